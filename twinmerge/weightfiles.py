"""All weight files of a folder that others wrote, one tensor at a time: single or sharded.

With an index of shards, names come from the index and no shard is opened before one of its tensors
is asked for: eight models of three hundred shards are as easily held as one. What a file looked
like (bytes, time of writing) is noted when the folder is opened and compared before every read.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from .errors import CheckpointError, CorruptCheckpoint, MissingTensor, TwinMergeError
from .sourcefile import PickleFile, SafetensorsFile, TensorInfo, WeightFile, explain, some

__all__ = ["TensorFiles", "TensorInfo", "explain", "read_json", "some"]

# Shards that may keep what they unpickled between reads, for each folder.
_MOST_OPEN = 4


class TensorFiles:
    """All tensors of a folder, in whichever of the four layouts it has them.

    `stems` are the file names to look for, without ending: safetensors before .bin, one file
    before an index of shards. `beside` are further files, not of weights, that what is read depends
    on; they count in `identity`. May be used by several threads at once.

    Raises `CheckpointError` if there is no weight file or one that must not be read, and
    `CorruptCheckpoint` if the index names a shard that is not there. What is wrong inside of a
    shard is raised when a tensor of it is first asked for, by `info` already.
    """

    def __init__(self, folder: Path, stems: tuple[str, ...], beside: tuple[str, ...] = ()) -> None:
        ends = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
        wanted = [stem + end for end in ends for stem in stems]
        found = next((folder / name for name in wanted if (folder / name).is_file()), None)
        if found is None:
            came = some((p.name for p in folder.iterdir()), 5)
            todo = "Save the model with `save_pretrained`, or name the folder that holds weights."
            raise CheckpointError(
                explain(f"{folder}: no weight file", " or ".join(wanted), came, todo)
            )
        self._folder, self._lock = folder, threading.RLock()
        self._files: dict[str, WeightFile] = {}
        self._kept: list[str] = []  # shards with something to close, the last used at the end
        seen = {name for name in (found.name, *beside) if (folder / name).exists()}
        self._where: dict[str, str] = {}
        self._index_name = ""
        if found.suffix == ".json":
            self._index_name, self._where = found.name, _weight_map(found)
            seen |= set(self._where.values())
        self._seen = {name: _look(folder / name) for name in sorted(seen)}
        self._shards: dict[str, set[str]] = {}
        for name, shard in self._where.items():
            self._shards.setdefault(shard, set()).add(name)
        if not self._where:
            self._shards = {found.name: set()}
            self._where = dict.fromkeys(self._file(found.name).infos, found.name)
        self._names = sorted(self._where)

    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, from the header. Raises `MissingTensor` if there is no such tensor."""
        return self._file(self._shard(name)).infos[name]

    def read(self, name: str) -> Tensor:
        """The tensor as stored, mapped from the file where it is large (see `sourcefile`).

        Raises `MissingTensor`, or `CorruptCheckpoint` if the file is damaged or is not the one that
        was opened. That is noticed here; a file cut short while a map of it is in use ends the
        process, as it does with every memory map.
        """
        shard = self._shard(name)
        file = self._file(shard)
        self._check(shard)
        with _readable(self._folder / shard):
            tensor = file.read(name)
        self._keep(shard, file)
        return tensor

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the kernel to read these tensors ahead. Never fails, and does nothing for .bin."""
        for name in names:
            with contextlib.suppress(TwinMergeError, OSError):
                shard = self._shard(name)
                self._file(shard).prefetch(name)

    def check(self, names: Iterable[str]) -> None:
        """Raise `CorruptCheckpoint` if a file of these tensors is not what it was at opening.

        `read` looks, too; this is for what happened since, to a tensor that is the file itself.
        """
        for shard in {self._shard(name) for name in names}:
            self._check(shard)

    def identity(self) -> dict[str, list[int]]:
        """{file name: [bytes, time of writing in ns]} of every file, as when they were opened."""
        return {name: list(seen) for name, seen in self._seen.items()}

    def bytes(self) -> int:
        """Of all tensors. Reads all headers."""
        return sum(self._file(shard).bytes for shard in self._shards)

    def close(self) -> None:
        """Let go of all files. A later `read` opens them again."""
        with self._lock:
            self._kept = []
            for file in self._files.values():
                file.close()

    def _shard(self, name: str) -> str:
        if name not in self._where:
            raise MissingTensor(f"{name}: no such tensor. There are: {some(self._where)}.")
        return self._where[name]

    def _file(self, shard: str) -> WeightFile:
        """The shard with its header read, which is compared with the index."""
        if shard in self._files:
            return self._files[shard]
        with self._lock:
            if shard not in self._files:
                path = self._folder / shard
                self._check(shard)
                with _readable(path):
                    safe = path.suffix == ".safetensors"
                    file = SafetensorsFile(path) if safe else PickleFile(path)
                if self._index_name:
                    self._compare(shard, file)
                self._files[shard] = file
            return self._files[shard]

    def _compare(self, shard: str, file: WeightFile) -> None:
        path, index = str(self._folder / shard), self._index_name
        todo = "The index and the shards are of different versions: fetch all files again."
        if lost := sorted(self._shards[shard] - set(file.infos)):
            expected = f"tensor {lost[0]} (says {index})"
            came = f"a file without it ({some(file.infos)})"
            raise CorruptCheckpoint(explain(path, expected, came, todo))
        if more := sorted(name for name in file.infos if name not in self._where):
            came = f"{some(more)}, which {index} does not name"
            raise CorruptCheckpoint(explain(path, "only tensors of the index", came, todo))

    def _keep(self, shard: str, file: WeightFile) -> None:
        if isinstance(file, SafetensorsFile):
            return
        with self._lock:
            self._kept = [name for name in self._kept if name != shard] + [shard]
            for name in self._kept[:-_MOST_OPEN]:
                self._files[name].close()
            self._kept = self._kept[-_MOST_OPEN:]

    def _check(self, shard: str) -> None:
        """Raise `CorruptCheckpoint` unless the file is as it was when the folder was opened."""
        path, (size, written) = self._folder / shard, self._seen[shard]
        try:
            now = _look(path)
        except FileNotFoundError:
            came = "no such file any more"
        except OSError as error:
            came = error.strerror or str(error)
        else:
            if now == (size, written):
                return
            came = f"{now[0]:,} bytes" if now[0] != size else "one that was written to since"
        todo = "It went or changed while we were reading the model. Bring the same file back and "
        todo += "run again; if the change is meant, start over with the changed model."
        raise CorruptCheckpoint(
            explain(str(path), f"the file that was opened, {size:,} bytes", came, todo)
        )


def _look(path: Path) -> tuple[int, int]:
    """(bytes, time of writing in ns). Not the inode: on network drives it may change by itself."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _readable(path: Path):
    """Tells of what the system refuses as a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        came = error.strerror or str(error)
        todo = "Give yourself the right to read it, or copy the folder to where you have."
        raise CheckpointError(explain(str(path), "a file that can be read", came, todo)) from error


def _weight_map(path: Path) -> dict[str, str]:
    """{tensor: shard} of an index, all shards there. Raises `CorruptCheckpoint`."""
    index = read_json(path).get("weight_map")
    texts = isinstance(index, dict) and all(isinstance(shard, str) for shard in index.values())
    if not isinstance(index, dict) or not index or not texts:
        raise CorruptCheckpoint(
            explain(str(path), "a weight_map of tensors to files", "none", "Fetch it again.")
        )
    for shard in sorted(set(index.values())):
        inside = not {"..", "/"} & set(PurePosixPath(shard).parts)
        if not inside or not (path.parent / shard).is_file():
            todo = f"Fetch {shard} again: the model is not whole without it."
            raise CorruptCheckpoint(explain(str(path), f"shard {shard}", "no such file", todo))
    return index


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError` if it is missing or is none."""
    if not path.is_file():
        came = some((p.name for p in path.parent.iterdir()), 5)
        todo = f"Copy the model's {path.name} into the folder; `save_pretrained` writes it."
        raise CheckpointError(explain(f"{path.parent}: no {path.name}", "that file", came, todo))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except ValueError as error:
        raise CorruptCheckpoint(
            explain(str(path), "a JSON object", str(error), "Copy or download it again.")
        ) from error
    return content
