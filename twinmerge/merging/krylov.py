r"""The leading singular triplets by block Krylov iteration, with a bound on what they miss.

For `A` (long, short) a random block `Ω` is driven through `M = A Aᵀ`, and every block is kept:

    Q = orthonormal [AΩ, M AΩ, M² AΩ, ...],    C = Aᵀ Q,    CᵀC = W Θ Wᵀ,    s² = θ,    u = Q w

Power iteration keeps the last block alone; keeping all of them uses the best polynomial in `M`
instead of its highest power, which tells most on flat spectra. Sources: Golub, Luk and Overton, ACM
TOMS 7 (1981), for the iteration; Musco and Musco, arXiv:1504.05477, for its convergence without
gaps; Stathopoulos and Wu, SIAM J. Sci. Comput. 23 (2002), for bases from Gram matrices.

**What is missed.** In the basis of the leading `rank` Ritz vectors and a complement, `M` is
`[[Θ, Eᵀ], [E, M₂]]`; we know `Θ` and `EᵀE`, from the residuals `M u - θ u`. For any `d > 0`

    [[0, Eᵀ], [E, 0]]  ≤  [[EᵀE / d, 0], [0, d]]

so with `μ` the largest eigenvalue of `M₂` and `t = μ + d`, the best approximation of that rank
holds at most this much energy beyond `Σ θ` (`λ` are eigenvalues, the rest is counting):

    missed  =  min over d > 0 of  Σ_i ( max(λ_i(Θ + EᵀE / d), t) - θ_i )

That is proven but for `μ`, of which we only have an estimate: the next Ritz value plus its
residual, or the mean of what lies outside of the space where that is larger. It is too low if a
large direction hides from the start. A start that knows nothing of the matrix makes that as good as
impossible: each of its 16 or more columns would have to miss it. Against a matrix made for our
fixed start, 16 of its columns are held back until the first check. They show what carries several
times the energy of the next largest direction; what hides from them too, or among near equals, we
do not see.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

# The processor multiplies by 16 columns in the time of 8; and a block of at least `rank` columns
# finds every copy of a singular value that repeats `rank` times.
COLUMNS = 16
# Converged when at most this share of the remaining energy is missed: 0.2 % of the error.
TOLERANCE = 4e-3
# Below this share of the energy no more is asked for: 1e-5 of the norm.
FLOOR = 1e-10
# Rounding of the energy found, as a share of it, in steps of the dtype.
ROUNDING = 4
# Entries from which a pass over the matrix costs more than a look at what was found.
LARGE = 1 << 20
# Beyond this share of the short side the space costs as much as the exact SVD.
LARGEST_SPACE = 0.65


class Triplets(NamedTuple):
    """`u` (out, rank), `s` (rank,), `vh` (rank, in); see `SVD.missed` for the last."""

    u: Tensor
    s: Tensor
    vh: Tensor
    missed: float


def leading(matrix: Tensor, rank: int, energy: float) -> Triplets | None:
    """The leading triplets of a matrix of squared norm `energy`, or None if not converged.

    Computes in the dtype of the matrix (float32 or float64), small problems in float64. Entries
    must be near 1 in scale: squares of singular values are formed.
    """
    if matrix.shape[0] < matrix.shape[1]:
        found = leading(matrix.T, rank, energy)
        return found and Triplets(found.vh.T, found.s, found.u.T.contiguous(), found.missed)
    try:
        found = _iterate(matrix, rank, energy)
    except LinAlgError:
        return None
    return found if found and bool(torch.isfinite(found.s).all()) else None


def _iterate(a: Tensor, rank: int, energy: float) -> Triplets | None:
    short = a.shape[1]
    width = COLUMNS * -(-rank // COLUMNS)
    space = _Space(a, int(LARGEST_SPACE * short))
    start = _times(a, _start(short, width + COLUMNS).to(a))
    following, fresh = start.split([width, COLUMNS], dim=1)
    # Where a pass over the matrix is dear, a first look that may come too early pays.
    first = 4 if a.numel() >= LARGE else 5
    check_at, blocks = max(first * rank, 2 * COLUMNS), 0
    while True:
        if space.size < check_at <= space.size + width and fresh is not None:
            following, fresh = torch.cat([following, space.beyond(fresh)], dim=1), None
        block = _orthonormal(following, space.basis)
        if not block.shape[1] or not space.fits(block):
            return None
        space.add(block)
        blocks += 1
        following = space.follow()
        if space.size < check_at or space.size <= rank:
            continue
        # Every other block later on: the small eigenproblem grows.
        check_at = space.size + (1 if blocks < 6 else width + COLUMNS + 1)
        theta, w = space.ritz()
        left = max(energy - float(theta[:rank].sum()), 0.0)
        outside = max(energy - float(theta.sum()), 0.0) / (short - space.size)
        enough = TOLERANCE * left + FLOOR * energy
        residual = _gram(following, w[-block.shape[1] :, : rank + 1])
        missed = _missed(theta, residual, rank, outside, enough)
        if missed <= enough:
            return space.triplets(theta[:rank], w[:, :rank], missed)


class _Space:
    """Orthonormal columns `Q`, their images `C = Aᵀ Q`, and `CᵀC`, as they grow block by block."""

    def __init__(self, a: Tensor, room: int) -> None:
        long, short = a.shape
        self.a = a
        self.size = self._settled = 0
        # Rows are columns of the basis: memory is touched only as the space grows.
        self._basis, self._image = a.new_empty(room, long), a.new_empty(room, short)
        self._precise = a.new_empty(room, short, dtype=torch.float64)
        self._gram = a.new_empty(room, room, dtype=torch.float64)

    @property
    def basis(self) -> Tensor:
        return self._basis[: self.size].T

    def fits(self, block: Tensor) -> bool:
        return self.size + block.shape[1] <= len(self._basis)

    def add(self, block: Tensor) -> None:
        new = slice(self.size, self.size + block.shape[1])
        self._basis[new] = block.T
        self._image[new] = _times(self.a.T, block).T
        self._precise[new] = self._image[new]
        self._settled, self.size = self.size, new.stop
        rows = self._precise[new] @ self._precise[: self.size].T
        self._gram[new, : self.size] = rows
        self._gram[: self.size, new] = rows.T

    def follow(self) -> Tensor:
        """What `A Aᵀ` makes of the last block, beyond the space; earlier ones stay within it."""
        return self.beyond(_times(self.a, self._image[self._settled : self.size].T))

    def beyond(self, block: Tensor) -> Tensor:
        """The part of a block that is orthogonal to the space, up to rounding of the block."""
        return torch.addmm(block, self.basis, self.basis.T @ block, alpha=-1)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values, largest first, and their vectors in the basis."""
        values, vectors = torch.linalg.eigh(self._gram[: self.size, : self.size])
        return values.flip(0), vectors.flip(1)

    def triplets(self, theta: Tensor, w: Tensor, missed: float) -> Triplets:
        w = w.to(self._basis.dtype)
        u, v, s = self.basis @ w, self._image[: self.size].T @ w, theta.clamp(min=0).sqrt()
        missed += ROUNDING * torch.finfo(self.a.dtype).eps * float(theta.sum())
        if float(s[-1]) > 1e-3 * float(s[0]):
            s = s.to(v.dtype)
            return Triplets(u, s, (v / s).T.contiguous(), missed)
        # Columns of `v` this small have lost their right angles to rounding.
        v, s, turn = torch.linalg.svd(v, full_matrices=False)
        return Triplets(u @ turn.T, s, v.T.contiguous(), missed)


