"""The texts that come nearest to an input in what the router reads of it.

A prototype router compares inputs by the Mahalanobis distance under its own precision, so that is
the distance; for all others it is one minus the cosine of features, centred by the texts' mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..data import Chat, Text, batches, encode, sample, segments
from ..errors import InputError
from .model import TwinModel
from .router.features import Features
from .router.router import Router, joined
from .router.scorers import Prototype

MOST = 200
"""Texts of one expert that are compared; of more, so many are drawn."""

_BATCH = 32
_CHUNK = 512
_SEED = 0

Measure = Literal["mahalanobis", "cosine"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Neighbour:
    """A text of the routing data."""

    expert: str
    distance: float
    text: Text


@dataclass(frozen=True)
class Nearest:
    """The nearest first."""

    neighbours: tuple[Neighbour, ...]
    measure: Measure
    usual: float | None
    """Median distance of these texts to the nearest other one; None with fewer than two."""
    rows: int
    """Compared, of all experts."""


def nearest(
    twin: TwinModel,
    features: Features,
    texts: Mapping[str, Sequence[Text | Chat | str]],
    count: int,
    max_tokens: int,
    progress: Progress | None = None,
) -> Nearest:
    """The `count` texts nearest to the one row of `features`.

    texts: by expert; at most `MOST` of each, drawn by a fixed seed, are read, one forward up to the
        router's last layer for each

    Raises `InputError` for names that are no expert's, and for a router that reads nothing.
    """
    router = twin.router
    assert router is not None and router.kind != "none", "the caller has asked a router that reads"
    for name in texts:
        if name not in twin.experts:
            known = ", ".join(twin.experts)
            raise InputError(f"examples: no expert is called {name!r}. Known: {known}.")
    rows = [
        (name, (text,) if isinstance(text, str) else text)
        for name, table in texts.items()
        for text in (table if len(table) <= MOST else sample(table, MOST, _SEED))
    ]
    if not rows:
        raise InputError("examples: expected at least one text, got none.")
    encoded = encode(twin.tokenizer, [text for _, text in rows], max_tokens)
    order: list[int] = []
    found: list[Tensor] = []
    for indices, batch in batches(twin.tokenizer, encoded, _BATCH):
        read = router.read(twin, {key: value.to(twin.device) for key, value in batch.items()})
        found.append(joined(read, router.keys).cpu())
        order += indices
        if progress:
            progress("reading examples", len(order), len(rows))
    examples = torch.cat(found)[torch.tensor(order).argsort()]
    distances = measured(router, joined(features, router.keys).cpu()[0], examples)
    usual = usual_distance(router, examples) if len(rows) > 1 else None
    first = distances.argsort(stable=True)[:count].tolist()
    neighbours = []
    for index in first:
        name, text = rows[index]
        words = segments(text)
        neighbours.append(Neighbour(name, float(distances[index]), words))
    return Nearest(tuple(neighbours), measure_of(router), usual, len(rows))


def measure_of(router: Router) -> Measure:
    return "mahalanobis" if isinstance(router.scorer, Prototype) else "cosine"


def measured(
    router: Router, row: Float[Tensor, " width"], examples: Float[Tensor, "example width"]
) -> Float[Tensor, " example"]:
    """Distances of one row to the examples, float64.

    `√((x - e)ᵀ Σ⁻¹ (x - e))` with a prototype's Σ⁻¹, else `1 - cos(x - m, e - m)`.
    """
    x, others = row.double(), examples.double()
    if isinstance(router.scorer, Prototype):
        apart = others - x
        precision = router.scorer.precision.detach().cpu().double()
        return ((apart @ precision) * apart).sum(dim=1).clamp(min=0).sqrt()
    middle = others.mean(dim=0)
    cosine = torch.nn.functional.cosine_similarity((x - middle)[None], others - middle)
    same = (others == x).all(dim=1)  # also where that is the middle, which has no direction
    return (1 - cosine).clamp(min=0).masked_fill(same, 0.0)


def usual_distance(router: Router, examples: Float[Tensor, "example width"]) -> float:
    """The median, over examples, of the distance to the nearest other one."""
    centred = examples.double() - examples.double().mean(dim=0)
    if isinstance(router.scorer, Prototype):
        left = centred @ router.scorer.precision.detach().cpu().double()
    else:  # of unit vectors, 1 - cos = ½ |x - e|²
        left = centred = torch.nn.functional.normalize(centred) / 2**0.5
    own = (left * centred).sum(dim=1)
    found = []
    for start in range(0, len(centred), _CHUNK):
        part = slice(start, start + _CHUNK)
        product = left[part] @ centred.T
        apart = own[part, None] + own - 2 * product
        apart[torch.arange(len(product)), torch.arange(start, start + len(product))] = float("inf")
        found.append(apart.amin(dim=1))
    least = torch.cat(found).clamp(min=0)
    return float((least.sqrt() if isinstance(router.scorer, Prototype) else least).median())
