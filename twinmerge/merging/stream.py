"""Walking base and experts in step: one tensor at a time, checked as it is read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..checkpoint import UNCHANGED, LowRank, Unchanged
from ..errors import CheckpointError, NotFinite
from .plan import Plan, Planned

# A fine-tune moves its matrices by a few percent of their norm; two unrelated models of equal shape
# and scale are √2 apart. Half is far beyond the one and well below the other.
UNRELATED_DRIFT = 0.5


@dataclass(frozen=True)
class Step:
    """One tensor of the base and what the experts have in its place.

    Either `vectors` (every expert's task vector is known in factors, or is zero) or `experts` (all
    of them dense, stacked) is set, or neither: every expert has the base's own values.
    """

    tensor: Planned
    base: Float[Tensor, " *shape"]
    experts: Float[Tensor, " expert *shape"] | None = None
    vectors: list[LowRank | None] | None = None
    """None in the list: that expert leaves the tensor as it is."""


@dataclass
class Drift:
    """How far every expert moved from the base, and which of them are the same model."""

    names: list[str]
    moved: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    alike: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.moved = dict.fromkeys(self.names, 0.0)
        self.alike = set(itertools.combinations(range(len(self.names)), 2))

    def see(self, step: Step) -> None:
        if step.experts is not None:
            self._compare(list(step.experts))
        elif step.vectors is not None:
            self._compare([None if v is None else torch.cat([v.b.T, v.a], 1) for v in step.vectors])
        if step.tensor.matrix is None:
            return
        self.norm += float(torch.linalg.vector_norm(step.base, dtype=torch.float64)) ** 2
        for index, name in enumerate(self.names):
            if step.experts is not None:
                delta = step.experts[index] - step.base
                self.moved[name] += float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
            elif step.vectors is not None and (vector := step.vectors[index]) is not None:
                # ‖B A‖² = tr((BᵀB)(A Aᵀ))
                b, a = vector.b.double(), vector.a.double()
                self.moved[name] += float(((b.T @ b) * (a @ a.T).T).sum())

    def see_heads(self, tensors: list[Tensor]) -> None:
        self._compare(list(tensors))

    def _compare(self, tensors: list[Tensor | None]) -> None:
        for one, other in list(self.alike):
            x, y = tensors[one], tensors[other]
            same = x is y if x is None or y is None else x.shape == y.shape and torch.equal(x, y)
            if not same:
                self.alike.discard((one, other))

    def relative(self, name: str) -> float:
        """‖W_t - W_0‖ / ‖W_0‖ over all matrices."""
        return (self.moved[name] / self.norm) ** 0.5 if self.norm else 0.0

    def check(self) -> list[str]:
        """Warnings. Raises `CheckpointError` if two experts are one and the same."""
        if self.alike:
            one, other = (self.names[index] for index in min(self.alike))
            raise CheckpointError(
                f"experts '{one}' and '{other}': expected two different models, but all their "
                f"tensors are equal.\n  The same expert was given twice: leave one of them out."
            )
        warnings = []
        for name in self.names:
            drift = self.relative(name)
            if drift > UNRELATED_DRIFT:
                warnings.append(
                    f"expert '{name}': its matrices are {drift:.2f} of the base's norm away from "
                    "the base; fine-tuning moves them by a few hundredths, two unrelated models "
                    "are about 1.4 apart. Was it tuned from another base?"
                )
            elif drift == 0.0:
                warnings.append(f"expert '{name}': all its matrices equal the base's.")
        return warnings


def read_step(plan: Plan, tensor: Planned, work: torch.dtype, *, affine: bool) -> Step:
    """Read one tensor of the base and of every expert, in `work` (float32 or float64).

    With `affine`, task vectors known in factors stay so (see `Step`). Raises `NotFinite`.
    """
    base = plan.base.read(tensor.name).to(work)
    _check_finite(base, tensor.name, "the base", plan.base.reference)
    vectors = [expert.task_vector(tensor.name) for expert in plan.experts]
    if all(vector is UNCHANGED for vector in vectors):
        return Step(tensor, base)
    known: list[LowRank | None] = []
    for expert, vector in zip(plan.experts, vectors, strict=True):
        if isinstance(vector, LowRank):
            for part in (vector.a, vector.b):
                _check_finite(part, tensor.name, f"expert '{expert.name}'", expert.reference)
            known.append(vector)
        elif isinstance(vector, Unchanged):
            known.append(None)
    stacked = sum(vector.a.shape[0] for vector in known if vector is not None)
    # Beyond half of the short side the dense path is as cheap, and handles everything.
    if affine and len(known) == len(vectors) and tensor.matrix:
        if 2 * stacked <= min(tensor.matrix):
            return Step(tensor, base, vectors=known)
    experts: list[Tensor] = []
    equal = True
    for expert, vector in zip(plan.experts, vectors, strict=True):
        own = base if isinstance(vector, Unchanged) else expert.read(tensor.name).to(work)
        if own is not base and not torch.equal(own, base):
            equal = False
            _check_finite(own, tensor.name, f"expert '{expert.name}'", expert.reference)
        experts.append(own)
    # Stacked only now: a table that no expert trained is never copied once per expert.
    return Step(tensor, base) if equal else Step(tensor, base, experts=torch.stack(experts))


def read_heads(plan: Plan, tensor: Planned) -> list[Tensor]:
    """Every expert's own head tensor, as stored. Raises `NotFinite`."""
    heads = []
    for expert in plan.experts:
        head = expert.read(tensor.name)
        _check_finite(head, tensor.name, f"expert '{expert.name}'", expert.reference)
        heads.append(head)
    return heads


def _check_finite(tensor: Tensor, name: str, whose: str, reference: str) -> None:
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
