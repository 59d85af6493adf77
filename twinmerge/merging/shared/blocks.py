"""Task vectors in flat blocks: a merge needs the memory of a few blocks beside its result.

Sums are formed in one fixed order. Where torch shares a sum out among its threads, its last bits,
and with them the bytes of an artifact, would depend on how many there are.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK = 2**18
"""Entries of a block: 1 MB in float32, so that what one step uses stays in the cache."""

RUN = 4096
"""Entries summed by one thread; torch shares out sums of more than 32768."""

DIGIT = 16
"""Bits that one pass of `largest` decides on."""

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def blocks(
    x: Float[Tensor, " *shape"], block: int | None = None
) -> Sequence[Float[Tensor, " _block"]]:
    """Views of a tensor that is seen flat; none if it is empty."""
    return x.reshape(-1).split(block or BLOCK) if x.numel() else ()


@dataclass(frozen=True)
class Change:
    """A task vector `W_t - W_0`: iterating gives it flat, block by block, as often as asked."""

    base: Float[Tensor, " *shape"]
    expert: Float[Tensor, " *shape"]
    block: int | None = None
    """Entries of a block, if not the usual number."""

    def __iter__(self) -> Iterator[Float[Tensor, " block"]]:
        pairs = zip(blocks(self.expert, self.block), blocks(self.base, self.block), strict=True)
        return (expert - base for expert, base in pairs)

    @property
    def size(self) -> int:
        return self.base.numel()


def changes(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    block: int | None = None,
) -> list[Change]:
    """Every expert's task vector."""
    return [Change(base, expert, block) for expert in experts]


def block_of_rows(row: int) -> int:
    """Entries of a block that holds whole rows of `row` entries, at least one."""
    return max(1, BLOCK // max(1, row)) * max(1, row)


def joined(
    like: Float[Tensor, " *shape"], vector: Iterable[Float[Tensor, " _block"]]
) -> Float[Tensor, " *shape"]:
    """A new tensor, shaped like another, of a vector in blocks, of any sizes."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    flat, start = out.view(-1), 0
    for block in vector:
        flat[start : start + len(block)] = block
        start += len(block)
    assert start == len(flat), f"the blocks hold {start} of {len(flat)} entries"
    return out


def add(
    base: Float[Tensor, " *shape"], vector: Iterable[Float[Tensor, " _block"]]
) -> Float[Tensor, " *shape"]:
    """A new tensor: the base plus a vector in blocks, of any sizes."""

    def sums() -> Iterator[Tensor]:
        flat, start = base.reshape(-1), 0
        for block in vector:
            yield flat[start : start + len(block)] + block
            start += len(block)

    return joined(base, sums())


def total(x: Float[Tensor, " *shape"]) -> float:
    """`Σ x` in float64, in an order that the number of threads has no part in."""
    sums = x.flatten()
    while len(sums) > RUN:
        runs, rest = sums.split([len(sums) // RUN * RUN, len(sums) % RUN])
        runs = runs.view(-1, RUN).sum(dim=1, dtype=torch.float64)
        sums = torch.cat([runs, rest.sum(dtype=torch.float64)[None]])
    return sums.sum(dtype=torch.float64).item()


def l1_norm(vector: Iterable[Float[Tensor, " _block"]]) -> float:
    """`‖δ‖₁` of a vector in blocks, summed in float64."""
    return sum((total(block.abs()) for block in vector), start=0.0)


@dataclass(frozen=True)
class Largest:
    """Which entries of a tensor are the largest in absolute value: those above `threshold`, and of
    those equal to it the ones at flat positions before `end`."""

    threshold: float
    end: int

    def __call__(self, block: Float[Tensor, " block"], start: int) -> Bool[Tensor, " block"]:
        """Where they are in the block that begins at flat position `start`."""
        size = block.abs()
        mask = size > self.threshold
        ahead = slice(0, max(0, self.end - start))
        mask[ahead] = size[ahead] >= self.threshold
        return mask


def largest(vector: Iterable[Float[Tensor, " _block"]], size: int, count: int) -> Largest:
    """The `count` largest of the `size` entries of a vector in blocks.

    Of equal entries the first are taken, so that the result is the same on every machine. This is a
    radix selection: floats without sign are ordered as their bits are, and each pass over the
    blocks decides on sixteen of those. It copies nothing, where sorting and `kthvalue` copy the
    tensor and its indices.
    """
    if count <= 0:
        return Largest(inf, 0)
    if count >= size:
        return Largest(0.0, size)
    dtype = next(iter(vector)).dtype
    bits = torch.finfo(dtype).bits
    prefix, equal = 0, size  # the bits decided so far, and how many entries begin with them
    for shift in range(bits - DIGIT, -1, -DIGIT):
        counts = torch.zeros(2**DIGIT, dtype=torch.int64)
        for block in vector:
            words = block.abs().view(BITS[dtype])
            if equal < size:
                words = words[words >> (shift + DIGIT) == prefix]
            digits = (words >> shift) & (2**DIGIT - 1)
            counts += torch.bincount(digits, minlength=2**DIGIT).cpu()
        at_least = counts.flip(0).cumsum(0)
        place = int((at_least < count).sum())
        digit = 2**DIGIT - 1 - place
        equal = int(counts[digit])
        count -= int(at_least[place]) - equal
        prefix = prefix << DIGIT | digit
    threshold = torch.tensor(prefix, dtype=BITS[dtype]).view(dtype).item()
    return Largest(threshold, size if count == equal else _after(vector, threshold, count))


def _after(vector: Iterable[Float[Tensor, " _block"]], threshold: float, count: int) -> int:
    """The flat position after the first `count` entries of that absolute value."""
    start = 0
    for block in vector:
        found = (block.abs() == threshold).nonzero().flatten()
        if len(found) >= count:
            return start + int(found[count - 1]) + 1
        count -= len(found)
        start += len(block)
    raise AssertionError("fewer entries than were counted")
