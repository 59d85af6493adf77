"""What the router benchmark reads once: the features of all texts, and each expert's answers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from twinmerge.data import Text, batches, encode
from twinmerge.evaluation.metrics import metric
from twinmerge.evaluation.score import Prepared, filled, guesses_of
from twinmerge.recipe import Router
from twinmerge.runtime.model import TwinModel
from twinmerge.runtime.router.encoder import TextEncoder
from twinmerge.runtime.router.features import Features, Key, Pooling, pooled
from twinmerge.runtime.router.fit import RouterFit

POOLINGS: tuple[Pooling, ...] = ("mean", "first", "last")


def note(text: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)


# --------------------------------------------------------------------------------------- features


class Read:
    """All features of many texts, read once: by (source, pooling), layer by layer."""

    def __init__(self, model: TwinModel, max_tokens: int, encoder: str) -> None:
        self.model, self.max_tokens = model, max_tokens
        self.encoder = TextEncoder(encoder, model.tokenizer, "mean")
        self.place: dict[Text, int] = {}
        self.kept: dict[tuple[str, str], dict[int, Tensor]] = {}

    def add(self, texts: Sequence[Text]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.place]
        start = len(self.place)
        self.place |= {text: start + i for i, text in enumerate(new)}
        if not new:
            return
        found = self._all(new)
        for key, by_layer in found.items():
            own = self.kept.setdefault(key, {})
            for layer, tensor in by_layer.items():
                own[layer] = torch.cat([own[layer], tensor]) if layer in own else tensor

    @torch.no_grad()
    def _all(self, texts: Sequence[Text]) -> dict[tuple[str, str], dict[int, Tensor]]:
        model, found, order = self.model, {}, []
        shared = model.merged([0.0] * len(model.experts), head=model.experts[0])
        encoded = encode(model.tokenizer, texts, self.max_tokens)

        def take(source: str, pooling: str, layer: int, each: Tensor) -> None:
            found.setdefault((source, pooling), {}).setdefault(layer, []).append(each)

        for indices, batch in batches(model.tokenizer, encoded, 64):
            states = shared(**batch, output_hidden_states=True).hidden_states
            for layer, hidden in enumerate(states):
                for pooling in POOLINGS:
                    take("states", pooling, layer, pooled(hidden, batch["attention_mask"], pooling))
            for (block, _), each in model.energies.read(batch, range(1, len(states))).items():
                take("energies", "mean", block, each)
            take("encoder", "mean", 0, self.encoder.read(batch))
            order += indices
            note(f"features {len(order)} / {len(texts)}")
        back = torch.tensor(order).argsort()
        return {
            key: {layer: torch.cat(parts)[back] for layer, parts in by_layer.items()}
            for key, by_layer in found.items()
        }

    def save(self, path: Path) -> None:
        torch.save((self.place, self.kept), path)

    def open(self, path: Path) -> None:
        """What an earlier run with the same artifact and settings has read."""
        if path.is_file():
            self.place, self.kept = torch.load(path, weights_only=True)

    def of(self, source: str, texts: Sequence[Text], wanted: Sequence[Key]) -> Features:
        rows = torch.tensor([self.place[text] for text in texts])
        return {key: self.kept[source, key[1]][key[0]][rows] for key in wanted}


class FitFromRead(RouterFit):
    """The fit of `fit-router`, with features that were read before."""

    def __init__(self, read: Read, settings: Router) -> None:
        super().__init__(read.model, settings, read.max_tokens, None)
        self.read = read

    def _features(self, rows: Any, wanted: Sequence[Key]) -> Features:
        return self.read.of(source_of(self.settings), rows.texts, wanted)

    @property
    def _encoder(self) -> TextEncoder | None:
        return self.read.encoder if self.settings.encoder is not None else None


def source_of(settings: Router) -> str:
    if settings.encoder is not None:
        return "encoder"
    return "energies" if settings.kind == "projection" else "states"


# ---------------------------------------------------------------------------------------- answers


def fingerprint(rows: Sequence[Mapping[str, list[int]]]) -> str:
    """Of token ids: whether answers are of these rows."""
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


class Alone:
    """What each expert alone answers to every task's test rows, under that task's own head.

    `guesses[task][expert]` has one answer for each row. A router that gives all weight to its
    likeliest expert is scored from these without a forward.
    """

    def __init__(self, model: TwinModel, tasks: Mapping[str, Prepared], path: Path) -> None:
        self.model, self.tasks = model, tasks
        self.guesses: dict[str, list[list[float]]] = {}
        of = {name: fingerprint(task.encoded.rows) for name, task in tasks.items()}
        if path.is_file():
            kept = torch.load(path, weights_only=True)
            self.guesses = {n: g for n, g in kept["guesses"].items() if kept["of"][n] == of.get(n)}
        for name in (name for name in tasks if name not in self.guesses):
            self.guesses[name] = [self._read(name, i) for i in range(len(model.experts))]
            torch.save({"guesses": self.guesses, "of": of}, path)
            note(f"every expert's answers to {name}")

    @torch.no_grad()
    def _read(self, name: str, expert: int) -> list[float]:
        model, encoded = self.model, self.tasks[name].encoded
        weights = [float(i == expert) for i in range(len(model.experts))]
        alone = model.merged(weights, head=name)
        found = [0.0] * len(encoded)
        for rows, batch in batches(model.tokenizer, encoded, 32):
            guesses = guesses_of(alone(**batch).logits, model.labels[name])
            for row, guess in zip(rows, guesses, strict=True):
                found[row] = guess
        return found

    def scores(self, name: str, chosen: Sequence[int]) -> dict[str, float]:
        """Both protocols' scores on the rows of task `name`, row i answered by `chosen[i]`."""
        own = [self.guesses[name][expert][row] for row, expert in enumerate(chosen)]
        index = self.model.experts.index(name)
        return both(self.model, name, self.tasks[name], own, [c == index for c in chosen])


def both(
    model: TwinModel,
    name: str,
    task: Prepared,
    own: Sequence[float | None],
    right: Sequence[bool],
) -> dict[str, float]:
    """Scores with the task's own head, and with the head of the likeliest expert."""
    score = metric(task.task.metric)
    routed = [guess if own_head else None for guess, own_head in zip(own, right, strict=True)]
    regression = model.labels[name] is None
    return {
        protocol: score(task.truth, filled(guesses, regression=regression))
        for protocol, guesses in (("known-head", own), ("routed", routed))
    }
