"""What a cut keeps of an expert, as bytes: rows of numbers in one dtype, and back.

All rows of one kind lie end to end in one tensor of the file (two, where they are quantised), so
that a file's header weighs hundreds of bytes and not tens of thousands: at 0.35 % of a small model
it would be an eighth of all. Shapes are those of the model and of the ranks that are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from twinmerge.artifact.codec import Quantised, dequantise, quantise, row_bytes

from ..rivals.packed import Packed, to_file

Dtype = Literal["float32", "float16", "int8", "int4"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

_FLOATS = {"float32": torch.float32, "float16": torch.float16}
_BITS = {"int8": 8, "int4": 4}


def row_size(n: int, dtype: Dtype) -> int:
    """Bytes of one row of `n` numbers, scales included."""
    return n * _FLOATS[dtype].itemsize if dtype in _FLOATS else row_bytes(n, _BITS[dtype])


def encode(name: str, matrices: Sequence[Float[Tensor, "_ _"]], dtype: Dtype) -> Packed:
    """The rows of all matrices under `name`. Raises `ValueError` for what is not finite."""
    if dtype in _FLOATS:
        found = _joined([matrix.to(_FLOATS[dtype]) for matrix in matrices], _FLOATS[dtype])
        if not bool(found.isfinite().all()):
            raise ValueError(f"{name}: a number is not finite in {dtype}")
        return {name: found}
    bits = _BITS[dtype]
    parts = [quantise(matrix, bits) for matrix in matrices if matrix.numel()]
    kind = torch.int8 if bits == 8 else torch.uint8
    return {
        f"{name}.q": _joined([part.q for part in parts], kind),
        f"{name}.scale": _joined([part.scale for part in parts], torch.bfloat16),
    }


def decode(
    packed: Packed, name: str, shapes: Sequence[tuple[int, int]], dtype: Dtype
) -> list[Float[Tensor, "_ _"]]:
    """What `encode` was given, rounded as `dtype` says; shapes: (rows, n) of each matrix"""
    if dtype in _FLOATS:
        parts = packed[name].split([rows * n for rows, n in shapes])
        return [x.view(shape).float() for x, shape in zip(parts, shapes, strict=True)]
    bits = _BITS[dtype]
    widths = [(n, 1) if bits == 8 else (-(-n // 2), 2) for _, n in shapes]
    quanta = packed[f"{name}.q"].split(
        [rows * width for (rows, _), (width, _) in zip(shapes, widths, strict=True)]
    )
    groups = [row_bytes(n, bits) - width for (_, n), (width, _) in zip(shapes, widths, strict=True)]
    item = torch.bfloat16.itemsize
    scales = packed[f"{name}.scale"].split(
        [rows * size // item for (rows, _), size in zip(shapes, groups, strict=True)]
    )
    return [
        dequantise(Quantised(q.view(rows, -1), scale.view(rows, -1), bits, n))
        if rows
        else torch.zeros(rows, n)
        for (rows, n), q, scale in zip(shapes, quanta, scales, strict=True)
    ]


def room(fixed: Packed, name: str, dtype: Dtype, limit: int) -> int:
    """Bytes for rows under `name` in a file of `limit` bytes that holds `fixed`, too.

    Less than 0 if `fixed` is too large. The header is taken at its longest.
    """
    longest = {key: x.new_empty(limit // x.itemsize) for key, x in encode(name, [], dtype).items()}
    return limit - (len(to_file(fixed | longest)) - sum(x.nbytes for x in longest.values()))


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=dtype), *(part.flatten() for part in parts)])
