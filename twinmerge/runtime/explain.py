"""Why one text is answered as it is, and what would be answered otherwise.

What the router read and made of it, the routing examples that come nearest, and the answers of
every way to run: as routed, as forced by the caller, each expert alone, the shared expert, the
base. All ways but the base run in one batch, in which every row has its own weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..artifact.reader import Artifact
from ..data import MESSAGES, Chat, Text, chat_of, encode, pad, segments, text_of, token_limit
from ..errors import InputError, RouterError
from .answer import encodes, prompt_room
from .arguments import Allowed, Given
from .base import load_base
from .model import TwinModel
from .nearest import Nearest, Progress, nearest
from .output import Decided, TwinOutput
from .router.router import Routed

Way = Literal["routed", "forced", "expert", "shared", "base"]

ROWS = 32
"""Ways that run in one forward; of more experts, so many at a time."""

NO_EXAMPLES = (
    "no routing examples to compare with: 'fit-router --examples N' keeps N texts of every expert "
    "in the artifact, or give a folder like fit-router's (--data DATA)"
)


@dataclass(frozen=True)
class Reply:
    """What one way of running answers. One of label, value, text and shapes is there."""

    way: Way
    expert: str | None
    """Of `expert`: which. Of `routed` and `forced`: that of the highest weight, or whose head."""
    head: str | None
    """Whose head answered; None where experts have none of their own."""
    weights: dict[str, float] | None
    """None for the base."""
    label: str | None = None
    score: float | None = None
    """Softmax probability of the label."""
    value: float | None = None
    """Of a regression."""
    text: str | None = None
    """Generated."""
    shapes: dict[str, list[int]] | None = None
    """Of the raw outputs for this text, where the model gives no single answer."""


@dataclass(frozen=True)
class Reading:
    """The router: what it reads and how it decides."""

    said: str
    kind: str
    layers: list[int]
    pooling: str
    encoder: str | None
    temperature: float
    sharpness: float | str
    held_out_accuracy: float | None
    held_out_rows: int | None


@dataclass(frozen=True)
class Unlikeness:
    """How unlike all experts' data the text is."""

    score: float
    threshold: float
    """New above it."""
    layers: list[int]
    coverage: float | None
    """Share of the experts' own rows below the threshold, when it was set."""


@dataclass(frozen=True)
class Routing:
    """What the router made of the text, nothing forced."""

    weights: dict[str, float]
    probabilities: dict[str, float]
    """Calibrated."""
    confidence: float
    likeliest: str
    new: bool
    novelty: Unlikeness | None
    """None: the router does not look."""
    outcome: str
    """What happens with such a text, in words."""
    held_out: dict[str, int]
    """Of the held-out rows that went to the likeliest expert: whose they were. Empty: not known."""


@dataclass(frozen=True)
class Forced:
    """What the caller asked for instead."""

    task: str | None
    weights: dict[str, float] | None
    allowed: list[str] | None
    head: str | None
    probabilities: dict[str, float] | None
    """Of `allowed`: calibrated, among these."""


@dataclass(frozen=True)
class Explanation:
    """All there is to say of one text."""

    artifact: str
    text: list[str]
    """One text, a pair, or the contents of a chat's messages."""
    chat: bool
    tokens: int
    """That were read."""
    truncated: bool
    """Whether there were more."""
    router: Reading | None
    routing: Routing | None
    """None without a router."""
    forced: Forced | None
    answers: tuple[Reply, ...]
    """Routed, forced, every expert in order, shared, base; without those that could not run."""
    nearest: Nearest | None
    notes: tuple[str, ...] = field(default=())
    """What is missing, and why."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; the same keys for every model."""
        return json.loads(json.dumps(asdict(self)))

    def of(self, way: Way, expert: str | None = None) -> Reply | None:
        """The answer of one way; of `expert`, that of one."""
        found = (r for r in self.answers if r.way == way and expert in (None, r.expert))
        return next(found, None)


