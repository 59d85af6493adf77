"""How a router does on rows held out: right answers, calibration, confusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from .calibration import calibration_error


def measured(
    logits: Float[Tensor, "held expert"],
    scaled: Float[Tensor, "held expert"],
    truth: Int[Tensor, " held"],
    experts: Sequence[str],
) -> dict[str, Any]:
    """For the record. `scaled`: logits over the temperature."""
    guess = logits.argmax(dim=1)
    return {
        "held_out_rows": len(truth),
        "held_out_accuracy": float((guess == truth).double().mean()),
        "calibration_error": calibration_error(scaled.softmax(dim=1), truth),
        "uncalibrated_error": calibration_error(logits.softmax(dim=1), truth),
        "confusion": confusion(truth, guess, experts),
    }


def confusion(
    truth: Int[Tensor, " row"], guess: Int[Tensor, " row"], experts: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Rows by true expert, then by chosen expert; those that are 0 left out."""
    return {
        true: {
            chosen: count
            for j, chosen in enumerate(experts)
            if (count := int(((truth == i) & (guess == j)).sum()))
        }
        for i, true in enumerate(experts)
    }
