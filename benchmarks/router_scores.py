"""What a router's weights are worth: scores of the answers beside those of the experts."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from router_bench import Bench
from router_read import both, note
from router_results import Results

from twinmerge.data import batches
from twinmerge.evaluation.reference import expert_model, score_plain
from twinmerge.evaluation.score import evaluate, guesses_of
from twinmerge.recipe import Recipe, Router
from twinmerge.runtime.router.router import Routed

APART = ("cola", "qnli", "qqp", "sst2")
"""Tasks whose inputs can be told from those of all others; the other four share sources."""

SCORED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {"kind": "none"}),
    ("projection, no data", {"kind": "projection", "rows_per_task": 1}),
    ("prompts, 8 lines", {"kind": "prompts", "rows_per_task": 8}),
    *(
        (f"prototype, auto, {n} rows", {"kind": "prototype", "rows_per_task": n})
        for n in (16, 100, 400)
    ),
    ("prototype, auto, 1000 rows", {"kind": "prototype"}),
    ("prototype, auto, coverage 0.95", {"kind": "prototype", "coverage": 0.95}),
    ("prototype, auto, never new", {"kind": "prototype", "coverage": 1.0}),
    *(
        (f"prototype, auto, sharpness {each}", {"kind": "prototype", "sharpness": each})
        for each in (1.0, 2.0, 4.0, "top")
    ),
    ("linear, auto, 1000 rows", {"kind": "linear"}),
    ("mlp, auto, 1000 rows", {"kind": "mlp"}),
    (
        "mlp, last layer, as the paper",
        {"kind": "mlp", "layer": 6, "temperature": 1.0, "sharpness": 1.0, "coverage": 1.0},
    ),
)


def scores(bench: Bench, results: Results) -> None:
    """Normalised scores of the router's weights under `known-head` and `routed`."""
    model, tasks = bench.model, bench.tasks
    own = experts_scores(bench, results)
    for name, given in SCORED:
        if results.has("scores", {"name": name}):
            continue
        settings = Router.model_validate(given)
        router, record, _ = bench.fitted(settings)
        by_task: dict[str, dict[str, float]] = {"known-head": {}, "routed": {}}
        new = 0
        for index, task in enumerate(model.experts):
            found = bench.routed(router, settings, bench.tests[task])
            new += int(found.new.sum())
            answers = answered(bench, task, tasks[task], found, index)
            for protocol, score in answers.items():
                by_task[protocol][task] = score
        row = {
            "name": name,
            "sharpness": router.sharpness,
            "temperature": router.temperature,
            "said": record.said,
            "new": new / len(bench.truth),
        }
        row |= {protocol: normalised(found, own) for protocol, found in by_task.items()}
        results.add("scores", row)
        note(
            f"{name}: known head {row['known-head']['normalised']:.4f}, "
            f"routed {row['routed']['normalised']:.4f}, sharpness {router.sharpness}"
        )


@torch.no_grad()
def answered(bench: Bench, name: str, task: Any, found: Routed, index: int) -> dict[str, float]:
    """The task's score with its own head, and with the head that the router chooses."""
    model, labels = bench.model, bench.model.labels[name]
    own: list[float | None] = [None] * len(task.encoded)
    for rows, batch in batches(model.tokenizer, task.encoded, 32):
        output = model(**batch, weights=found.weights[rows], head=name)
        for row, guess in zip(rows, guesses_of(output.logits, labels), strict=True):
            own[row] = guess
    chosen = (found.probabilities.argmax(dim=1) == index).tolist()
    return both(model, name, task, own, chosen)


def experts_scores(bench: Bench, results: Results) -> dict[str, float]:
    """Each expert's own score on its test rows; the first call scores `oracle` and `shared` too."""
    model, tasks = bench.model, bench.tasks
    if not results.has("scores", {"name": "oracle"}):
        models = [{"model": folder, "name": name} for name, folder in bench.names.items()]
        recipe = Recipe.model_validate({"base_model": bench.base, "models": models})
        own = {}
        for name, task in tasks.items():
            own[name] = score_plain(model, expert_model(model, name, recipe), name, task).score
            note(f"expert {name}: {own[name]:.4f}")
        for protocol in ("oracle", "shared"):
            report = evaluate(model, tasks, protocol, reference=own)
            results.add("scores", {"name": protocol} | report.to_dict())
            note(f"{protocol}: {report.normalised():.4f}")
    oracle = results.find("scores", {"name": "oracle"})
    return {name: task["expert"] for name, task in oracle["tasks"].items()}


def normalised(scores: dict[str, float], own: Mapping[str, float]) -> dict[str, Any]:
    """The mean over tasks of score / the expert's own score, and over some of the tasks."""
    shares = {task: score / own[task] for task, score in scores.items()}
    return {
        "scores": scores,
        "normalised": fmean(shares.values()),
        "normalised_apart": fmean(shares[task] for task in APART),
        "normalised_without_noisy": fmean(v for task, v in shares.items() if task != "rte"),
    }
