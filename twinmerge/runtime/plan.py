"""Which way a batch runs: the cheapest of those that are exact for it.

    shared    every weight is zero: the shared expert as it is
    merged    one weighting for the whole batch that lasts (a generation, calls that repeat it):
              every tensor is merged densely once and kept
    uniform   one weighting for the whole batch: each layer merges, or runs the factors of the
              experts with a weight, whichever is cheaper for this many tokens
    selected  every row has few experts of its own: only their factors are multiplied, row by row
              (where it has tokens enough to pay for gathering them, see `Mix.gathers`)
    stacked   the factors of all experts with a weight, side by side, for every row
    split     rows of equal weights at a time, each as `uniform`: where these are so many that
              merging them densely costs little, and for models that mix rows

All give the same numbers up to rounding. `top_k` and `threshold` set weights to zero first; what
they drop is reported, and what remains is not scaled up.

Per token, a matrix (out, in) costs in · out, and an expert's factors of rank r cost r · (in + out).
Merging them once costs r · in · out: it pays beyond in · out / (in + out) tokens, whatever the rank
(docs/running.md has the measured break-even beside it).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError
from .per_row import Ambiguous, NotRowWise
from .routing import GATHER, Mix, Routing, Store

Way = Literal["auto", "merged", "uniform", "selected", "stacked", "split"]
"""What a caller may ask for."""


SPLIT = 5
"""A batch is cut by weighting where each has, on average, this many times the tokens from which
merging pays."""


@dataclass(frozen=True)
class Dropped:
    """Weights after `top_k` and `threshold`, and how much of each row's they left out."""

    weights: Float[Tensor, "batch expert"]
    dropped: Float[Tensor, " batch"] | None


def drop(
    weights: Float[Tensor, "batch expert"], top_k: int | None, threshold: float | None
) -> Dropped:
    """Set all but each row's `top_k` largest weights, and those below `threshold`, to zero.

    Size counts, not sign; of equal ones the first stay. Raises `InputError` for a top_k below 1 or
    a threshold outside of [0, 1).
    """
    if top_k is None and threshold is None:
        return Dropped(weights, None)
    kept = weights
    if top_k is not None:
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise InputError(f"top_k={top_k!r}: expected a whole number from 1 on.")
        best = weights.abs().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        kept = torch.zeros_like(weights).scatter(1, best, weights.gather(1, best))
    if threshold is not None:
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not 0 <= threshold < 1:
            raise InputError(f"threshold={threshold!r}: expected a weight from 0 to below 1.")
        kept = torch.where(kept.abs() >= threshold, kept, 0)
    return Dropped(kept, (weights - kept).abs().sum(dim=1))


