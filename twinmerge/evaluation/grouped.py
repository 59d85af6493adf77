"""What the paper's grouped variant loses and gains, beside the exact mixed batch on the same rows.

All tasks' rows form one mixed set, which is what the grouping sees. Each way is scored under the
protocols `routed` and `known-head` (see `score`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Encoded, batches
from ..errors import InputError
from ..runtime.export import DenseMerge
from ..runtime.grouped import By, Grouped, group_weights, route_rows, run_groups
from ..runtime.model import TwinModel
from .metrics import metric
from .score import Prepared, Report, TaskScore, filled, guesses_of


@dataclass(frozen=True)
class Loss:
    """How far grouped rows are from the exact ones."""

    merges: int
    weight_error_mean: float
    weight_error_largest: float
    """Euclidean distance between a row's weights and its group's."""
    agreement: float | None
    """Share of rows, among those that a classifier's head answered, with the same class."""
    value_difference_mean: float | None
    """Of rows that a regression's head answered."""
    logit_difference_largest: float


@dataclass(frozen=True)
class Way:
    """One way to answer all rows, and how well it did."""

    groups: int | None
    """In each bin; None for the exact mixed batch."""
    by: By | None
    seconds: dict[str, float]
    """Wall time for all rows under `routed`: `total`, and its parts where there are any."""
    reports: dict[str, Report]
    """By protocol. A task's seconds are its share of the total, by rows."""
    loss: Loss | None
    """Against the exact mixed batch, under `routed`."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "groups": self.groups,
            "by": self.by,
            "seconds": self.seconds,
            "loss": None if self.loss is None else vars(self.loss),
            "protocols": {name: report.to_dict() for name, report in self.reports.items()},
        }


@dataclass(frozen=True)
class _Rows:
    """All tasks' rows as one set."""

    encoded: Encoded
    task: list[str]
    """Of every row."""


@dataclass(frozen=True)
class _Answers:
    """One per row: the logits of the head that answered, and whose it was."""

    logits: list[Tensor]
    expert: list[int]


@torch.no_grad()
def compare_grouped(
    model: TwinModel,
    tasks: Mapping[str, Prepared],
    ways: Sequence[tuple[int, By]],
    *,
    reference: Mapping[str, float] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Way]:
    """Answer the rows of all tasks exactly, then by groups: (groups in each bin, by what).

    tasks:     as `score.prepare` makes them
    reference: the experts' own scores on the same rows

    The exact way stands first. Routing is run once for all grouped ways; its seconds count in each.
    Raises `InputError` for no tasks or bad numbers of groups, `RouterError` without a router.
    """
    if not tasks:
        raise InputError("expected rows of at least one task, got none.")
    rows = _joined(tasks)
    score = _Scorer(model, tasks, rows, reference)

    started = time.perf_counter()
    exact = _exact(model, rows.encoded, batch_size)
    seconds = {"total": time.perf_counter() - started}
    misled = [i for i, e in enumerate(exact.expert) if model.experts[e] != rows.task[i]]
    heads = [rows.task[i] for i in misled]
    # Rows that were routed to their own task have the true head already.
    rest = _exact(model, _part(rows.encoded, misled), batch_size, heads)
    found = [Way(None, None, seconds, score.both(exact, rest, misled, seconds["total"]), None)]

    started = time.perf_counter()
    weights, expert = route_rows(model, rows.encoded, batch_size)
    route = time.perf_counter() - started
    dense = DenseMerge(model)
    for groups, by in ways:
        started = time.perf_counter()
        grouped = group_weights(weights, groups, seed, by, expert)
        seconds = {"route": route, "group": time.perf_counter() - started}
        run = run_groups(dense, rows.encoded, grouped, batch_size=batch_size)
        seconds["total"] = route + time.perf_counter() - started
        seconds |= run.seconds
        answers = _Answers(run.logits, run.expert.tolist())
        taken = grouped.take(misled)
        other = run_groups(
            dense, _part(rows.encoded, misled), taken, head=heads, batch_size=batch_size
        )
        rest = _Answers(other.logits, other.expert.tolist())
        reports = score.both(answers, rest, misled, seconds["total"])
        found.append(Way(groups, by, seconds, reports, _loss(model, exact, answers, grouped)))
    return found


