"""Experts, base and rows of a study, opened once, and the ways to score a merge of them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from twinmerge.artifact.format import MANIFEST
from twinmerge.artifact.reader import Artifact
from twinmerge.data import Encoded, Text, batches, drawn, read_tasks, text_of
from twinmerge.errors import InputError
from twinmerge.evaluation.metrics import metric
from twinmerge.evaluation.reference import expert_model, score_plain
from twinmerge.evaluation.score import Prepared, filled, guesses_of, prepare
from twinmerge.evaluation.tasks import task_for
from twinmerge.merging.build import build
from twinmerge.recipe import Recipe, Router
from twinmerge.runtime.export import DenseMerge
from twinmerge.runtime.load import load, load_router
from twinmerge.runtime.model import TwinModel
from twinmerge.runtime.router.fit import fit_router, store_router
from twinmerge.runtime.router.router import Routed

from .records import Records

ALL = "all validation"
"""A split: more validation rows than those that choose coefficients, for what is tried once."""

STORED = "float16"
"""What Twin-Merging is stored in, as the paper's appendix E counts it."""

Scores = dict[str, float]
"""Task -> score."""


@dataclass(frozen=True)
class Settings:
    """What all records of a study have in common."""

    title: str = ""
    choose_rows: int | None = 200
    """Validation rows of each task that choose coefficients; None: all."""
    better_rows: int | None = None
    """Validation rows of each task that choose what is better than the paper."""
    test_rows: int | None = None
    router_rows: int = 1000
    max_tokens: int = 96
    seeds: tuple[int, ...] = (0, 1, 2)
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    noisy: tuple[str, ...] = ("rte",)
    """Weak experts whose normalised score is mostly noise: the mean is given without them, too."""


