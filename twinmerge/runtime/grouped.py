"""The paper's grouped variant, AN APPROXIMATION: rows of like weights share one merged model.

Rows are put into bins by their expert of highest weight, each bin is clustered by KMeans, and every
row of a cluster g runs with the cluster's mean weights instead of its own:

    w(x) ≈ w_g = mean of w over the rows of g          W*(x) ≈ W_s + Σ_t w_g,t D_t

One dense merge serves a cluster. A row's answer then depends on which rows came with it; what its
weights lost is in `Grouped.error`. `TwinModel.forward` is exact for every row and needs none of
this: it is here to be compared, and for a plain model's speed where the groups are large.

Source: Twin-Merging, arXiv:2406.15479, appendix E ("Speedup variants", table 12). It leaves open
whether the 20 groups are of each bin (so here) or of all rows; the authors' code has no grouping.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data import Encoded, batches
from ..errors import InputError, did_you_mean
from .arguments import highest
from .export import DenseMerge
from .model import TwinModel

By = Literal["weights", "logits"]

GROUPS = 20
"""In each bin, as in the paper."""

RESTARTS = 4
"""Starts of each KMeans, of which the best is kept: one alone may stop in a poor place."""


@dataclass(frozen=True)
class Grouped:
    """Rows in groups, and the weights that each group runs with."""

    weights: Float[Tensor, "row expert"]
    """The mean of the group's weights, in every row of the group."""
    expert: Int[Tensor, " row"]
    """The bin: the expert of highest weight, of the row and of its group's mean alike."""
    group: Int[Tensor, " row"]
    """Numbered from 0, by bin."""
    error: Float[Tensor, " row"]
    """Euclidean distance between a row's own weights and its group's. From 0 to √2."""

    @property
    def count(self) -> int:
        """How many groups there are: dense merges that it takes to answer all rows."""
        return len(self.group.unique())

    def take(self, rows: Sequence[int]) -> Grouped:
        """Some of the rows, in the groups that all rows made."""
        chosen = torch.tensor(rows, dtype=torch.long, device=self.group.device)
        kept = (self.weights, self.expert, self.group, self.error)
        return Grouped(*(value[chosen] for value in kept))


@dataclass(frozen=True)
class GroupedRun:
    """What `run_grouped` gives, in the rows' order."""

    logits: list[Tensor]
    """One per row, as its own head gives them: (class,) for a classifier."""
    expert: Int[Tensor, " row"]
    """Index into `TwinModel.experts` of the head that answered each row."""
    grouped: Grouped
    merges: int
    seconds: dict[str, float]
    """Wall time of `route`, `group`, `merge` and `forward`. Work queued on a GPU counts where it
    is waited for."""


def group_weights(
    weights: Float[Tensor, "row expert"],
    groups: int = GROUPS,
    seed: int = 0,
    by: By = "weights",
    expert: Int[Tensor, " row"] | None = None,
) -> Grouped:
    """Group rows of like weights, and average the weights of each group.

    groups: clusters in each bin of rows that share their expert of highest weight; where a bin has
            no more different rows than this, equal rows are a group and nothing is lost
    by:     what KMeans sees: the weights, or their logarithms (the router's logits up to a constant
            of each row), which tell apart what the weights of near-certain rows do not
    expert: whose head answers each row; default the highest weight's

    Rows without weights (the shared expert) are a bin of their own. Groups do not depend on the
    order of the rows. Raises `InputError` for fewer than one group, no rows or weights that are not
    finite.
    """
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise InputError(f"groups={groups!r}: expected a whole number from 1 on.")
    if by not in get_args(By):
        known = list(get_args(By))
        hint = did_you_mean(str(by), known)
        raise InputError(f"by={by!r}: expected one of {', '.join(known)}.{hint}")
    if not len(weights):
        raise InputError("weights: expected at least one row, got none.")
    if not bool(torch.isfinite(weights).all()):
        raise InputError("weights: expected finite numbers, got NaN or infinity.")
    own = weights.detach().cpu().double().numpy()
    heads = highest(weights) if expert is None else expert
    alone = (weights == 0).all(dim=1).cpu().numpy()
    bins = np.where(alone, weights.shape[1], highest(weights).cpu().numpy())
    mean = np.empty_like(own)
    group = np.empty(len(own), dtype=np.int64)
    count = 0
    for each in np.unique(bins):
        rows = np.flatnonzero(bins == each)
        # Different rows in sorted order, with how often they occur: the same whatever the order.
        distinct, place, times = np.unique(
            own[rows], axis=0, return_inverse=True, return_counts=True
        )
        label = np.arange(len(distinct))
        if len(distinct) > groups:
            points = distinct if by == "weights" else _logits(distinct)
            label = _labels(points, times, groups, seed)
        total = np.zeros((label.max() + 1, own.shape[1]))
        np.add.at(total, label, distinct * times[:, None])
        size = np.bincount(label, weights=times)
        place = place.reshape(-1)
        mean[rows] = (total / size[:, None])[label[place]]
        group[rows] = count + label[place]
        count += len(size)
    error = np.linalg.norm(own - mean, axis=1)
    return Grouped(
        torch.from_numpy(mean).to(weights),
        heads.to(weights.device),
        torch.from_numpy(group).to(weights.device),
        torch.from_numpy(error).to(weights),
    )


