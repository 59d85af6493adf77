r"""T-Switch: a task vector as a mask, signs and one scale for each tensor.

    τ_t ≈ λ · a ⊙ p,   a = 1{|τ_t| is large},  p = sgn(τ_t),  λ = ‖a ⊙ τ_t‖ / ‖a‖

Of each tensor's positive values the largest `density` is kept, and of its negative ones. The task
must be known (we leave out Auto-Switch, which looks for it among stored examples). A mask is one
bit a weight, a sign one bit a weight that is kept, a scale float32. No shared tensor beside the
pretrained model.

Source: Qi et al., Less is More: Efficient Model Merging with Binary Task Switch, arXiv:2412.00054.
That thresholds and scales are for each tensor and that λ is made from what is kept is from the
authors' code (lfy-123/Binary-Task-Switch), read, not copied. Our implementation.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twinmerge.merging.sparse import count_of

from .packed import Packed, Shapes, Vector, flat, from_bits, shaped, to_bits

TITLE = "T-Switch"
SOURCE = "https://arxiv.org/abs/2412.00054"


def activation(x: Float[Tensor, " *shape"], density: float) -> Bool[Tensor, " *shape"]:
    """Where the largest `density` of the positive and of the negative values are."""
    kept = torch.zeros_like(x, dtype=torch.bool)
    for side in (x, -x):
        values = side[side > 0]
        if len(values):
            dropped = len(values) - count_of(len(values), density)
            least = values.kthvalue(dropped).values if dropped else 0.0
            kept |= (side > 0) & (side > least)
    return kept


def scale(x: Float[Tensor, " *shape"], kept: Bool[Tensor, " *shape"]) -> Float[Tensor, ""]:
    """λ; 0 where nothing is kept, as in a tensor that this expert did not change."""
    return (x * kept).norm() / kept.sum().clamp(min=1).sqrt()


def pack(vector: Vector, density: float) -> Packed:
    kept = {name: activation(x, density) for name, x in vector.items()}
    return {
        "activation": to_bits(flat(kept)),
        "polarity": to_bits(flat(vector)[flat(kept)] > 0),
        "scale": torch.stack([scale(x, kept[name]) for name, x in vector.items()]),
    }


def unpack(packed: Packed, shapes: Shapes) -> Vector:
    kept = from_bits(packed["activation"], sum(shape.numel() for shape in shapes.values()))
    signs = torch.zeros(len(kept))
    signs[kept] = 2.0 * from_bits(packed["polarity"], int(kept.sum())) - 1.0
    parts = shaped(signs, shapes)
    return {name: x * parts[name] for name, x in zip(shapes, packed["scale"], strict=True)}
