"""Choosing the sharpness: what brings answers nearest to those of each row's own expert."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...data import Encoded, batches
from ..model import TwinModel
from .calibration import Sharpness, sharpened
from .rows import FEATURE_BATCH, Progress, Rows

SHARPNESS: tuple[Sharpness, ...] = (1.0, 2.0, 4.0, "top")
SHARPENED_ROWS = 96
"""Held-out rows on which `sharpness: auto` compares answers, all experts together."""


@torch.no_grad()
def best_sharpness(
    model: TwinModel,
    rows: Rows,
    held: Int[Tensor, " held"],
    scaled: Float[Tensor, "held expert"],
    say: Progress,
) -> Sharpness:
    """What brings rows nearest to the answers of their own expert, all weight on it.

    The distance of answers is that of their logits, squared, of each expert as a share of the
    shared expert's distance. No labels are needed. `scaled`: logits over the temperature.
    """
    count = len(model.experts)
    probabilities = scaled.softmax(dim=-1).float()
    each = max(1, SHARPENED_ROWS // count)
    places = [
        place
        for expert in range(count)
        for place in (rows.truth[held] == expert).nonzero()[:each, 0].tolist()
    ]
    off = torch.zeros(len(SHARPNESS), count, dtype=torch.float64)
    scale = torch.zeros(count, dtype=torch.float64)
    chosen = Encoded([rows.encoded.rows[int(held[p])] for p in places], [False] * len(places))
    done = 0
    for indices, batch in batches(model.tokenizer, chosen, FEATURE_BATCH // 4):
        say("comparing answers", done, len(places))
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        at = torch.tensor([places[i] for i in indices])
        own = rows.truth[held[at]]
        answer = _Answers(model, inputs, [model.experts[t] for t in own])
        truth = answer(torch.eye(count)[own])
        if truth is None:
            return 1.0
        shared = answer(torch.zeros(len(at), count))
        scale.index_add_(0, own, _apart(shared, truth))
        for place, sharpness in enumerate(SHARPNESS):
            given = answer(sharpened(probabilities[at], sharpness))
            off[place].index_add_(0, own, _apart(given, truth))
        done += len(indices)
    say("comparing answers", done, len(places))
    if not bool((scale > 0).any()):
        return 1.0
    mean = (off[:, scale > 0] / scale[scale > 0]).mean(dim=1)
    return SHARPNESS[int(mean.argmin())]


class _Answers:
    """What the model answers to a batch with some weights, as (batch, number)."""

    def __init__(self, model: TwinModel, inputs: dict[str, Tensor], heads: list[str]) -> None:
        self.model, self.inputs = model, inputs
        self.head = heads if model.has_heads else None

    def __call__(self, weights: Float[Tensor, "batch expert"]) -> Float[Tensor, "batch n"] | None:
        output = self.model(**self.inputs, weights=weights, head=self.head)
        logits = output.logits
        if logits is None:
            return None
        if logits.ndim == 3:  # the last token's: what is said next
            mask = self.inputs.get("attention_mask", torch.ones(logits.shape[:2]))
            place = torch.arange(logits.shape[1], device=mask.device).expand(len(logits), -1)
            last = place.masked_fill(~mask.bool(), -1).amax(dim=1).clamp(min=0)
            logits = logits[torch.arange(len(logits)), last.to(logits.device)]
        return logits.masked_fill(logits.isinf(), 0.0).flatten(1).cpu()


def _apart(one: Tensor | None, other: Tensor) -> Float[Tensor, " batch"]:
    assert one is not None
    return (one.double() - other.double()).square().sum(dim=1)
