"""What all parts of the router benchmark share: artifact, rows, features, fitted routers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from router_read import Alone, FitFromRead, Read, source_of
from subjects import folders, merged

from twinmerge.data import Text, read_rows, sample, text_of
from twinmerge.evaluation.score import prepare
from twinmerge.evaluation.tasks import task_for
from twinmerge.recipe import Router
from twinmerge.runtime.load import load
from twinmerge.runtime.router.router import Routed
from twinmerge.runtime.router.router import Router as RouterModule

COVERAGE = 0.95

ASKED = (
    ("context", "question"),
    ("question",),
    ("dialogue",),
    ("email",),
    ("meaning_representation",),
)
"""Columns of the text in tasks that generate, beside those that `text_of` knows."""


class Bench:
    """Artifact, rows and features that all parts share."""

    def __init__(
        self,
        experts: Path,
        data: Path,
        unseen: Sequence[Path],
        base: str,
        work: Path,
        rows: int,
        train_rows: int,
        settings: Mapping[str, Any],
    ) -> None:
        names = {folder.name: str(folder) for folder in folders(experts)}
        self.names, self.base = names, base
        self.artifact = merged(base, names, work / "artifact", settings["rank"])
        self.model = load(self.artifact, check=False)
        self.tokens = settings["max_tokens"]
        self.test = {
            name: sample(read_rows(data / name / "test.jsonl.gz"), rows, 0) for name in names
        }
        self.train: dict[str, list[Text]] = {}
        for name in names:
            table = read_rows(data / name / "train.jsonl.gz")
            table = sample(table, train_rows, 0)
            self.train[name] = [self.text(name, row) for row in table]
        self.tests = {n: [self.text(n, row) for row in table] for n, table in self.test.items()}
        self.unseen: dict[str, list[Text]] = {}
        for folder in (each for every in unseen for each in folders(every)):
            table = sample(read_rows(folder / "test.jsonl.gz"), rows, 0)
            self.unseen[folder.name] = [as_text(row) for row in table]
        self.read = Read(self.model, self.tokens, base)
        self.read.open(work / "features.pt")
        for texts in (*self.train.values(), *self.tests.values(), *self.unseen.values()):
            self.read.add(texts)
        self.read.save(work / "features.pt")
        self.tasks = prepare(self.model, self.test, max_tokens=self.tokens)
        self.alone = Alone(self.model, self.tasks, work / "alone.pt")
        self.truth = torch.tensor(
            [i for i, name in enumerate(self.model.experts) for _ in self.tests[name]]
        )

    @staticmethod
    def text(name: str, row: dict[str, Any]) -> Text:
        found = text_of(row, task_for(name, None).columns)
        assert isinstance(found, tuple)
        return found

    def fitted(self, settings: Router) -> tuple[RouterModule, Any, float]:
        started = time.perf_counter()
        texts = None if settings.kind == "none" or settings.rows_per_task == 1 else self.train
        if settings.kind == "projection" and settings.rows_per_task == 1:
            texts = None
        router, record = FitFromRead(self.read, settings).run(texts)
        return router, record, time.perf_counter() - started

    @torch.no_grad()
    def routed(self, router: RouterModule, settings: Router, texts: Sequence[Text]) -> Routed:
        if router.kind == "none":
            return router({(0, "mean"): torch.zeros(len(texts), 0)})
        return router(self.read.of(source_of(settings), texts, router.wanted))


def as_text(row: dict[str, Any]) -> Text:
    columns = next((each for each in ASKED if set(each) <= set(row)), None)
    found = text_of(row, columns)
    assert isinstance(found, tuple)
    return found
