"""The first true table: experts, static merges and Twin-Merging on the same test rows.

    python -m twinmerge.evaluation.study EXPERTS DATA OUT.json --base BASE [--work FOLDER]

EXPERTS  a folder with one checkpoint (or adapter) folder per task
DATA     `<task>/{train,validation,test}.jsonl.gz`
OUT      the results; rows are added as they are done, and a second run goes on where one stopped

What is chosen, and on which rows: coefficients of the static merges by the mean normalised score
with known heads on the first `--choose-rows` validation rows of each task; router layer and epoch
on a fifth, held out, of the train rows that the router is fitted on. Test rows choose nothing.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from ..artifact.reader import Artifact
from ..artifact.writer import replace_text
from ..data import read_tasks, text_of
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

GRIDS: dict[str, dict[str, list[float]]] = {
    "task_arithmetic": {"weight": [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]},
    "ties": {"density": [0.2, 0.5, 0.8], "lambda": [0.5, 1.0, 1.5]},
    "dare_linear": {"density": [0.3, 0.7, 0.9], "weight": [0.2, 0.3, 0.4, 0.5]},
    "dare_ties": {"density": [0.3, 0.7, 0.9], "weight": [0.2, 0.3, 0.4, 0.5]},
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
        folder = self.work / name.replace(" ", "-").replace(",", "").replace("%", "percent")
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        build(recipe, folder)
        return folder, time.perf_counter() - started

    def save(self, **parts: Any) -> None:
        self.results |= parts
        replace_text(self.out, json.dumps(self.results, indent=1) + "\n")

    # ------------------------------------------------------------------ steps

    def run(self, say: Callable[[str], None]) -> None:
        settings = self.settings | {"experts": self.names}
        if self.results.get("settings", settings) != settings:
            raise InputError(
                f"{self.out}: holds results of other settings, {self.results['settings']}; now "
                f"they are {settings}. Give another file."
            )
        if "provenance" not in self.results:
            self.save(settings=settings, provenance=provenance())
        if "experts" not in self.results:
            say("experts on their own rows")
            self.save(experts=self.score_experts())
        if "chosen" not in self.results:
            self.save(chosen={})
        for method, grid in GRIDS.items():
            if method not in self.results["chosen"]:
                say(f"coefficients of {method}")
                self.save(chosen=self.results["chosen"] | {method: self.choose(method, grid)})
        if "rows" not in self.results:
            self.save(rows={})
        routers: dict[str, Path] = {}
        for name, method in STATIC.items():
            if name not in self.results["rows"]:
                say(name)
                parameters = {"weight": 0.0} if name == "pretrained" else self.best(method)
                self.row(name, self.recipe(method, "none", parameters), routers, twin=False)
        for name, (method, rank) in TWIN.items():
            if name not in self.results["rows"]:
                say(name)
                self.row(name, self.recipe(method, rank, self.best(method)), routers, twin=True)

    def best(self, method: str) -> dict[str, float]:
        return self.results["chosen"].get(method, {}).get("parameters", {})

    def score_experts(self) -> dict[str, Any]:
        """Every expert as a plain model on its own validation and test rows."""
        folder, _ = self.artifact("plain", self.recipe("linear", "none", {}))
        model = load(folder, check=False)
        sets = {
            "test": self.prepared(model, "test", self.settings["test_rows"]),
            "validation": self.prepared(model, "validation", self.settings["choose_rows"]),
        }
        scores: dict[str, Any] = {}
        for name in self.names:
            plain = expert_model(model, name)
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

    def row(self, name: str, recipe: Recipe, routers: dict[str, Path], *, twin: bool) -> None:
        """Build, fit the router, score under the protocols; adds one row to the results."""
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
            "method": recipe.merge_method,
            "parameters": dict(recipe.parameters),
            "rank": recipe.exclusive.rank,
            "commit": provenance()["commit"],
            "build_seconds": seconds,
            "bytes": {
                "base": shared,
                "experts": sum(expert.bytes for expert in manifest.experts),
                "router": manifest.router.bytes if manifest.router else 0,
                "folder": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            },
            "router": router,
            "protocols": reports,
        }
        self.save(rows=self.results["rows"] | {name: row})
        if folder not in routers.values():
            shutil.rmtree(folder)

    def route(self, folder: Path, routers: dict[str, Path]) -> dict[str, Any]:
        """Fit the artifact's router, or take that of one with the same shared expert."""
        artifact = Artifact(folder, check=False)
        key = json.dumps(artifact.manifest.shared_files(), sort_keys=True)
        if key in routers:
            mlp, record = load_router(Artifact(routers[key], check=False))
            fitted = store_router(artifact, mlp, record)
        else:
            texts = {
                name: [text_of(row, task_for(name, None).columns) for row in rows]
                for name, rows in self.rows("train").items()
            }
            settings = Router(rows_per_task=self.settings["router_rows"])
            fitted = fit_router(folder, texts, settings, max_tokens=self.settings["max_tokens"])
            routers[key] = folder
        return {
            "layer": fitted.layer,
            "held_out_accuracy": fitted.held_out_accuracy,
            "held_out_rows": fitted.held_out_rows,
            "accuracy_by_layer": fitted.accuracy_by_layer,
        }

    def summary(self, report: Report) -> dict[str, Any]:
        plain = [both["test"] for both in self.results["experts"].values()]
        plain_seconds = 1000 * sum(p["seconds"] for p in plain) / sum(p["rows"] for p in plain)
        return report.to_dict() | {
            "normalised_without_noisy": report.normalised(without=NOISY),
            "seconds_per_1000_rows_plain": plain_seconds,
            "mean_of_experts": fmean(self.reference("test").values()),
        }


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
            lambda what: typer.echo(f"{time.perf_counter() - started:6.0f} s  {what}", err=True)
        )


if __name__ == "__main__":
    typer.run(main)
