r"""Exclusive knowledge: what one expert knows that the shared expert does not, in few numbers.

For expert t and one weight, `D_t = W_t - W_s`. We keep its best approximation of some rank
(Eckart-Young) as two thin matrices laid out the way LoRA does:

    D_t ≈ B_t @ A_t        A_t: (rank, in)    B_t: (out, rank)

Source: Lu et al., Twin-Merging, arXiv:2406.15479, section 3.3. Unlike the authors' code, which
multiplies back to a dense matrix, we store and run the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from .linalg import SVD, numerical_rank, svd, truncated_svd


@dataclass(frozen=True)
class Cut:
    """How much of each matrix is kept. Exactly one field is set.

    rank:    this many singular values, or all of them where a matrix has fewer
    share:   this share of the singular values, rounded down, at least one (the paper's "sparsity")
    energy:  as many as hold this share of the squared Frobenius norm
    full:    all that stand above float32 rounding
    none:    nothing: a static merge
    """

    rank: int | None = None
    share: float | None = None
    energy: float | None = None
    full: bool = False
    none: bool = False

    def limit(self, out: int, in_: int) -> int:
        """The largest rank that this cut can keep of an (out, in) matrix."""
        shortest = min(out, in_)
        if self.none:
            return 0
        if self.rank is not None:
            return min(self.rank, shortest)
        if self.share is not None:
            # The rounding is against 0.1 * 70 = 7.000000000000001 and 0.29 * 100 = 28.999...
            return min(max(1, int(self.share * shortest + 1e-9)), shortest)
        return shortest

    def of(self, s: Float[Tensor, " rank"], out: int, in_: int) -> int:
        """The rank to keep, given the singular values found."""
        rank = min(self.limit(out, in_), numerical_rank(s, out, in_))
        if self.energy is not None and rank:
            energy = s.double().square()  # all of it: `s` is the whole spectrum here
            kept = energy[:rank].cumsum(0) / energy.sum()
            rank = min(rank, int((kept < self.energy - 1e-12).sum()) + 1)
        return rank


@dataclass(frozen=True)
class Factors:
    """A low-rank matrix `b @ a`, and how far it is from what it stands for."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    error: float
    """‖D - b a‖ / ‖D‖ in the Frobenius norm, of the factors as stored; 0 for D = 0."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The (out, in) view under which a tensor is factored, or None for vectors, kept whole.

    A convolution's kernel is seen as out × rest. Leading axes of length 1, as class tokens and
    position parameters have them, are dropped first.
    """
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) < 2 or min(shape[0], prod(shape[1:])) <= 1:
        return None
    return shape[0], prod(shape[1:])


@torch.no_grad()
def factorize(
    delta: Float[Tensor, "out in"], cut: Cut, dtype: torch.dtype = torch.float32
) -> Factors:
    """Best approximation of `delta` under `cut`, in the Frobenius norm, stored as `dtype`.

    Computes in float32 or better whatever comes in. Both factors carry half of the scale (√S), so
    neither is tiny or huge in half precision. Signs of singular vectors are arbitrary: compare
    `b @ a`, never `a`. Raises `ValueError` if `delta` holds NaN or infinity.
    """
    out, in_ = delta.shape
    limit = cut.limit(out, in_)
    if limit == 0 or not delta.any():
        return _none(out, in_, dtype, error=1.0 if delta.any() else 0.0)
    truncated = cut.rank is not None or cut.share is not None
    found = truncated_svd(delta, limit) if truncated else svd(delta)
    a, b = _split(found.cut(cut.of(found.s, out, in_)), dtype)
    work = delta if delta.dtype == torch.float64 else delta.float()
    rest = torch.addmm(work, b.to(work.dtype), a.to(work.dtype), alpha=-1)
    return Factors(a, b, float(rest.norm() / work.norm()))


@torch.no_grad()
def factorize_svd(
    found: SVD, cut: Cut, shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Factors:
    """Factors from an SVD that is already known and exact (that of LoRA factors).

    The error is that of the truncation; rounding to a 16-bit `dtype` adds its own 2⁻⁸ (bfloat16)
    or 2⁻¹¹ (float16) of each entry, which is not counted.
    """
    rank = cut.of(found.s, *shape)
    energy = found.s.double().square()
    error = float((energy[rank:].sum() / energy.sum()).sqrt()) if energy.sum() else 0.0
    if rank == 0:
        return _none(*shape, dtype, error)
    return Factors(*_split(found.cut(rank), dtype), error)


def _split(found: SVD, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    root = found.s.sqrt()
    return (root[:, None] * found.vh).to(dtype).contiguous(), (found.u * root).to(
        dtype
    ).contiguous()


def _none(out: int, in_: int, dtype: torch.dtype, error: float) -> Factors:
    return Factors(torch.empty(0, in_, dtype=dtype), torch.empty(out, 0, dtype=dtype), error)
