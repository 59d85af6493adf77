"""An artifact to another folder or to the hub, and back: what `save_pretrained` and the like do.

A running model is its artifact: nothing in it changes while it runs, so saving is copying, checked
against the manifest's digests on the way. The one thing that may differ from the files is the
router, which is written from memory.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from safetensors.torch import save as to_bytes

from ..artifact.card import model_card
from ..artifact.format import (
    MANIFEST,
    RECIPE,
    ROUTER,
    FileRecord,
    Manifest,
    RouterRecord,
    parse_manifest,
)
from ..artifact.reader import Artifact
from ..artifact.tensorfile import HashedFile
from ..artifact.writer import check_space, check_target, explained
from ..errors import ArtifactError, CorruptArtifact, InputError, OutputError, first_line
from .router.encoder import ENCODER
from .router.store import of_router

if TYPE_CHECKING:
    from .model import TwinModel
    from .router.router import Router

CARD = "README.md"
CHUNK = 1 << 20
# An artifact's repository is always somebody's: `name` alone is a folder that is not there.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^\s@]+)?")


# ---------------------------------------------------------------------------------- to a folder


def save(twin: TwinModel, folder: Path | str, *, overwrite: bool = False) -> Path:
    """Write the model's artifact to `folder`, which appears when it is whole. See `TwinModel`."""
    target = Path(folder).expanduser().resolve()
    manifest, own = _state(twin)
    if target == twin.folder.resolve():
        if _on_disk(twin.folder) == manifest:
            Artifact(target)  # nothing to write, but it is what it should be
            return target
        raise OutputError(
            f"{target}: is the folder that this model was loaded from, and its router is another "
            "now. Save to a new folder."
        )
    replaces = overwrite and (target / MANIFEST).is_file()
    if replaces:
        Artifact(target, check=False)  # what is no artifact is not ours to remove
    else:
        _check_free(target)
    check_space(target, sum(file.bytes for file in manifest.files.values()))
    mark = uuid4().hex
    work = target.with_name(f".{target.name}.{mark}.saving")
    old = target.with_name(f".{target.name}.{mark}.replaced")
    try:
        with explained(target):
            work.mkdir(parents=True)
            for name, expected in manifest.files.items():
                if name in own:
                    (work / name).write_bytes(own[name])
                else:
                    _copy(twin.folder / name, work / name, expected)
            if (twin.folder / RECIPE).is_file():
                shutil.copyfile(twin.folder / RECIPE, work / RECIPE)
            (work / CARD).write_bytes(own[CARD])
            (work / MANIFEST).write_bytes(own[MANIFEST])
            if replaces:
                os.rename(target, old)
            elif target.is_dir():
                target.rmdir()  # empty: not every system renames over it
            try:
                os.rename(work, target)
            except OSError:
                if replaces:
                    os.rename(old, target)
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return target


def _check_free(target: Path) -> None:
    if (target / MANIFEST).is_file():
        raise OutputError(
            f"{target}: expected a new or empty folder to write to, but an artifact is there. "
            "Choose another folder, or replace it with overwrite=True."
        )
    check_target(target)


