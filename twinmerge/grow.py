"""Experts added to an artifact, removed and replaced, in place, the others left as they are.

    from twinmerge.grow import add, remove, replace

    add("my-merge", "path/to/expert", name="poems", rows=["a few dozen texts", ...])
    replace("my-merge", "poems", "path/to/better")
    remove("my-merge", "poems")

Both halves work here: `merging.grow` cuts what the new expert keeps, `runtime.router.grow` lets the
router follow. All that is new is made in a folder beside the rest, loaded once to see that it runs,
and then changes places with the old, file by file, with the manifest last. A kill at any moment
leaves a valid artifact: the old one, the new one, or in between one with fewer experts or without a
router, never one that says what it does not hold.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import yaml
from safetensors.torch import save

from .artifact.card import model_card
from .artifact.format import EXAMPLES, MANIFEST, RECIPE, ROUTER, Manifest, expert_file
from .artifact.reader import Artifact
from .artifact.tensorfile import record
from .artifact.writer import explained, replace_text
from .data import Chat, Text, json_of, sample, text_of
from .errors import RecipeError, RouterError
from .merging.grow import cut_expert, summary, with_expert, without_expert
from .recipe.model import Recipe
from .recipe.sections import Expert
from .runtime.load import load, load_router
from .runtime.model import TwinModel
from .runtime.router.encoder import ENCODER
from .runtime.router.grow import Followed, grown, settled, shrunk
from .runtime.router.store import CARD, STAGED, alone, of_router

__all__ = ["add", "remove", "replace"]

Rows = Sequence[Text | Chat | str] | Mapping[str, Sequence[Text | Chat | str]]
"""Texts like those that the new expert is for; or by expert, for a router that is fitted again."""

Progress = Callable[[str, int, int], None]
"""Called with what is going on, steps done and steps in all."""


def add(
    folder: Path | str,
    expert: str,
    *,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    base: str | None = None,
    rows: Rows | None = None,
    weights: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Add the expert at `expert` (a folder or hub id, full or an adapter) to an artifact.

    name, labels: as in a recipe; the name defaults to the last part of `expert`
    base:    where the base is, instead of the recipe's `base_model`
    rows:    texts of the new expert, for a router of prototypes; by expert for linear and mlp
    weights: of a router of kind none; default even

    Returns what changed, as `--json` prints it. Raises what a build raises for models that do not
    fit, `RecipeError` for a name that is taken, `OutputError` while something else writes there.
    """
    entry = _entry(expert, name, labels)
    return _Change(folder, progress).run(None, entry, base, rows, weights)


def remove(folder: Path | str, name: str, *, progress: Progress | None = None) -> dict[str, Any]:
    """Remove an expert. It stays part of the shared expert, which is not touched.

    Raises `RecipeError` for a name that is not there, and for the only expert.
    """
    return _Change(folder, progress).run(name, None, None, None, None)


