r"""Truncated singular value decompositions that converge on every finite matrix.

`truncated_svd(D, rank)` returns the leading singular triplets of `D`, so that by Eckart-Young
`u * s @ vh` is the best approximation of that rank in the Frobenius norm.

Four ways, chosen by shape and rank:

- *Krylov*: for a rank of at most an eighth of the short side (see krylov.py). It stops when a bound
  on what it misses is small, and hands over if that does not happen: it never returns an
  unconverged result.
- *Gram*: eigenvectors of the smaller Gram matrix in float64, whose relative accuracy of 1e-8 is
  that of float32 results. For larger ranks, and for tall matrices.
- *LAPACK*: divide and conquer on the rows and columns that are not all zero. Embedding tables need
  it: rows that training never touched make hundreds of equal (zero) singular values, on which a
  bare `gesdd` or `gesvda` can fail to converge. Whichever of these fails, the next is tried.
- *from factors*: for a sum of LoRA updates, by QR of the stacked factors. Exact, and the dense
  matrix is never formed.

Everything runs in float32 or better: no 16-bit type has an SVD kernel on CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from . import krylov

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

# Krylov iteration pays when the rank is well below the short side of the matrix.
ITERATE_BELOW_SHARE = 0.125
# Below this short side LAPACK is as fast as any other way.
SMALL = 64
# Rows are set aside when at least this share of them is zero: a copy of the rest must pay.
ZERO_ROWS = 0.1
# Squared norms outside of this range are scaled to 1: their squares must fit float32.
SAFE_ENERGY = (1e-18, 1e18)


@dataclass(frozen=True)
class SVD:
    """Singular triplets, largest first: `u @ diag(s) @ vh`."""

    u: Float[Tensor, "out rank"]
    s: Float[Tensor, " rank"]
    vh: Float[Tensor, "rank in"]
    missed: float = 0.0
    """Upper estimate of the energy (squared Frobenius norm) that the best approximation of this
    rank, or a lower one, may hold beyond `sum(s²)`; 0 if exact. See krylov.py for its limits."""

    def cut(self, rank: int) -> SVD:
        """The leading `rank` triplets."""
        return SVD(self.u[:, :rank], self.s[:rank], self.vh[:rank], self.missed)


@torch.no_grad()
def svd(matrix: Float[Tensor, "out in"]) -> SVD:
    """Thin exact SVD of any finite matrix, in float32 (float64 in, float64 out).

    All-zero rows and columns are set aside first. Returns at least one triplet. Raises `ValueError`
    if the matrix holds NaN or infinity.
    """
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    scale = _scale(work)
    out, in_ = matrix.shape
    if scale == 0:
        return SVD(work.new_zeros(out, 1), work.new_zeros(1), work.new_zeros(1, in_))
    # Scaled to 1 so that neither 1e-30 nor 1e30 under- or overflows in a Gram matrix.
    rows, columns = (work != 0).any(dim=1), (work != 0).any(dim=0)
    small = work[rows][:, columns] / scale
    u, s, vh = _dense(small, min(small.shape))
    full_u = work.new_zeros(out, len(s))
    full_vh = work.new_zeros(len(s), in_)
    full_u[rows] = u
    full_vh[:, columns] = vh
    return SVD(full_u, s * scale, full_vh)


def _scale(work: Tensor) -> Tensor:
    scale = work.abs().max() if work.numel() else torch.tensor(0.0)
    if not torch.isfinite(scale):
        raise ValueError("svd: the matrix holds NaN or infinity")
    return scale


def _dense(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading triplets of a matrix near 1 in scale; the way that is tried first is the fastest."""
    ways = [_lapack(matrix.dtype), _lapack(torch.float64), _gram]
    short, long = sorted(matrix.shape)
    if matrix.dtype == torch.float32 and short >= SMALL and (rank <= short // 2 or long > short):
        ways = [_gram, *ways[:2]]
    for number, way in enumerate(ways):
        try:
            parts = way(matrix, rank)
        except LinAlgError:
            if number + 1 == len(ways):
                raise
            continue
        if all(bool(torch.isfinite(part).all()) for part in parts):
            return parts
    raise LinAlgError(f"svd: no driver converged on a {tuple(matrix.shape)} matrix")


def _lapack(dtype: torch.dtype):
    def way(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
        return tuple(p.to(matrix.dtype) for p in (u[:, :rank], s[:rank], vh[:rank]))

    return way


def _gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading triplets through the eigenvectors of the smaller Gram matrix, in float64."""
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = _gram(matrix.T, rank)
        return vh.T.contiguous(), s, u.T.contiguous()
    _, v = torch.linalg.eigh(_gram_matrix(matrix))
    v = v[:, -rank:].flip(-1)
    # The norm of each image is the singular value.
    image = matrix.double() @ v
    s = image.norm(dim=0)
    order = s.argsort(descending=True, stable=True)
    image, s, v = image[:, order], s[order], v[:, order]
    if float(s[-1]) > 1e-5 * float(s[0]):
        u = image / s
    else:  # QR makes the left side orthonormal even where singular values vanish
        q, r = torch.linalg.qr(image)
        u = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return tuple(part.to(matrix.dtype) for part in (u, s, v.T.contiguous()))


def _gram_matrix(tall: Tensor) -> Tensor:
    """`tallᵀ tall` in float64, a few thousand rows at a time: no copy of a large table."""
    gram = tall.new_zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in tall.split(4096):
        rows = rows.double()
        gram.addmm_(rows.T, rows)
    return gram


@torch.no_grad()
def spectrum(matrix: Float[Tensor, "out in"]) -> Float[Tensor, " rank"]:
    """All `min(out, in)` singular values, largest first, in float32 (float64 in, float64 out).

    Exact. From float32 they come from the smaller Gram matrix in float64, so values below 1e-8 of
    the largest are rounding. Raises `ValueError` if the matrix holds NaN or infinity.
    """
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    scale = _scale(work)
    if scale == 0:
        return work.new_zeros(min(work.shape))
    small = work / scale
    try:
        if work.dtype == torch.float64:
            return torch.linalg.svdvals(small) * scale
        tall = small if small.shape[0] >= small.shape[1] else small.T
        squares = torch.linalg.eigvalsh(_gram_matrix(tall)).flip(-1).clamp(min=0)
        return squares.sqrt().float() * scale
    except LinAlgError:
        found = svd(matrix).s
        return torch.cat([found, found.new_zeros(min(matrix.shape) - len(found))])


@torch.no_grad()
def truncated_svd(matrix: Float[Tensor, "out in"], rank: int) -> SVD:
    """The leading `rank` singular triplets of a finite matrix, in float32 or better.

    The Frobenius error is at most 0.2 % above the optimum, or 1e-5 of the norm where that is more;
    `missed` says how far it may be. Fewer triplets come where rows are zero: nothing is lost. The
    start of the iteration is seeded by the shape alone, so the result is reproducible.

    Raises `ValueError` if `rank` is not in `1..min(out, in)`, or if the matrix holds NaN or
    infinity.
    """
    shortest = min(matrix.shape)
    if not 1 <= rank <= shortest:
        shape = tuple(matrix.shape)
        raise ValueError(f"rank must be in 1..{shortest} for a {shape} matrix, got {rank}")
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    # Norms of rows in the dtype of the matrix, their sum in float64: 30 times faster than a
    # float64 norm, and as exact, since rounding of rows cancels.
    energies = torch.linalg.vector_norm(work, dim=1).double().square()
    energy = float(energies.sum())
    if not SAFE_ENERGY[0] < energy < SAFE_ENERGY[1]:
        return _scaled(work, rank)
    used = energies > 0
    if int(used.sum()) <= (1 - ZERO_ROWS) * len(used):
        rest = work[used]
        found = truncated_svd(rest, min(rank, *rest.shape))
        u = work.new_zeros(len(work), len(found.s))
        u[used] = found.u
        return replace(found, u=u)
    if rank <= ITERATE_BELOW_SHARE * shortest:
        found = krylov.leading(work, rank, energy)
        if found is not None:
            return SVD(*found)
    return SVD(*_dense(work, rank))


def _scaled(work: Tensor, rank: int) -> SVD:
    scale = _scale(work)
    if scale == 0:
        return svd(work)
    found = truncated_svd(work / scale, rank)
    return replace(found, s=found.s * scale, missed=found.missed * float(scale) ** 2)


class ProductSVD:
    """Exact SVDs of `b @ diag(c) @ a` for several `c`, without forming the product.

    For stacked LoRA factors `b = [B_1 | B_2 | ...]`, `a = [A_1; A_2; ...]`, repeated coefficients
    `c` give the SVD of `Σ_j c_j B_j A_j`: QR of both sides once, then the SVD of a small core for
    every `c`. Runs in float64.
    """

    def __init__(self, b: Float[Tensor, "out stacked"], a: Float[Tensor, "stacked in"]) -> None:
        self._left, self._r_left = torch.linalg.qr(b.double())
        self._right, self._r_right = torch.linalg.qr(a.double().T)

    @torch.no_grad()
    def svd(self, c: Float[Tensor, " stacked"]) -> SVD:
        """In float32, largest singular value first; at most `stacked` of them."""
        core = svd((self._r_left * c.double()) @ self._r_right.T)
        u, vh = self._left @ core.u, core.vh @ self._right.T
        return SVD(u.float(), core.s.float(), vh.float())


def numerical_rank(singular_values: Float[Tensor, " rank"], out: int, in_: int) -> int:
    """How many singular values stand above float32 rounding of the largest one.

    The floor does not grow with the long side: what a table of 250,000 rows holds at 1 % of its
    largest singular value is no rounding.
    """
    if not len(singular_values) or float(singular_values[0]) == 0:
        return 0
    floor = min(out, in_) ** 0.5 * torch.finfo(torch.float32).eps * float(singular_values[0])
    return int((singular_values > floor).sum())
