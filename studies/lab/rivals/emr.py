r"""EMR-Merging: one elected task vector for all, and a mask and a scale of each expert.

    elect    γ = sgn(Σ_t τ_t),  ε = the largest |τ_t| of those with that sign,  τ = γ ⊙ ε
    mask     M_t = (τ_t ⊙ τ > 0)
    rescale  λ_t = Σ|τ_t| / Σ|M_t ⊙ τ|,  over all weights
    expert   W_0 + λ_t M_t ⊙ τ

All tensors are one long vector, gains and biases too; there is nothing to choose. The task must be
known. The pretrained model is needed beside τ (where a mask is 0 the weight is pretrained), so τ
is an extra shared tensor, in float16; a mask is one bit a weight, a scale float32.

Source: Huang et al., EMR-Merging, arXiv:2405.17461, section 3.2. Our implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .packed import Kept, Packed, Shapes, Vector, flat, from_bits, shaped, to_bits

TITLE = "EMR-Merging"
SOURCE = "https://arxiv.org/abs/2405.17461"


def elect(vectors: Sequence[Float[Tensor, " weight"]]) -> Float[Tensor, " weight"]:
    """The sign of the sum with the largest magnitude that has it."""
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total += vector
    sign = total.sign()
    largest = torch.zeros_like(total)
    for vector in vectors:
        torch.maximum(largest, vector * sign, out=largest)
    return sign * largest


def mask(
    vector: Float[Tensor, " weight"], unified: Float[Tensor, " weight"]
) -> Bool[Tensor, " weight"]:
    return vector * unified > 0


def rescale(
    vector: Float[Tensor, " weight"], masked: Float[Tensor, " weight"]
) -> Float[Tensor, ""]:
    """λ; 0 where the mask leaves nothing, as for an expert that changed nothing."""
    size = masked.abs().sum()
    return vector.abs().sum() / size if size > 0 else torch.zeros(())


def pack(vectors: Mapping[str, Vector]) -> Kept:
    """Masks and scales are made for τ as it is stored."""
    rows = {task: flat(vector) for task, vector in vectors.items()}
    stored = elect(list(rows.values())).half()
    unified = stored.float()
    experts: dict[str, Packed] = {}
    for task, row in rows.items():
        kept = mask(row, unified)
        experts[task] = {"mask": to_bits(kept), "scale": rescale(row, kept * unified)}
    return Kept(experts, {"unified": stored})


def unpack(shared: Packed, packed: Packed, shapes: Shapes) -> Vector:
    unified = shared["unified"].float()
    return shaped(packed["scale"] * from_bits(packed["mask"], len(unified)) * unified, shapes)
