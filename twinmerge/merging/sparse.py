r"""Exclusive knowledge as a share of its entries: the forms that the paper compares with the SVD.

    magnitude   the largest `density` of the entries of D_t = W_t - W_s, as they are
    dropout     every entry with probability `density`, divided by it:  D̃ = (M ⊙ D) / density

Source: Lu et al., Twin-Merging, arXiv:2406.15479, appendix D.5 (equation 6, after DARE) and
figure 6. Which entries are kept is stored, in the smaller of two ways; see `artifact/codec.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..artifact.codec import Sparse, encode_sparse
from ..artifact.format import Storage
from .exclusive import squared_norm


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
    """The largest `density` of the entries; of equal ones, the first."""
    flat = delta.reshape(-1)
    count = count_of(flat.numel(), density)
    size = flat.abs()
    threshold = size.kthvalue(flat.numel() - count + 1).values
    return above(delta, float(threshold), count, dtype)


@torch.no_grad()
def above(
    delta: Float[Tensor, " *shape"], threshold: float, count: int, dtype: torch.dtype
) -> Entries:
    """Entries larger than `threshold`, filled up to `count` with the first of those equal to it.

    Zeros are never kept: they say nothing.
    """
    flat = delta.reshape(-1)
    size = flat.abs()
    mask = size > threshold
    if threshold > 0 and (missing := count - int(mask.sum())) > 0:
        mask[(size == threshold).nonzero().flatten()[:missing]] = True
    return _kept(delta, mask, dtype)


@torch.no_grad()
def dropout(
    delta: Float[Tensor, " *shape"],
    density: float,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Entries:
    """Every entry with probability `density`, divided by `density` (equation 6 of the paper)."""
    flat = delta.reshape(-1)
    draw = torch.rand(flat.shape, generator=generator, dtype=torch.float32)
    return _kept(delta, (draw < density) & (flat != 0), dtype, scale=1 / density)


def _kept(delta: Tensor, mask: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Entries:
    flat = delta.reshape(-1)
    index = mask.nonzero().flatten()
    values = (flat[index] * scale).to(dtype)
    square = squared_norm(flat)
    rest = flat.clone()
    rest[index] -= values.to(flat.dtype)
    error = (squared_norm(rest) / square) ** 0.5 if square else 0.0
    parts = encode_sparse(Sparse(values, index, tuple(delta.shape)))
    storage: Storage = "mask" if "mask" in parts else "index"
    stored = {f".{name}": tensor for name, tensor in parts.items()}
    return Entries(len(index), error, storage, stored)


class Histogram:
    """Counts of sizes |d| by the upper bits of their float32 pattern, to find the k-th largest.

    The order of positive floats is that of their bits, so two rounds of 2¹⁶ bins find the exact
    threshold of any number of tensors without holding two of them.
    """

    def __init__(self, high: int | None = None) -> None:
        self.high = high
        self.counts = torch.zeros(1 << 16, dtype=torch.int64)

    def see(self, delta: Float[Tensor, " *shape"]) -> None:
        """Count the entries of a tensor: by their upper 16 bits, or (in the second round) by the
        lower 16 of those whose upper 16 are `high`."""
        bits = delta.reshape(-1).float().abs().view(torch.int32)
        if self.high is None:
            bins = bits >> 16
        else:
            bins = bits[(bits >> 16) == self.high] & 0xFFFF
        self.counts += torch.bincount(bins, minlength=1 << 16)

    def bin_of(self, count: int) -> tuple[int, int]:
        """The bin that holds the `count`-th largest entry, and how many lie above that bin."""
        downwards = self.counts.flip(0).cumsum(0)
        place = int((downwards < count).sum())
        found = len(self.counts) - 1 - place
        return found, int(downwards[place] - self.counts[found])


def threshold_of(high: int, low: int) -> float:
    """The float32 whose pattern has these upper and lower 16 bits."""
    return float(torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32))
