"""The routing cell: what every row of the batch that is running now is mixed from.

Layers read it; `TwinModel` sets it around a forward. Every thread has its own, so two that run the
same model at once never see each other's weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .per_row import NotRowWise


class Store:
    """Densely merged tensors of one weighting, by layer and attribute, filled as they are read."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[tuple, Tensor]] = {}

    def kept(self, key: tuple[str, str], source: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What was made of `source` under this key; made anew if `source` was changed since."""
        found = self._kept.get(key)
        if torch.compiler.is_compiling():  # a graph knows no addresses: what is kept is taken
            if found is None:
                found = self._kept[key] = (), make()
            return found[1]
        state = (source._version, source.data_ptr(), source.dtype, source.device)
        if found is None or found[0] != state:
            found = self._kept[key] = state, make()
        return found[1]

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._kept)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in list(self._kept.values()))


GATHER = 48
"""Tokens · experts of a row that must be saved for each expert that is gathered. With
one expert of eight, rows of seven tokens or more are gathered; by the clock it pays from 2 to 4 on
(results/runtime.json, width 384), so where in doubt fewer bytes are copied."""


@dataclass(frozen=True, eq=False)
class Mix:
    """Weights of the rows of a batch, and what is known of them before the first layer runs.

    weights: one row per row of the batch; or a single one, which serves every row
    active:  experts that any row gives a weight; the others cost nothing
    chosen:  each row's own experts, where these are few: only their factors are multiplied
    gather:  by how much that has to save before a row's own factors are gathered, see `gathers`
    store:   where layers keep what they merged densely, for a single weighting that lasts
    convex:  known to be weights from 0 to 1 that sum to 1 at most
    """

    weights: Float[Tensor, "row expert"]
    active: tuple[int, ...]
    chosen: Int[Tensor, "row k"] | None = None
    gather: int = GATHER
    store: Store | None = None
    convex: bool = False
    memo: dict[Hashable, Any] = field(default_factory=dict)
    """Small tensors that several layers, or one layer at every step of a generation, ask for."""

    @property
    def rows(self) -> int:
        return self.weights.shape[0]

    @property
    def one(self) -> bool:
        """Whether a single weighting serves all rows: then every kind of layer is exact."""
        return self.rows == 1

    def gathers(self, x: Tensor) -> bool:
        """Whether each row of `x` (row, ..., in) is multiplied by its own experts' factors alone.

        Gathering them is worth it where the rows save enough: they have to be read for each row.
        """
        if self.chosen is None or len(x) != self.rows:
            return False
        few, tokens = self.chosen.shape[1], x.numel() // (x.shape[0] * x.shape[-1])
        return tokens * (len(self.active) - few) >= self.gather * few

    def like(self, x: Tensor) -> Tensor:
        """The weights in the dtype and on the device of `x`."""
        key = "weights", x.dtype, x.device
        if key not in self.memo:
            self.memo[key] = self.weights.to(x.device, x.dtype)
        return self.memo[key]

    def spans(self, ranks: tuple[int, ...]) -> tuple[slice, ...]:
        """Where the components of the active experts lie among stacked ones.

        A few experts without a weight between them are taken along: they are multiplied by zero,
        and a single span need not be copied together.
        """
        key = "spans", ranks
        if key not in self.memo:
            begins = [sum(ranks[:t]) for t in range(len(ranks) + 1)]
            found: list[slice] = []
            for t in self.active:
                if ranks[t] and found and found[-1].stop == begins[t]:
                    found[-1] = slice(found[-1].start, begins[t + 1])
                elif ranks[t]:
                    found.append(slice(begins[t], begins[t + 1]))
            if len(found) > 1:
                needed = sum(span.stop - span.start for span in found)
                if found[-1].stop - found[0].start <= 2 * needed:
                    found = [slice(found[0].start, found[-1].stop)]
            self.memo[key] = tuple(found)
        return self.memo[key]

    def of_components(self, ranks: tuple[int, ...], x: Tensor) -> Float[Tensor, "row stacked"]:
        """Weights of the components in `spans`, one after the other, like `x`."""
        key = "components", ranks, x.dtype, x.device
        if key not in self.memo:
            owner = [t for t, rank in enumerate(ranks) for _ in range(rank)]
            own = [t for span in self.spans(ranks) for t in owner[span]]
            self.memo[key] = self.like(x)[:, torch.tensor(own, dtype=torch.long, device=x.device)]
        return self.memo[key]

    def of_chosen(
        self, ranks: tuple[int, ...], x: Tensor
    ) -> tuple[Int[Tensor, "row n"], Float[Tensor, "row 1 n"]]:
        """Which components of stacked factors each row's chosen experts have, and their weights.

        Experts of lower rank are filled up with components of weight zero.
        """
        assert self.chosen is not None
        key = "chosen", ranks, x.dtype, x.device
        if key not in self.memo:
            chosen, widest = self.chosen.to(x.device), max(ranks, default=0)
            rank = torch.tensor(ranks, device=x.device)
            begin = (rank.cumsum(0) - rank)[chosen][:, :, None]
            step = torch.arange(widest, device=x.device)
            there = step < rank[chosen][:, :, None]
            weights = self.like(x).gather(1, chosen)[:, :, None] * there
            ids = torch.where(there, begin + step, 0)
            self.memo[key] = ids.flatten(1), weights.flatten(1)[:, None]
        return self.memo[key]

    def rows_of(self, expert: int) -> Int[Tensor, " some"]:
        """The rows that have a weight for this expert. Waits for a GPU the first time."""
        key = "rows", expert
        if key not in self.memo:
            self.memo[key] = self.weights[:, expert].nonzero()[:, 0]
        return self.memo[key]

    def of_tokens(self, tokens: int, where: str) -> Mix:
        """The weights of `tokens` tokens that come row by row, all rows of one length.

        Raises `NotRowWise` if they are not so many for each row.
        """
        if self.one or tokens == self.rows:
            return self
        if tokens % self.rows or not tokens:
            raise NotRowWise(
                f"{where}: {tokens} tokens are not as many for each of {self.rows} rows"
            )
        key = "tokens", tokens
        if key not in self.memo:
            # No `chosen`: factors would be gathered for every token, not for every row.
            weights = self.weights.repeat_interleave(tokens // self.rows, dim=0)
            self.memo[key] = Mix(weights, self.active, convex=self.convex)
        return self.memo[key]

    def repeated(self, times: int) -> Mix:
        """Each row `times` times in a row."""
        chosen = None if self.chosen is None else self.chosen.repeat_interleave(times, dim=0)
        weights = self.weights.repeat_interleave(times, dim=0)
        return Mix(weights, self.active, chosen, self.gather, convex=self.convex)


@dataclass(frozen=True, eq=False)
class Routing:
    """What every row of a batch runs with.

    mix:   None where every row's weights are all zero: the shared expert, exactly
    head:  whose head answers each row
    batch: rows of the batch
    """

    mix: Mix | None
    head: Int[Tensor, " batch"] | None
    batch: int

    def sized(self, rows: int) -> Mix | None:
        """The mix for `rows` rows; None if that is no size of this batch."""
        assert self.mix is not None
        return self.mix if self.mix.one or rows == self.mix.rows else None


class Cell:
    """Holds the routing of a forward; filled while it runs where it routes on the way."""

    def __init__(self, routing: Routing | None) -> None:
        self.routing = routing
        self.reads = 0
        """How many layers have asked so far."""

    def count(self) -> None:
        """A layer asks. Not counted in a compiled graph, which would hold for one count alone."""
        if not torch.compiler.is_compiling():
            self.reads += 1


class _Current(threading.local):
    # Not a context variable: torch.compile cannot look into one, and a forward is never suspended.
    cell: Cell | None = None


_CURRENT = _Current()


def current() -> Routing | None:
    """The routing of the batch that is running, or None: the shared expert alone."""
    cell = _CURRENT.cell
    return None if cell is None else cell.routing


def cell() -> Cell | None:
    """The cell that the running forward reads."""
    return _CURRENT.cell


def asked() -> Routing | None:
    """The routing of the running forward, for a layer that it mixes; None where it mixes none."""
    found = _CURRENT.cell
    if found is None or found.routing is None or found.routing.mix is None:
        return None
    found.count()
    return found.routing


@contextmanager
def routed(routing: Routing | None) -> Iterator[Cell]:
    """Run the block under `routing`."""
    before, cell = _CURRENT.cell, Cell(routing)
    _CURRENT.cell = cell
    try:
        yield cell
    finally:
        _CURRENT.cell = before
