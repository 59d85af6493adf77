"""The first true table: experts, static merges and Twin-Merging on the same test rows.

    python -m twinmerge.evaluation.study EXPERTS DATA OUT.json --base BASE [--work FOLDER]

EXPERTS  a folder with one checkpoint (or adapter) folder per task
DATA     `<task>/{train,validation,test}.jsonl.gz`
OUT      the results; rows are added as they are done, a second run goes on where one stopped, and
         several may work on one table (`--only`)

What is chosen, and on which rows: coefficients of the static merges by the mean normalised score
with known heads on the first `--choose-rows` validation rows of each task; router layer and epoch
on a fifth, held out, of the train rows that the router is fitted on. Test rows choose nothing.

Seconds per 1,000 rows are measured batch by batch in turn with a plain model of the same class, so
that the ratio holds when the machine's speed drifts.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..artifact.format import MANIFEST
from ..artifact.reader import Artifact
from ..artifact.writer import replace_text
from ..data import Encoded, batches, read_tasks, text_of
from ..errors import InputError
from ..merging.build import build
from ..recipe import Recipe, Router
from ..runtime.load import load, load_router
from ..runtime.model import TwinModel
from ..runtime.router.fit import fit_router, store_router
from .provenance import provenance
from .reference import expert_model, score_plain
from .score import Prepared, Protocol, Report, evaluate, prepare
from .tasks import task_for

# Weak experts whose normalised score is mostly noise; the mean is given with and without them.
NOISY = ("rte",)

TIMED_ROWS = 40
"""Rows of every task on which seconds are measured."""

GRIDS: dict[str, dict[str, list[float]]] = {
    "task_arithmetic": {"weight": [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]},
    "ties": {"density": [0.2, 0.5, 0.8], "lambda": [0.5, 1.0, 1.5]},
    "dare_linear": {"density": [0.3, 0.8], "weight": [0.2, 0.3, 0.4]},
    "dare_ties": {"density": [0.3, 0.8], "weight": [0.2, 0.3, 0.4]},
}

STATIC: dict[str, str] = {
    "pretrained": "task_arithmetic",
    "averaging": "linear",
    "task arithmetic": "task_arithmetic",
    "TIES": "ties",
    "DARE + task arithmetic": "dare_linear",
    "DARE + TIES": "dare_ties",
}

TWIN: dict[str, tuple[str, Any]] = {
    "Twin-Merging, rank 1": ("linear", 1),
    "Twin-Merging, rank 8": ("linear", 8),
    "Twin-Merging, rank 16": ("linear", 16),
    "Twin-Merging, 10 % of singular values": ("linear", "10%"),
    "Twin-Merging on task arithmetic, rank 16": ("task_arithmetic", 16),
}


class Study:
    """One run of the table; holds what its rows share."""

    def __init__(
        self, experts: Path, data: Path, out: Path, base: str, work: Path, settings: dict[str, Any]
    ) -> None:
        self.data, self.out, self.base, self.work, self.settings = data, out, base, work, settings
        names = sorted(p.name for p in experts.iterdir() if (p / "config.json").is_file())
        if not names:
            names = sorted(
                p.name for p in experts.iterdir() if (p / "adapter_config.json").is_file()
            )
        self.names = names
        self.models = [{"model": str(experts / name), "name": name} for name in names]
        self.results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}

    # ------------------------------------------------------------------ pieces

    def recipe(self, method: str, rank: Any, parameters: Mapping[str, float]) -> Recipe:
        return Recipe.model_validate(
            {
                "base_model": self.base,
                "models": self.models,
                "merge_method": method,
                "parameters": dict(parameters),
                "exclusive": {"rank": rank},
            }
        )

    def rows(self, split: str, limit: int | None = None) -> dict[str, list[dict[str, Any]]]:
        found, _ = read_tasks(self.data, self.names, split)
        return {name: rows[:limit] for name, rows in found.items()}

    def prepared(
        self, model: TwinModel, split: str, limit: int | None = None
    ) -> dict[str, Prepared]:
        return prepare(model, self.rows(split, limit), max_tokens=self.settings["max_tokens"])

    def artifact(self, name: str, recipe: Recipe) -> tuple[Path, float]:
        """Build, and how long it took."""
        folder = (
            self.work
            / str(os.getpid())
            / name.replace(" ", "-").replace(",", "").replace("%", "percent")
        )
        if (folder / MANIFEST).is_file():
            shutil.rmtree(folder)
        started = time.perf_counter()
        build(recipe, folder)
        return folder, time.perf_counter() - started

    def save(self, part: str, **values: Any) -> None:
        """Add to one part of the results, in the file as it is now."""
        with open(self.out.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.results = json.loads(self.out.read_text()) if self.out.is_file() else {}
            self.results[part] = self.results.get(part, {}) | values
            replace_text(self.out, json.dumps(self.results, indent=1) + "\n")

    # ------------------------------------------------------------------ steps

    def run(self, only: list[str], say: Callable[[str], None]) -> None:
        settings = self.settings | {"experts": self.names}
        if self.results.get("settings", settings) != settings:
            raise InputError(
                f"{self.out}: holds results of other settings, {self.results['settings']}; now "
                f"they are {settings}. Give another file."
            )
        if "provenance" not in self.results:  # rows that come later name their own commit
            self.save("settings", **settings)
            self.save("provenance", **provenance())
        if "experts" not in self.results:
            say("experts on their own rows")
            self.save("experts", **self.score_experts())
        rows = {name: (method, "none") for name, method in STATIC.items()} | TWIN
        routers: dict[str, Path] = {}
        for name, (method, rank) in rows.items():
            if only and name not in only or name in self.results.get("rows", {}):
                continue
            parameters = {"weight": 0.0} if name == "pretrained" else self.best(method, say)
            say(name)
            row = self.row(name, self.recipe(method, rank, parameters), routers)
            self.save("rows", **{name: row})

    def best(self, method: str, say: Callable[[str], None]) -> dict[str, float]:
        """The chosen coefficients of a method; chosen now if they are not yet."""
        if method not in GRIDS:
            return {}
        if method not in self.results.get("chosen", {}):
            say(f"coefficients of {method}")
            self.save("chosen", **{method: self.choose(method, GRIDS[method])})
        return self.results["chosen"][method]["parameters"]

    def score_experts(self) -> dict[str, Any]:
        """Every expert as a plain model on its own validation and test rows."""
        recipe = self.recipe("linear", "none", {})
        folder, _ = self.artifact("plain", recipe)
        model = load(folder, check=False)
        sets = {
            "test": self.prepared(model, "test", self.settings["test_rows"]),
            "validation": self.prepared(model, "validation", self.settings["choose_rows"]),
        }
        scores: dict[str, Any] = {}
        for name in self.names:
            plain = expert_model(model, name, recipe)
            scores[name] = {
                split: vars(score_plain(model, plain, name, tasks[name]))
                for split, tasks in sets.items()
            }
            for split, score in scores[name].items():
                if score["score"] <= 0:
                    raise InputError(
                        f"expert '{name}' scores {score['score']:.3f} on its own {split} rows, so "
                        "no normalised score exists. Does its checkpoint belong to these rows?"
                    )
        return scores

    def reference(self, split: str) -> dict[str, float]:
        return {name: both[split]["score"] for name, both in self.results["experts"].items()}

    def choose(self, method: str, grid: dict[str, list[float]]) -> dict[str, Any]:
        """The coefficients with the best mean normalised score on validation rows, heads known."""
        tried = []
        for values in itertools.product(*grid.values()):
            parameters = dict(zip(grid, values, strict=True))
            folder, _ = self.artifact("trial", self.recipe(method, "none", parameters))
            model = load(folder, check=False)
            tasks = self.prepared(model, "validation", self.settings["choose_rows"])
            report = evaluate(model, tasks, "shared", reference=self.reference("validation"))
            tried.append({"parameters": parameters, "normalised": report.normalised()})
        best = max(tried, key=lambda trial: trial["normalised"])
        return {"parameters": best["parameters"], "tried": tried}

    def row(self, name: str, recipe: Recipe, routers: dict[str, Path]) -> dict[str, Any]:
        """Build, fit the router, score under the protocols, time."""
        twin = recipe.exclusive.rank != "none"
        folder, seconds = self.artifact(name, recipe)
        router = self.route(folder, routers)
        model = load(folder, check=False)
        tasks = self.prepared(model, "test", self.settings["test_rows"])
        protocols: list[Protocol] = (
            ["routed", "known-head", "oracle"] if twin else ["routed", "oracle"]
        )
        reports: dict[str, Any] = {}
        for protocol in protocols:
            report = evaluate(model, tasks, protocol, reference=self.reference("test"))
            reports[protocol] = self.summary(report)
        if not twin:
            # Without exclusive knowledge weights change nothing: both take the true task's head.
            reports["known-head"] = reports["oracle"]
        manifest = Artifact(folder, check=False).manifest
        shared = sum(tensor.bytes for tensor in manifest.tensors)
        row = {
            "commit": provenance()["commit"],
            "method": recipe.merge_method,
            "parameters": dict(recipe.parameters),
            "rank": recipe.exclusive.rank,
            "build_seconds": seconds,
            "bytes": {
                "base": shared,
                "experts": sum(expert.bytes for expert in manifest.experts),
                "router": manifest.router.bytes if manifest.router else 0,
                "folder": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            },
            "router": router,
            "protocols": reports,
            "seconds_per_1000_rows": paired_seconds(model, tasks),
        }
        if folder not in routers.values():
            shutil.rmtree(folder)
        return row

    def route(self, folder: Path, routers: dict[str, Path]) -> dict[str, Any]:
        """Fit the artifact's router, or take that of one with the same shared expert."""
        artifact = Artifact(folder, check=False)
        key = json.dumps(artifact.manifest.shared_files(), sort_keys=True)
        if key in routers:
            other = Artifact(routers[key], check=False)
            assert other.manifest.router is not None
            fitted = store_router(artifact, load_router(other), other.manifest.router)
        else:
            texts = {
                name: [text_of(row, task_for(name, None).columns) for row in rows]
                for name, rows in self.rows("train").items()
            }
            settings = Router(rows_per_task=self.settings["router_rows"])
            fitted = fit_router(folder, texts, settings, max_tokens=self.settings["max_tokens"])
            routers[key] = folder
        return {
            "kind": fitted.kind,
            "layers": fitted.layers,
            "held_out_accuracy": fitted.held_out_accuracy,
            "held_out_rows": fitted.held_out_rows,
            "calibration_error": fitted.calibration_error,
            "tried": [each.model_dump(mode="json") for each in fitted.tried],
        }

    def summary(self, report: Report) -> dict[str, Any]:
        return report.to_dict() | {"normalised_without_noisy": report.normalised(without=NOISY)}


