r"""Exclusive knowledge as a share of its entries: the forms that the paper compares with the SVD.

    magnitude   the largest `density` of the entries of D_t = W_t - W_s, as they are
    dropout     every entry with probability `density`, divided by it:  D̃ = (M ⊙ D) / density

Source: Lu et al., Twin-Merging, arXiv:2406.15479, appendix D.5 (equation 6, after DARE) and
figure 6. Which entries are kept is stored, in the smaller of two ways; see `artifact/codec.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..artifact.codec import Sparse, encode_sparse
from ..artifact.format import Storage
from .exclusive import NEAR, squared_norm
from .shared.blocks import Largest, blocks, largest


@dataclass(frozen=True)
class Entries:
    """Some entries of a tensor, and how far they are from all of it."""

    count: int
    error: float
    """‖D - kept‖ / ‖D‖ in the Frobenius norm; dropout's is above 1 for small densities."""
    storage: Storage
    stored: dict[str, Tensor]
    """What goes into the file, by suffix."""


def count_of(entries: int, density: float) -> int:
    """How many of so many entries a density keeps: rounded down, at least one."""
    return min(entries, max(1, int(density * entries + 1e-9))) if entries else 0


@torch.no_grad()
def magnitude(
    delta: Float[Tensor, " *shape"], density: float, dtype: torch.dtype = torch.float32
) -> Entries:
    """The largest `density` of the entries; of equal ones, the first. Zeros are never kept."""
    size = delta.numel()
    return select(delta, largest(blocks(delta), size, count_of(size, density)), 0, dtype)


@torch.no_grad()
def select(
    delta: Float[Tensor, " *shape"], where: Largest, start: int, dtype: torch.dtype
) -> Entries:
    """Those entries of a tensor that are among the largest of a longer row of entries.

    start: the place of its first entry in that row
    """
    masks = []
    for block in blocks(delta):
        masks.append(where(block, start) & (block != 0))
        start += len(block)
    return _kept(delta, masks, dtype)


@torch.no_grad()
def dropout(
    delta: Float[Tensor, " *shape"],
    density: float,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Entries:
    """Every entry with probability `density`, divided by `density` (equation 6 of the paper)."""
    masks = [
        (torch.rand(len(block), generator=generator, dtype=torch.float32) < density) & (block != 0)
        for block in blocks(delta)
    ]
    return _kept(delta, masks, dtype, scale=1 / density)


def _kept(
    delta: Tensor, masks: Sequence[Tensor], dtype: torch.dtype, scale: float = 1.0
) -> Entries:
    flat = delta.reshape(-1)
    mask = torch.cat([*masks]) if masks else torch.zeros(0, dtype=torch.bool)
    index = mask.nonzero().flatten()
    chosen = flat[index]
    values = (chosen * scale).to(dtype)
    square, off = squared_norm(flat), squared_norm(chosen - values.to(flat.dtype))
    # What was left out and what was rounded, or scaled.
    left = square - squared_norm(chosen)
    if left < NEAR * square:  # a difference of nearly equal sums
        left = sum(
            squared_norm(block[~kept]) for block, kept in zip(blocks(delta), masks, strict=True)
        )
    error = ((left + off) / square) ** 0.5 if square else 0.0
    parts = encode_sparse(Sparse(values, index, tuple(delta.shape)))
    storage: Storage = "mask" if "mask" in parts else "index"
    stored = {f".{name}": tensor for name, tensor in parts.items()}
    return Entries(len(index), error, storage, stored)
