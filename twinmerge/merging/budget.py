r"""A budget of bytes, spent where it lowers the error most.

Component i of the factors of matrix m of expert t costs `bytes_m` bytes and lowers the squared
error `‖D_tm - kept‖²` by what the journal says it does, as it is stored (about σ_i²). All
components of all matrices of all experts are bought in the order of gain per byte, as long as the
budget lasts. As gains fall within a matrix, this greedy choice is optimal up to the last component
bought.

Beside it stands the even spread: one rank for all matrices, and the rest of the same bytes for one
rank more in as many of them as it pays for.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from .journal import Candidate

Key = tuple[str, str]
"""(tensor, expert)."""


@dataclass(frozen=True)
class Spent:
    """Ranks by tensor and expert, their bytes, and the squared error that is left."""

    ranks: dict[Key, int]
    bytes: int
    square: float


def spend(candidates: Mapping[Key, Candidate], costs: Mapping[str, int], budget: int) -> Spent:
    """The ranks that a budget buys. costs: bytes of one component, by tensor."""
    ranks = dict.fromkeys(candidates, 0)
    left = budget

    def best(key: Key) -> tuple[float, Key, int] | None:
        """The next components of a matrix, as many as gain most per byte together.

        A single one gains less than the next where quantisation did it more harm.
        """
        squares, rank = candidates[key].squares, ranks[key]
        cost = costs[key[0]]
        found = None
        for more in range(rank + 1, min(len(squares), rank + 9)):
            gain = (squares[rank] - squares[more]) / ((more - rank) * cost)
            if gain > 0 and (found is None or gain > -found[0]):
                found = (-gain, key, more)
                if more == rank + 1 and _falls(squares, rank):
                    break
        return found

    heap = [item for key in sorted(candidates) if (item := best(key))]
    heapq.heapify(heap)
    while heap:
        _, key, more = heapq.heappop(heap)
        cost = (more - ranks[key]) * costs[key[0]]
        if cost > left:
            continue  # too dear by now; something smaller may still fit
        left -= cost
        ranks[key] = more
        if item := best(key):
            heapq.heappush(heap, item)
    return Spent(ranks, budget - left, _left(candidates, ranks))


def _falls(squares: tuple[float, ...], rank: int) -> bool:
    """Whether the component after the next gains no more than the next."""
    if rank + 2 >= len(squares):
        return True
    return squares[rank + 1] - squares[rank + 2] <= squares[rank] - squares[rank + 1]


def spend_evenly(
    candidates: Mapping[Key, Candidate], costs: Mapping[str, int], budget: int
) -> Spent:
    """One rank for all, and one more for the first of them that the rest pays for."""
    ranks = dict.fromkeys(candidates, 0)
    left, open_ = budget, sorted(candidates)
    while open_:
        bought = []
        for key in open_:
            if ranks[key] + 1 < len(candidates[key].squares) and costs[key[0]] <= left:
                ranks[key] += 1
                left -= costs[key[0]]
                bought.append(key)
        open_ = bought
    return Spent(ranks, budget - left, _left(candidates, ranks))


def _left(candidates: Mapping[Key, Candidate], ranks: Mapping[Key, int]) -> float:
    return sum((candidates[key].squares[rank] for key, rank in ranks.items()), 0.0)