def read_text(text: str, pair: str | None = None, columns: Sequence[str] | None = None) -> Any:
    """A text as the command line has it: plain, a pair, or JSON.

    JSON is a row as `run` reads it (`{"text": ...}`, `{"messages": [...]}`) or a list of messages.
    What starts like JSON and is none is a plain text.
    """
    if pair is not None:
        return text, pair
    if text.lstrip()[:1] in ("{", "["):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            return (text,)
        if isinstance(row, dict):
            return text_of(row, columns)
        if isinstance(row, list) and row and all(isinstance(each, dict) for each in row):
            return chat_of(row)
    return (text,)


@torch.no_grad()
def explain(
    twin: TwinModel,
    text: Text | Chat | str,
    *,
    task: str | None = None,
    weights: Given = None,
    allowed: str | Sequence[str] | None = None,
    head: str | None = None,
    examples: Mapping[str, Sequence[Text | Chat | str]] | None = None,
    count: int = 5,
    base: bool | str | Path = True,
    max_tokens: int | None = None,
    max_new_tokens: int = 24,
    progress: Progress | None = None,
) -> Explanation:
    """Explain how one text (or pair, or chat) is answered.

    task, weights, allowed, head: what to force, as in a call of the model; shown beside the routed
    examples: routing examples by expert; default those that the artifact keeps
    count:    how many of the nearest to give
    base:     whether to run the base, or where it is; it is loaded beside the model. A base that is
              not on this disk is a note
    max_tokens, max_new_tokens: to read, and to generate

    Raises `InputError` for empty texts and unknown names; `RouterError` for `allowed` without a
    router, and where the router makes nothing of the text.
    """
    given = (text,) if isinstance(text, str) else text
    batch, limit, cut = _encoded(twin, given, max_tokens, max_new_tokens)
    notes = [f"the text was cut to {limit:,} tokens"] if cut else []
    if head is not None and not twin.has_heads:
        raise InputError(
            f"head={head!r}: the experts of a {type(twin.model).__name__} have no heads of their "
            "own to choose from. Leave it out."
        )

    said = features = None
    if twin.router is not None:
        features = twin.router.read(twin, batch)
        said = twin.routed_from(features)
    else:
        try:
            twin.routing(allowed=None, **batch)
        except RouterError as problem:
            notes.append(str(problem))
    decided = None if said is None else twin.decide(batch, said=said)
    forced, limited = _forced(twin, batch, task, weights, allowed, head, said, features)

    likeliest = head or task
    if decided is not None:
        likeliest = twin.experts[int(decided.expert[0])]
    rows = _rows(twin, decided, forced, likeliest)
    answers = _run(twin, batch, rows, max_new_tokens)
    if likeliest is None and twin.has_heads:
        notes.append("the shared expert and the base answer with a head: say whose with --head")
    elif base is not False:
        try:
            own = None if base is True else base
            answers.append(_base(twin, batch, likeliest, own, max_new_tokens))
        except InputError as problem:
            notes.append(str(problem))
    if any(reply.shapes is not None for reply in answers):
        notes.append(
            f"a {type(twin.model).__name__} gives no single answer for a text: only the shapes of "
            "its outputs are told. Call the model from Python for the numbers"
        )

    near = None
    if twin.router is not None and features is not None:
        if twin.router.kind == "none":
            notes.append("the router reads nothing, so no examples are near")
        else:
            examples = _kept(twin) if examples is None else examples
            if examples:
                near = nearest(twin, features, examples, count, limit, progress)
            else:
                notes.append(NO_EXAMPLES)
    asked = None
    if forced is not None:
        asked = Forced(
            task,
            None if weights is None else _by_name(twin, twin.as_weights(weights, 1)[0]),
            None if allowed is None else [allowed] if isinstance(allowed, str) else list(allowed),
            head,
            None if limited is None else _by_name(twin, limited.probabilities[0]),
        )
    return Explanation(
        artifact=str(twin.folder),
        text=list(segments(given)),
        chat=isinstance(given, Chat),
        tokens=int(batch["input_ids"].shape[1]),
        truncated=cut,
        router=_reading(twin),
        routing=None if said is None else _routing(twin, said),
        forced=asked,
        answers=tuple(answers),
        nearest=near,
        notes=tuple(notes),
    )


