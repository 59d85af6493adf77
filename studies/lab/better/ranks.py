"""Ranks of matrices, as many as some bytes pay for: even, budgeted, or budgeted across experts."""

from __future__ import annotations

from collections.abc import Mapping
from math import fsum

from torch import Tensor

from twinmerge.merging.budget import spend
from twinmerge.merging.journal import Candidate

from .store import Dtype, row_size

Ranks = dict[str, int]
"""Matrix -> rank."""


def cost(shape: tuple[int, int], dtype: Dtype) -> int:
    """Bytes of one component of a matrix: a column of B and a row of A."""
    return row_size(shape[0], dtype) + row_size(shape[1], dtype)


def stored(shapes: Mapping[str, tuple[int, int]], ranks: Ranks, dtype: Dtype) -> int:
    """Bytes of all factors."""
    return sum(ranks[name] * cost(shape, dtype) for name, shape in shapes.items())


def even(shapes: Mapping[str, tuple[int, int]], dtype: Dtype, room: int) -> Ranks:
    """The largest rank for all that fits; a matrix has no more than its short side."""

    def at(rank: int) -> Ranks:
        return {name: min(rank, *shape) for name, shape in shapes.items()}

    rank, most = 0, max(map(min, shapes.values()))
    while rank < most and stored(shapes, at(rank + 1), dtype) <= room:
        rank += 1
    return at(rank)


def budgeted(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], dtype: Dtype, room: int
) -> Ranks:
    """The components that hold most of the squared norm per byte, over all matrices.

    spectra: matrix -> singular values, largest first

    The greedy choice is the best up to the last component bought; even ranks are returned where
    that makes them better.
    """
    left = {name: _left(s) for name, s in spectra.items()}
    greedy = across({"": spectra}, shapes, dtype, room)[""]

    def error(ranks: Ranks) -> float:
        return fsum(left[name][min(rank, len(left[name]) - 1)] for name, rank in ranks.items())

    return min(greedy, even(shapes, dtype, room), key=error)


def across(
    spectra: Mapping[str, Mapping[str, Tensor]],
    shapes: Mapping[str, tuple[int, int]],
    dtype: Dtype,
    room: int,
) -> dict[str, Ranks]:
    """By task: the same over the matrices of all experts, some of which get more than others.

    spectra: task -> matrix -> singular values; room: bytes of all experts together
    """
    costs = {name: cost(shape, dtype) for name, shape in shapes.items()}
    candidates = {
        (name, task): Candidate(squares=_left(s), captured=(), missed=0)
        for task, own in spectra.items()
        for name, s in own.items()
    }
    found = spend(candidates, costs, room)
    return {task: {name: found.ranks[name, task] for name in shapes} for task in spectra}


def _left(s: Tensor) -> tuple[float, ...]:
    """Squared error at each rank from 0 on."""
    squares = s.double().square()
    tails = squares.flip(0).cumsum(0).flip(0).tolist()
    return (*tails, 0.0)
