"""Scoring an artifact under named protocols.

routed:      nothing is known about a row: weights and head both come from the router
known-head:  the true task's head, routed weights (the paper's setting, without the reference
             code's habit of also taking the biases from the true task)
oracle:      all weight on the true task's expert: the ceiling of the compression
shared:      no exclusive knowledge, the true task's head: a static merge

The normalised score is the mean over tasks of score / the expert's own score on the same rows
(Twin-Merging, arXiv:2406.15479, equation 4).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import fmean
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..data import Encoded, batches, encode, text_of, token_limit
from ..errors import InputError, did_you_mean
from ..runtime.model import TwinModel
from .metrics import metric
from .tasks import Task, task_for

Protocol = Literal["routed", "known-head", "oracle", "shared"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
Rows = Sequence[Mapping[str, Any]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TaskScore:
    """One task under one protocol."""

    score: float
    metric: str
    rows: int
    routing_accuracy: float | None
    """Share of rows that the router finds likeliest to be their own expert's; None where nothing
    was routed."""
    truncated: int
    """Rows cut to the token limit."""
    seconds: float
    dropped: float | None = None
    """Weight that `top_k` and `threshold` left out, mean over rows; None if neither was given."""
    new: float | None = None
    """Share of rows that were taken for unlike all experts' data; None where nothing was routed."""


@dataclass(frozen=True)
class Report:
    """All tasks under one protocol."""

    protocol: str
    tasks: dict[str, TaskScore]
    reference: dict[str, float] | None = None
    """The experts' own scores on the same rows."""
    top_k: int | None = None
    threshold: float | None = None
    """What restricted the routed weights, as in `TwinModel.forward`."""

    @property
    def mean(self) -> float:
        return fmean(task.score for task in self.tasks.values())

    def normalised(self, without: Sequence[str] = ()) -> float | None:
        """Mean of score / expert's score.

        None without a reference or tasks, and where an expert scores 0 or less: a share of that
        says nothing.
        """
        kept = [name for name in self.tasks if name not in without]
        if self.reference is None or not kept or min(self.reference[n] for n in kept) <= 0:
            return None
        return fmean(self.tasks[name].score / self.reference[name] for name in kept)

    @property
    def routing_accuracy(self) -> float | None:
        """Over all rows of all tasks."""
        parts = [(t.routing_accuracy, t.rows) for t in self.tasks.values()]
        if any(accuracy is None for accuracy, _ in parts):
            return None
        return sum((a or 0.0) * n for a, n in parts) / sum(n for _, n in parts)

    @property
    def seconds_per_1000(self) -> float:
        rows = sum(task.rows for task in self.tasks.values())
        return 1000 * sum(task.seconds for task in self.tasks.values()) / rows

    def to_dict(self) -> dict[str, Any]:
        """As JSON. What was not given (`top_k`, `threshold`, the experts' scores) is no key."""
        given = {"top_k": self.top_k, "threshold": self.threshold}
        return {
            "protocol": self.protocol,
            **{name: value for name, value in given.items() if value is not None},
            "mean": self.mean,
            "normalised": self.normalised(),
            "routing_accuracy": self.routing_accuracy,
            "seconds_per_1000_rows": self.seconds_per_1000,
            "tasks": {
                name: {
                    k: v
                    for k, v in asdict(task).items()
                    if k not in ("dropped", "new") or v is not None
                }
                | ({"expert": self.reference[name]} if self.reference is not None else {})
                for name, task in self.tasks.items()
            },
        }


@dataclass(frozen=True)
class Prepared:
    """One task's rows, tokenized."""

    task: Task
    encoded: Encoded
    truth: list[float]


def prepare(
    model: TwinModel,
    rows: Mapping[str, Rows],
    *,
    max_tokens: int | None = None,
    columns: Sequence[str] | None = None,
) -> dict[str, Prepared]:
    """Tokenize the rows of every task. Raises `InputError` for missing columns or labels."""
    out = {}
    outputs = model.outputs
    if not rows:
        raise InputError("expected rows of at least one task, got none.")
    limit = token_limit(model, max_tokens)
    for name, found in rows.items():
        if name not in outputs:
            raise InputError(f"task '{name}': no such expert. Known: {', '.join(model.experts)}.")
        if outputs[name] is None:
            raise InputError(
                f"task '{name}': its expert has no head with labels to score. Use `run` for "
                "generation."
            )
        if not found:
            raise InputError(f"task '{name}': expected at least one row, got none.")
        task = task_for(name, outputs[name])
        texts = [text_of(dict(row), columns or task.columns) for row in found]
        truth = [_label(row, name, model, number) for number, row in enumerate(found, start=1)]
        out[name] = Prepared(task, encode(model.tokenizer, texts, limit), truth)
    return out


def _label(row: Mapping[str, Any], task: str, model: TwinModel, number: int) -> float:
    """A row's label as a number; class names are accepted too."""
    label = row.get("label")
    names = model.labels[task]
    if isinstance(label, str) and names is not None and label in names:
        return float(names.index(label))
    if isinstance(label, bool) or not isinstance(label, int | float) or not isfinite(label):
        hint = ""
        if names is not None:
            hint = f"{did_you_mean(str(label), names)} Known: {', '.join(names)}, or numbers."
        raise InputError(
            f"task '{task}', row {number}: expected a finite number or the name of a class as "
            f"`label`, got {label!r}.{hint}"
        )
    if names is not None and label not in range(len(names)):
        raise InputError(
            f"task '{task}', row {number}: label {label!r} is not one of the expert's "
            f"{len(names)} classes (0 to {len(names) - 1}: {', '.join(names)})."
        )
    return float(label)