# ---------------------------------------------------------------------------------------- input


def _encoded(
    twin: TwinModel, text: Text | Chat, max_tokens: int | None, max_new_tokens: int
) -> tuple[dict[str, Tensor], int, bool]:
    """One row of tensors, the most tokens it may have, and whether it was cut to these."""
    words = segments(text)
    if not any(word.strip() for word in words):
        what = MESSAGES if isinstance(text, Chat) else "text"
        raise InputError(f"{what}: is empty; expected something to explain.")
    limit = token_limit(twin, max_tokens)
    if twin.can_generate():
        limit = min(limit, prompt_room(twin, max_new_tokens))
    encoded = encode(twin.tokenizer, [text], limit)
    batch = {k: v.to(twin.device) for k, v in pad(twin.tokenizer, encoded.rows).items()}
    if twin.can_generate():
        batch.pop("token_type_ids", None)
    return batch, limit, encoded.cut[0]


def _kept(twin: TwinModel) -> dict[str, list[Text | Chat]]:
    """The artifact's own examples."""
    stored = Artifact(twin.folder, check=False).examples()
    return {name: [text_of(row) for row in rows] for name, rows in stored.items()}


# -------------------------------------------------------------------------------------- routing


def _forced(
    twin: TwinModel,
    batch: dict[str, Tensor],
    task: str | None,
    weights: Given,
    allowed: Allowed,
    head: str | None,
    said: Routed | None,
    features: Any,
) -> tuple[Decided | None, Routed | None]:
    """What is forced, and what the router says among the allowed."""
    if task is None and weights is None and allowed is None and head is None:
        return None, None
    limited = None
    if allowed is not None and features is not None and task is None and weights is None:
        limited = said = twin.routed_from(features, allowed)
    asked: dict[str, Any] = {"task": task, "weights": weights, "allowed": allowed, "head": head}
    if task is None and weights is None and said is None and allowed is None:
        raise InputError(
            f"head={head!r}: forces a head, but without a router no weights follow. Give task= or "
            "weights= too."
        )
    return twin.decide(batch, **asked, said=said), limited


def _reading(twin: TwinModel) -> Reading | None:
    router, record = twin.router, twin.manifest.router
    if router is None:
        return None
    return Reading(
        router.said,
        router.kind,
        list(router.layers),
        router.pooling,
        None if record is None else record.encoder,
        router.temperature,
        router.sharpness,
        None if record is None else record.held_out_accuracy,
        None if record is None else record.held_out_rows,
    )


def _routing(twin: TwinModel, said: Routed) -> Routing:
    assert twin.router is not None
    likeliest = twin.experts[int(said.probabilities[0].argmax())]
    new, look, record = bool(said.new[0]), twin.router.novelty, twin.manifest.router
    novelty = None
    if look is not None:
        coverage = None if record is None or record.novelty is None else record.novelty.coverage
        novelty = Unlikeness(float(said.novelty[0]), look.threshold, list(look.layers), coverage)
    if new:
        head = f", with the head of {likeliest}" if twin.has_heads else ""
        left = float(said.weights[0].sum())
        outcome = f"new: weights sum to {left:.2g}, the rest is the shared expert{head}"
    else:
        outcome = f"the weights are those of the router{_sharp(twin.router.sharpness)}"
    went = {} if record is None else record.confusion
    held_out = {true: row[likeliest] for true, row in went.items() if row.get(likeliest)}
    return Routing(
        _by_name(twin, said.weights[0]),
        _by_name(twin, said.probabilities[0]),
        float(said.confidence[0]),
        likeliest,
        new,
        novelty,
        outcome,
        held_out,
    )


def _sharp(sharpness: float | str) -> str:
    if sharpness == "top":
        return ": all on the likeliest expert"
    return "" if sharpness == 1 else f": probabilities to the power of {sharpness:g}"


def _by_name(twin: TwinModel, row: Tensor) -> dict[str, float]:
    return dict(zip(twin.experts, row.tolist(), strict=True))


# -------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class _Row:
    way: Way
    expert: str | None
    weights: Tensor
    head: int


