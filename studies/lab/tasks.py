"""Merges of some of the experts, and what more of them cost (the paper's Figure 4)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from twinmerge.evaluation.tasks.glue import GLUE

from .lab import STORED, Lab, bytes_of, opened
from .static import STATIC, Parameters, Say
from .twin import MAIN, routing_of

COUNTS = (2, 4, 6, 8, 11, 14, 17)
"""Of tasks; those that the lab has, and all of them."""

ORDER_SEED = 0
"""Of the order in which tasks join: GLUE's first, either part shuffled."""

RANK = 16
SEED = 0
"""Of the router."""

GRIDS: Mapping[str, Mapping[str, Sequence[float]]] = {
    "task arithmetic": {"weight": (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)},
    "TIES": {"density": (0.2, 0.5), "lambda": (0.5, 1.0)},
}
"""What is tried anew for every choice of experts: fewer values than for the main table. A weight of
0.5 averages two experts."""


@contextmanager
def among(lab: Lab, names: Sequence[str]) -> Iterator[Lab]:
    """A lab of some experts, which cannot read the others' rows.

    Its artifacts are gone at the end, its records are the lab's own.
    """
    lab.work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=lab.work) as work:
        yield replace(
            lab,
            names=list(names),
            models={name: lab.models[name] for name in names},
            data={name: lab.data[name] for name in names},
            work=Path(work),
            _prepared={},
            _answers={},
        )


def best(some: Lab, name: str, say: Say) -> Parameters:
    """The coefficients of a static method with the best normalised score on the validation rows of
    these experts."""
    grid, method = GRIDS.get(name, {}), STATIC[name][0]
    if not grid:
        return {}
    tried: list[tuple[float, Parameters]] = []
    for values in itertools.product(*grid.values()):
        parameters = dict(zip(grid, values, strict=True))

        def scored(parameters: Parameters = parameters) -> dict[str, Any]:
            return static_scores(some, method, parameters, "validation")["known-head"]

        settings = {"names": some.names, "method": method} | parameters
        record = some.records.once("tasks choice", name, settings, scored)
        tried.append((record["normalised"], parameters))
    score, parameters = max(tried, key=lambda each: each[0])
    say(f"{name} of {len(some.names)}: {parameters}, {score:.4f} on validation rows")
    return parameters


def static_scores(some: Lab, method: str, parameters: Parameters, split: str) -> dict[str, Any]:
    """A static merge of a lab's experts as it is stored, true heads."""
    recipe = some.recipe(method, parameters, stored=STORED)
    artifact = some.built(recipe)
    model = opened(artifact)
    found = {"bytes": bytes_of(artifact), "known-head": some.dense(model, split, oracle=False)}
    some.drop(recipe)
    return found


def tasks(lab: Lab, say: Say) -> None:
    """One record for each method and number of tasks."""
    order = joining(lab.names)
    for count in counts(len(order)):
        with among(lab, order[:count]) as some:
            for name in ("averaging", "task arithmetic"):
                _static(some, name, say)
            _twin(some, say)


def joining(names: Sequence[str]) -> list[str]:
    """All tasks in the order in which they join."""
    draw = random.Random(ORDER_SEED)
    parts = [[n for n in names if n in GLUE], [n for n in names if n not in GLUE]]
    return [name for part in parts for name in draw.sample(part, len(part))]


def counts(most: int) -> list[int]:
    return sorted({*(count for count in COUNTS if count < most), most})


def _static(some: Lab, name: str, say: Say) -> None:
    method, parameters = STATIC[name][0], best(some, name, say)
    settings = {"names": some.names, "method": method, "parameters": parameters}
    record = some.records.once(
        "tasks", name, settings, lambda: static_scores(some, method, parameters, "test")
    )
    say(f"{len(some.names)} tasks, {name}: {record['known-head']['normalised']:.4f}")


def _twin(some: Lab, say: Say) -> None:
    method = STATIC[MAIN][0]
    exclusive: dict[str, Any] = {"rank": RANK}

    def scored() -> dict[str, Any]:
        model = some.route(some.built(some.recipe(method, stored=STORED, **exclusive)), SEED)
        routes = {name: some.routed(model, name, "test") for name in some.names}
        return {
            "bytes": bytes_of(model),
            "oracle": some.dense(model, "test", oracle=True),
            "routing accuracy": routing_of(model.experts, routes)["accuracy"],
        } | some.protocols(model, routes, "test")

    settings = {"names": some.names, "method": method, "exclusive": exclusive, "seed": SEED}
    record = some.records.once("tasks", "Twin-Merging", settings, scored)
    shown = ", ".join(f"{p} {record[p]['normalised']:.4f}" for p in ("oracle", "known-head"))
    say(f"{len(some.names)} tasks, Twin-Merging: {shown}")