@dataclass
class Lab:
    """Experts and rows of a study.

    names:  of the experts, one for each task
    models: their folders
    data:   task -> folder with `<split>.jsonl.gz`
    work:   where artifacts go; they are found again by what they were built from
    """

    names: list[str]
    models: Mapping[str, Path]
    data: Mapping[str, Path]
    base: str
    work: Path
    settings: Settings
    records: Records
    _prepared: dict[str, dict[str, Prepared]] = field(default_factory=dict)
    _answers: dict[Any, dict[tuple[int, bytes], float]] = field(default_factory=dict)

    # ------------------------------------------------------------------------------ what to merge

    def recipe(
        self,
        method: str = "linear",
        parameters: Mapping[str, Any] | None = None,
        *,
        names: Sequence[str] | None = None,
        each: Mapping[str, Mapping[str, Any]] | None = None,
        stored: str | None = None,
        **exclusive: Any,
    ) -> Recipe:
        """A recipe of some experts (default: all).

        parameters: of the method; each: of single experts, by name
        stored:     dtype of what is written; default: the base's
        exclusive:  what is kept of every expert; default: nothing
        """
        names = list(names or self.names)
        return Recipe.model_validate(
            {
                "base_model": self.base,
                "models": [
                    {"model": str(self.models[name]), "name": name}
                    | ({"parameters": dict(each[name])} if each and name in each else {})
                    for name in names
                ],
                "merge_method": method,
                "parameters": dict(parameters or {}),
                "exclusive": exclusive or {"rank": "none"},
                "out_dtype": stored,
            }
        )

    def built(self, recipe: Recipe) -> Artifact:
        """The artifact of a recipe, built if it is not there."""
        key = _key(self.records.settings.get("inputs"), recipe.model_dump(mode="json"))
        folder = self.work / "artifacts" / key
        with self._alone(key):
            if not (folder / MANIFEST).is_file():
                folder.parent.mkdir(parents=True, exist_ok=True)
                build(recipe, folder)
        return Artifact(folder, check=False)

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Other processes with the same work folder wait."""
        place = self.work / "locks" / key
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def drop(self, recipe: Recipe) -> None:
        """Remove an artifact that is not needed again."""
        shutil.rmtree(self.built(recipe).folder)

    @cached_property
    def plain(self) -> TwinModel:
        """The pretrained model with every expert's head: whose rows, labels and tokenizer count."""
        recipe = self.recipe("task_arithmetic", {"weight": 0.0})
        return opened(self.built(recipe))

    def expert(self, name: str) -> PreTrainedModel:
        """One expert as a plain model with its head."""
        return expert_model(self.plain, name, self.recipe("task_arithmetic", {"weight": 0.0}))

    # --------------------------------------------------------------------------------------- rows

    def prepared(self, split: str) -> dict[str, Prepared]:
        """Every task's rows of `test`, `validation` or `ALL`, as many as the settings say."""
        if split not in self._prepared:
            file, limit = {
                "test": ("test", self.settings.test_rows),
                "validation": ("validation", self.settings.choose_rows),
                ALL: ("validation", self.settings.better_rows),
            }[split]
            rows = {name: drawn(self._rows(name, file), limit) for name in self.names}
            self._prepared[split] = prepare(self.plain, rows, max_tokens=self.settings.max_tokens)
        return self._prepared[split]

    def texts(self, name: str, split: str) -> list[Text]:
        """Raises `InputError` for a row that is a chat: a study is of classifiers of text."""
        columns = task_for(name, None).columns
        found: list[Text] = []
        for number, row in enumerate(self._rows(name, split), start=1):
            text = text_of(row, columns)
            if not isinstance(text, tuple):
                raise InputError(
                    f"task '{name}', {split} row {number}: expected a text or a pair, got a chat. "
                    "A study is of experts that classify text."
                )
            found.append(text)
        return found

    def _rows(self, name: str, split: str) -> list[dict[str, Any]]:
        found, _ = read_tasks(self.data[name], [name], split)
        return found[name]

    # ------------------------------------------------------------------------------------- scores

    @cached_property
    def own(self) -> dict[str, Scores]:
        """Split -> each expert's own score. Raises `InputError` for a score of 0 or less."""
        return self._own("experts", ("validation", "test"))

    @cached_property
    def own_of_all(self) -> dict[str, Scores]:
        """The same for `ALL`."""
        return self._own(f"experts, {ALL}", (ALL,))

    def _own(self, part: str, splits: Sequence[str]) -> dict[str, Scores]:
        found: dict[str, Scores] = {split: {} for split in splits}
        for name in self.names:

            def scored(name: str = name) -> dict[str, Any]:
                plain = self.expert(name)
                return {
                    split: vars(score_plain(self.plain, plain, name, self.prepared(split)[name]))
                    for split in found
                }

            record = self.records.once(part, name, {}, scored)
            for split, scores in found.items():
                scores[name] = record[split]["score"]
                if scores[name] <= 0:
                    raise InputError(
                        f"expert '{name}' scores {scores[name]:.3f} on its own {split} rows, so no "
                        "normalised score exists. Does its checkpoint belong to these rows?"
                    )
        return found

    def normalised(self, scores: Scores, split: str) -> dict[str, Any]:
        """The paper's equation 4, with the scores it is made of."""
        own = (self.own_of_all if split == ALL else self.own)[split]
        shares = {name: score / own[name] for name, score in scores.items()}
        quiet = [share for name, share in shares.items() if name not in self.settings.noisy]
        return {
            "scores": scores,
            "normalised": sum(shares.values()) / len(shares),
            "normalised_without_noisy": sum(quiet) / len(quiet) if quiet else None,
            "mean": sum(scores.values()) / len(scores),
            "rows": {name: len(self.prepared(split)[name].truth) for name in scores},
        }

    def dense(self, model: TwinModel, split: str, *, oracle: bool) -> dict[str, Any]:
        """Under `oracle` (all weight on the true expert) or `shared` (none), the true head.

        Weights are the same for all rows of a task, so it is merged densely; the runtime's own
        answers are the same (design, invariant 2).
        """
        merge = DenseMerge(model)
        scores = {}
        for index, name in enumerate(model.experts):
            weights = torch.zeros(len(model.experts))
            weights[index] = float(oracle)
            merged = merge.at(weights, name)
            scores[name] = score_plain(model, merged, name, self.prepared(split)[name]).score
        return self.normalised(scores, split)

    def alone(self, name: str, plain: PreTrainedModel, split: str) -> float:
        """One task's score with a plain model that has its head."""
        return score_plain(self.plain, plain, name, self.prepared(split)[name]).score

    # ------------------------------------------------------------------------------------- router

    def route(
        self,
        artifact: Artifact,
        seed: int = 0,
        *,
        fitted_on: Artifact | None = None,
        **settings: Any,
    ) -> TwinModel:
        """A copy of the artifact with a router, opened; `manifest` of the model tells of both.

        fitted_on: the artifact beside which the router is fitted, with the same shared expert;
                   default: the same. A router is fitted once
        settings:  of the router, beside rows and seed
        """
        ground = fitted_on or artifact
        assert ground.manifest.shared_files() == artifact.manifest.shared_files()
        router = self._router(ground, seed, settings)
        key = f"{artifact.folder.name}-{router.folder.name}"
        folder = self.work / "routed" / key
        with self._alone(key):
            if not folder.is_dir():
                assert router.manifest.router is not None
                with self._copy(artifact, folder) as copy:
                    store_router(copy, load_router(router), router.manifest.router)
        return opened(Artifact(folder, check=False))

    @contextmanager
    def _copy(self, artifact: Artifact, folder: Path) -> Iterator[Artifact]:
        """A copy, to be changed, that is at `folder` in the end. Files are linked, not doubled:
        what changes an artifact puts other files in their place."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.work) as temporary:
            copy = Path(temporary) / "artifact"
            shutil.copytree(artifact.folder, copy, copy_function=os.link)
            yield Artifact(copy, check=False)
            copy.rename(folder)

    def _router(self, artifact: Artifact, seed: int, settings: Mapping[str, Any]) -> Artifact:
        """A copy of the artifact that has a router."""
        wanted = Router(rows_per_task=self.settings.router_rows, seed=seed, **settings)
        key = _key(
            self.records.settings.get("inputs"),
            artifact.manifest.recipe,
            wanted.model_dump(mode="json"),
            self.settings.max_tokens,
        )
        folder = self.work / "routers" / key
        with self._alone(key):
            if not folder.is_dir():
                names = artifact.manifest.names
                texts = {name: self.texts(name, "train") for name in names}
                limit = self.settings.max_tokens
                with self._copy(artifact, folder) as copy:
                    fit_router(copy.folder, texts, wanted, max_tokens=limit, dtype="float32")
        return Artifact(folder, check=False)

    @torch.no_grad()
    def routed(self, model: TwinModel, name: str, split: str) -> Routed:
        """What the router says of every row of one task, in the rows' order."""
        encoded = self.prepared(split)[name].encoded
        parts, order = [], []
        for rows, batch in batches(model.tokenizer, encoded, 32):
            parts.append(model.routing(allowed=None, **batch))
            order += rows
        back = torch.tensor(order).argsort()
        names = [each.name for each in fields(Routed)]
        return Routed(
            **{name: torch.cat([getattr(part, name) for part in parts])[back] for name in names}
        )

    @torch.no_grad()
    def weighted(
        self, model: TwinModel, name: str, weights: Tensor, split: str, head: str | None = None
    ) -> list[float]:
        """Answers to one task's rows with a weighting for each row, under its own head.

        A row that has been answered with the same weights is not run again: routers of other seeds
        agree on most. Who else is in a batch changes no answer (design, invariant 2).

        weights: (row, expert)
        """
        task, head = self.prepared(split)[name], head or name
        known = self._answers.setdefault((model.origin, name, split, head), {})
        keys = [(row, each.numpy().tobytes()) for row, each in enumerate(weights.cpu())]
        asked = [row for row, key in enumerate(keys) if key not in known]
        rows_left = [task.encoded.rows[row] for row in asked]
        left = Encoded(rows_left, [task.encoded.cut[row] for row in asked])
        for places, batch in batches(model.tokenizer, left, 32):
            rows = [asked[place] for place in places]
            output = model(**batch, weights=weights[rows], head=head)
            guesses = guesses_of(output.logits, self.plain.labels[name])
            known |= {keys[row]: guess for row, guess in zip(rows, guesses, strict=True)}
        return [known[key] for key in keys]

    def protocols(
        self, model: TwinModel, routes: Mapping[str, Routed], split: str
    ) -> dict[str, Any]:
        """`known-head` and `routed`, from one pass: they differ in whose head is believed."""
        known: Scores = {}
        routed: Scores = {}
        for index, name in enumerate(model.experts):
            guesses = self.weighted(model, name, routes[name].weights, split)
            right = (routes[name].probabilities.argmax(dim=1) == index).tolist()
            known[name] = self.scored(name, guesses, split)
            routed[name] = self.scored(
                name, [g if r else None for g, r in zip(guesses, right, strict=True)], split
            )
        return {
            "known-head": self.normalised(known, split),
            "routed": self.normalised(routed, split),
        }

    def scored(self, name: str, guesses: Sequence[float | None], split: str) -> float:
        """None: no answer, see `evaluate`."""
        task = self.prepared(split)[name]
        regression = self.plain.labels[name] is None
        return metric(task.task.metric)(task.truth, filled(guesses, regression=regression))


def opened(artifact: Artifact) -> TwinModel:
    """The model of an artifact, computing in float32 whatever it is stored in."""
    return load(artifact.folder, check=False, dtype="float32")


def _key(*parts: Any) -> str:
    """Of what is kept in the work folder: equal for equal parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def bytes_of(artifact: Artifact | TwinModel) -> dict[str, Any]:
    """What an artifact stores.

    share: of one expert's bytes, mean over experts, in the bytes of one float16 base model
    """
    manifest = artifact.manifest
    own = [tensor for tensor in manifest.tensors if tensor.bytes and tensor.tied_to is None]
    values = sum(prod(tensor.shape) for tensor in own)
    each = [expert.bytes for expert in manifest.experts]
    return {
        "shared": sum(tensor.bytes for tensor in manifest.tensors),
        "experts": sum(each),
        "router": manifest.router.bytes if manifest.router else 0,
        "base_float16": 2 * values,
        "share": sum(each) / len(each) / (2 * values),
    }
