r"""TALL masks: one multi-task vector for all, and a mask of each expert.

    m_t = 1{|τ_t| ≥ λ_t |τ - τ_t|},   expert  W_0 + m_t ⊙ τ

τ is the plain sum of all task vectors (task arithmetic), or that of TIES: the largest fifth of
each task vector, over all its tensors, then the sum of what agrees with the sign of the total.
λ_t is chosen for each task on its validation rows, from the authors' `LAMBDAS`. All tensors are one
long vector, gains and biases too. The task must be known.

The pretrained model is needed beside τ, so τ is an extra shared tensor, in float16; a mask is one
bit a weight. The authors compress masks further; a record says what `zlib` makes of the files.

Source: Wang et al., Localizing Task Information for Improved Model Merging and Compression,
arXiv:2405.07813. λ's values, the fifth and the sum for TIES are from the authors' code
(nik-dim/tall_masks), read, not copied. Our implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twinmerge.merging.sparse import count_of

from .packed import Kept, Packed, Shapes, Vector, flat, from_bits, shaped, to_bits

SOURCE = "https://arxiv.org/abs/2405.07813"
LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)
TRIMMED_TO = 0.2


def summed(vectors: Sequence[Float[Tensor, " weight"]]) -> Float[Tensor, " weight"]:
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total += vector
    return total


def ties(
    vectors: Sequence[Float[Tensor, " weight"]], density: float = TRIMMED_TO
) -> Float[Tensor, " weight"]:
    trimmed = [trim(vector, density) for vector in vectors]
    sign = summed(trimmed).sign()
    return summed([vector * (vector * sign > 0) for vector in trimmed])


def trim(vector: Float[Tensor, " weight"], density: float) -> Float[Tensor, " weight"]:
    """The largest `density` of the values, the others 0. Equal ones at the border all stay."""
    size = vector.abs()
    dropped = len(vector) - count_of(len(vector), density)
    return vector if dropped == 0 else vector * (size > size.kthvalue(dropped).values)


VECTORS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "TALL masks + task arithmetic": summed,
    "TALL masks + TIES": ties,
}
"""Title -> how τ is made."""


def mask(
    vector: Float[Tensor, " weight"], multi: Float[Tensor, " weight"], lambda_: float
) -> Bool[Tensor, " weight"]:
    return vector.abs() >= lambda_ * (multi - vector).abs()


def pack(title: str, vectors: Mapping[str, Vector], lambdas: Mapping[str, float]) -> Kept:
    """Masks are made for τ as it is stored."""
    rows = {task: flat(vector) for task, vector in vectors.items()}
    stored = VECTORS[title](list(rows.values())).half()
    multi = stored.float()
    masks = {task: mask(row, multi, lambdas[task]) for task, row in rows.items()}
    return Kept({task: {"mask": to_bits(kept)} for task, kept in masks.items()}, {"multi": stored})


def unpack(shared: Packed, packed: Packed, shapes: Shapes) -> Vector:
    multi = shared["multi"].float()
    return shaped(from_bits(packed["mask"], len(multi)) * multi, shapes)