def replace(
    folder: Path | str,
    name: str,
    expert: str,
    *,
    labels: Sequence[str] | None = None,
    base: str | None = None,
    rows: Rows | None = None,
    weights: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Put the expert at `expert` in the place of `name`, under that name: `remove`, then `add`."""
    entry = _entry(expert, name, labels)
    return _Change(folder, progress).run(name, entry, base, rows, weights)


def _entry(expert: str, name: str | None, labels: Sequence[str] | None) -> Expert:
    """As in a recipe, with its messages."""
    given: dict[str, Any] = {"model": expert, "name": name, "labels": labels}
    models = [{key: value for key, value in given.items() if value is not None}]
    try:
        made = Recipe.model_validate({"base_model": "\0", "models": models})
    except RecipeError as problem:
        raise RecipeError(str(problem).replace("models[0].", "expert: ")) from None
    return made.models[0]


class _Change:
    """One change of an artifact's experts."""

    def __init__(self, folder: Path | str, progress: Progress | None) -> None:
        self.folder = Path(folder)
        self.say: Progress = progress or (lambda stage, done, total: None)
        self.staged = self.folder / f".grow.{uuid4().hex}{STAGED}"

    def run(
        self,
        gone: str | None,
        entry: Expert | None,
        base: str | None,
        rows: Rows | None,
        weights: Mapping[str, float] | None,
    ) -> dict[str, Any]:
        """gone: the expert that leaves; entry: the one that comes."""
        with alone(self.folder), torch.inference_mode(False), torch.enable_grad():
            artifact = Artifact(self.folder, check=True)
            _sweep(artifact)
            try:
                with explained(self.folder):
                    return self._run(artifact, gone, entry, base, rows, weights)
            finally:
                shutil.rmtree(self.staged, ignore_errors=True)

    def _run(
        self,
        artifact: Artifact,
        gone: str | None,
        entry: Expert | None,
        base: str | None,
        rows: Rows | None,
        weights: Mapping[str, float] | None,
    ) -> dict[str, Any]:
        before = between = artifact.manifest
        place = None
        if gone is not None:
            if entry is not None and before.names == (gone,):
                raise RecipeError(
                    f"'{gone}': the only expert cannot be replaced in one step that a kill may not "
                    "spoil. Add the new one under another name, then remove this one."
                )
            between = without_expert(artifact, gone)
            place = before.names.index(gone)
        after = between.model_copy(update={"router": None, "files": _plain(between)})
        named: dict[str, str] = {} if gone is None else {"removed": gone}
        (self.staged / "experts").mkdir(parents=True)
        if entry is not None:
            new = cut_expert(
                artifact,
                entry,
                self.staged / expert_file(entry.name),
                base=base,
                instead=gone,
                progress=lambda done, total, _: self.say("cutting", done, total),
            )
            after = with_expert(after, new, place)
            named["added"] = entry.name
        followed = self._router(artifact, after, gone, entry, rows, weights)
        after = self._stage(artifact, after, followed, rows, entry)
        self._commit(before, between, after)
        result = summary(before, after, named)
        result["router"] = _router_result(before, after, followed)
        return result

    # ------------------------------------------------------------------ the router

    def _router(
        self,
        artifact: Artifact,
        after: Manifest,
        gone: str | None,
        entry: Expert | None,
        rows: Rows | None,
        weights: Mapping[str, float] | None,
    ) -> Followed:
        """The router for the experts as they will be.

        With a new expert the artifact as it will be is opened as a model first: it must run.
        """
        recorded = artifact.manifest.router
        projected = recorded is not None and recorded.kind == "projection"
        model = self._preview(artifact, after) if entry is not None or projected else None
        if recorded is None:
            return Followed(None, None, ("there was none, and there is none",))
        try:
            router = load_router(artifact)
        except RouterError as problem:
            why = str(problem).split("\n")[0]
            return Followed(None, None, (f"it did not fit before, and was taken out: {why}",))
        followed = Followed(router, recorded, ())
        if gone is not None:
            followed = shrunk(router, recorded, gone)
        if model is None:
            return followed
        assert followed.router is not None and followed.record is not None
        if entry is None:
            last = settled(model, followed.router, followed.record)
        else:
            last = grown(
                model,
                followed.router,
                followed.record,
                entry.name,
                texts=_by_expert(rows, entry.name),
                weights=weights,
                examples={
                    name: [text_of(row) for row in kept]
                    for name, kept in artifact.examples().items()
                    if name in followed.record.experts
                },
                progress=self.say,
            )
        said = (*followed.said, *last.said)
        return Followed(last.router, last.record, said, last.measured)

    def _preview(self, artifact: Artifact, after: Manifest) -> TwinModel:
        """The artifact as it will be, without a router: links to what stays, and what is new."""
        encoder = [name for name in artifact.manifest.files if name.startswith(f"{ENCODER}/")]
        for name in (*after.files, *encoder):
            path = self.staged / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to((self.folder / name).absolute())
        (self.staged / MANIFEST).write_text(after.to_json(), encoding="utf-8")
        return load(self.staged, check=False)

    # ------------------------------------------------------------------ writing

    def _stage(
        self,
        artifact: Artifact,
        after: Manifest,
        followed: Followed,
        rows: Rows | None,
        entry: Expert | None,
    ) -> Manifest:
        """Write router, recipe, card and manifest beside what is there."""
        if followed.router is not None and followed.record is not None:
            (self.staged / ROUTER).write_bytes(save(followed.router.tensors(), {"format": "pt"}))
            files = {ROUTER: record(self.staged / ROUTER)}
            old = artifact.manifest.files
            files |= {name: old[name] for name in old if name.startswith(f"{ENCODER}/")}
            if examples := _examples(artifact, after, rows, entry):
                text = json.dumps(examples, indent=1)
                (self.staged / EXAMPLES).write_text(text, encoding="utf-8")
                files[EXAMPLES] = record(self.staged / EXAMPLES)
            fitted = followed.record.model_copy(
                update={"bytes": sum(file.bytes for file in files.values())}
            )
            after = after.model_copy(update={"router": fitted, "files": after.files | files})
        recipe = yaml.safe_dump(after.recipe, sort_keys=False, allow_unicode=True)
        (self.staged / RECIPE).write_text(recipe, encoding="utf-8")
        (self.staged / CARD).write_text(model_card(after), encoding="utf-8")
        (self.staged / MANIFEST).write_text(after.to_json(), encoding="utf-8")
        return after

    def _commit(self, before: Manifest, between: Manifest, after: Manifest) -> None:
        """Change places with the old. The manifest lists nothing that changes in the meantime."""
        if before.router is not None or between is not before:
            held = between.model_copy(update={"router": None, "files": _plain(between)})
            replace_text(self.folder / MANIFEST, held.to_json())
        changed = [name for name in after.files if _is_file(self.staged / name)]
        for name in (*changed, RECIPE, CARD, MANIFEST):  # the manifest last
            os.replace(self.staged / name, self.folder / name)
        for name in before.files:
            if name not in after.files:
                (self.folder / name).unlink(missing_ok=True)
        if not any(name.startswith(f"{ENCODER}/") for name in after.files):
            shutil.rmtree(self.folder / ENCODER, ignore_errors=True)


def _is_file(path: Path) -> bool:
    """Whether it was made here, and is no link to what is there already."""
    return path.is_file() and not path.is_symlink()


def _plain(manifest: Manifest) -> dict[str, Any]:
    """Its files without the router's."""
    return {name: file for name, file in manifest.files.items() if not of_router(name)}


def _sweep(artifact: Artifact) -> None:
    """Remove what a killed run left: files of experts that the manifest does not list."""
    listed = {artifact.folder / name for name in artifact.manifest.files}
    for path in (artifact.folder / "experts").glob("*.safetensors"):
        if path not in listed:
            path.unlink()


def _by_expert(rows: Rows | None, name: str) -> dict[str, Sequence[Text | Chat | str]]:
    if rows is None:
        return {}
    return dict(rows) if isinstance(rows, Mapping) else {name: rows}


def _examples(
    artifact: Artifact, after: Manifest, rows: Rows | None, entry: Expert | None
) -> dict[str, list[Any]]:
    """The kept examples of the experts that stay, and as many of the new one."""
    kept = artifact.examples()
    if not kept:
        return {}
    count, new = max(map(len, kept.values())), None if entry is None else entry.name
    found = {}
    for name in after.names:
        if name == new:
            texts = _by_expert(rows, name).get(name, ())
            found[name] = [json_of(each) for each in sample(texts, count, 0)]
        else:
            found[name] = kept.get(name, [])
    return {name: each for name, each in found.items() if each}


def _router_result(before: Manifest, after: Manifest, followed: Followed) -> dict[str, Any]:
    return {
        "before": None if before.router is None else before.router.said,
        "after": None if after.router is None else after.router.said,
        "said": list(followed.said),
        "measured": followed.measured,
    }
