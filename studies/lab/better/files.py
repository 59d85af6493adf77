"""An expert's file: its matrices and vectors as packed rows of numbers, and read back.

It holds the expert's head, its vectors (what is no matrix, as differences to the shared expert),
and the factors of each matrix: `W_t ≈ W_s + B A`, or a core between bases that are in a file of
their own. What no expert changed is in none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from twinmerge.merging.linalg import SVD

from ..rivals.packed import Packed, Vector, from_file, to_file
from .basis import Basis, product
from .store import Dtype, decode, encode

FACTORS, VECTORS, RANKS, BASES = "factors", "vectors", "ranks", "bases"
"""Names in a file."""


@dataclass(frozen=True)
class Layout:
    """What all files have in common: the order of what is in them, and its shapes.

    matrices: name -> (out, in)
    vectors:  name -> shape of what is no matrix
    """

    matrices: Mapping[str, tuple[int, int]]
    vectors: Mapping[str, torch.Size]

    def factors(self, kept: Mapping[str, SVD], dtype: Dtype) -> Packed:
        """Of each matrix, with its rank."""
        counts = [len(kept[name].s) for name in self.matrices]
        sides = [side for name in self.matrices for side in balanced(kept[name])]
        packed = {RANKS: torch.tensor(counts, dtype=torch.int16)}
        return packed | encode(FACTORS, sides, dtype)

    def read_factors(self, packed: Packed, dtype: Dtype) -> Vector:
        ranks = packed[RANKS].tolist()
        rows = decode(
            packed,
            FACTORS,
            [
                (rank, n)
                for rank, shape in zip(ranks, self.matrices.values(), strict=True)
                for n in shape
            ],
            dtype,
        )
        sides = zip(self.matrices, rows[::2], rows[1::2], strict=True)
        return {name: b.T @ a for name, b, a in sides}

    def bases(self, found: Mapping[str, Basis], dtype: Dtype) -> bytes:
        """One file, for all experts."""
        rows = [side for basis in found.values() for side in (basis.u, basis.v)]
        counts = [len(side) for side in rows]
        packed = {RANKS: torch.tensor(counts, dtype=torch.int16)}
        return to_file(packed | encode(BASES, rows, dtype))

    def read_bases(self, file: bytes, dtype: Dtype) -> dict[str, Basis]:
        packed = from_file(file)
        widths = [n for shape in self.matrices.values() for n in shape]
        shapes = list(zip(packed[RANKS].tolist(), widths, strict=True))
        rows = decode(packed, BASES, shapes, dtype)
        sides = zip(self.matrices, rows[::2], rows[1::2], strict=True)
        return {name: Basis(u, v) for name, u, v in sides}

    def read_vectors(self, packed: Packed, dtype: Dtype | Literal["none"]) -> Vector:
        shapes = self.vectors
        if dtype == "none":
            return {name: torch.zeros(shape) for name, shape in shapes.items()}
        rows = decode(packed, VECTORS, [(1, prod(s)) for s in shapes.values()], dtype)
        return {name: row.view(s) for (name, s), row in zip(shapes.items(), rows, strict=True)}


def packed_cores(found: Sequence[Tensor], dtype: Dtype) -> Packed:
    return encode(FACTORS, found, dtype)


def read_cores(packed: Packed, bases: Mapping[str, Basis], dtype: Dtype) -> Vector:
    shapes = [(len(basis.u), len(basis.v)) for basis in bases.values()]
    found = decode(packed, FACTORS, shapes, dtype)
    return {
        name: product(basis, each) for (name, basis), each in zip(bases.items(), found, strict=True)
    }


def packed_vectors(vectors: Vector, dtype: Dtype | Literal["none"]) -> Packed:
    if dtype == "none":
        return {}
    return encode(VECTORS, [x.reshape(1, -1) for x in vectors.values()], dtype)


def balanced(found: SVD) -> tuple[Tensor, Tensor]:
    """Columns of B and rows of A, as rows, equally long: neither leaves the range of float16."""
    b, a = (found.u * found.s).T, found.vh
    tiny = torch.finfo(torch.float32).tiny
    ratio = (a.norm(dim=1) / b.norm(dim=1).clamp_min(tiny)).sqrt()[:, None]
    usable = ratio.isfinite() & (ratio > 0)
    ratio = torch.where(usable, ratio, 1.0)
    return b * ratio, a / ratio
