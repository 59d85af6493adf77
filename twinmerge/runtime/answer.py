"""Answering texts: from strings to labels, values or generated text, in the order given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..data import Chat, Text, encode, known_positions, pad, token_limit
from ..errors import InputError
from .model import TwinModel
from .output import Decided, TwinOutput

KEYS = (
    *("expert", "weight", "answer", "score", "weights", "confidence", "new", "dropped"),
    "truncated",
)
"""All that a row's dictionary may hold."""

# Rows whose weight is below this are left out of the printed weights (not of the computation).
SHOWN_WEIGHT = 0.0005


def answer_texts(
    model: TwinModel,
    texts: Sequence[Text | Chat],
    *,
    task: str | None = None,
    allowed: Sequence[str] | None = None,
    batch_size: int = 32,
    max_tokens: int | None = None,
    max_new_tokens: int = 128,
    top_k: int | None = None,
    threshold: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """One dictionary per text: `expert`, `weight`, `answer`, `score`, `weights`, `confidence`.

    `confidence` is the router's calibrated probability of its likeliest expert, absent where it was
    not asked (`task`), or has the same weights for all (kind none). `new` is there, and true, where
    an input is unlike all experts' data: then its weights sum below 1, down to 0 (the shared
    expert), and `expert` says whose head answered.
    `answer` is a label, a value (regression, then `score` is absent), or generated text. Chats
    (`data.chat_of`) are formatted by the tokenizer's template, for the router as for the answer.
    `top_k` and `threshold` are those of `TwinModel.forward`; with one of them, `dropped` says how
    much of the row's weight they left out. `truncated` is there, and true, where a text was cut to
    the token limit. A prompt is also cut where it leaves no room for `max_new_tokens` within the
    model's positions; `InputError` if they leave none for the prompt.
    """
    limit = token_limit(model, max_tokens)
    generates = model.can_generate()
    if generates:
        limit = min(limit, prompt_room(model, max_new_tokens))
    tokenizer = model.tokenizer
    if generates:
        # A decoder goes on from the last column; an encoder numbers positions from the first.
        tokenizer.padding_side = "right" if encodes(model) else "left"
    how = {"task": task, "allowed": allowed, "top_k": top_k, "threshold": threshold}
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        encoded = encode(tokenizer, chunk, limit)
        batch = {k: v.to(model.device) for k, v in pad(tokenizer, encoded.rows).items()}
        if generates:
            results = _generated(model, batch, how, max_new_tokens)
        else:
            results = _answered(model, batch, how)
        for result, cut in zip(results, encoded.cut, strict=True):
            yield result | ({"truncated": True} if cut else {})
        if progress:
            progress(start + len(chunk), len(texts), "")


def prompt_room(model: TwinModel, max_new_tokens: int) -> int:
    """The most tokens that a prompt may have."""
    positions = known_positions(model)
    if encodes(model):
        return positions  # the answer has positions of its own
    if max_new_tokens >= positions:
        raise InputError(
            f"--max-new-tokens {max_new_tokens}: expected fewer than the model's {positions} "
            "positions, which prompt and answer share. Ask for fewer."
        )
    return positions - max_new_tokens


def encodes(model: TwinModel) -> bool:
    """Whether an encoder reads the prompt, and a decoder writes the answer beside it."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _answered(model: TwinModel, batch: dict[str, Any], how: dict[str, Any]) -> list[dict[str, Any]]:
    output = model(**batch, **how)
    assert output.weights is not None
    results = []
    for answer, weights in zip(model.answers(output), output.weights, strict=True):
        result: dict[str, Any] = {"expert": answer.expert, "weight": round(answer.weight, 4)}
        if answer.label is None:
            result["answer"] = round(answer.score, 4)
        else:
            result |= {"answer": answer.label, "score": round(answer.score, 4)}
        results.append(result | {"weights": _shown(model, weights)})
    return _saying(model, results, output)


def _generated(
    model: TwinModel, batch: dict[str, Any], how: dict[str, Any], max_new_tokens: int
) -> list[dict[str, Any]]:
    batch.pop("token_type_ids", None)
    decided = model.decide(batch, **how)
    tokens = model.generate(
        **batch,
        weights=decided.weights,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    new = tokens if encodes(model) else tokens[:, batch["input_ids"].shape[1] :]
    results = []
    texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
    for text, row, best in zip(texts, decided.weights, decided.expert.tolist(), strict=True):
        results.append(
            {
                "expert": model.experts[best],
                "weight": round(float(row[best]), 4),
                "answer": text,
                "weights": _shown(model, row),
            }
        )
    return _saying(model, results, decided)


def _saying(
    model: TwinModel, results: list[dict[str, Any]], ran: TwinOutput | Decided
) -> list[dict[str, Any]]:
    """The results, with what the router said and what `top_k` and `threshold` dropped."""
    if ran.routed is not None:
        sure, new = ran.routed.confidence.tolist(), ran.routed.new.tolist()
        fixed = model.router is not None and model.router.kind == "none"  # weights, no guess
        results = [
            each
            | ({} if fixed else {"confidence": round(p, 4)})
            | ({"new": True} if unlike else {})
            for each, p, unlike in zip(results, sure, new, strict=True)
        ]
    if ran.dropped is None:
        return results
    return [
        each | {"dropped": round(lost, 4)}
        for each, lost in zip(results, ran.dropped.tolist(), strict=True)
    ]


def _shown(model: TwinModel, weights) -> dict[str, float]:
    return {
        name: round(float(weight), 4)
        for name, weight in zip(model.experts, weights, strict=True)
        if float(weight) >= SHOWN_WEIGHT
    }
