"""Fitting the router on rows of the user's own, and choosing by rows held out from them.

Source: Twin-Merging, arXiv:2406.15479, appendix D.1: cross-entropy on the expert's name, at most
1,000 rows a task, learning rate 5e-4. Unlike the authors' code, which keeps the epoch that does
best on the test rows, epoch and layer are chosen on rows held out from the same data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from uuid import uuid4

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from ...artifact.card import model_card
from ...artifact.format import MANIFEST, ROUTER, RouterRecord
from ...artifact.reader import Artifact
from ...artifact.tensorfile import record
from ...artifact.writer import explained, replace_text
from ...data import Chat, Text, batches, encode, sample, token_limit
from ...errors import InputError, OutputError
from ...recipe import Router
from ..load import load
from ..model import TwinModel
from .mlp import RouterMLP

Progress = Callable[[str, int, int], None]
"""Called with what is going on, steps done and steps in all."""

FEATURE_BATCH = 64
CARD = "README.md"
LOCK = ".fit-router.lock"
STAGED = ".fitted"


@dataclass(frozen=True)
class _Split:
    """Rows by position: what is trained on, and what chooses."""

    fit: Int[Tensor, " fit"]
    held_out: Int[Tensor, " held"]


@dataclass(frozen=True)
class _Fitted:
    """The best epoch of one layer."""

    layer: int
    mlp: RouterMLP
    accuracy: float
    loss: float
    epoch: int


def fit_router(
    folder: Path | str,
    texts: Mapping[str, Sequence[Text | Chat | str]],
    settings: Router | None = None,
    *,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> RouterRecord:
    """Fit the router of an artifact on texts of every expert, and store it there.

    texts: expert name -> texts like those that the expert is for: strings, pairs (tuples of two) or
        chats (`data.chat_of`)
    max_tokens: longer texts are cut to this many tokens; default 512, or what the model takes

    The feature layer (unless set) is the earliest whose held-out accuracy is within one standard
    error of the best: an early layer costs a smaller part of a forward. Returns what is recorded in
    the manifest. Raises `InputError` for missing or too few rows, `OutputError` while another
    fit of the same artifact runs.
    """
    if not isinstance(texts, Mapping):
        raise InputError(
            f"texts=: expected {{expert: texts}}, got a {type(texts).__name__}. "
            "twinmerge.data.read_tasks(folder, experts, split) reads rows of a folder."
        )
    with _alone(Path(folder)), torch.inference_mode(False), torch.enable_grad():
        return _fit_router(Path(folder), texts, settings, max_tokens, progress)


def _fit_router(
    folder: Path,
    texts: Mapping[str, Sequence[Text | Chat | str]],
    settings: Router | None,
    max_tokens: int | None,
    progress: Progress | None,
) -> RouterRecord:
    model = load(folder, check=True)
    settings = settings or Router.model_validate(model.manifest.recipe.get("router", {}))
    _check_rows(texts, model.experts)
    limit = token_limit(model, max_tokens)
    rows = [
        (expert, _item(text))
        for expert in model.experts
        for text in sample(texts[expert], settings.rows_per_task, settings.seed)
    ]
    layers = (
        list(range(model.features.layers + 1))
        if settings.layer == "auto"
        else [int(settings.layer)]
    )
    features = _features(model, [text for _, text in rows], layers, limit, progress)
    truth = torch.tensor([model.experts.index(expert) for expert, _ in rows])
    split = _split([text for _, text in rows], truth, model.experts, settings)
    fitted = []
    for done, layer in enumerate(layers):
        if progress:
            progress("training the router", done, len(layers))
        fitted.append(_train(layer, features[layer], truth, split, len(model.experts), settings))
    if progress:
        progress("training the router", len(layers), len(layers))
    chosen = choose_layer({f.layer: f.accuracy for f in fitted}, len(split.held_out))
    best = next(f for f in fitted if f.layer == chosen)
    with torch.no_grad():
        guess = best.mlp(features[best.layer][split.held_out]).argmax(dim=-1)
    artifact = Artifact(folder, check=False)
    entry = RouterRecord(
        kind="mlp",
        layer=best.layer,
        width=best.mlp.width,
        hidden=best.mlp.hidden,
        experts=model.experts,
        shared_sha256=artifact.manifest.shared_files(),
        rows={e: int((truth[split.fit] == i).sum()) for i, e in enumerate(model.experts)},
        held_out_rows=len(split.held_out),
        held_out_accuracy=best.accuracy,
        accuracy_by_layer={f.layer: f.accuracy for f in fitted},
        confusion=_confusion(truth[split.held_out], guess, model.experts),
        epoch=best.epoch,
        seed=settings.seed,
        max_tokens=limit,
        bytes=0,
    )
    return _store(artifact, best.mlp, entry)


def choose_layer(accuracy: Mapping[int, float], rows: int) -> int:
    """The earliest layer within one standard error of the best held-out accuracy.

    The one-standard-error rule of Breiman et al. (Classification and Regression Trees, 1984):
    among choices that the held-out rows cannot tell apart, take the cheapest.
    """
    best = max(accuracy.values())
    margin = (best * (1 - best) / rows) ** 0.5
    return min(layer for layer, value in accuracy.items() if value >= best - margin)


def _item(text: Text | Chat | str) -> Text | Chat:
    if isinstance(text, Chat):
        return text
    return (text,) if isinstance(text, str) else tuple(text)


def _check_rows(texts: Mapping[str, Sequence[Text | Chat | str]], experts: Sequence[str]) -> None:
    for expert in experts:
        count = len(texts.get(expert, ()))
        if count < 5:
            raise InputError(
                f"expert '{expert}': expected at least 5 rows to fit and check a router, got "
                f"{count}. A few dozen that look like its inputs will do."
            )
    extra = sorted(set(texts) - set(experts))
    if extra:
        raise InputError(f"rows for '{extra[0]}', but no such expert. Known: {', '.join(experts)}.")


def _features(
    model: TwinModel,
    texts: Sequence[Text | Chat],
    layers: list[int],
    limit: int,
    progress: Progress | None,
) -> dict[int, Float[Tensor, "row width"]]:
    encoded = encode(model.tokenizer, texts, limit)
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    order: list[int] = []
    for indices, batch in batches(model.tokenizer, encoded, FEATURE_BATCH):
        if progress:
            progress("reading features", len(order), len(texts))
        found = model.features.read({k: v.to(model.device) for k, v in batch.items()}, layers)
        for layer in layers:
            parts[layer].append(found[layer].cpu())
        order += indices
    if progress:
        progress("reading features", len(order), len(texts))
    back = torch.tensor(order).argsort()
    return {layer: torch.cat(parts[layer])[back] for layer in layers}


def _split(
    texts: Sequence[Text | Chat], truth: Tensor, experts: Sequence[str], settings: Router
) -> _Split:
    """A share of each expert's rows held out; equal texts stay on one side."""
    draw = torch.Generator().manual_seed(settings.seed)
    said = [text.text if isinstance(text, Chat) else text for text in texts]
    joined = [" ".join(text).lower() for text in said]
    keys = [re.sub(r"\W+", " ", text).strip() or text for text in joined]
    held_keys: set[str] = set()
    for expert in truth.unique().tolist():
        rows = (truth == expert).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=draw)].tolist()
        count = max(1, round(settings.held_out * len(rows)))
        held_keys |= {keys[row] for row in rows[:count]}
    held = [row for row in range(len(texts)) if keys[row] in held_keys]
    fit = [row for row in range(len(texts)) if keys[row] not in held_keys]
    for index, expert in enumerate(experts):
        if not any(int(truth[row]) == index for row in fit):
            raise InputError(
                f"expert '{expert}': after setting rows aside none are left to fit on. "
                "Give more rows that differ, or a smaller held_out share."
            )
    return _Split(torch.tensor(fit), torch.tensor(held))


