"""The routing cell: the weights of the batch that is running now.

Layers read it; `TwinModel` sets it around a forward. It is a context variable, so two threads that
run the same model at once never see each other's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """What every row of a batch runs with.

    `weights` is None where every row's weights are all zero: the shared expert, exactly.
    """

    weights: Float[Tensor, "batch expert"] | None
    head: Int[Tensor, " batch"] | None

    @cached_property
    def wanted(self) -> list[bool]:
        """Whether any row gives expert t a weight. Waits for a GPU: once, not in every layer."""
        assert self.weights is not None
        return self.weights.any(dim=0).tolist()

    def repeated(self, times: int) -> Routing:
        """Each row `times` times in a row, as `generate` expands a batch for beams and samples."""
        if times == 1:
            return self
        return Routing(
            None if self.weights is None else self.weights.repeat_interleave(times, dim=0),
            None if self.head is None else self.head.repeat_interleave(times, dim=0),
        )


_CURRENT: ContextVar[Routing | None] = ContextVar("twinmerge_routing", default=None)


def current() -> Routing | None:
    """The routing of the batch that is running, or None: the shared expert alone."""
    return _CURRENT.get()


@contextmanager
def routed(routing: Routing | None) -> Iterator[None]:
    """Run the block under `routing`."""
    token = _CURRENT.set(routing)
    try:
        yield
    finally:
        _CURRENT.reset(token)