def _logits(weights: np.ndarray) -> np.ndarray:
    """log w, where a weight that underflowed to zero counts as the least that float32 holds."""
    return np.log(np.maximum(weights, np.finfo(np.float32).tiny))


def _labels(points: np.ndarray, times: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """The cluster of every point, numbered from 0 without gaps. times: how often each occurs."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Rows that differ in the last bit alone make fewer clusters, at no loss.
        warnings.simplefilter("ignore", ConvergenceWarning)
        means: Any = KMeans(groups, n_init=RESTARTS, random_state=seed)  # pyright: ignore
        found: Any = means.fit(points, sample_weight=times).labels_
    return np.unique(found, return_inverse=True)[1].reshape(-1)


@torch.no_grad()
def route_rows(
    model: TwinModel, rows: Encoded, batch_size: int = 32
) -> tuple[Float[Tensor, "row expert"], Int[Tensor, " row"]]:
    """Routing weights of every row, in the rows' order, and whose head each comes nearest to."""
    weights = torch.empty(len(rows), len(model.experts), device=model.device)
    expert = torch.empty(len(rows), dtype=torch.long, device=model.device)
    for places, batch in batches(model.tokenizer, rows, batch_size):
        inputs: dict[str, Any] = _moved(batch, model)
        said = model.routing(**inputs)
        weights[places], expert[places] = said.weights, said.probabilities.argmax(dim=-1)
    return weights, expert


def run_grouped(
    model: TwinModel,
    rows: Encoded,
    *,
    groups: int = GROUPS,
    seed: int = 0,
    by: By = "weights",
    head: Sequence[str] | None = None,
    batch_size: int = 32,
) -> GroupedRun:
    """Answer a whole set of rows by groups: route all, group, and merge once for each group.

    An approximation, see the module; `groups`, `seed` and `by` as in `group_weights`.

    head: whose head answers, a name per row; default the expert of highest weight

    Raises `InputError` for no rows or an unknown head, `RouterError` without a router.
    """
    started = time.perf_counter()
    weights, expert = route_rows(model, rows, batch_size)
    routed = time.perf_counter()
    grouped = group_weights(weights, groups, seed, by, expert)
    seconds = {"route": routed - started, "group": time.perf_counter() - routed}
    run = run_groups(DenseMerge(model), rows, grouped, head=head, batch_size=batch_size)
    return replace(run, seconds=seconds | run.seconds)


@torch.no_grad()
def run_groups(
    dense: DenseMerge,
    rows: Encoded,
    grouped: Grouped,
    *,
    head: Sequence[str] | None = None,
    batch_size: int = 32,
) -> GroupedRun:
    """The second half of `run_grouped`: rows that are in groups already."""
    model = dense.twin
    experts = list(model.experts)
    chosen = _heads(experts, grouped, head)
    logits: list[Tensor | None] = [None] * len(rows)
    numbers = grouped.group.unique().tolist()
    seconds = {"merge": 0.0, "forward": 0.0}
    for number in numbers:
        mine = (grouped.group == number).nonzero()[:, 0].tolist()
        weights = grouped.weights[mine[0]]
        started = time.perf_counter()
        dense.at(weights, experts[chosen[mine[0]]])
        seconds["merge"] += time.perf_counter() - started
        # Heads are exchanged without merging again.
        for index in dict.fromkeys(chosen[row] for row in mine):
            answered = [row for row in mine if chosen[row] == index]
            plain = dense.with_head(weights, experts[index])
            part = Encoded([rows.rows[row] for row in answered], [rows.cut[r] for r in answered])
            for places, batch in batches(model.tokenizer, part, batch_size):
                started = time.perf_counter()
                found = plain(**_moved(batch, model)).logits
                seconds["forward"] += time.perf_counter() - started
                for place, one in zip(places, found, strict=True):
                    logits[answered[place]] = one
    assert all(one is not None for one in logits)
    return GroupedRun(
        [one for one in logits if one is not None],
        torch.tensor(chosen, dtype=torch.long, device=model.device),
        grouped,
        len(numbers),
        seconds,
    )


def _heads(experts: list[str], grouped: Grouped, head: Sequence[str] | None) -> list[int]:
    if head is None:
        return grouped.expert.tolist()
    if isinstance(head, str) or len(head) != len(grouped.expert):
        came = repr(head) if isinstance(head, str) else f"{len(head)} names"
        raise InputError(
            f"head=: expected a name for each of {len(grouped.expert)} rows, got {came}."
        )
    for name in head:
        if name not in experts:
            hint = did_you_mean(name, experts)
            raise InputError(f"head={name!r}: no such expert.{hint} Known: {', '.join(experts)}.")
    return [experts.index(name) for name in head]


def _moved(batch: dict[str, Tensor], model: TwinModel) -> dict[str, Tensor]:
    return {key: value.to(model.device) for key, value in batch.items()}
