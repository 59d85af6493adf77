"""Walking base and experts in step: one tensor at a time, checked as it is merged."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..checkpoint import UNCHANGED, LowRank, Unchanged
from ..errors import CheckpointError, NotFinite
from .plan import Plan
from .planned import Planned

# A fine-tune moves its matrices by a few percent of their norm; two unrelated models of equal shape
# and scale are √2 apart. Half is far beyond the one and well below the other.
UNRELATED_DRIFT = 0.5


@dataclass(frozen=True)
class Step:
    """One tensor of the base and what the experts have in its place, as stored.

    Either `vectors` (every expert's task vector is known in factors, or is zero) or `experts` (all
    of them dense) is set. An expert that leaves the tensor alone is the very tensor `base`.
    """

    tensor: Planned
    base: Float[Tensor, " *shape"]
    experts: list[Float[Tensor, " *shape"]] | None = None
    vectors: list[LowRank | None] | None = None
    """None in the list: that expert leaves the tensor as it is."""


def read_step(plan: Plan, tensor: Planned, *, affine: bool) -> Step:
    """Read one tensor of the base and of every expert.

    With `affine`, task vectors known in factors stay so (see `Step`). Raises `NotFinite` for those;
    dense tensors are checked while they are merged.
    """
    base = plan.base.read(tensor.name)
    vectors = [expert.task_vector(tensor.name) for expert in plan.experts]
    known: list[LowRank | None] = []
    for expert, vector in zip(plan.experts, vectors, strict=True):
        if isinstance(vector, LowRank):
            for part in (vector.a, vector.b):
                check_finite(part, tensor.name, f"expert '{expert.name}'", expert.reference)
            known.append(vector)
        elif isinstance(vector, Unchanged):
            known.append(None)
    held = [vector for vector in known if vector is not None]
    stacked = sum(vector.a.shape[0] for vector in held)
    # An adapter may see a kernel otherwise than we do.
    fits = all((len(v.b), v.a.shape[1]) == tensor.matrix for v in held)
    # All of a difference is more than its factors where the shared expert is rounded.
    cut = plan.keep.cut
    rounded = (cut.full or cut.energy is not None) and tensor.dtype.itemsize < 4
    # Beyond half of the short side the dense path is as cheap, and handles everything.
    if affine and len(known) == len(vectors) and stacked and fits and not rounded:
        if tensor.matrix and 2 * stacked <= min(tensor.matrix):
            return Step(tensor, base, vectors=known)
    experts = [
        base if vector is UNCHANGED else expert.read(tensor.name)
        for expert, vector in zip(plan.experts, vectors, strict=True)
    ]
    return Step(tensor, base, experts=experts)


def read_heads(plan: Plan, tensor: Planned) -> list[Tensor]:
    """Every expert's own head tensor, as stored. Raises `NotFinite`."""
    heads = []
    for expert in plan.experts:
        head = expert.read(tensor.name)
        check_finite(head, tensor.name, f"expert '{expert.name}'", expert.reference)
        heads.append(head)
    return heads


def check_finite(tensor: Tensor, name: str, whose: str, reference: str) -> None:
    """Raise `NotFinite` if the tensor holds NaN or infinity."""
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.bfloat16)  # 8-bit floats know no arithmetic
    # One pass without a mask; a sum may overflow although all entries are finite.
    if torch.isfinite(tensor.sum(dtype=max(tensor.dtype, torch.float32, key=lambda d: d.itemsize))):
        return
    bad = ~torch.isfinite(tensor)
    if bad.any():
        raise NotFinite(
            f"{name}: expected finite numbers, {whose} ({reference}) has {int(bad.sum()):,} NaN or "
            f"infinite of {tensor.numel():,}.\n  The checkpoint is broken (a diverged or "
            "overflowed training run?): save it again or leave it out."
        )


def check_step(plan: Plan, step: Step, work: torch.dtype) -> None:
    """Raise `NotFinite` for the model of this step that is not finite in `work`.

    Called when a sum of squares is not finite, so it raises in any case.
    """
    name = step.tensor.name
    check_finite(step.base.to(work), name, "the base", plan.base.reference)
    for expert, own in zip(plan.experts, step.experts or (), strict=bool(step.experts)):
        check_finite(own.to(work), name, f"expert '{expert.name}'", expert.reference)
    raise NotFinite(
        f"{name}: holds numbers so large that their squares are no numbers any more.\n  The "
        "checkpoint is broken (a diverged training run?): save it again or leave it out."
    )


def pairs(experts: int) -> set[tuple[int, int]]:
    """All pairs of so many experts, by their places."""
    return set(itertools.combinations(range(experts), 2))


def unlike(
    alike: Iterable[tuple[int, int]], tensors: Sequence[Tensor | None]
) -> list[tuple[int, int]]:
    """Those pairs of experts that differ in a tensor. None: left as the base has it."""
    found = []
    for one, other in alike:
        x, y = tensors[one], tensors[other]
        same = x is y or (
            x is not None and y is not None and x.shape == y.shape and x.dtype == y.dtype
            and torch.equal(_comparable(x), _comparable(y))
        )  # fmt: skip
        if not same:
            found.append((one, other))
    return found


def _comparable(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def drift_warnings(drift: dict[str, float]) -> list[str]:
    """What looks odd about `‖W_t - W_0‖ / ‖W_0‖` over all matrices, by expert."""
    warnings = []
    for name, moved in drift.items():
        if moved > UNRELATED_DRIFT:
            warnings.append(
                f"expert '{name}': its matrices are {moved:.2f} of the base's norm away from "
                "the base; fine-tuning moves them by a few hundredths, two unrelated models "
                "are about 1.4 apart. Was it tuned from another base?"
            )
        elif moved == 0.0:
            warnings.append(f"expert '{name}': all its matrices equal the base's.")
    return warnings


def refuse_twins(names: Sequence[str], alike: set[tuple[int, int]]) -> None:
    """Raise `CheckpointError` if two experts were equal in every tensor."""
    if alike:
        one, other = (names[index] for index in min(alike))
        raise CheckpointError(
            f"experts '{one}' and '{other}': expected two different models, but all their "
            f"tensors are equal.\n  The same expert was given twice: leave one of them out."
        )