def _times(a: Tensor, x: Tensor) -> Tensor:
    """`a @ x` with the large matrix as it lies in memory: transposed, it costs a third more."""
    return a @ x if a.is_contiguous() else (x.T @ a.T).T


def _start(short: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(short * 1_000_003 + width)
    return torch.randn(short, width, generator=generator)


def _gram(block: Tensor, w: Tensor | None = None) -> Tensor:
    """`blockᵀ block` in float64, or that of `block @ w`."""
    double = block.double()
    gram = double.T @ double
    return gram if w is None else w.T @ gram @ w


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of a block that is orthogonal to `basis` but for rounding.

    Dependent columns drop out. Two rounds: the first leaves rounding times the condition of the
    block, the second removes it.
    """
    block = block @ _whitening(_gram(block)).to(block.dtype)
    block = torch.addmm(block, basis, basis.T @ block, alpha=-1)
    return block @ _whitening(_gram(block)).to(block.dtype)


def _whitening(gram: Tensor) -> Tensor:
    """`R` with `Rᵀ gram R = 1`: by Cholesky, or by eigenvectors where columns are dependent."""
    scale = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    cosines = scale[:, None] * gram * scale
    lower, failed = torch.linalg.cholesky_ex(cosines)
    if not failed and float(lower.diagonal().min()) > 1e-6:
        # diag(scale) @ lower^-T
        return torch.linalg.solve_triangular(lower.T, scale.diag(), upper=True, left=False)
    values, vectors = torch.linalg.eigh(cosines)
    kept = values > 1e-13 * float(values[-1])
    return scale[:, None] * vectors[:, kept] * values[kept].rsqrt()


def _missed(theta: Tensor, residual: Tensor, rank: int, outside: float, enough: float) -> float:
    """The bound of the module's docstring; `residual` is `EᵀE` of the first `rank + 1` Ritz pairs.

    `Σ λ_i` is at most `Σ θ_i` + ‖E‖² / d: a cheaper bound, minimised first. Only where it is near
    to `enough` are the eigenvalues worth their time.
    """
    top, coupling = theta[:rank], residual[:rank, :rank]
    beyond = float(theta[rank]) + max(float(residual[rank, rank]), 0.0) ** 0.5
    mu = max(beyond, outside)
    total = coupling.trace().clamp(min=0)
    counts = torch.arange(1, rank + 1).to(theta)
    d = torch.cat([top - mu, (total / counts).sqrt()]).clamp(min=1e-15 * float(theta[0]))
    bounds = (mu + d[:, None] - top).clamp(min=0).sum(1) + total / d
    best = int(bounds.argmin())
    missed = float(bounds[best])
    if enough < missed < 3 * enough:
        for share in (1.0, 0.7, 0.5):
            some = float(d[best]) * share
            values = torch.linalg.eigvalsh(top.diag() + coupling / some)
            missed = min(missed, float(values.clamp(min=mu + some).sum() - top.sum()))
    return missed