def _train(
    layer: int,
    features: Float[Tensor, "row width"],
    truth: Int[Tensor, " row"],
    split: _Split,
    experts: int,
    settings: Router,
) -> _Fitted:
    """Train on one layer's features; keep the epoch that does best on the held-out rows."""
    width = features.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        mlp = RouterMLP(width, settings.hidden or width, experts, settings.dropout)
        optimizer = torch.optim.Adam(mlp.parameters(), lr=settings.learning_rate)
        held_x, held_y = features[split.held_out], truth[split.held_out]
        best: tuple[float, float, int, dict[str, Tensor]] | None = None
        size = max(2, settings.batch_size)  # batches of one would all be passed over below
        for epoch in range(settings.epochs):
            mlp.train()
            for rows in split.fit[torch.randperm(len(split.fit))].split(size):
                if len(rows) < 2:
                    continue  # BatchNorm has no variance of one row; the next epoch draws another
                loss = F.cross_entropy(mlp(features[rows]), truth[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            mlp.eval()
            with torch.no_grad():
                logits = mlp(held_x)
                accuracy = float((logits.argmax(dim=-1) == held_y).float().mean())
                held_loss = float(F.cross_entropy(logits, held_y))
            if best is None or (accuracy, -held_loss) > (best[0], -best[1]):
                state = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
                best = accuracy, held_loss, epoch + 1, state
    assert best is not None, "a recipe has at least one epoch"
    mlp.load_state_dict(best[3])
    return _Fitted(layer, mlp.eval(), best[0], best[1], best[2])


def _confusion(
    truth: Int[Tensor, " row"], guess: Int[Tensor, " row"], experts: Sequence[str]
) -> dict[str, dict[str, int]]:
    return {
        true: {
            chosen: count
            for j, chosen in enumerate(experts)
            if (count := int(((truth == i) & (guess == j)).sum()))
        }
        for i, true in enumerate(experts)
    }


def store_router(artifact: Artifact, mlp: RouterMLP, entry: RouterRecord) -> RouterRecord:
    """Write router and manifest so that the artifact is valid at every moment.

    All that is new is written beside the old. Then the old router leaves the manifest, the files
    change places, and the new one enters with the new manifest: a kill in between leaves an
    artifact without a router, a full disk the old router. Raises `OutputError` for that, and while
    another fit writes there.
    """
    with _alone(artifact.folder):
        return _store(artifact, mlp, entry)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the artifact for one fit. The lock goes with the process, so a kill leaves none.

    What a killed fit left behind is removed. Where a file system has no locks, nothing is held.
    """
    if not (folder / MANIFEST).is_file():
        yield  # no artifact: opening it says so
        return
    path = folder / LOCK
    with explained(path):
        file = open(path, "w")
    with file:
        held = _lock(file, path)
        for left in folder.glob(f".*{STAGED}") if held else ():
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(file: IO[str], path: Path) -> bool:
    """Whether the file is locked now; `OutputError` if another process or thread has it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # An ended fit removes the file: the one that we opened may be gone.
        ours = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        ours = False
    except (ImportError, OSError):
        return False
    if not ours:
        raise OutputError(
            f"{path.parent}: expected no other run at work here, but another fit-router is writing "
            "here; wait for it, then run the same command again."
        )
    return True


def _store(artifact: Artifact, mlp: RouterMLP, entry: RouterRecord) -> RouterRecord:
    folder, mark = artifact.folder, f".{uuid4().hex}{STAGED}"
    staged = {name: folder / f".{name}{mark}" for name in (ROUTER, CARD, MANIFEST)}
    try:
        with explained(folder / ROUTER):
            state = {name: tensor.contiguous() for name, tensor in mlp.state_dict().items()}
            # not save_file(): its error on a full disk is no OSError
            staged[ROUTER].write_bytes(save(state, {"format": "pt"}))
            stored = record(staged[ROUTER])
            entry = entry.model_copy(update={"bytes": stored.bytes})
            files = {k: v for k, v in artifact.manifest.files.items() if k != ROUTER}
            without = artifact.manifest.model_copy(update={"router": None, "files": files})
            fitted = {"router": entry, "files": files | {ROUTER: stored}}
            manifest = without.model_copy(update=fitted)
            staged[CARD].write_text(model_card(manifest), encoding="utf-8")
            staged[MANIFEST].write_text(manifest.to_json(), encoding="utf-8")
            replace_text(folder / MANIFEST, without.to_json())
            for name, path in staged.items():  # the manifest last
                os.replace(path, folder / name)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)
    return entry
