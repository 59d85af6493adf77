"""An unfinished build: what is done so far, on disk, so that a killed build goes on where it was.

Beside the target `out` lies `.out.building/`, with one folder for every part of the build (one,
unless it is divided). A part's folder holds

    build.json       what is being built from which files: another recipe must not go on with it
    journal.jsonl    one line for every tensor that is done, written after its bytes: the digest
                     of the rest of the line, and the rest, JSON
    model*.safetensors[.segment]   the shared expert's files, or what this part has of them
    experts.spool    the experts' parts, in the order of the tensors

Every line has the size and SHA-256 of both files up to that tensor. On resuming, bytes beyond the
last whole line are cut off and the rest is compared with its digest, so that what a crash left half
written is never built upon.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..artifact.format import Share
from ..artifact.tensorfile import HashedFile, raw
from ..errors import OutputError

RESTART = "Run again with --restart to begin anew."


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Piece(_Line):
    """One tensor of one expert's part, in the spool."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class Candidate(_Line):
    """Factors of more rank than may be kept, for a budget to choose from. Squared norms."""

    squares: tuple[float, ...]
    """`‖D - kept‖²` with 0, 1, 2, ... components, as stored."""
    captured: tuple[float, ...]
    """The squares of the singular values, summed."""
    missed: float
    """How much more the best factors may hold; see `linalg.SVD`."""


class Line(_Line):
    """One finished tensor."""

    tensor: str
    """Its key; see `planned.Planned`."""
    file: str
    """The file of the shared expert that it belongs to (whether or not it has bytes there)."""
    end: int
    sha256: str
    spool_end: int
    spool_sha256: str
    pieces: dict[str, tuple[Piece, ...]] = {}
    """By expert."""
    shares: dict[str, Share] = {}
    candidates: dict[str, Candidate] = {}
    base_square: float = 0.0
    """‖W_0‖², of matrices."""
    moved: tuple[float, ...] = ()
    """‖W_t - W_0‖² by expert, of matrices."""
    unlike: tuple[tuple[int, int], ...] = ()
    """Pairs of experts that differ in this tensor, as far as they had not differed before."""


class Workspace:
    """The folder of an unfinished build, beside its target."""

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))
        self.folder = self.target.parent / f".{self.target.name}.building"

    @property
    def whole(self) -> Path:
        """Where the artifact is put together before it is moved to its place."""
        return self.folder / "whole"

    @property
    def moving(self) -> Path:
        """An empty file: that `whole` is gone means that it was moved."""
        return self.folder / "moving"

    def part(self, index: int, count: int) -> Path:
        return self.folder / f"part-{index + 1:05}-of-{count:05}"

    def bytes(self) -> int:
        """Bytes of all files in it."""
        total = 0
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # another process may be at work here
                total += path.stat().st_size if path.is_file() else 0
        return total

    def finish(self, mine: Iterable[Path]) -> None:
        """Move the whole artifact to its place; the rest goes. mine: as for `discard`."""
        mask = os.umask(0)
        os.umask(mask)
        self.whole.chmod(0o777 & ~mask)
        self.moving.touch()
        os.rename(self.whole, self.target)  # over an empty folder, too
        self.discard(mine)

    def tidy(self) -> None:
        """Remove what is left where a kill came between the artifact's move and the end."""
        if self.moving.exists() and not self.whole.exists():
            self.discard()

    def discard(self, mine: Iterable[Path] = ()) -> None:
        """Remove everything but parts of another division that a process is at work in.

        mine: folders of parts that this process holds
        """
        mine = set(mine)
        for part in self.folder.glob("part-*"):
            if part in mine or not _busy(part):
                shutil.rmtree(part, ignore_errors=True)
        if not any(self.folder.glob("part-*")):
            shutil.rmtree(self.folder, ignore_errors=True)


