r"""The bytes of exclusive parts that are not plain float tensors: quantised rows, sparse tensors.

**Quantised rows** (int8, int4). Each row is cut into groups of 64 entries, the last one shorter,
and each group has one scale, so that one large entry costs its own group only:

    x ≈ scale · q      scale = max|x| / 127 (int8) or / 7 (int4)      |x - scale · q| ≤ scale / 2

Symmetric: 0 stays 0. The scale is rounded up to bfloat16 before the entries are divided by it, so
the bound holds for the scale as stored (but at the very end of float32: `scale · q` has to stay
finite in bfloat16 too, so entries above 3.37e38 may be off by 1.01 scales). A row is a component
of the rank (a row of A, a column of B): to cut the rank is to cut rows. int4 packs two entries into
a byte, each stored as q + 8, the first of the two in the low bits; where their number is odd, the
last byte's high bits hold 8.

**Sparse tensors**. The values in the order of the flattened tensor, and where they stand: one bit
per entry of the tensor, bit i of byte j for entry 8j + i; or each value's position. Whichever is
smaller; the positions, if neither is.

Everything here is deterministic and runs where its tensors are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Float, Int, Int8, UInt8
from torch import Tensor

from ..errors import CorruptArtifact

GROUP = 64
"""Entries per scale: 2 bytes more for 64 (int8) or 32 (int4), 3 % and 6 %."""
LARGEST = {8: 127, 4: 7}
"""Bits -> largest |q|."""
_TINIEST = 2.0**-133
"""The smallest bfloat16 above zero."""
_HUGEST = {8: 2.0**121, 4: 145 * 2.0**118}
"""Bits -> the largest bfloat16 whose product with `LARGEST` is finite in bfloat16."""
_AGAIN = "Copy the folder again, or rebuild."


# ------------------------------------------------------------------------------ quantised rows


@dataclass(frozen=True)
class Quantised:
    """Rows of `n` entries in groups: `scale · q`. int4 holds ceil(n / 2) bytes in a row."""

    q: Int8[Tensor, "rank n"] | UInt8[Tensor, "rank packed"]
    scale: Float[Tensor, "rank group"]
    """In bfloat16."""
    bits: int
    n: int


@torch.no_grad()
def quantise(rows: Float[Tensor, "rank n"], bits: int) -> Quantised:
    """Round each group of `rows` to `bits` (8 or 4) around a scale of its own, in float32.

    Raises `ValueError` for NaN, infinity, and other bits.
    """
    if bits not in LARGEST:
        raise ValueError(f"bits must be one of {sorted(LARGEST)}, got {bits}")
    if not bool(rows.isfinite().all()):
        raise ValueError("expected finite entries to quantise, got NaN or infinity")
    (rank, n), largest = rows.shape, LARGEST[bits]
    groups = -(-n // GROUP)
    padded = rows.new_zeros(rank, groups * GROUP, dtype=torch.float32)
    padded[:, :n] = rows
    grouped = padded.view(rank, groups, GROUP)
    peak = grouped.abs().amax(dim=2)
    # Below the smallest scale the quotient would be 0, and a group that is not lost.
    scale = _up_to_bfloat16((peak / largest).clamp(_TINIEST, _HUGEST[bits])) * (peak > 0)
    divisor = torch.where(scale > 0, scale, 1.0)[:, :, None]
    q = (grouped / divisor).round_().clamp_(-largest, largest).flatten(1)[:, :n]
    return Quantised(_packed(q) if bits == 4 else q.to(torch.int8), scale.bfloat16(), bits, n)


@torch.no_grad()
def dequantise(x: Quantised, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rank n"]:
    """`scale · q`, rounded once to `dtype`."""
    # float16 cannot hold every scale; the other types hold q, the scale and their product's range.
    work = torch.float32 if dtype == torch.float16 else dtype
    rows = _unpacked(x.q, x.n, work) if x.bits == 4 else x.q.to(work)
    scale = x.scale.to(work)
    whole = x.n // GROUP
    rows[:, : whole * GROUP].unflatten(1, (whole, GROUP)).mul_(scale[:, :whole, None])
    rows[:, whole * GROUP :].mul_(scale[:, whole:])
    return rows.to(dtype)


@torch.no_grad()
def dequantise_columns(
    x: Quantised, columns: Int[Tensor, " column"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rank column"]:
    """`dequantise(x)[:, columns]`, without the others."""
    work = torch.float32 if dtype == torch.float16 else dtype
    if x.bits == 4:
        pairs = x.q.index_select(1, columns // 2)
        q = torch.where(columns % 2 == 1, pairs >> 4, pairs & 15).to(work) - 8
    else:
        q = x.q.index_select(1, columns).to(work)
    return (q * x.scale.index_select(1, columns // GROUP).to(work)).to(dtype)


def row_bytes(n: int, bits: int) -> int:
    """Bytes of one quantised row of `n` entries, scales included."""
    return (n if bits == 8 else -(-n // 2)) + 2 * -(-n // GROUP)


def decode_quantised(
    parts: Mapping[str, Tensor], rank: int, n: int, bits: int, where: str = "quantised rows"
) -> Quantised:
    """`rank` rows of `n` entries from their `q` and `scale` as read from a file.

    Raises `CorruptArtifact`, naming `where`, if the parts do not fit.
    """
    width, kind = (n, torch.int8) if bits == 8 else (-(-n // 2), torch.uint8)
    wanted = {"q": (kind, (rank, width)), "scale": (torch.bfloat16, (rank, -(-n // GROUP)))}
    for name, (dtype, shape) in wanted.items():
        tensor = parts[name]
        if tensor.dtype != dtype or tensor.shape != shape:
            raise CorruptArtifact(
                f"{where}.{name}: expected {dtype} {shape} for {rank} int{bits} rows of {n} "
                f"entries, got {tensor.dtype} {tuple(tensor.shape)}. {_AGAIN}"
            )
    scale = parts["scale"]
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise CorruptArtifact(
            f"{where}.scale: expected finite scales of at least 0, got others. {_AGAIN}"
        )
    return Quantised(parts["q"], scale, bits, n)


def _up_to_bfloat16(x: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """Positive float32 numbers rounded up to what bfloat16 holds: its bits are the upper half."""
    return ((x.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _packed(q: Float[Tensor, "rank n"]) -> UInt8[Tensor, "rank packed"]:
    rank, n = q.shape
    pairs = q.new_full((rank, n + n % 2), 8, dtype=torch.uint8)
    pairs[:, :n] = q + 8
    return pairs[:, 0::2] | (pairs[:, 1::2] << 4)


def _unpacked(q: UInt8[Tensor, "rank packed"], n: int, dtype: torch.dtype) -> Tensor:
    pairs = torch.stack([q & 15, q >> 4], dim=2)
    return pairs.flatten(1)[:, :n].to(dtype).sub_(8)


# ------------------------------------------------------------------------------ sparse tensors


@dataclass(frozen=True)
class Sparse:
    """A tensor of `shape` that is zero but for `values` at `index` of its flattened entries."""

    values: Float[Tensor, " n"]
    index: Int[Tensor, " n"]
    """Ascending, int64."""
    shape: tuple[int, ...]

    def dense(self) -> Tensor:
        whole = self.values.new_zeros(prod(self.shape))
        whole[self.index] = self.values
        return whole.view(self.shape)


def encode_sparse(x: Sparse) -> dict[str, Tensor]:
    """`values`, and `mask` or `index`: whichever takes fewer bytes."""
    size = prod(x.shape)
    kind = _index_type(size)
    if -(-size // 8) >= len(x.index) * kind.itemsize:
        return {"values": x.values, "index": x.index.to(kind)}
    bits = torch.zeros(-(-size // 8) * 8, dtype=torch.bool, device=x.index.device)
    bits[x.index] = True
    return {"values": x.values, "mask": pack_bits(bits)}


def decode_sparse(
    parts: Mapping[str, Tensor], shape: tuple[int, ...], where: str = "a sparse tensor"
) -> Sparse:
    """What `encode_sparse` was given.

    Raises `CorruptArtifact`, naming `where`, if values and positions do not fit together.
    """
    size, values = prod(shape), parts["values"]
    if values.ndim != 1 or not values.is_floating_point():
        raise CorruptArtifact(
            f"{where}.values: expected a row of floats, got {values.dtype} "
            f"{tuple(values.shape)}. {_AGAIN}"
        )
    if "mask" in parts:
        mask = parts["mask"]
        if mask.dtype != torch.uint8 or mask.shape != (-(-size // 8),):
            raise CorruptArtifact(
                f"{where}.mask: expected {-(-size // 8):,} bytes for {size:,} entries, got "
                f"{mask.dtype} {tuple(mask.shape)}. {_AGAIN}"
            )
        index = unpack_bits(mask).nonzero()[:, 0]
    else:
        index = parts["index"]
        if index.dtype not in (torch.int32, torch.int64) or index.ndim != 1:
            raise CorruptArtifact(
                f"{where}.index: expected a row of int32 or int64, got {index.dtype} "
                f"{tuple(index.shape)}. {_AGAIN}"
            )
        index = index.long()
        if bool((index[1:] <= index[:-1]).any()):
            raise CorruptArtifact(f"{where}.index: expected ascending positions. {_AGAIN}")
    if len(index) != len(values):
        raise CorruptArtifact(
            f"{where}: expected as many values as positions, got {len(values):,} values and "
            f"{len(index):,} positions. {_AGAIN}"
        )
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= size):
        raise CorruptArtifact(
            f"{where}: expected positions in 0..{size - 1:,}, got {int(index[0]):,} to "
            f"{int(index[-1]):,}. {_AGAIN}"
        )
    return Sparse(values, index, shape)


def sparse_bytes(entries: int, size: int, itemsize: int) -> int:
    """Bytes of `entries` values of `itemsize` bytes in a tensor of `size` entries."""
    return entries * itemsize + min(-(-size // 8), entries * _index_type(size).itemsize)


def pack_bits(bits: Bool[Tensor, " size"]) -> UInt8[Tensor, " byte"]:
    """Eight to a byte, the first in the lowest bit. `size` is a multiple of 8."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8).to(torch.uint8) << places).sum(dim=1, dtype=torch.uint8)


def unpack_bits(mask: UInt8[Tensor, " byte"]) -> Bool[Tensor, " size"]:
    """All 8 bits of each byte."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, None] >> places) & 1).bool().flatten()


def _index_type(size: int) -> torch.dtype:
    return torch.int32 if size <= 2**31 - 1 else torch.int64