@dataclass
class Planner:
    """Plans batches of one model, and keeps what it merged densely. Threads may share it.

    mixes_rows: why rows of other weights cannot share a forward of this model, or None if they can
    keep:     how many weightings stay merged; each takes as much memory as the tensors that differ
    """

    mixes_rows: str | None = None
    keep: int = 1
    _stores: OrderedDict[tuple[float, ...], Store] = field(default_factory=OrderedDict)
    _seen: OrderedDict[tuple[float, ...], None] = field(default_factory=OrderedDict)
    """The weightings of the last batches, as many as may be kept."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "keep" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise InputError(f"planner.keep={value!r}: expected a whole number from 0 on.")
        super().__setattr__(name, value)

    def noted(self, problem: NotRowWise) -> None:
        """Run one weighting at a time from now on, unless that may have been a coincidence."""
        if not isinstance(problem, Ambiguous):
            self.mixes_rows = str(problem)

    def __reduce__(self) -> tuple:
        return Planner, (self.mixes_rows, self.keep)  # what is kept merged is not sent along

    def plan(
        self,
        weights: Float[Tensor, "batch expert"],
        head: Int[Tensor, " batch"] | None = None,
        *,
        way: Way = "auto",
        lasts: bool = False,
        tokens: float = 0.0,
    ) -> tuple[Routing, str]:
        """How to run rows of these weights: the routing, and the name of the way.

        lasts:  whether the weights hold for many forwards (a generation)
        tokens: of a row, as a multiple of the number from which merging densely pays; 0 where a
                batch had better stay in one piece

        A "split" routing is to be cut by `groups`. Raises `InputError` for a way that these weights
        or this model do not allow.
        """
        if way not in get_args(Way):
            raise InputError(f"plan={way!r}: expected one of {', '.join(get_args(Way))}.")
        batch, table = len(weights), weights.tolist()  # waits for a GPU, once a batch
        used = [sum(row[t] != 0 for row in table) for t in range(weights.shape[1])]
        learnt = _learnt(weights)
        # The gradient of a weight of zero is that of its expert, which then has to run.
        active = tuple(t for t, count in enumerate(used) if count or learnt)
        if not active:
            return Routing(None, head, batch), "shared"
        convex = all(min(row) >= 0 and sum(row) <= 1 + 1e-4 for row in table)
        mix = Mix(weights, active, convex=convex)
        if way == "split" or (self.mixes_rows and any(row != table[0] for row in table)):
            if way not in ("auto", "split"):
                raise InputError(
                    f"plan={way!r}: this model cannot run rows of other weights in one forward "
                    f"({self.mixes_rows}). Leave plan= out: it runs one weighting at a time."
                )
            return Routing(mix, head, batch), "split"
        # Rows that happen to agree have a gradient each; one vector for all of them has stride 0.
        apart = learnt and batch > 1 and weights.stride(0) != 0
        alike = all(row == table[0] for row in table) and not apart
        if way in ("merged", "uniform") and not alike:
            raise InputError(
                f"plan={way!r}: expected one weighting for the whole batch, got rows that differ "
                "or learn apart. Leave plan= out, or pass weights of shape (expert,)."
            )
        if alike and way in ("auto", "merged", "uniform"):
            mix = replace(mix, weights=weights[:1])
            store = None
            if way != "uniform":
                store = self._store(tuple(table[0]), asked=way == "merged", lasts=lasts)
            if store is None:
                return Routing(mix, head, batch), "uniform"
            return Routing(replace(mix, store=store), head, batch), "merged"
        weightings = len({tuple(row) for row in table})
        if way == "auto" and batch * tokens >= SPLIT * weightings:
            return Routing(mix, head, batch), "split"
        widest = max(sum(w != 0 for w in row) for row in table)
        if way == "selected" and learnt:
            widest = len(active)
        if way == "selected" or (way == "auto" and widest < len(active) and not learnt):
            chosen = weights.abs().topk(widest, dim=1).indices
            gather = 0 if way == "selected" else GATHER
            mix = replace(mix, chosen=chosen, gather=gather)
            return Routing(mix, head, batch), "selected"
        return Routing(mix, head, batch), "stacked"

    def _store(self, key: tuple[float, ...], *, asked: bool, lasts: bool) -> Store | None:
        """Where this weighting is kept merged; None if it is not worth it yet."""
        with self._lock:
            again = key in self._seen
            self._seen[key] = None
            self._seen.move_to_end(key)
            while len(self._seen) > max(self.keep, 1):  # more would push each other out
                self._seen.popitem(last=False)
            while len(self._stores) > self.keep:  # `keep` was lowered
                self._stores.popitem(last=False)
            if key in self._stores:
                self._stores.move_to_end(key)
                return self._stores[key]
            if not asked and (self.keep < 1 or not (again or lasts)):
                return None
            store = Store()
            if self.keep >= 1:
                self._stores[key] = store
                while len(self._stores) > self.keep:
                    self._stores.popitem(last=False)
            return store

    @property
    def merged_bytes(self) -> int:
        """Memory of all that is kept merged now."""
        with self._lock:
            return sum(store.bytes for store in self._stores.values())

    def forget(self) -> None:
        """Drop everything that is kept merged: after the model moved, or to free memory."""
        with self._lock:
            self._stores.clear()
            self._seen.clear()


@dataclass(frozen=True)
class Group:
    """Rows of one weighting and one head."""

    rows: Int[Tensor, " some"]
    routing: Routing


def _learnt(weights: Tensor) -> bool:
    return weights.requires_grad and torch.is_grad_enabled()


def groups(routing: Routing, weights: Float[Tensor, "batch expert"]) -> list[Group]:
    """The rows of a batch by equal weights and heads, each group under one weighting.

    Rows whose weights are learnt are a group each.
    """
    learnt = _learnt(weights)
    heads = [-1] * len(weights) if routing.head is None else routing.head.tolist()
    found: dict[tuple, list[int]] = {}
    for index, (row, head) in enumerate(zip(weights.tolist(), heads, strict=True)):
        own = index if learnt else -1  # each row has its own gradient
        found.setdefault((*row, head, own), []).append(index)
    out = []
    for members in found.values():
        rows = torch.tensor(members, device=weights.device)
        active = tuple(
            t for t, weight in enumerate(weights[members[0]].tolist()) if weight or learnt
        )
        own = weights[members[0] : members[0] + 1]
        mix = Mix(own, active, convex=routing.mix.convex) if active and routing.mix else None
        head = None if routing.head is None else routing.head[rows]
        out.append(Group(rows, Routing(mix, head, len(members))))
    return out
