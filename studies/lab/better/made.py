"""What a cut made: files, what they weigh, and how much of the experts they lost."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median_low
from typing import Any

from ..rivals.packed import Vector
from .way import Way


@dataclass(frozen=True)
class Made:
    """experts: task -> file; bases: for all experts; shared: expert minus pretrained model

    error:     ‖what was lost‖² / ‖W_t - W_s‖² over all matrices, W_s the average
    corrected: how many biases of each expert
    ranks:     least, median and most of all matrices and experts
    """

    way: Way
    experts: dict[str, bytes]
    bases: bytes
    shared: Vector
    error: float
    corrected: int
    ranks: tuple[int, int, int]

    def sizes(self, base_float16: int) -> dict[str, Any]:
        """Bases are counted with the experts, each with its part of them; largest: a file."""
        files = [len(file) for file in self.experts.values()]
        experts = sum(files)
        share = (experts + len(self.bases)) / len(files) / base_float16
        return {
            "experts": experts,
            "largest": max(files),
            "extra_shared": len(self.bases),
            "base_float16": base_float16,
            "share": share,
        }


class Tally:
    """What is counted while files are made. shared: the expert that all are differences to"""

    def __init__(self, shared: Vector) -> None:
        self.shared = shared
        self.lost = self.whole = 0.0
        self.corrected = 0
        self.ranks: list[int] = []

    def add(self, lost: Vector, whole: Vector) -> None:
        for name, x in lost.items():
            self.lost += float(x.double().square().sum())
            self.whole += float(whole[name].double().square().sum())

    def made(self, way: Way, experts: dict[str, bytes], bases: bytes) -> Made:
        error = self.lost / self.whole if self.whole else 0.0
        ranks = min(self.ranks), median_low(self.ranks), max(self.ranks)
        return Made(way, experts, bases, self.shared, error, self.corrected, ranks)
