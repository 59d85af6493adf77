"""Elementwise work on tensors of any size, some entries at a time.

A block of base, experts and result fits into a core's cache, so the memory that a merge needs
beyond its inputs and its result does not grow with the tensor, and neither does the time it waits
for memory. Blocks have a fixed size and their sums are added in order: results have the same bits
for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .exclusive import squared_norm

BLOCK = 1 << 16
"""Entries of a block: a quarter of a megabyte in float32."""

GROUP = 8
"""Blocks that one task of a pool does."""

SMALL = 1 << 20
"""Bytes below which a result takes no turn of a buffer: memory of that size is not fresh anyway."""

Merge = Callable[[Tensor, list[Tensor]], Tensor]
"""(base, experts) of one block -> the shared expert's block, all in one dtype."""


@dataclass
class Moved:
    """`‖W_0‖²`, and `‖W_t - W_0‖²` of every expert. Not finite where an input is not."""

    base: float
    experts: list[float]
    changed: bool
    """Whether any expert differs from the base at all."""
    finite: bool = True
    """Whether the result is, as stored."""

    def __iadd__(self, other: Moved) -> Moved:
        self.base += other.base
        self.experts = [x + y for x, y in zip(self.experts, other.experts, strict=True)]
        self.changed |= other.changed
        self.finite &= other.finite
        return self


class Buffers:
    """Room for `count` results that take turns, kept from tensor to tensor.

    The kernel clears every page that it hands out: fresh memory is written at a third of the speed
    of memory that was used before. With two, a result is good until the next but one is asked for.
    """

    def __init__(self, count: int) -> None:
        self._free = [torch.empty(0, dtype=torch.uint8) for _ in range(count)]

    def next(self, entries: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of so many entries, not cleared."""
        size = entries * dtype.itemsize
        if size < SMALL:
            return torch.empty(entries, dtype=dtype)
        buffer = self._free.pop(0)
        if buffer.numel() < size:
            buffer = torch.empty(0)  # let go of the old before the new is there
            buffer = torch.empty(size, dtype=torch.uint8)
        self._free.append(buffer)
        return buffer[:size].view(dtype)


def all_finite(x: Float[Tensor, " *shape"]) -> bool:
    """Whether no entry is NaN or infinite. One pass and no mask, unless a sum overflows."""
    for block in x.reshape(-1).split(GROUP * BLOCK):
        wide = max(block.dtype, torch.float32, key=lambda dtype: dtype.itemsize)
        if not torch.isfinite(block.sum(dtype=wide)) and not torch.isfinite(block).all():
            return False
    return True


def _square(block: Tensor) -> float:
    """`squared_norm` of one block, without its ceremony."""
    square = torch.dot(block, block).item()
    return square if 1e-30 < square < 1e30 else squared_norm(block)


@dataclass(frozen=True)
class _Job:
    """One tensor's inputs, seen flat, and what is to be done with every block of them."""

    base: Tensor
    experts: list[Tensor]
    result: Tensor | None
    coefficients: list[float]
    merge: Merge | None
    work: torch.dtype
    limit: float
    """Below this no sum of the parts can leave the dtype that the result is stored in."""

    def run(self, start: int) -> Moved:
        """Do the blocks from `start` on that are one task."""
        total = Moved(0.0, [0.0] * len(self.experts), False)
        room = torch.empty(2, BLOCK, dtype=self.work)
        for begin in range(start, min(start + GROUP * BLOCK, self.base.numel()), BLOCK):
            span = slice(begin, begin + BLOCK)
            ground = self.base[span].to(self.work)
            delta, sum_ = room[0, : len(ground)], room[1, : len(ground)]
            square = _square(ground)
            total.base += square
            largest, own, empty = square**0.5, [], True
            for index, each in enumerate(self.experts):
                if each is self.base:
                    own.append(ground)
                    continue
                own.append(each[span].to(self.work))
                torch.sub(own[-1], ground, out=delta)
                square = _square(delta)
                total.experts[index] += square
                total.changed |= square != 0
                if self.coefficients:
                    factor = self.coefficients[index]
                    largest += abs(factor) * square**0.5
                    if empty:
                        torch.mul(delta, factor, out=sum_)
                    else:
                        sum_.add_(delta, alpha=factor)
                    empty = False
            if self.result is None:
                continue
            target = self.result[span]
            if self.merge is not None:
                target.copy_(self.merge(ground, own))
            elif empty:
                target.copy_(ground)
            elif self.result.dtype == self.work:
                torch.add(sum_, ground, out=target)
            else:
                target.copy_(sum_.add_(ground))
            if self.merge is not None or not largest < self.limit:
                total.finite &= all_finite(target)
        return total


@torch.no_grad()
def merge_blocks(
    base: Float[Tensor, " *shape"],
    experts: Sequence[Float[Tensor, " *shape"]],
    merge: Merge | Float[Tensor, " expert"] | None,
    *,
    work: torch.dtype,
    store: torch.dtype,
    pool: Executor,
    buffers: Buffers | None = None,
) -> tuple[Moved, Float[Tensor, " *shape"] | None]:
    """How far the experts moved, and the shared expert by `merge`, stored as `store`.

    merge: a function of blocks, or the coefficients c of `W_0 + Σ_t c_t (W_t - W_0)`; without it
    only how far the experts moved is found, and None. Inputs of any float dtype, computed in
    `work`. An expert that is the very tensor `base` has not moved.
    """
    flat = base.reshape(-1)
    flats = [flat if expert is base else expert.reshape(-1) for expert in experts]
    result = None
    if merge is not None:
        result = (buffers or Buffers(1)).next(flat.numel(), store)
    job = _Job(
        base=flat,
        experts=flats,
        result=result,
        coefficients=merge.tolist() if isinstance(merge, Tensor) else [],
        merge=merge if callable(merge) else None,
        work=work,
        limit=torch.finfo(store).max / 4,
    )
    total = Moved(0.0, [0.0] * len(flats), False)
    for part in pool.map(job.run, range(0, flat.numel(), GROUP * BLOCK)):
        total += part
    return total, None if result is None else result.view(base.shape)
