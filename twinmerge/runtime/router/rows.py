"""Rows that a router is fitted on: texts of every expert, checked, encoded and divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ...data import Chat, Encoded, Text, encode, row_of, sample, segments
from ...errors import InputError
from ...recipe import Router as Settings
from ..model import TwinModel
from .splitting import Parts, alike, crossed, divide

Progress = Callable[[str, int, int], None]
"""Called with what is going on, steps done and steps in all."""

FEATURE_BATCH = 64
FEWEST = 5
"""Rows of each expert for the kinds that learn: one must train, one calibrate, one choose."""
CROSSED = 500
"""Held-out rows below which routers are compared on all rows but the calibrating, by turns."""
FOLDS = 5


@dataclass
class Rows:
    """The rows of all experts, one after the other."""

    experts: tuple[str, ...]
    texts: list[Text | Chat]
    truth: Int[Tensor, " row"]
    encoded: Encoded

    def per_expert(self, chosen: Int[Tensor, " chosen"]) -> dict[str, int]:
        """How many of the rows `chosen` each expert has."""
        counts = torch.bincount(self.truth[chosen], minlength=len(self.experts)).tolist()
        return dict(zip(self.experts, counts, strict=True))


def prepared(
    model: TwinModel,
    texts: Mapping[str, Sequence[Text | Chat | str]],
    settings: Settings,
    limit: int,
) -> Rows:
    """limit: in tokens. Raises `InputError` for experts without rows, and rows without text."""
    for expert in model.experts:
        if not len(texts.get(expert, ())):
            raise InputError(
                f"expert '{expert}': expected rows to fit a router, got 0. A few dozen texts "
                "that look like its inputs will do; for a few lines each there is the kind "
                "prompts, without any data the kind projection."
            )
    extra = sorted(set(texts) - set(model.experts))
    if extra:
        known = ", ".join(model.experts)
        raise InputError(f"rows for '{extra[0]}', but no such expert. Known: {known}.")
    rows = [
        (index, row_of(text))
        for index, expert in enumerate(model.experts)
        for text in sample(texts[expert], settings.rows_per_task, settings.seed)
    ]
    found = [text for _, text in rows]
    encoded = encode(model.tokenizer, found, limit)
    for place, (index, text) in enumerate(rows):
        if not encoded.rows[place]["input_ids"] or not "".join(segments(text)).strip():
            raise InputError(
                f"expert '{model.experts[index]}': a row has no text, got {text!r:.80}. A "
                "router learns nothing from it: remove it."
            )
    return Rows(model.experts, found, torch.tensor([index for index, _ in rows]), encoded)


def check_enough(rows: Rows) -> None:
    """Raises `InputError` if an expert has fewer than `FEWEST` rows."""
    for expert, count in rows.per_expert(torch.arange(len(rows.truth))).items():
        if count < FEWEST:
            raise InputError(
                f"expert '{expert}': expected at least {FEWEST} rows to fit and check a "
                f"router, got {count}. A few dozen that look like its inputs will do; with so "
                "few there is the kind prompts (--kind prompts)."
            )


def divided(rows: Rows, settings: Settings) -> tuple[Parts, list[tuple[Tensor, Tensor]]]:
    """And what routers that are compared train on and are scored on."""
    shares, seed = (settings.calibration, settings.held_out), settings.seed
    groups = alike(rows.texts)
    parts = divide(groups, rows.truth, rows.experts, shares, seed)
    if not settings.refit or len(parts.held_out) >= CROSSED:
        return parts, [(parts.train, parts.held_out)]
    return parts, crossed(parts, groups, rows.truth, FOLDS, seed)
