"""Outputs in words: what every expert's outputs are called, and each row's answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..artifact.format import ExpertRecord
from ..errors import InputError
from .output import Answer, TwinOutput

if TYPE_CHECKING:
    from .model import TwinModel


def labels(twin: TwinModel) -> dict[str, list[str] | None]:
    """See `TwinModel.labels`."""
    out: dict[str, list[str] | None] = {}
    widths = twin.outputs
    for expert in twin.manifest.experts:
        known, width = _known_labels(twin, expert), widths[expert.name] or 0
        named = [known.get(i, f"LABEL_{i}") for i in range(width)]
        out[expert.name] = named if width > 1 else None
    return out


def outputs(twin: TwinModel) -> dict[str, int | None]:
    """See `TwinModel.outputs`."""
    return {
        expert.name: expert.outputs or len(_known_labels(twin, expert)) or None
        for expert in twin.manifest.experts
    }


def _known_labels(twin: TwinModel, expert: ExpertRecord) -> dict[int, str]:
    stored = expert.config.get("id2label") or {}
    if expert.outputs is None and "Classification" in type(twin.model).__name__:
        stored = stored or _base_labels(twin)  # a head that base and experts have alike
    return {int(key): str(value) for key, value in stored.items()}


def _base_labels(twin: TwinModel) -> dict[Any, str]:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(twin.folder, local_files_only=True).id2label or {}


def answers(twin: TwinModel, output: TwinOutput) -> list[Answer]:
    """See `TwinModel.answers`."""
    if not isinstance(output, TwinOutput):
        came = type(output).__name__
        raise InputError(f"answers: expected the output of a call of this model, got a {came}.")
    if output.logits is None or output.logits.ndim != 2:
        came = "no logits" if output.logits is None else f"logits {tuple(output.logits.shape)}"
        raise InputError(
            f"expected one answer per row: answers in words exist for logits of (batch, "
            f"class), but {type(twin.model).__name__} gave {came}. Call the model from Python "
            "and read output.logits or output.model_output."
        )
    assert output.weights is not None and output.expert is not None
    named = twin.labels
    out = []
    for logits, weights, index in zip(
        output.logits.float(), output.weights, output.expert.tolist(), strict=True
    ):
        name = twin.experts[index]
        names = named[name]
        if names is None:
            out.append(Answer(name, float(weights[index]), None, float(logits[0])))
            continue
        scores = logits[: len(names)].softmax(dim=-1)
        best = int(scores.argmax())
        out.append(Answer(name, float(weights[index]), names[best], float(scores[best])))
    return out
