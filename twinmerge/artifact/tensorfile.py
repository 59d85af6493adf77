"""A safetensors file written one tensor at a time.

The safetensors library writes a file from a dictionary of all its tensors. A build must not hold
a whole shard in memory, but it knows names, dtypes and shapes beforehand, and so the whole header:
`layout` makes it, the tensors follow in that order. The digest is taken on the way. The result is
an ordinary safetensors file, and tests read it with the library.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .format import FileRecord

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

CHUNK = 1 << 18
"""Bytes that are hashed and written in turn: the hash leaves them in the core's cache, and copying
them into the kernel's takes a third of the time that it takes from memory."""

Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of one tensor of a file."""


@dataclass(frozen=True)
class Layout:
    """A file before any tensor is in it: the header's bytes, and the entries in their order."""

    header: bytes
    entries: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + sum(size_of(entry) for entry in self.entries)


def size_of(entry: Entry) -> int:
    """Bytes of one tensor's data."""
    return prod(entry[2]) * entry[1].itemsize


def layout(entries: Iterable[Entry]) -> Layout:
    """The layout of these tensors, in this order.

    They must come in descending order of item size, so that each starts aligned to its own size:
    safetensors allows no gaps. Raises `ValueError` if they do not, or if a name comes twice.
    """
    entries = tuple(entries)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, last = 0, 1 << 30
    for entry in entries:
        name, dtype, shape = entry
        if dtype.itemsize > last:
            raise ValueError(f"{name}: tensors must come in descending order of item size")
        if name in header:
            raise ValueError(f"{name}: given twice")
        last, end = dtype.itemsize, offset + size_of(entry)
        header[name] = {
            "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # safetensors aligns the data to 8 bytes
    return Layout(struct.pack("<Q", len(text)) + text, entries)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's data."""
    data = tensor.detach().cpu().contiguous()
    return data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else memoryview(b"")


class HashedFile:
    """A file that grows at its end and knows the SHA-256 of what is in it.

    With `length` an existing file is opened, cut to so many bytes, and read once for its digest.
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self.length = 0
        if length is None:
            path.unlink(missing_ok=True)  # it may be a link to a file that is done
        # Unbuffered: a line of the journal must never be older than the bytes that it tells of.
        self._file = open(path, "wb" if length is None else "r+b", buffering=0)
        if length is not None:
            if path.stat().st_size > length:
                self._file.truncate(length)
            for chunk in iter(lambda: self._file.read(1 << 20), b""):
                self._digest.update(chunk)
                self.length += len(chunk)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. Raises `OSError` where they do not go down."""
        whole = memoryview(data).cast("B")
        for start in range(0, whole.nbytes, CHUNK):
            chunk = whole[start : start + CHUNK]
            self._digest.update(chunk)
            self.length += chunk.nbytes
            while chunk.nbytes:  # one write may take less
                chunk = chunk[self._file.write(chunk) :]

    def sha256(self) -> str:
        """Of all bytes so far."""
        return self._digest.copy().hexdigest()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def close(self) -> FileRecord:
        """Size and digest of the whole file."""
        self._file.close()
        return FileRecord(bytes=self.length, sha256=self.sha256())


class TensorFileWriter:
    """Writes the tensors of one `Layout` in its order."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self._file = HashedFile(path)
        self._due = list(reversed(layout.entries))
        try:
            self._file.write(layout.header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor. Raises `ValueError` if it is not the one that is due."""
        entry = (name, tensor.dtype, tuple(tensor.shape))
        if not self._due or self._due[-1] != entry:
            due = self._due[-1] if self._due else "nothing"
            raise ValueError(f"{self._file.path.name}: expected {due}, got {entry}")
        self._due.pop()
        self._file.write(raw(tensor))

    def close(self) -> FileRecord:
        """The file's size and digest. Raises `ValueError` if a tensor is missing."""
        if self._due:
            self._file.close()
            raise ValueError(f"{self._file.path.name}: {self._due[-1][0]} did not come")
        return self._file.close()


def record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())
