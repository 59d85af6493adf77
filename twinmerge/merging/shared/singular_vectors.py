"""Merging matrices by their singular vectors: TSV-M, Iso-C and Iso-CTS.

A tensor of more than two axes is seen as out × rest, as for the factors of the exclusive part. What
is no matrix (vectors, scalars, tensors that are one row) is moved by the average of the task
vectors, as the papers do it. Singular values that are only rounding are left out, and with them
the arbitrary directions that belong to them: rows that training never touched stay the base's.

All of it runs in float64: side by side, the singular vectors of all tasks are nearly dependent, and
making them orthogonal multiplies their errors by 10,000.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import RecipeError
from ..exclusive import matrix_shape
from ..linalg import SVD, numerical_rank, svd
from ..threads import one_thread
from .registry import shared_expert
from .task_arithmetic import task_arithmetic

Matrix: TypeAlias = Float[Tensor, "out in"]

SAME = 1e-3
"""Directions side by side are the same, but for the rounding of float32 weights, where they differ
by less than this share of what directions at random do."""


@shared_expert("tsv_m", paper="https://arxiv.org/abs/2412.00081")
@torch.no_grad()
def tsv_m(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    lambda_: float = 1.0,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + λ U⊥ Σ V⊥ᵀ`, from the leading singular triplets of all task matrices.

    Of each `W_t - W_0 = U_t Σ_t V_tᵀ`, the first `min(out, in) / T` triplets are kept (rounded
    down, at least one). Side by side they make U, Σ and V; `U⊥` and `V⊥` are the nearest matrices
    with orthonormal columns (Procrustes: `P Qᵀ` of `U = P D Qᵀ`), so that no task's directions
    interfere with another's. Directions that experts share, up to rounding, count once. An expert
    alone comes back whole. Tensors that are no matrix are moved by λ times the average.

    λ is the paper's α; 1 adds what was merged as it is.

    Source: Gargiulo et al., Task Singular Vectors, arXiv:2412.00081. Convolutions, which the
    authors' code averages, are matrices here.
    """

    def update(base: Matrix, experts: Float[Tensor, "expert out in"], floor: float) -> Matrix:
        share = max(1, min(base.shape) // len(experts))
        return _recombined([_significant(_change(base, x), floor).cut(share) for x in experts])

    return _by_matrix(base, experts, lambda_, update)


@shared_expert("iso_c", paper="https://arxiv.org/abs/2502.04959")
@torch.no_grad()
def iso_c(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    lambda_: float = 1.0,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + λ σ̄ U Vᵀ`, with `U Σ Vᵀ = Σ_t (W_t - W_0)` and σ̄ the mean of Σ.

    All directions of the summed task matrices count alike, so that no task's dominate. The mean is
    over the directions that the sum has; the paper's is over `min(out, in)`, which is the same
    where the sum has full rank. Tensors that are no matrix are moved by λ times the average.

    λ is the paper's α, which its authors choose on validation data for each number of tasks; 1 adds
    what was merged as it is.

    Source: Marczak et al., No Task Left Behind, arXiv:2502.04959.
    """

    def update(base: Matrix, experts: Float[Tensor, "expert out in"], floor: float) -> Matrix:
        found = _significant(_sum(base, experts), len(experts) ** 0.5 * floor)
        return (found.u * _mean(found.s)) @ found.vh

    return _by_matrix(base, experts, lambda_, update)


@shared_expert("iso_cts", paper="https://arxiv.org/abs/2502.04959")
@torch.no_grad()
def iso_cts(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    *,
    common_space_fraction: float = 0.8,
    lambda_: float = 1.0,
) -> Float[Tensor, " *shape"]:
    """`W_s = W_0 + λ σ̄ U⊥ V⊥ᵀ`, from directions that tasks have in common and directions of each.

    The first `k` singular triplets of `Σ_t (W_t - W_0)` are common, with k the fraction
    `common_space_fraction` of `r = min(out, in)`, rounded down. The part of each task matrix that
    is orthogonal to their left side gives its first `(r - k) / T` triplets, rounded to the nearest
    (halves to even); k becomes what these leave over. All of them side by side make U, Σ and V,
    orthogonalised as in `tsv_m`; σ̄ is the mean of Σ. With one expert, or a fraction of 1, this is
    `iso_c`. Tensors that are no matrix are moved by λ times the average. λ is as in `iso_c`, and
    0.8 is the authors' choice.

    The authors' code divides the directions in the same way, but lets the tasks have more than r,
    and k be negative. Here each has `r / T` at most, rounded down.

    Source: Marczak et al., No Task Left Behind, arXiv:2502.04959. Raises `RecipeError` if
    `common_space_fraction` is not in [0, 1].
    """
    if not 0 <= common_space_fraction <= 1:
        raise RecipeError(
            "parameters.common_space_fraction: expected the share of directions that is common, "
            f"between 0 and 1, got {common_space_fraction:g}. 0.8 is the paper's."
        )

    def update(base: Matrix, experts: Float[Tensor, "expert out in"], floor: float) -> Matrix:
        count, shortest = len(experts), min(base.shape)
        # The rounding is against 0.29 * 100 = 28.999...
        left = shortest - int(common_space_fraction * shortest + 1e-9)
        own = min(round(left / count), shortest // count)
        floor *= count**0.5
        common = _significant(_sum(base, experts), floor).cut(shortest - own * count)
        parts = [common]
        for delta in (_change(base, expert) for expert in experts if own):
            shadow = common.u.T @ delta
            # Rounding of the sum turns its weak directions most, and what a task has there leaks.
            leaks = torch.linalg.vector_norm(shadow, dim=1) / common.s
            rest = delta - common.u @ shadow
            parts.append(_significant(rest, floor * max([1.0, *leaks.tolist()])).cut(own))
        mean = _mean(torch.cat([part.s for part in parts]))
        flat = [SVD(part.u, torch.full_like(part.s, mean), part.vh) for part in parts]
        return _recombined(flat)

    return _by_matrix(base, experts, lambda_, update)


def orthonormal(x: Matrix) -> Matrix:
    """The nearest matrix with orthonormal columns: the unitary factor of the polar decomposition.

    The columns are unit vectors, in float64. Those that agree up to rounding have no difference
    that could be made orthogonal: the factor is then a partial isometry. What is no rounding
    depends on how many columns share the space: p of them at random in n dimensions have singular
    values from `√n - √p` to `√n + √p`, relative to each other, and down to about `1/n` where they
    fill it. Below `SAME` of that, singular values count as 0.
    """
    found = svd(x)
    used = int((x != 0).any(dim=1).sum())
    p, n = sorted((used, x.shape[1]))
    random = max((n**0.5 - p**0.5) / (n**0.5 + p**0.5), 1 / n) if n else 0
    rank = int((found.s > SAME * random * found.s[0]).sum())
    return found.u[:, :rank] @ found.vh[:rank]


def _recombined(parts: list[SVD]) -> Matrix:
    """`U⊥ Σ V⊥ᵀ` of the triplets of all parts."""
    u, v = torch.cat([part.u for part in parts], 1), torch.cat([part.vh for part in parts]).T
    return (orthonormal(u) * torch.cat([part.s for part in parts])) @ orthonormal(v).T


def _significant(matrix: Matrix, floor: float) -> SVD:
    """Its singular triplets, but for those that rounding makes; maybe none."""
    found = svd(matrix)
    rank = numerical_rank(found.s, *matrix.shape)
    return found.cut(min(rank, int((found.s > floor).sum())))


def _rounding(weights: Matrix) -> float:
    """What the singular values of a task matrix may be because its weights are float32.

    These are off by up to `ε/2` of themselves. A matrix of independent errors of sizes `e_ij` has
    singular values up to about the largest norm of a row of e plus that of a column (Bandeira and
    van Handel, arXiv:1408.6185). With ε for `e / |W|`, that is about 5 times what rounding makes.
    """
    norms = (torch.linalg.vector_norm(weights, dim=dim) for dim in (0, 1))
    return torch.finfo(torch.float32).eps * sum(float(norm.max()) for norm in norms)


def _mean(s: Float[Tensor, " rank"]) -> float:
    return float(s.mean()) if len(s) else 0.0


def _sum(base: Matrix, experts: Float[Tensor, "expert out in"]) -> Matrix:
    total = torch.zeros_like(base, dtype=torch.float64)
    for expert in experts:
        total += _change(base, expert)
    return total


def _change(base: Matrix, expert: Matrix) -> Matrix:
    """The task matrix, in float64."""
    return expert.to(torch.float64, copy=True).sub_(base)


def _by_matrix(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    lambda_: float,
    update: Callable[[Matrix, Float[Tensor, "expert out in"], float], Matrix],
) -> Float[Tensor, " *shape"]:
    """`W_0 + λ · update`, or `W_0` plus λ times the average of the task vectors.

    `update` gets matrices, and the floor of one task's singular values; it gives float64.
    """
    view = matrix_shape(tuple(base.shape))
    if view is None:
        return task_arithmetic(base, experts, weight=1 / len(experts), lambda_=lambda_)
    ground, stacked = base.reshape(view), experts.reshape(len(experts), *view)
    changed = torch.stack([(expert != ground).any(dim=1) for expert in stacked]).any(dim=0)
    if not changed.any():
        return base.clone()
    with one_thread():
        floor = max(_rounding(weights[changed]) for weights in (ground, *stacked))
        moved = update(ground, stacked, floor)
    return base + (lambda_ * moved).to(base).view(base.shape)
