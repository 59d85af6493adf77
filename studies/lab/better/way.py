"""One way to cut all experts to some bytes: its dials, and its title in tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .store import Dtype

MOST_INPUTS = 256
"""Of each task; fewer inputs are the first of these."""

TITLES = {
    "even": "",
    "budget": "budgeted ranks",
    "across": "budget across experts",
    "basis": "shared basis",
}
"""Of ranks."""


@dataclass(frozen=True)
class Way:
    """The dials; those of `Way()` are the paper's.

    factors: dtype of factors, bases and cores
    vectors: dtype of vectors, or "none": they are not kept
    ranks:   one for all; by a budget of each expert; by one of all experts together; or a basis
             shared by the experts with cores of one size
    rounds:  how often the shared expert is refitted
    correct: whether biases are corrected
    ridge:   of the activation-aware SVD; None: the plain one
    inputs:  of each task for biases and activations, at most `MOST_INPUTS`
    """

    factors: Dtype = "float16"
    vectors: Dtype | Literal["none"] = "float16"
    ranks: Literal["even", "budget", "across", "basis"] = "even"
    rounds: int = 0
    correct: bool = False
    ridge: float | None = None
    inputs: int = 0

    @property
    def clash(self) -> str:
        """Why there is no such way; "" where there is."""
        if self.correct and self.vectors == "none":
            return "a bias that is not kept cannot be corrected"
        changed = (self.ranks == "basis", self.rounds > 0, self.ridge is not None)
        if sum(changed) > 1:
            return "only own factors are refitted or aware, and the refit knows no activations"
        return ""

    @property
    def title(self) -> str:
        parts = [
            ("", f"{self.factors} factors")[self.factors != "float16"],
            TITLES[self.ranks],
            {"float16": "", "none": "vectors not kept"}.get(
                self.vectors, f"vectors in {self.vectors}"
            ),
            ("", "refitted shared expert")[self.rounds > 0],
            ("", "activation-aware SVD")[self.ridge is not None],
            ("", "bias correction")[self.correct],
        ]
        return " + ".join(part for part in parts if part) or "plain"

    @property
    def settings(self) -> dict[str, Any]:
        """Dtypes and ranks, and what is turned on."""
        always = ("factors", "vectors", "ranks")
        return {key: value for key, value in asdict(self).items() if key in always or value}