def _joined(tasks: Mapping[str, Prepared]) -> _Rows:
    encoded = Encoded(
        [row for task in tasks.values() for row in task.encoded.rows],
        [cut for task in tasks.values() for cut in task.encoded.cut],
    )
    return _Rows(encoded, [name for name, task in tasks.items() for _ in task.encoded.rows])


def _part(rows: Encoded, chosen: Sequence[int]) -> Encoded:
    return Encoded([rows.rows[i] for i in chosen], [rows.cut[i] for i in chosen])


def _exact(
    model: TwinModel, rows: Encoded, batch_size: int, heads: Sequence[str] | None = None
) -> _Answers:
    """Every row with its own weights, in mixed batches of similar length."""
    outputs = list(model.outputs.values())
    logits: dict[int, Tensor] = {}
    expert = [0] * len(rows)
    for places, batch in batches(model.tokenizer, rows, batch_size):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        output = model(**batch, head=None if heads is None else [heads[i] for i in places])
        assert output.logits is not None and output.expert is not None
        for place, one, index in zip(places, output.logits, output.expert.tolist(), strict=True):
            logits[place], expert[place] = one[: outputs[index]], index
    return _Answers([logits[place] for place in range(len(rows))], expert)


class _Scorer:
    """Reports from answers."""

    def __init__(
        self,
        model: TwinModel,
        tasks: Mapping[str, Prepared],
        rows: _Rows,
        reference: Mapping[str, float] | None,
    ) -> None:
        self.model, self.tasks, self.rows = model, tasks, rows
        self.reference = None if reference is None else {name: reference[name] for name in tasks}

    def both(
        self, routed: _Answers, rest: _Answers, misled: Sequence[int], seconds: float
    ) -> dict[str, Report]:
        """Under `routed`; and under `known-head`, where `rest` answers the rows of `misled`."""
        known = _Answers(list(routed.logits), list(routed.expert))
        for place, row in enumerate(misled):
            known.logits[row], known.expert[row] = rest.logits[place], rest.expert[place]
        heads = [self.model.experts[index] for index in routed.expert]
        right = [head == task for head, task in zip(heads, self.rows.task, strict=True)]
        return {
            protocol: Report(
                protocol,
                {name: self._task(name, answers, right, seconds) for name in self.tasks},
                self.reference,
            )
            for protocol, answers in (("routed", routed), ("known-head", known))
        }

    def _task(self, name: str, answers: _Answers, right: list[bool], seconds: float) -> TaskScore:
        task, names = self.tasks[name], self.model.labels[name]
        own = self.model.experts.index(name)
        mine = [i for i, other in enumerate(self.rows.task) if other == name]
        guesses = [
            guesses_of(answers.logits[i][None], names)[0] if answers.expert[i] == own else None
            for i in mine
        ]
        scored = filled(guesses, regression=names is None)
        return TaskScore(
            score=metric(task.task.metric)(task.truth, scored),
            metric=task.task.metric,
            rows=len(mine),
            routing_accuracy=sum(right[i] for i in mine) / len(mine),
            truncated=task.encoded.truncated,
            seconds=seconds * len(mine) / len(self.rows.task),
        )


def _loss(model: TwinModel, exact: _Answers, answers: _Answers, grouped: Grouped) -> Loss:
    same: list[bool] = []
    apart: list[float] = []
    largest = 0.0
    regression = [names is None for names in model.labels.values()]
    for index, one, other in zip(exact.expert, exact.logits, answers.logits, strict=True):
        largest = max(largest, float((one - other).abs().max()))
        if regression[index]:
            apart.append(float((one[0] - other[0]).abs()))
        else:
            same.append(bool(one.argmax() == other.argmax()))
    return Loss(
        merges=grouped.count,
        weight_error_mean=float(grouped.error.mean()),
        weight_error_largest=float(grouped.error.max()),
        agreement=sum(same) / len(same) if same else None,
        value_difference_mean=sum(apart) / len(apart) if apart else None,
        logit_difference_largest=largest,
    )
