r"""Activation-aware SVD: the factors that change a layer's outputs least, not its weights.

For inputs x with `C = E x xᵀ`, the squared error of the outputs is
`E‖(D - B A) x‖² = ‖(D - B A) L‖²` for any L with `L Lᵀ = C`, so the best B A of a rank is
`SVD_r(D L) L⁻¹`. L is the Cholesky factor; `C^½` gives the same product. Where the bias is
corrected a constant difference costs nothing, and C is the covariance. A ridge of
`ridge · trace(C) / in` keeps directions that a few inputs did not show.

Sources: Yuan et al., ASVD, arXiv:2312.05821, for the idea (a diagonal C); Wang et al., SVD-LLM,
arXiv:2403.07378, for the Cholesky factor.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from twinmerge.merging.linalg import SVD, svd


def aware(difference: Float[Tensor, "out in"], second: Float[Tensor, "in in"], ridge: float) -> SVD:
    """Triplets `u, s, vh` with `vh = Vᵀ L⁻¹`: rows of `vh` are not orthonormal, `s` are the
    singular values of `D L`, and cut anywhere `u · s @ vh` is the best of its rank."""
    c = second.double()
    c = c + ridge * c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype)
    lower = torch.linalg.cholesky(c)
    found = svd(difference.double() @ lower)
    vh = torch.linalg.solve_triangular(lower, found.vh, upper=False, left=False)
    return SVD(found.u.float(), found.s.float(), vh.float())
