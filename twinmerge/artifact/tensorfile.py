"""A safetensors file written one tensor at a time.

The safetensors library writes a file from a dictionary of all its tensors. A build must not hold a
whole shard in memory, so this writes the same format as tensors come: room for the header is left
at the front, the data follows, and the header, padded with spaces as the format allows, is filled
in at the end. The result is an ordinary safetensors file, and tests read it with the library.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .format import FileRecord

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.complex64: "C64",
    torch.bool: "BOOL",
}
_METADATA = {"format": "pt"}


def header_room(entries: Iterable[tuple[str, tuple[int, ...]]], data_bytes: int) -> int:
    """Bytes that suffice for the header of tensors of these names and (largest) shapes.

    `data_bytes` is the most that all data can take. A multiple of 8, as safetensors writes it.
    """
    room = len(json.dumps({"__metadata__": _METADATA}))
    for name, shape in entries:
        room += len(json.dumps(_entry(name, "F8_E4M3", shape, data_bytes, data_bytes)))
    return -(-room // 8) * 8


def _entry(
    name: str, dtype: str, shape: tuple[int, ...], start: int, end: int
) -> dict[str, object]:
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}}


class TensorFileWriter:
    """Appends tensors to one file.

    Tensors must come in descending order of item size, so that each starts aligned to its own
    size: safetensors allows no gaps. `room` is the header's size, from `header_room` of all names
    that may come.
    """

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self._room = room
        self._entries: dict[str, object] = {"__metadata__": _METADATA}
        self._offset = 0
        self._last_size = 1 << 30
        self._file: BinaryIO = open(path, "wb")
        self._file.seek(8 + room)

    def add(self, name: str, tensor: Tensor) -> int:
        """Append one tensor; returns its size in bytes. Raises `ValueError` if out of order."""
        if tensor.element_size() > self._last_size:
            raise ValueError(f"{name}: tensors must come in descending order of item size")
        if name in self._entries:
            raise ValueError(f"{name}: written twice")
        self._last_size = tensor.element_size()
        data = tensor.detach().cpu().contiguous()
        size = data.numel() * data.element_size()
        end = self._offset + size
        self._entries |= _entry(name, _NAMES[tensor.dtype], tuple(tensor.shape), self._offset, end)
        if size:
            self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._offset += size
        return size

    def close(self) -> FileRecord:
        """Fill in the header; returns the file's size and digest."""
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ValueError(f"{self.path.name}: header of {len(header)} bytes, room {self._room}")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.close()
        return record(self.path)

    def abandon(self) -> None:
        """Close the file as it is, after an error."""
        self._file.close()


def record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())