def _state(twin: TwinModel) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of the model as it is, and the files that are not copied: name -> content."""
    manifest, own = twin.manifest, {}
    if twin.router is not None:
        record = _recorded(twin.router, manifest.router)
        own[ROUTER] = to_bytes(twin.router.tensors(), {"format": "pt"})
        file = FileRecord(bytes=len(own[ROUTER]), sha256=hashlib.sha256(own[ROUTER]).hexdigest())
        files = manifest.files | {ROUTER: file}
        if record.encoder is None:
            files = {k: v for k, v in files.items() if not k.startswith(f"{ENCODER}/")}
        size = sum(each.bytes for name, each in files.items() if of_router(name))
        record = record.model_copy(update={"bytes": size})
        manifest = manifest.model_copy(update={"router": record, "files": files})
    own[MANIFEST] = manifest.to_json().encode()
    own[CARD] = model_card(manifest).encode()
    card = twin.folder / CARD
    if card.is_file() and _on_disk(twin.folder) == manifest:
        own[CARD] = card.read_bytes()  # people add to it
    return manifest, own


def _recorded(router: Router, record: RouterRecord | None) -> RouterRecord:
    """The record of the fit, with what was changed since.

    Raises `OutputError` where there is none of the router, its encoder or what notices new inputs.
    """
    novelty = None if record is None else record.novelty
    if (
        record is None
        or (router.encoder is not None and record.encoder is None)
        or (router.novelty is not None and novelty is None)
    ):
        raise OutputError(
            "the model has a router that no fit-router made, so there is nothing to write "
            "about it into the manifest. Fit one with twinmerge.fit_router(folder, texts)."
        )
    if novelty is not None and router.novelty is not None:
        own = {name: getattr(router.novelty, name) for name in ("layers", "pooling", "threshold")}
        novelty = novelty.model_copy(update=own)
    now = router.as_recorded() | {
        "encoder": None if router.encoder is None else record.encoder,
        "novelty": None if router.novelty is None else novelty,
    }
    return record.model_copy(update=now)


def _on_disk(folder: Path) -> Manifest | None:
    path = folder / MANIFEST
    return parse_manifest(path.read_text(encoding="utf-8"), folder) if path.is_file() else None


def _copy(source: Path, target: Path, expected: FileRecord) -> None:
    """Copy one file. Raises `CorruptArtifact` unless it is what the manifest says."""
    if not source.is_file():
        raise CorruptArtifact(
            f"{source}: the model was loaded from it, but it is missing now. Load the model again "
            "from a whole copy."
        )
    target.parent.mkdir(exist_ok=True)
    with HashedFile(target) as copy, open(source, "rb") as file:
        while chunk := file.read(CHUNK):
            copy.write(chunk)
        if copy.close() != expected:
            raise CorruptArtifact(
                f"{source}: its SHA-256 differs from the manifest's: a byte was changed since the "
                "model was loaded. Load it again from a whole copy."
            )


# ------------------------------------------------------------------------------------ the hub


def fetch(
    reference: Path | str,
    *,
    revision: str | None = None,
    cache_dir: Path | str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a reference: a local path, else a hub id `org/name` or `org/name@revision`.

    What is there already wins. Only the artifact's own files are downloaded, all of one commit.
    Raises `ArtifactError` if the hub has no such artifact or does not answer.
    """
    path = Path(reference)
    if not isinstance(reference, str) or path.exists() or not _HUB_ID.fullmatch(reference):
        return path
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, named = reference.partition("@")
    if named and revision not in (None, named):
        raise InputError(f"{reference}: expected one revision, got revision={revision!r} as well.")
    common: dict[str, Any] = {
        "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only
    }  # fmt: skip
    with _hub(f"'{reference}': not a folder here, and the hub", ArtifactError):
        try:
            first = Path(
                huggingface_hub.hf_hub_download(
                    repo, MANIFEST, revision=named or revision, **common
                )
            )
        except LocalEntryNotFoundError:
            raise  # not on this disk: the hub may have it
        except EntryNotFoundError:
            raise ArtifactError(
                f"'{reference}': the repository has no {MANIFEST}: expected an artifact that "
                "TwinModel.push_to_hub put there. Plain checkpoints are for the recipe of "
                "'twinmerge merge'."
            ) from None
        manifest = parse_manifest(first.read_text(encoding="utf-8"), first.parent)
        # The branch may move between the two downloads; a cache names its folders by commit.
        commit = first.parent.name
        known = re.fullmatch(r"[0-9a-f]{40}", commit)
        names = [MANIFEST, RECIPE, CARD, *manifest.files]
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=commit if known else named or revision,
            allow_patterns=[glob.escape(name) for name in names],
            **common,
        )
    return Path(folder)


def push(
    twin: TwinModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload the artifact to the hub; the address of the commit. See `TwinModel.push_to_hub`."""
    import huggingface_hub

    manifest, _ = _state(twin)
    with tempfile.TemporaryDirectory(prefix="twinmerge-push-") as spare:
        if _on_disk(twin.folder) == manifest:
            folder = Artifact(twin.folder).folder  # as it is on disk, and whole
        else:
            folder = save(twin, Path(spare) / "artifact")
        names = [MANIFEST, RECIPE, CARD, *manifest.files]
        with _hub(f"'{repo_id}': the hub", OutputError):
            api = huggingface_hub.HfApi(token=token)
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message or f"Upload {len(manifest.experts)} experts",
                revision=revision,
                create_pr=create_pr,
                allow_patterns=[glob.escape(name) for name in names],
                # Weights of an earlier artifact under names that this one does not have.
                delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            )
    return str(done.pr_url or done.commit_url)


@contextmanager
def _hub(what: str, kind: type[ArtifactError] | type[OutputError]) -> Iterator[None]:
    """Errors of the hub's library as one of ours, with what to do about them."""
    from huggingface_hub import errors

    try:
        yield
    except (ArtifactError, OutputError, InputError):
        raise
    except Exception as error:  # offline, not found, gated, no token: many unrelated classes
        status = getattr(getattr(error, "response", None), "status_code", None)
        reading = kind is ArtifactError
        if isinstance(error, errors.OfflineModeIsEnabled):
            todo = "HF_HUB_OFFLINE is set: unset it, or give a folder."
        elif isinstance(error, errors.LocalEntryNotFoundError):
            todo = "Without a network only what was downloaded before can be loaded."
        elif isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
            todo = "Log in with `hf auth login`, or give token=."
            if reading:
                todo = f"Check the spelling; for a private or gated repository: {todo}"
        elif isinstance(error, errors.GatedRepoError) or status == 403:
            todo = "The token may not do this: ask for access, or give another one with token=."
        elif isinstance(error, errors.RevisionNotFoundError):
            todo = "Check the revision: a branch, a tag or a commit."
        else:
            todo = "Check the spelling and the network."
        came = f"{type(error).__name__}: {first_line(error)}"
        raise kind(f"{what} could not be reached or refused it ({came}).\n  {todo}") from error
