"""Writing a router into its artifact, which is valid at every moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from safetensors.torch import save

from ...artifact.card import model_card
from ...artifact.format import EXAMPLES, MANIFEST, ROUTER, FileRecord, RouterRecord
from ...artifact.reader import Artifact
from ...artifact.tensorfile import record
from ...artifact.writer import explained, replace_text
from ...errors import OutputError
from .encoder import ENCODER
from .router import Router

CARD = "README.md"
LOCK = ".fit-router.lock"
STAGED = ".fitted"


def store_router(
    artifact: Artifact,
    router: Router,
    entry: RouterRecord,
    examples: Mapping[str, Sequence[Any]] | None = None,
) -> RouterRecord:
    """Write router and manifest so that the artifact is valid at every moment.

    All that is new is written beside the old. Then the old router leaves the manifest, the files
    change places, and the new one enters with the new manifest: a kill in between leaves an
    artifact without a router, a full disk the old router. Raises `OutputError` for that, and while
    another fit writes there.
    """
    with alone(artifact.folder):
        return stored(artifact, router, entry, examples)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
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
            _removed(left)
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
            f"{path.parent}: another command is changing this artifact; wait for it, then "
            "run the same command again."
        )
    return True


def stored(
    artifact: Artifact,
    router: Router,
    entry: RouterRecord,
    examples: Mapping[str, Sequence[Any]] | None = None,
) -> RouterRecord:
    """`store_router`, by who holds the artifact already. examples: texts to keep, by expert."""
    folder, mark = artifact.folder, f".{uuid4().hex}{STAGED}"
    staged = {
        name: folder / f".{name}{mark}" for name in (ENCODER, EXAMPLES, ROUTER, CARD, MANIFEST)
    }
    if not examples:
        del staged[EXAMPLES]
    if router.encoder is None:
        del staged[ENCODER]
    try:
        with explained(folder / ROUTER):
            # not save_file(): its error on a full disk is no OSError
            staged[ROUTER].write_bytes(save(router.tensors(), {"format": "pt"}))
            new = {ROUTER: record(staged[ROUTER])}
            if router.encoder is not None:
                router.encoder.save(staged[ENCODER])
                new |= encoder_files(staged[ENCODER])
            if examples:
                staged[EXAMPLES].write_text(json.dumps(examples, indent=1), encoding="utf-8")
                new[EXAMPLES] = record(staged[EXAMPLES])
            entry = entry.model_copy(update={"bytes": sum(file.bytes for file in new.values())})
            files = {k: v for k, v in artifact.manifest.files.items() if not of_router(k)}
            without = artifact.manifest.model_copy(update={"router": None, "files": files})
            manifest = without.model_copy(update={"router": entry, "files": files | new})
            staged[CARD].write_text(model_card(manifest), encoding="utf-8")
            staged[MANIFEST].write_text(manifest.to_json(), encoding="utf-8")
            replace_text(folder / MANIFEST, without.to_json())
            for name in (ENCODER, EXAMPLES):
                _removed(folder / name)
            for name, path in staged.items():  # the manifest last
                os.replace(path, folder / name)
    finally:
        for path in staged.values():
            _removed(path)
    return entry


def of_router(name: str) -> bool:
    """Whether a file of the artifact belongs to the router."""
    return name in (ROUTER, EXAMPLES) or name.startswith(f"{ENCODER}/")


def encoder_files(folder: Path) -> dict[str, FileRecord]:
    """What the manifest says of the encoder's files."""
    return {f"{ENCODER}/{path.name}": record(path) for path in sorted(folder.iterdir())}


def _removed(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