@torch.inference_mode()
def paired_seconds(model: TwinModel, tasks: Mapping[str, Prepared]) -> dict[str, float]:
    """Seconds per 1,000 rows of a plain model and of routed answers, batch by batch in turn.

    On the first rows of every task, mixed, in batches of 32 rows of similar length.
    """
    rows = [row for task in tasks.values() for row in task.encoded.rows[:TIMED_ROWS]]
    mixed = Encoded(random.Random(0).sample(rows, len(rows)), [False] * len(rows))
    plain = model.merged([0.0] * len(model.experts), head=model.experts[0])
    seconds = {"plain": 0.0, "routed": 0.0}
    runs: dict[str, Callable[..., Any]] = {"plain": plain, "routed": model}
    for number, (_, batch) in enumerate(batches(model.tokenizer, mixed, 32)):
        for name, run in runs.items():
            if number == 0:
                run(**batch)  # warm up
            started = time.perf_counter()
            run(**batch)
            seconds[name] += time.perf_counter() - started
    return {name: 1000 * took / len(rows) for name, took in seconds.items()}


def main(
    experts: Annotated[Path, typer.Argument(help="One checkpoint folder per task.")],
    data: Annotated[Path, typer.Argument(help="`<task>/{train,validation,test}.jsonl.gz`.")],
    out: Annotated[Path, typer.Argument(help="Results, JSON.")],
    base: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    work: Annotated[
        Path | None, typer.Option(help="Where artifacts go; default: temporary.")
    ] = None,
    choose_rows: Annotated[int, typer.Option(help="Validation rows per task that choose.")] = 200,
    test_rows: Annotated[int | None, typer.Option(help="Test rows per task; default: all.")] = None,
    router_rows: Annotated[int, typer.Option(help="Train rows per task for the router.")] = 1000,
    max_tokens: Annotated[int, typer.Option(help="Longer rows are cut.")] = 96,
    only: Annotated[list[str] | None, typer.Option(help="Only this row; may be repeated.")] = None,
    title: Annotated[str, typer.Option(help="What the experts are, for the table.")] = "",
) -> None:
    """Experts, static merges and Twin-Merging on the same test rows, under named protocols."""
    settings = {
        "title": title,
        "choose_rows": choose_rows,
        "test_rows": test_rows,
        "router_rows": router_rows,
        "max_tokens": max_tokens,
        "router_seed": 0,
        "merge_seed": 0,
        "noisy": list(NOISY),
    }
    with tempfile.TemporaryDirectory() as temporary:
        study = Study(experts, data, out, base, work or Path(temporary), settings)
        started = time.perf_counter()
        study.run(
            only or [],
            lambda what: typer.echo(f"{time.perf_counter() - started:6.0f} s  {what}", err=True),
        )


if __name__ == "__main__":
    typer.run(main)
