"""Weight files that others wrote, one tensor at a time: safetensors or .bin, single or sharded.

Headers are read when a file is opened, data only when asked for. A pickle is loaded with
`weights_only`: it can hold tensors and nothing that runs.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import (
    CheckpointError,
    CorruptCheckpoint,
    MissingTensor,
    UnsafePickle,
    UnsupportedCheckpoint,
)

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"BOOL": torch.bool, "C64": torch.complex64},
}


def explain(thing: str, expected: str, came: str, todo: str) -> str:
    """The message of an error in its four parts."""
    return f"{thing}: expected {expected}, got {came}.\n  {todo}"


def some(names: Iterable[str], count: int = 3) -> str:
    """The first few of many names, for a message."""
    listed = sorted(names)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return (", ".join(listed[:count]) or "none") + more


@dataclass(frozen=True)
class TensorInfo:
    """What a file header says about one tensor: its shape, and its dtype as stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Safetensors:
    """One .safetensors file: the header is read now, the file is mapped at the first `read`."""

    def __init__(self, path: Path) -> None:
        self.path, self._handle = path, None
        size = path.stat().st_size
        again = "Copy or download the file again."
        try:
            with path.open("rb") as file:
                start = file.read(8)
                if start == b"version ":
                    again = "This is a Git LFS pointer, not the file: run `git lfs pull`."
                length = int.from_bytes(start, "little")
                if len(start) < 8 or length > size - 8:
                    raise ValueError("the file ends inside it")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            unknown = {str(h["dtype"]) for h in header.values()} - set(_DTYPES)
            shapes = {n: tuple(int(size) for size in h["shape"]) for n, h in header.items()}
            end = 8 + length + max((h["data_offsets"][1] for h in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            came = f"{size} bytes in which it cannot be read ({error})"
            raise CorruptCheckpoint(
                explain(str(path), "a safetensors header", came, again)
            ) from error
        if unknown:
            todo = "Dequantise the model and save it in bfloat16 first."
            raise UnsupportedCheckpoint(explain(str(path), "float dtypes", some(unknown), todo))
        if size != end:
            raise CorruptCheckpoint(
                explain(str(path), f"{end} bytes (says its header)", f"{size} bytes", again)
            )
        self.infos = {n: TensorInfo(shapes[n], _DTYPES[h["dtype"]]) for n, h in header.items()}
        self.bytes = end - 8 - length

    def read(self, name: str) -> Tensor:
        try:
            if self._handle is None:
                self._handle = safe_open(self.path, framework="pt", device="cpu")
            return self._handle.get_tensor(name)
        except SafetensorError as error:
            raise CorruptCheckpoint(
                explain(str(self.path), f"tensor {name}", str(error), "Copy the file again.")
            ) from error

    def close(self) -> None:
        if self._handle is not None:
            self._handle.__exit__(None, None, None)
            self._handle = None


class _Pickle:
    """One .bin file: mapped, not read, and refused if it holds anything but tensors."""

    def __init__(self, path: Path) -> None:
        self.path, self._tensors = path, None
        tensors = self._load()
        self.infos = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}
        # Tied tensors share one storage and count once.
        storages = {t.untyped_storage().data_ptr(): t for t in tensors.values()}
        self.bytes = sum(t.numel() * t.element_size() for t in storages.values())

    def _load(self) -> dict[str, Tensor]:
        again = "Copy or download the file again, or use its safetensors version."
        start = b""
        try:
            with self.path.open("rb") as file:
                start = file.read(2)
            # Files older than torch 1.6 are no zip archive and cannot be mapped.
            state = torch.load(
                self.path, map_location="cpu", weights_only=True, mmap=start == b"PK"
            )
        except pickle.UnpicklingError as error:
            # torch opens with advice to load it unsafely: we keep only what it found.
            found = str(error).partition("trusted source.")[2] or str(error)
            found = found.rpartition("WeightsUnpickler error: ")[2].strip()
            reason = found.split("\n")[0]
            code = re.search(r"global|reduce|class|persistent", reason, re.IGNORECASE)
            if code or (start[:1] == b"\x80" and "operand" in reason):
                todo = "Nothing was run. Do not load this file; ask for a safetensors version."
                came = f"a pickle that wants to run code ({reason})"
                raise UnsafePickle(explain(str(self.path), "tensors only", came, todo)) from error
            raise CorruptCheckpoint(
                explain(str(self.path), "a torch file of tensors", reason or "no pickle", again)
            ) from error
        except PermissionError:
            raise
        except (RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
            came = f"{self.path.stat().st_size} bytes that torch cannot read ({error})"
            raise CorruptCheckpoint(
                explain(str(self.path), "a torch file of tensors", came, again)
            ) from error
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            todo = "Save `model.state_dict()` itself, with `save_pretrained`."
            came = type(state).__name__ + " with other things in it"
            raise CorruptCheckpoint(explain(str(self.path), "a flat dict of tensors", came, todo))
        return {str(n): t.detach() for n, t in state.items()}

    def read(self, name: str) -> Tensor:
        if self._tensors is None:
            self._tensors = self._load()
        return self._tensors[name]

    def close(self) -> None:
        self._tensors = None


class TensorFiles:
    """All tensors of a folder, in whichever of the four layouts it has them.

    `stems` are the file names to look for, without ending: safetensors before .bin, one file
    before an index of shards. Raises `CheckpointError` if there is none of them and
    `CorruptCheckpoint` if a file or an index lies.
    """

    def __init__(self, folder: Path, stems: tuple[str, ...]) -> None:
        ends = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
        wanted = [stem + end for end in ends for stem in stems]
        found = [folder / name for name in wanted if (folder / name).is_file()]
        if not found:
            came = some((p.name for p in folder.iterdir()), 5)
            todo = "Save the model with `save_pretrained`, or name the folder that holds weights."
            raise CheckpointError(
                explain(f"{folder}: no weight file", " or ".join(wanted), came, todo)
            )
        self._files: dict[str, _Safetensors | _Pickle] = {}
        self._where: dict[str, str] = {}
        index = self._index(found[0]) if found[0].suffix == ".json" else {}
        for shard in sorted(set(index.values())) or [found[0].name]:
            path = folder / shard
            try:
                file = _Safetensors(path) if path.suffix == ".safetensors" else _Pickle(path)
            except OSError as error:
                came = error.strerror or str(error)
                todo = "Give yourself the right to read it, or copy the folder to where you have."
                raise CheckpointError(
                    explain(str(path), "a file that can be read", came, todo)
                ) from error
            self._files[shard] = file
            self._where.update(dict.fromkeys(file.infos, shard))
        for name, shard in index.items():
            if name not in self._files[shard].infos:
                todo = "The index and the shards are of different versions: fetch all files again."
                expected = f"tensor {name} (says {found[0].name})"
                came = f"a file without it ({some(self._files[shard].infos)})"
                raise CorruptCheckpoint(explain(str(folder / shard), expected, came, todo))
        self._where.update(index)

    @staticmethod
    def _index(path: Path) -> dict[str, str]:
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CorruptCheckpoint(
                explain(str(path), "a weight_map of tensors to files", "none", "Fetch it again.")
            )
        for shard in sorted(set(index.values())):
            inside = not {"..", "/"} & set(PurePosixPath(shard).parts)
            if not inside or not (path.parent / shard).is_file():
                todo = f"Fetch {shard} again: the model is not whole without it."
                raise CorruptCheckpoint(explain(str(path), f"shard {shard}", "no such file", todo))
        return index

    def names(self) -> list[str]:
        return sorted(self._where)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, from the header. Raises `MissingTensor` if there is no such tensor."""
        return self._file(name).infos[name]

    def read(self, name: str) -> Tensor:
        """The tensor as stored. Raises `MissingTensor` or `CorruptCheckpoint`."""
        return self._file(name).read(name)

    def bytes(self) -> int:
        return sum(file.bytes for file in self._files.values())

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _file(self, name: str) -> _Safetensors | _Pickle:
        if name not in self._where:
            raise MissingTensor(f"{name}: no such tensor. There are: {some(self._where)}.")
        return self._files[self._where[name]]


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
