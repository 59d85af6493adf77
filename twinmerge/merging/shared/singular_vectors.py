"""Merging matrices by their singular vectors: TSV-M, Iso-C and Iso-CTS.

A tensor of more than two axes is seen as out × rest, as for the factors of the exclusive part. What
is no matrix (vectors, scalars, tensors that are one row) is moved by the average of the task
vectors, as the papers do it. Singular values that are only rounding are left out, and with them
the arbitrary directions that belong to them: rows that training never touched stay the base's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import RecipeError
from ..exclusive import matrix_shape
from ..linalg import SVD, numerical_rank, svd
from .registry import shared_expert
from .task_arithmetic import task_arithmetic

Matrix: TypeAlias = Float[Tensor, "out in"]


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

    def update(base: Matrix, experts: Float[Tensor, "expert out in"]) -> Matrix:
        share = max(1, min(base.shape) // len(experts))
        return _recombined([_significant(expert - base).cut(share) for expert in experts])

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

    def update(base: Matrix, experts: Float[Tensor, "expert out in"]) -> Matrix:
        found = _significant(_sum(base, experts))
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
    `common_space_fraction` of `r = min(out, in)`. The part of each task matrix that is orthogonal
    to their left side gives its first `(r - k) / T` triplets, rounded down; the common ones get
    what is left over. All of them side by side make U, Σ and V, orthogonalised as in `tsv_m`; σ̄ is
    the mean of Σ. With one expert, or a fraction of 1, this is `iso_c`. Tensors that are no matrix
    are moved by λ times the average. λ is as in `iso_c`, and 0.8 is the authors' choice.

    Source: Marczak et al., No Task Left Behind, arXiv:2502.04959. Raises `RecipeError` if
    `common_space_fraction` is not in [0, 1].
    """
    if not 0 <= common_space_fraction <= 1:
        raise RecipeError(
            "parameters.common_space_fraction: expected the share of directions that is common, "
            f"between 0 and 1, got {common_space_fraction:g}. 0.8 is the paper's."
        )

    def update(base: Matrix, experts: Float[Tensor, "expert out in"]) -> Matrix:
        shortest = min(base.shape)
        # The rounding is against 0.29 * 100 = 28.999...
        own = (shortest - int(common_space_fraction * shortest + 1e-9)) // len(experts)
        common = _significant(_sum(base, experts)).cut(shortest - own * len(experts))
        parts = [common]
        for delta in (expert - base for expert in experts):
            rest = delta - common.u @ (common.u.T @ delta)
            # what the projection leaves behind by rounding is no direction of the task's
            floor = 10 * torch.finfo(delta.dtype).eps * float(torch.linalg.vector_norm(delta))
            parts.append(_significant(rest, floor).cut(own))
        mean = _mean(torch.cat([part.s for part in parts]))
        flat = [SVD(part.u, torch.full_like(part.s, mean), part.vh) for part in parts]
        return _recombined(flat)

    return _by_matrix(base, experts, lambda_, update)


def orthonormal(x: Matrix) -> Matrix:
    """The nearest matrix with orthonormal columns: the unitary factor of the polar decomposition.

    Singular values below √ε of the largest count as 0: columns that agree up to rounding have no
    difference that could be made orthogonal, and the factor is a partial isometry.
    """
    found = svd(x)
    rank = int((found.s > torch.finfo(x.dtype).eps ** 0.5 * found.s[0]).sum())
    return found.u[:, :rank] @ found.vh[:rank]


def _recombined(parts: list[SVD]) -> Matrix:
    """`U⊥ Σ V⊥ᵀ` of the triplets of all parts."""
    u, v = torch.cat([part.u for part in parts], 1), torch.cat([part.vh for part in parts]).T
    return (orthonormal(u) * torch.cat([part.s for part in parts])) @ orthonormal(v).T


def _significant(matrix: Matrix, floor: float = 0.0) -> SVD:
    """Its singular triplets, but for those that rounding makes; maybe none."""
    found = svd(matrix)
    rank = numerical_rank(found.s, *matrix.shape)
    return found.cut(min(rank, int((found.s > floor).sum())))


def _mean(s: Float[Tensor, " rank"]) -> float:
    return float(s.mean()) if len(s) else 0.0


def _sum(base: Matrix, experts: Float[Tensor, "expert out in"]) -> Matrix:
    total = torch.zeros_like(base)
    for expert in experts:
        total += expert - base
    return total


def _by_matrix(
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    lambda_: float,
    update: Callable[[Matrix, Float[Tensor, "expert out in"]], Matrix],
) -> Float[Tensor, " *shape"]:
    """`W_0 + λ · update`, or `W_0` plus λ times the average of the task vectors."""
    view = matrix_shape(tuple(base.shape))
    if view is None:
        return task_arithmetic(base, experts, weight=1 / len(experts), lambda_=lambda_)
    with _one_thread():
        moved = update(base.reshape(view), experts.reshape(len(experts), *view))
    return base + lambda_ * moved.view(base.shape)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bits of a matrix product or SVD depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
