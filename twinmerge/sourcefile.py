"""One weight file that others wrote, safetensors or pickle: its header now, its tensors on demand.

Large tensors of a .safetensors file are private maps of the file: their pages are the kernel's file
cache, not memory of ours, and nothing is copied until somebody writes to them. A map lives as long
as the tensor that was given out, and no longer, so that a build never holds more of a source than
the tensors at hand. A pickle is loaded with `weights_only`: it can hold tensors and nothing that
runs.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import re
import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CorruptCheckpoint, UnsafePickle, UnsupportedCheckpoint

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
    **{"BOOL": torch.bool, "C64": torch.complex64},
}
# Smaller tensors are read: a map costs a system call, a file handle and a page at either end.
MAPPED = 1 << 20
"""Bytes from which a tensor is mapped."""
# Python's maps keep their file open, and macOS allows 256 open files. Whoever holds more large
# tensors than this at once gets the others in memory.
_MOST_MAPS = 128
_MAPS: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


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

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """One .safetensors file. Between reads it holds its header only, and no open file.

    `infos` are what the header says, `bytes` those of all tensors. May be read by several threads.
    Raises `CorruptCheckpoint`, or `UnsupportedCheckpoint` for numbers of fewer than eight bits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
                if length > _LONGEST_HEADER:
                    raise ValueError(f"it would take {length:,} bytes")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            packed = {n: str(h["dtype"]) for n, h in header.items() if h["dtype"] not in _DTYPES}
            shapes = {n: tuple(int(size) for size in h["shape"]) for n, h in header.items()}
            spans = {n: (h["data_offsets"][0], h["data_offsets"][1]) for n, h in header.items()}
            end = 8 + length + max((stop for _, stop in spans.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            came = f"{size} bytes in which it cannot be read ({error})"
            raise CorruptCheckpoint(
                explain(str(path), "a safetensors header", came, again)
            ) from error
        if packed:
            name = min(packed)
            came = f"packed {packed[name]} numbers (tensor {name}), which mean nothing unscaled"
            todo = "Dequantise the model and save it in bfloat16 first, or give us the original."
            raise UnsupportedCheckpoint(
                explain(str(path), "plain floats of 8 bits or more", came, todo)
            )
        if size != end:
            raise CorruptCheckpoint(
                explain(str(path), f"{end} bytes (says its header)", f"{size} bytes", again)
            )
        self.infos = {n: TensorInfo(shapes[n], _DTYPES[h["dtype"]]) for n, h in header.items()}
        self.bytes = end - 8 - length
        self._starts: dict[str, int] = {}
        stop = 0
        for name, span in sorted(spans.items(), key=lambda item: item[1]):
            if span != (stop, stop + self.infos[name].bytes):
                info = self.infos[name]
                expected = f"{info.bytes} bytes for tensor {name}, {info.shape} {info.dtype}"
                came = f"bytes {span[0]} to {span[1]} of its data, after {stop}"
                raise CorruptCheckpoint(explain(str(path), expected, came, again))
            self._starts[name], stop = 8 + length + span[0], span[1]

    def read(self, name: str) -> Tensor:
        """A map of the tensor in the file, or a copy if it is small or cannot be mapped."""
        info, start = self.infos[name], self._starts[name]
        aligned = start % info.dtype.itemsize == 0
        with self.path.open("rb") as file:
            data = None
            if info.bytes >= MAPPED and aligned and len(_MAPS) < _MOST_MAPS:
                data = _mapped(file.fileno(), start, info.bytes)
            if data is None:
                data = torch.empty(info.bytes, dtype=torch.uint8)
                file.seek(start)
                if info.bytes and file.readinto(data.numpy().data) < info.bytes:
                    came = "a file that ends inside it"
                    todo = "Copy or download the file again."
                    raise CorruptCheckpoint(explain(str(self.path), f"tensor {name}", came, todo))
        return data.view(info.dtype).view(info.shape)

    def prefetch(self, name: str) -> None:
        """Ask the kernel to read the tensor's bytes ahead. Returns at once."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            with self.path.open("rb") as file:
                start, size = self._starts[name], self.infos[name].bytes
                os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Nothing is kept between reads."""


def _mapped(file: int, start: int, size: int) -> Tensor | None:
    """Bytes `start` to `start + size` of an open file; None where the system will not map it."""
    # Writable, so that a caller may change its tensor, yet no reservation of memory: without
    # NORESERVE (unnamed before Python 3.13), Linux refuses private maps beyond its memory.
    unnamed = 0x4000 if sys.platform == "linux" else 0
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", unnamed)
    before = start % mmap.ALLOCATIONGRANULARITY
    try:
        area = mmap.mmap(
            file,
            size + before,
            flags=flags,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=start - before,
        )
    except (OSError, ValueError):
        return None
    _MAPS.add(area)
    return torch.frombuffer(area, dtype=torch.uint8, count=size, offset=before)


class PickleFile:
    """One .bin file: mapped, not read, and refused if it holds anything but tensors.

    As `SafetensorsFile`, except that what was unpickled is kept until `close`. Two names of one
    storage count once in `bytes`. Raises `UnsafePickle`, `CorruptCheckpoint`, or
    `UnsupportedCheckpoint` for quantised and sparse tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._tensors = path, None
        tensors = self._load()
        for name, tensor in tensors.items():
            if tensor.is_quantized or tensor.layout != torch.strided:
                came = f"tensor {name} as {tensor.dtype}, {tensor.layout}"
                todo = "Call `.dequantize()` or `.to_dense()` on it and save the state dict again."
                raise UnsupportedCheckpoint(explain(str(path), "dense tensors", came, todo))
        self.infos = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}
        storages = {t.untyped_storage().data_ptr(): t for t in tensors.values()}
        self.bytes = sum(t.numel() * t.element_size() for t in storages.values())

    def _load(self) -> dict[str, Tensor]:
        again = "Copy or download the file again, or use its safetensors version."
        start = b""
        try:
            with self.path.open("rb") as file:
                start = file.read(8)
                if start == b"version ":
                    again = "This is a Git LFS pointer, not the file: run `git lfs pull`."
            # Files older than torch 1.6 are no zip archive and cannot be mapped.
            state: Any = torch.load(
                self.path, map_location="cpu", weights_only=True, mmap=start[:2] == b"PK"
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
        tensors = self._tensors
        if tensors is None:
            tensors = self._tensors = self._load()
        return tensors[name]

    def prefetch(self, name: str) -> None:
        """Nothing: where in the file a tensor lies, only torch knows."""

    def close(self) -> None:
        """Forget what was unpickled; a later `read` loads it again."""
        self._tensors = None


WeightFile = SafetensorsFile | PickleFile
