"""Task vectors of which entries were dropped: rescaled, then added up or merged by elected signs.

What TIES, DARE, DELLA and Model Breadcrumbs share; they differ in which entries stay.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .blocks import Change, add, l1_norm
from .registry import weighted_sum
from .task_arithmetic import task_arithmetic_coefficients

Keep: TypeAlias = Callable[[Float[Tensor, " block"], int], Bool[Tensor, " block"]]
"""Which entries of a block of a task vector stay. It is told at which flat position the block
begins; blocks come in order, and again from 0 as often as needed."""

TOO_SMALL_TO_RESCALE = 1e-7
"""Below this L1 norm a change is left as it is, as in mergekit: the ratio would be noise."""


@dataclass(frozen=True)
class Dropped:
    """A task vector and which of its entries stay: iterating gives what stays, block by block."""

    change: Change
    keep: Keep | None = None
    """None: all of them, and nothing to rescale."""
    factor: float = 1.0

    def __iter__(self) -> Iterator[Float[Tensor, " block"]]:
        start = 0
        for delta in self.change:
            if self.keep is None:
                yield delta
            else:
                stays = delta * self.keep(delta, start)
                yield stays if self.factor == 1 else self.factor * stays
            start += len(delta)


def rescaled(vectors: Sequence[Dropped]) -> list[Dropped]:
    """What stays of each, times `‖δ‖₁ / ‖m ⊙ δ‖₁`."""
    return [vector if vector.keep is None else _rescaled(vector) for vector in vectors]


def _rescaled(vector: Dropped) -> Dropped:
    before, after = l1_norm(vector.change), l1_norm(vector)
    if min(before, after) < TOO_SMALL_TO_RESCALE:
        return vector
    return replace(vector, factor=before / after)


def add_up(
    base: Float[Tensor, " *shape"],
    vectors: Sequence[Dropped],
    weight: Float[Tensor, " expert"],
    *,
    normalize: bool,
    lambda_: float,
) -> Float[Tensor, " *shape"]:
    """`W_0 + λ Σ_t w_t δ_t`, with `normalize` divided by `Σ w`."""
    c = task_arithmetic_coefficients(weight, normalize=normalize, lambda_=lambda_)
    return add(base, (weighted_sum(c, deltas) for deltas in zip(*vectors, strict=True)))


def elect(
    base: Float[Tensor, " *shape"],
    vectors: Sequence[Dropped],
    weight: Float[Tensor, " expert"],
    *,
    normalize: bool,
    lambda_: float,
) -> Float[Tensor, " *shape"]:
    """`W_0 + λ · elected(w_t δ_t)`."""
    blocks = (lambda_ * elected(deltas, weight, normalize) for deltas in zip(*vectors, strict=True))
    return add(base, blocks)


def elected(
    deltas: Sequence[Float[Tensor, " *shape"]], weight: Float[Tensor, " expert"], normalize: bool
) -> Float[Tensor, " *shape"]:
    """Sum of the weighted deltas whose sign is the sign of that sum over all experts.

    A sum of exactly 0 counts as positive. `normalize` divides by the weights of those that
    agreed, entry by entry; where nobody did, the result is 0.
    """
    sign = majority(weighted_sum(weight, deltas))
    merged, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for w, delta in zip(weight, deltas, strict=True):
        weighted = w * delta
        agrees = weighted.sign() == sign
        merged += weighted * agrees
        if normalize:
            divisor += w * agrees
    return merged / (divisor + (divisor == 0)) if normalize else merged


def majority(total: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """1 where the total is positive or 0, and -1 elsewhere."""
    return 2.0 * (total >= 0).to(total.dtype) - 1.0
