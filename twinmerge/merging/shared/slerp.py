"""Spherical interpolation between two models."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import Change, add, blocks, total
from .registry import shared_expert

NEARLY_PARALLEL = 0.9995
"""Above this cosine, of either sign, the interpolation is linear (mergekit's limit)."""

NEGLIGIBLE_NORM = 1e-8
"""Not divided by (mergekit's limit)."""


@shared_expert("slerp", paper="https://doi.org/10.1145/325334.325242", experts=(1, 2), ordered=True)
@torch.no_grad()
def slerp(
    base: Float[Tensor, " *shape"], experts: Float[Tensor, " expert *shape"], *, t: float = 0.5
) -> Float[Tensor, " *shape"]:
    """`W_s = sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b`, with θ the angle between a and b.

    With one expert, `a` is the base and `b` the expert: mergekit's form, where one of the two
    models is the `base_model`. With two experts, `a` is the first and `b` the second, and the base
    has no part in it. `t` is 0 at `a` and 1 at `b`. Each tensor is one vector; where a and b are
    nearly parallel, as fine-tunes of one base are, `W_s = a + t (b - a)`.

    Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; semantics of
    mergekit 0.1.5, where `t` is required.
    """
    a, b = (base, experts[0]) if len(experts) == 1 else (experts[0], experts[1])
    cosine = _cosine(a, b)
    if abs(cosine) > NEARLY_PARALLEL:
        return add(a, (t * delta for delta in Change(a, b)))
    angle = math.acos(cosine)
    from_a, from_b = (math.sin(part * angle) / math.sin(angle) for part in (1 - t, t))
    # As a sum of a and b - a: what the two have in common is then no difference of large numbers.
    both = zip(blocks(a), Change(a, b), strict=True)
    return add(a, ((from_a + from_b - 1) * x + from_b * delta for x, delta in both))


def _cosine(a: Float[Tensor, " *shape"], b: Float[Tensor, " *shape"]) -> float:
    """Summed in float64; a norm near 0 counts as 1."""
    aa = ab = bb = 0.0
    for x, y in zip(blocks(a), blocks(b), strict=True):
        x, y = x.double(), y.double()
        aa, ab, bb = aa + total(x * x), ab + total(x * y), bb + total(y * y)
    norms = [norm if norm > NEGLIGIBLE_NORM else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb))]
    return min(1.0, max(-1.0, ab / norms[0] / norms[1]))
