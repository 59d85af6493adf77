"""Singular values of exclusive parts: which matrices to look at, and the rank their energy needs.

The energy of `W_t - W_s` is its squared Frobenius norm, the sum of its squared singular values; the
first r of them are what the best rank-r factors hold (Eckart-Young).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median

from jaxtyping import Float
from torch import Tensor

from ...checkpoint import Checkpoint, Expert
from ..exclusive import matrix_shape

SHARES = (0.90, 0.95, 0.99)
"""Of the energy, for which ranks are told."""
MAX_WORK = 5e11
"""Multiplications of about a minute of singular values on one core; beyond it, fewer matrices."""
LEAST_MATRICES = 4


@dataclass(frozen=True)
class Subject:
    """One tensor to measure, and its (out, in) view if it is one that factors stand for."""

    name: str
    shape: tuple[int, ...]
    matrix: tuple[int, int] | None
    bytes: int
    """Stored whole; of a matrix: what one rank's two vectors take."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one expert's exclusive part of one matrix, as shares of its energy."""

    tensor: str
    expert: str
    shape: tuple[int, int]
    ranks: dict[str, int]
    """How many directions hold 90, 95 and 99 % of ‖W_t - W_s‖²."""
    energy: dict[str, float]
    """What ranks 1, 2, 4, ... hold, up to all."""
    kept: float | None
    """What the recipe's own rank holds; None if it has none."""


def subjects_of(base: Checkpoint, experts: Sequence[Expert]) -> list[Subject]:
    """Float tensors that base and all experts have in one shape: for experts without a plan."""
    held = [set(expert.names()) for expert in experts]
    return [
        Subject(name, shape, matrix, (sum(matrix) if matrix else prod(shape)) * info.dtype.itemsize)
        for name in base.floats()
        for info in [base.info(name)]
        for shape, matrix in [(info.shape, matrix_shape(info.shape))]
        if all(name in names for names in held)
        and all(expert.info(name).shape == shape for expert in experts)
    ]


def kind_of(name: str) -> str:
    """The name without its numbers: equal for the same matrix of all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def choose(subjects: Sequence[Subject], count: int | None, work: float = 0.0) -> list[str]:
    """At most `count` matrices, spread over kinds and depth; all if None.

    `work` weighs a matrix's out · in · min(out, in): the choice ends at `MAX_WORK`, but never
    before `LEAST_MATRICES`. Depends on names and shapes alone.
    """
    matrices = {s.name: s.matrix for s in subjects if s.matrix is not None}
    if count is None:
        return list(matrices)
    groups: dict[str, list[str]] = {}
    for name in sorted(matrices, key=lambda n: ([int(i) for i in re.findall(r"\d+", n)], n)):
        groups.setdefault(kind_of(name), []).append(name)
    queues = []
    for index, group in enumerate(groups.values()):
        # Multiples of the golden ratio: any first few of them lie evenly over the depth.
        places = [((i * 0.6180339887 + index / len(groups)) % 1, n) for i, n in enumerate(group)]
        queues.append([name for _, name in sorted(places)])
    chosen: list[str] = []
    spent = 0.0
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue) and len(chosen) < count:
                out, in_ = matrices[queue[turn]]
                spent += work * out * in_ * min(out, in_)
                if spent > MAX_WORK and len(chosen) >= LEAST_MATRICES:
                    return chosen
                chosen.append(queue[turn])
    return chosen


def spectrum_of(
    s: Float[Tensor, " rank"], subject: Subject, expert: str, rank: int | None
) -> Spectrum | None:
    """What singular values say, `rank` being the recipe's own; None of a matrix of zeros."""
    assert subject.matrix is not None
    energy = s.double().square()
    total = float(energy.sum())
    if total == 0.0:
        return None
    held = (energy.cumsum(0) / total).clamp(max=1.0).tolist()
    steps = [2**i for i in range(len(held).bit_length()) if 2**i < len(held)] + [len(held)]
    return Spectrum(
        tensor=subject.name,
        expert=expert,
        shape=subject.matrix,
        ranks={f"{p:.0%}": sum(h < p - 1e-12 for h in held) + 1 for p in SHARES},
        energy={str(r): held[r - 1] for r in steps},
        kept=held[min(rank, len(held)) - 1] if rank else None,
    )


def expected_bytes(
    mine: Sequence[Spectrum], subjects: Sequence[Subject], moved: Collection[str]
) -> dict[str, int]:
    """Bytes of one expert's factors and vectors at 90, 95 and 99 % of the energy, all together.

    `mine` are its spectra, `moved` the tensors that some expert changed. Matrices outside of the
    sample take the median share of min(out, in) of their kind's sampled ones, or of all.
    """
    kinds = {kind_of(s.tensor) for s in mine}
    out: dict[str, int] = {}
    for share in (f"{share:.0%}" for share in SHARES):
        parts = {
            kind: median(_part(s, share) for s in mine if kind_of(s.tensor) == kind)
            for kind in kinds
        }
        overall = median(_part(s, share) for s in mine) if mine else 0.0
        known = {s.tensor: s.ranks[share] for s in mine}
        total = 0
        for subject in subjects:
            if subject.matrix and subject.name in moved:
                part = parts.get(kind_of(subject.name), overall)
                rank = known.get(subject.name) or round(part * min(subject.matrix))
                total += rank * subject.bytes
            elif subject.name in moved:
                total += subject.bytes
        out[share] = total
    return out


def _part(found: Spectrum, share: str) -> float:
    return found.ranks[share] / min(found.shape)