def _rows(
    twin: TwinModel, decided: Decided | None, forced: Decided | None, likeliest: str | None
) -> list[_Row]:
    """The ways to run, as rows of one batch."""
    rows = []
    ways: tuple[tuple[Way, Decided | None], ...] = (("routed", decided), ("forced", forced))
    for way, each in ways:
        if each is not None:
            index = int(each.expert[0])
            rows.append(_Row(way, twin.experts[index], each.weights[0], index))
    alone = torch.eye(len(twin.experts), device=twin.device)
    for index, name in enumerate(twin.experts):
        rows.append(_Row("expert", name, alone[index], index))
    if likeliest is not None or not twin.has_heads:
        index = 0 if likeliest is None else twin.experts.index(likeliest)
        rows.append(_Row("shared", None, torch.zeros_like(alone[0]), index))
    return rows


def _run(
    twin: TwinModel, batch: dict[str, Tensor], rows: list[_Row], max_new_tokens: int
) -> list[Reply]:
    replies = []
    for start in range(0, len(rows), ROWS):
        chunk = rows[start : start + ROWS]
        inputs = {k: v.repeat(len(chunk), *[1] * (v.ndim - 1)) for k, v in batch.items()}
        weights = torch.stack([row.weights for row in chunk])
        if twin.can_generate():
            found = _texts(twin, twin, inputs, max_new_tokens, weights=weights)
        else:
            heads = [twin.experts[row.head] for row in chunk] if twin.has_heads else None
            found = _answers(twin, twin(**inputs, weights=weights, head=heads))
        for row, answer in zip(chunk, found, strict=True):
            head = twin.experts[row.head] if twin.has_heads else None
            mixed = _by_name(twin, row.weights)
            replies.append(Reply(row.way, row.expert, head, mixed, **answer))
    return replies


def _base(
    twin: TwinModel,
    batch: dict[str, Tensor],
    likeliest: str | None,
    reference: str | Path | None,
    max_new_tokens: int,
) -> Reply:
    """The base's answer, with the head of the likeliest expert. Raises `InputError`."""
    head = likeliest if twin.has_heads else None
    model: Any = load_base(twin, head, reference)
    if twin.can_generate():
        (answer,) = _texts(twin, model, batch, max_new_tokens)
    else:
        output = model(**batch)
        index = torch.tensor([0 if head is None else twin.experts.index(head)])
        none = torch.zeros(1, len(twin.experts))
        logits = getattr(output, "logits", None)
        (answer,) = _answers(twin, TwinOutput(logits, none, index, model_output=output))
    return Reply("base", None, head, None, **answer)


def _texts(
    twin: TwinModel, model: Any, inputs: dict[str, Tensor], max_new_tokens: int, **more: Any
) -> list[dict[str, Any]]:
    """Greedy continuations, one for each row."""
    pad_id = twin.tokenizer.pad_token_id
    tokens = model.generate(
        **inputs, **more, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id
    )
    new = tokens if encodes(twin) else tokens[:, inputs["input_ids"].shape[1] :]
    return [{"text": text} for text in twin.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _answers(twin: TwinModel, output: TwinOutput) -> list[dict[str, Any]]:
    """Labels and scores or values of the rows; else the shapes of a row's outputs."""
    assert output.expert is not None
    names = [twin.experts[index] for index in output.expert.tolist()]
    if output.logits is None or output.logits.ndim != 2:
        return [{"shapes": _shapes(output, twin.outputs[name])} for name in names]
    return [
        {"value": answer.score}
        if answer.label is None
        else {"label": answer.label, "score": answer.score}
        for answer in twin.answers(output)
    ]


def _shapes(output: TwinOutput, width: int | None) -> dict[str, list[int]]:
    """Of one row, without the batch; logits as wide as the row's own head."""
    shapes = {
        name: list(value.shape[1:])
        for name, value in output.model_output.items()
        if isinstance(value, Tensor)
    }
    if width is not None and "logits" in shapes:
        shapes["logits"][-1] = min(shapes["logits"][-1], width)
    return shapes