def _busy(part: Path) -> bool:
    """Whether another process holds this part."""
    try:
        with open(part / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_spool(file: BinaryIO, piece: Piece) -> Tensor:
    """One tensor from a spool."""
    dtype: torch.dtype = getattr(torch, piece.dtype)
    if 0 in piece.shape:
        return torch.empty(piece.shape, dtype=dtype)
    size = dtype.itemsize * torch.Size(piece.shape).numel()
    data = bytearray(size)
    file.seek(piece.start)
    if file.readinto(data) != size:  # type: ignore[attr-defined]
        raise OutputError(f"{file.name}: {piece} is cut short. {RESTART}")
    return torch.frombuffer(data, dtype=dtype).view(piece.shape)


class Spool:
    """Tensors one after another in a file, to be found again by their `Piece`."""

    def __init__(self, file: HashedFile) -> None:
        self.file = file

    def add(self, suffix: str, tensor: Tensor) -> Piece:
        start = self.file.length
        self.file.write(raw(tensor))
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Piece(suffix=suffix, dtype=dtype, shape=tuple(tensor.shape), start=start)


class Part:
    """One part's folder, held by this process alone. What is there is compared with its digests.

    Raises `OutputError` if another process is at work in it, if what lies there is of another
    build, or if it was damaged; `restart` begins anew instead.
    """

    def __init__(self, folder: Path, build: dict[str, Any], *, restart: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise OutputError(
                f"{folder}: another process is building here right now. Wait for it, or choose "
                "another output folder."
            ) from None
        except OSError:
            pass  # a disk without locks (some network drives): two at once cannot be told there
        try:
            if restart:
                self._clear()
            self.lines = self._resumed(build)
            for name in {line.file for line in self.lines}:
                if file := self.shared_file(name):
                    file.close()
            self.spool = self._spool()
            self._journal = open(folder / "journal.jsonl", "ab", buffering=0)
        except BaseException:
            if not (folder / "journal.jsonl").is_file():
                self.discard()  # nothing was done yet
            self._lock.close()
            raise

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def _resumed(self, build: dict[str, Any]) -> list[Line]:
        """The lines of an earlier run of this very build; none if there was none."""
        path, text = self.folder / "build.json", json.dumps(build, indent=1, sort_keys=True)
        if path.is_file():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                before = None  # killed while it was written: nothing was built yet
            if before is not None:
                difference = changed(before, json.loads(text))
                if difference:
                    raise OutputError(
                        f"{self.folder.parent}: holds an unfinished build, but {difference}, so "
                        f"it cannot go on.\n  Put that back as it was, or: {RESTART}"
                    )
                return self._read_lines()
        self._clear()
        path.write_text(text, encoding="utf-8")
        return []

    def _read_lines(self) -> list[Line]:
        path = self.folder / "journal.jsonl"
        if not path.is_file():
            return []
        lines, kept = [], 0
        with open(path, "r+b") as file:
            for text in file:
                if not text.endswith(b"\n"):
                    break
                digest, _, content = text.rstrip(b"\n").partition(b" ")
                if digest != _digest(content):
                    break  # what came after it is done again
                lines.append(Line.model_validate_json(content))
                kept += len(text)
            file.truncate(kept)
        return lines

    def _spool(self) -> Spool:
        path = self.folder / "experts.spool"
        if not self.lines:
            return Spool(HashedFile(path))
        last = self.lines[-1]
        return Spool(_reopened(path, last.spool_end, last.spool_sha256))

    def shared_file(self, name: str) -> HashedFile | None:
        """The file of the shared expert called `name`, as far as it is; None if not begun.

        Raises `OutputError` if it is not as the journal says.
        """
        mine = [line for line in self.lines if line.file == name]
        if not mine:
            return None
        return _reopened(self.folder / name, mine[-1].end, mine[-1].sha256)

    def append(self, line: Line) -> None:
        """Note a tensor as done; its bytes must have been written before."""
        content = line.model_dump_json(exclude_defaults=True).encode()
        text = _digest(content) + b" " + content + b"\n"
        while text:
            text = text[self._journal.write(text) :]
        self.lines.append(line)

    def discard(self) -> None:
        """Remove the folder, and after the last part the unfinished build."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if not any(self.folder.parent.glob("part-*")):
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def close(self) -> None:
        self._journal.close()
        self.spool.file.close()
        self._lock.close()


def _digest(content: bytes) -> bytes:
    """Of one line, short: against a flipped bit, not against anyone."""
    return hashlib.sha256(content).hexdigest()[:16].encode()


def _reopened(path: Path, end: int, sha256: str) -> HashedFile:
    problem = "is gone"
    if path.is_file():
        file = HashedFile(path, end)
        if file.length == end and file.sha256() == sha256:
            return file
        file.close()
        problem = "is not what the journal says (a crash of the machine, or a change by hand)"
    raise OutputError(f"{path}: a part of an unfinished build {problem}. {RESTART}")


def changed(before: Any, now: Any, path: str = "") -> str:
    """What of a `build.json` is no longer so, in words; empty if nothing."""
    if before == now:
        return ""
    if isinstance(before, dict) and isinstance(now, dict):
        if path == "sources":
            for name in sorted(before.keys() | now.keys()):
                if before.get(name) != now.get(name):
                    what = "is new" if name not in before else "was changed since"
                    return f"the source {name} {'is gone' if name not in now else what}"
        for key in sorted(before.keys() | now.keys()):
            difference = changed(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
            if difference:
                return difference
    return f"{path} was {before!r} and is now {now!r}"
