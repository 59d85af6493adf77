r"""Exclusive knowledge: what one expert knows that the shared expert does not, in few numbers.

For expert t and one weight, `D_t = W_t - W_s`. We keep its best approximation of some rank
(Eckart-Young) as two thin matrices laid out the way LoRA does:

    D_t ≈ B_t @ A_t        A_t: (rank, in)    B_t: (out, rank)

Source: Lu et al., Twin-Merging, arXiv:2406.15479, section 3.3. Unlike the authors' code, which
multiplies back to a dense matrix, we store and run the factors. The other forms that the paper
compares, a share of the entries themselves, are in `sparse.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from ..artifact.codec import dequantise, quantise
from ..artifact.format import SCALE, A, B, Q, Storage
from .linalg import SVD, numerical_rank, svd, truncated_svd

BLOCK_ENTRIES = 1 << 20
"""Entries of a residual that are formed at a time."""

SAFE = (1e-24, 1e24)
"""Squared norms for which `D aᵀ` may be formed in float32."""

NEAR = 1e-4
"""Below this share of `‖D‖²` an error is measured on the residual itself: as a difference of two
squares in float32 it would be mostly rounding."""


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
    """A low-rank matrix `b @ a`, and how far it is from what it stands for.

    All errors are shares of `‖D‖` in the Frobenius norm, 0 for D = 0.
    """

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    error: float
    """Of the factors as stored, rounding or quantisation included."""
    truncation: float = 0.0
    """Of the truncated SVD before it was rounded to what is stored."""
    bound: float = 0.0
    """Eckart-Young: no matrix of this rank comes nearer."""
    storage: Storage = "factors"
    stored: dict[str, Tensor] = field(default_factory=dict)
    """What goes into the file, by suffix. `a` and `b` are what it stands for."""
    squares: tuple[float, ...] = ()
    """`‖D - b a‖²` if only the first 0, 1, ..., rank components are kept; where asked for."""
    captured: tuple[float, ...] = ()
    """The squares of the first 0, 1, ..., rank singular values, summed; where asked for."""
    missed: float = 0.0
    """How much more than the last of these the best factors may hold."""

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
    delta: Float[Tensor, "out in"],
    cut: Cut,
    dtype: torch.dtype = torch.float32,
    *,
    bits: int | None = None,
    by_rank: bool = False,
) -> Factors:
    """Best approximation of `delta` under `cut`, in the Frobenius norm, stored as `dtype`.

    With `bits` (8 or 4) the factors are stored as integers with a scale for every group. With
    `by_rank` the squared errors of all smaller ranks come along.

    Computes in float32 or better whatever comes in. Both factors carry half of the scale (√S), so
    neither is tiny or huge in half precision. Signs of singular vectors are arbitrary: compare
    `b @ a`, never `a`. Raises `ValueError` if `delta` holds NaN or infinity.
    """
    out, in_ = delta.shape
    work = delta if delta.dtype == torch.float64 else delta.float()
    square = squared_norm(work)
    limit = cut.limit(out, in_)
    if limit == 0 or (square == 0 and not work.any()):
        return _nothing(out, in_, dtype, bits, square, by_rank)
    truncated = cut.rank is not None or cut.share is not None
    found = truncated_svd(work, limit) if truncated else svd(work)
    whole, missed, rank = found.s, found.missed, cut.of(found.s, out, in_)
    found = found.cut(rank)
    a, b, stored = _stored(found, dtype, bits)
    squares = _squares(work, a.to(work.dtype), b.to(work.dtype), square)
    left = squares[-1]
    if left < NEAR * square:
        left = _residual(work, a.to(work.dtype), b.to(work.dtype))
    captured = [0.0, *found.s.double().square().cumsum(0).tolist()]
    error = _share(left, square)
    tail = square - captured[-1]
    if not truncated or limit == min(out, in_):  # no difference where all of the spectrum is known
        tail = float(whole[rank:].double().square().sum())
    return Factors(
        a,
        b,
        error,
        truncation=min(error, _share(tail, square)),
        bound=min(error, _share(tail - missed, square)),
        storage=_STORAGES[bits],
        stored=stored,
        squares=tuple(squares) if by_rank else (),
        captured=tuple(captured) if by_rank else (),
        missed=missed,
    )


@torch.no_grad()
def factorize_svd(
    found: SVD,
    cut: Cut,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    bits: int | None = None,
    by_rank: bool = False,
    rounding: float = 0.0,
) -> Factors:
    """Factors from an SVD that is already known and exact (that of LoRA factors).

    rounding: `‖ρ‖²` of what D has beside the SVD, such as the rounding of a 16-bit shared expert;
    no factors of low rank hold it, and errors count it
    """
    energy = found.s.double().square()
    square = float(energy.sum()) + rounding
    rank = cut.of(found.s, *shape)
    if rank == 0:
        return _nothing(*shape, dtype, bits, square, by_rank)
    kept = found.cut(rank)
    a, b, stored = _stored(kept, dtype, bits)
    # All in the few dimensions of the SVD: D aᵀ = U S (V aᵀ), and ‖D‖² is the sum of s².
    product = (found.u.double() * found.s.double()) @ (found.vh.double() @ a.double().T)
    squares = _cumulative(product, a.double(), b.double(), square)
    tail = float(energy[rank:].sum()) + rounding
    # The rest is orthogonal to U and V up to rounding, so that the error is the tail's and the
    # rounding's; as a difference of squares it would drown in float32.
    own = _residual_of_product(kept, a, b)
    error = _share(tail + own, square)
    return Factors(
        a,
        b,
        error,
        truncation=min(error, _share(tail, square)),
        bound=min(error, _share(tail, square)),
        storage=_STORAGES[bits],
        stored=stored,
        squares=tuple(squares) if by_rank else (),
        captured=(0.0, *energy[:rank].cumsum(0).tolist()) if by_rank else (),
    )


_STORAGES: dict[int | None, Storage] = {None: "factors", 8: "int8", 4: "int4"}


def squared_norm(x: Tensor) -> float:
    """`‖x‖²`, summed in float64 over blocks of fixed size, the same for any number of threads.

    0 only if every entry is.
    """
    flat = x.reshape(-1)
    total = 0.0
    for block in flat.split(BLOCK_ENTRIES):
        square = float(torch.dot(block, block))
        # Near the ends of float32; zeros are usual, and seen faster.
        if not 1e-30 < square < 1e30 and (square or block.any()):
            square = float(block.double().square().sum())
        total += square
    return total


def _stored(
    found: SVD, dtype: torch.dtype, bits: int | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """a, b as they will be read back, and the tensors for the file."""
    root = found.s.sqrt()
    a, b = root[:, None] * found.vh, found.u * root
    if bits is None:
        a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
        return a, b, {A: a, B: b}
    rows, columns = quantise(a.float(), bits), quantise(b.float().T.contiguous(), bits)
    stored = {A + Q: rows.q, A + SCALE: rows.scale, B + Q: columns.q, B + SCALE: columns.scale}
    return dequantise(rows), dequantise(columns).T.contiguous(), stored


def _nothing(
    out: int, in_: int, dtype: torch.dtype, bits: int | None, square: float, by_rank: bool
) -> Factors:
    a, b = torch.empty(0, in_, dtype=dtype), torch.empty(out, 0, dtype=dtype)
    lost = 1.0 if square else 0.0
    squares, captured = ((square,), (0.0,)) if by_rank else ((), ())
    return Factors(a, b, lost, lost, lost, _STORAGES[bits], {}, squares, captured)


def _squares(work: Tensor, a: Tensor, b: Tensor, square: float) -> list[float]:
    """`‖D - b a‖²` for the first 0, 1, ..., rank components."""
    if not SAFE[0] < square < SAFE[1]:  # products of three of its numbers leave float32
        work, a = work.double(), a.double()
    return _cumulative((work @ a.T).double(), a.double(), b.double(), square)


def _cumulative(product: Tensor, a: Tensor, b: Tensor, square: float) -> list[float]:
    """With `product = D aᵀ`: ‖D‖² - 2 Σ_i b_i·D a_i + Σ_ij (b_i·b_j)(a_i·a_j), rank by rank."""
    cross = (product * b).sum(dim=0).cumsum(0)
    gram = (b.T @ b) * (a @ a.T)
    own = gram.cumsum(0).cumsum(1).diagonal()
    return [square, *(square - 2 * cross + own).clamp_min(0).tolist()]


def _residual(work: Tensor, a: Tensor, b: Tensor) -> float:
    """`‖D - b a‖²`, some rows at a time."""
    rows = max(1, BLOCK_ENTRIES // work.shape[1])
    total = 0.0
    for part, left in zip(work.split(rows), b.split(rows), strict=True):
        total += squared_norm(torch.addmm(part, left, a, alpha=-1))
    return total


def _residual_of_product(found: SVD, a: Tensor, b: Tensor) -> float:
    """`‖U S Vᵀ - b a‖²` by QR of the stacked factors: no dense matrix is formed."""
    left = torch.cat([found.u.double() * found.s.double(), -b.double()], dim=1)
    right = torch.cat([found.vh.double(), a.double()])
    core = torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    return float(core.square().sum())


def _share(part: float, whole: float) -> float:
    return (max(part, 0.0) / whole) ** 0.5 if whole else 0.0