@torch.no_grad()
def evaluate(
    model: TwinModel,
    rows: Mapping[str, Rows] | Mapping[str, Prepared],
    protocol: Protocol = "routed",
    *,
    reference: Mapping[str, float] | None = None,
    batch_size: int = 32,
    max_tokens: int | None = None,
    columns: Sequence[str] | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Score every task of `rows` (task name -> rows with text and `label`) under `protocol`.

    A row that another task's head answered has no answer to its own question. In a classification
    it counts as wrong in accuracy, also where the class numbers happen to agree; in Matthews
    correlation and F1 it is a class of its own (-1), which costs less than the opposite class would
    (in F1 the same, where the row is positive). In a regression it gets the mean of the values that
    the right head gave, so it tells nothing. `top_k` and `threshold` drop small weights where the
    router decides (`routed`, `known-head`); other protocols have none to drop. Raises `InputError`
    for bad rows or an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}.")
    if not isinstance(rows, Mapping):
        raise InputError(f"rows: expected {{task: rows}}, got a {type(rows).__name__}.")
    if model.training:
        raise InputError("the model is in training mode, where dropout is at work: model.eval().")
    if reference is not None and (lacking := [name for name in rows if name not in reference]):
        raise InputError(f"reference=: has no score of the expert '{lacking[0]}'.")
    prepared: dict[str, Prepared] = {}
    raw = {name: value for name, value in rows.items() if not isinstance(value, Prepared)}
    if raw or not rows:
        prepared |= prepare(model, raw, max_tokens=max_tokens, columns=columns)
    prepared |= {name: value for name, value in rows.items() if isinstance(value, Prepared)}
    scores: dict[str, TaskScore] = {}
    how = _Protocol(protocol, top_k, threshold)
    done, total = 0, sum(len(task.encoded) for task in prepared.values())
    for name, task in prepared.items():
        if progress:
            progress(name, done, total)
        scores[name] = _score(model, name, task, how, batch_size)
        done += len(task.encoded)
    if progress:
        progress("", total, total)
    kept = None if reference is None else {name: float(reference[name]) for name in scores}
    return Report(protocol, scores, kept, **how.restricted)


def _score(
    model: TwinModel, name: str, task: Prepared, how: _Protocol, batch_size: int
) -> TaskScore:
    guesses: list[float | None] = [None] * len(task.encoded)
    dropped: float | None = None
    routed_right = new = 0
    own = model.experts.index(name)
    names = model.labels[name]
    seconds = 0.0
    for indices, batch in batches(model.tokenizer, task.encoded, batch_size):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        started = time.perf_counter()
        output = model(**batch, **how.options(model, name))
        seconds += time.perf_counter() - started
        assert output.logits is not None and output.expert is not None
        if output.routed is not None:
            routed_right += int((output.routed.probabilities.argmax(dim=-1) == own).sum())
            new += int(output.routed.new.sum())
        if output.dropped is not None:
            dropped = (dropped or 0.0) + float(output.dropped.sum())
        for index, chosen, guess in zip(
            indices, output.expert.tolist(), guesses_of(output.logits, names), strict=True
        ):
            guesses[index] = guess if chosen == own else None
    answers = filled(guesses, regression=names is None)
    score = metric(task.task.metric)(task.truth, answers)
    return TaskScore(
        score=score,
        metric=task.task.metric,
        rows=len(task.encoded),
        routing_accuracy=routed_right / len(task.encoded) if how.routes else None,
        truncated=task.encoded.truncated,
        seconds=seconds,
        dropped=None if dropped is None else dropped / len(task.encoded),
        new=new / len(task.encoded) if how.routes else None,
    )


@dataclass(frozen=True)
class _Protocol:
    """A protocol and what restricts its routed weights."""

    name: Protocol
    top_k: int | None
    threshold: float | None

    @property
    def routes(self) -> bool:
        return self.name in ("routed", "known-head")

    @property
    def restricted(self) -> dict[str, Any]:
        return {"top_k": self.top_k, "threshold": self.threshold} if self.routes else {}

    def options(self, model: TwinModel, task: str) -> dict[str, Any]:
        """Of a call of the model on rows of this task."""
        if self.name == "oracle":
            return {"task": task}
        if self.name == "shared":
            return {"weights": [0.0] * len(model.experts), "head": task}
        return ({"head": task} if self.name == "known-head" else {}) | self.restricted


def guesses_of(logits: Tensor, names: list[str] | None) -> list[float]:
    """The class, or the value of a regression (`names` is None), of every row of one head.

    Raises `InputError` unless there is one answer for a row: heads that label tokens have none.
    """
    if logits.ndim != 2:
        raise InputError(
            f"expected one answer per row, (batch, class), but the head gives "
            f"{tuple(logits.shape)}. Only sequence classification and regression can be scored."
        )
    values = logits[:, 0] if names is None else logits[:, : len(names)].argmax(dim=-1)
    return values.float().tolist()


def filled(guesses: Sequence[float | None], *, regression: bool) -> list[float]:
    """What stands for "no answer": see `evaluate`."""
    answered = [guess for guess in guesses if guess is not None]
    instead = (fmean(answered) if answered else 0.0) if regression else -1.0
    return [instead if guess is None else guess for guess in guesses]
