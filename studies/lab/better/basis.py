r"""A basis shared by the experts with small cores: `W_t - W_s ≈ U M_t Vᵀ`.

For one matrix, U (out, R) holds the leading left singular vectors of all experts' differences side
by side, V (in, R) the leading right ones of them stacked; both are stored once. Each expert has a
core M_t (R, R), the least-squares one for the bases as they were stored (rounded):
`M_t = U⁺ D_t V⁺ᵀ`, which is `Uᵀ D_t V` for orthonormal ones.

This is the higher-order SVD of the experts' differences without a cut in the direction of the
experts (De Lathauwer et al., A Multilinear Singular Value Decomposition, 2000).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from twinmerge.merging.linalg import truncated_svd


@dataclass(frozen=True)
class Basis:
    """Of one matrix, for all experts; rows are the vectors."""

    u: Float[Tensor, "left out"]
    v: Float[Tensor, "right in"]


def joint(differences: Sequence[Float[Tensor, "out in"]], size: int) -> Basis:
    """The leading `size` directions of each side, or all where there are fewer."""
    beside, stacked = (torch.cat(list(differences), dim=dim) for dim in (1, 0))
    u = truncated_svd(beside, min(size, *beside.shape)).u
    vh = truncated_svd(stacked, min(size, *stacked.shape)).vh
    return Basis(u.T.contiguous(), vh.contiguous())


def cores(
    basis: Basis, differences: Sequence[Float[Tensor, "out in"]]
) -> list[Float[Tensor, "left right"]]:
    """Of each expert."""
    left = torch.linalg.pinv(basis.u.double()).T
    right = torch.linalg.pinv(basis.v.double())
    return [(left @ difference.double() @ right).float() for difference in differences]


def product(basis: Basis, core: Float[Tensor, "left right"]) -> Float[Tensor, "out in"]:
    return basis.u.T @ core @ basis.v
