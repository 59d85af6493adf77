"""Answering texts: from strings to labels, values or generated text, in the order given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..data import Text, encode, known_positions, pad, token_limit
from ..errors import InputError
from .model import TwinModel

KEYS = ("expert", "weight", "answer", "score", "weights", "truncated")
"""All that a row's dictionary may hold."""

# Rows whose weight is below this are left out of the printed weights (not of the computation).
SHOWN_WEIGHT = 0.0005


def answer_texts(
    model: TwinModel,
    texts: Sequence[Text],
    *,
    task: str | None = None,
    batch_size: int = 32,
    max_tokens: int | None = None,
    max_new_tokens: int = 128,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """One dictionary per text: `expert`, `weight`, `answer`, `score`, `weights`.

    `answer` is a label, a value (regression, then `score` is absent), or generated text.
    `truncated` is there, and true, where a text was cut to the token limit. A prompt is also cut
    where it leaves no room for `max_new_tokens` within the model's positions; `InputError` if they
    leave none for the prompt.
    """
    limit = token_limit(model, max_tokens)
    generates = model.can_generate
    if generates:
        limit = min(limit, _prompt_room(model, max_new_tokens))
    tokenizer = model.tokenizer
    if generates:
        tokenizer.padding_side = "left"
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        encoded = encode(tokenizer, chunk, limit)
        batch = {k: v.to(model.device) for k, v in pad(tokenizer, encoded.rows).items()}
        if generates:
            results = _generated(model, batch, task, max_new_tokens)
        else:
            results = _answered(model, batch, task)
        for result, cut in zip(results, encoded.cut, strict=True):
            yield result | ({"truncated": True} if cut else {})
        if progress:
            progress(start + len(chunk), len(texts), "")


def _prompt_room(model: TwinModel, max_new_tokens: int) -> int:
    """The most tokens that a prompt may have."""
    positions = known_positions(model)
    if getattr(model.config, "is_encoder_decoder", False):
        return positions  # the answer has positions of its own
    if max_new_tokens >= positions:
        raise InputError(
            f"--max-new-tokens {max_new_tokens}: expected fewer than the model's {positions} "
            "positions, which prompt and answer share. Ask for fewer."
        )
    return positions - max_new_tokens


def _answered(model: TwinModel, batch: dict[str, Any], task: str | None) -> list[dict[str, Any]]:
    output = model(**batch, task=task)
    assert output.weights is not None
    results = []
    for answer, weights in zip(model.answers(output), output.weights, strict=True):
        result: dict[str, Any] = {"expert": answer.expert, "weight": round(answer.weight, 4)}
        if answer.label is None:
            result["answer"] = round(answer.score, 4)
        else:
            result |= {"answer": answer.label, "score": round(answer.score, 4)}
        results.append(result | {"weights": _shown(model, weights)})
    return results


def _generated(
    model: TwinModel, batch: dict[str, Any], task: str | None, max_new_tokens: int
) -> list[dict[str, Any]]:
    batch.pop("token_type_ids", None)
    weights = model.weights_for(batch, task=task)
    tokens = model.generate(
        **batch,
        weights=weights,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    new = tokens[:, batch["input_ids"].shape[1] :]
    results = []
    texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
    for text, row in zip(texts, weights, strict=True):
        best = int(row.argmax())
        results.append(
            {
                "expert": model.experts[best],
                "weight": round(float(row[best]), 4),
                "answer": text,
                "weights": _shown(model, row),
            }
        )
    return results


def _shown(model: TwinModel, weights) -> dict[str, float]:
    return {
        name: round(float(weight), 4)
        for name, weight in zip(model.experts, weights, strict=True)
        if float(weight) >= SHOWN_WEIGHT
    }
