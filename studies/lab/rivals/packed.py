"""What a rival stores, as real files: tensors packed, counted, and read back before they are used.

All rivals but SMILE store a task vector: what one expert changed in the pretrained model, tensor
by tensor. Tensors that no expert changed are in none, and cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from jaxtyping import Bool, Float, UInt8
from safetensors.torch import load, save
from torch import Tensor

from twinmerge.artifact.codec import pack_bits, unpack_bits

Vector = dict[str, Tensor]
"""Tensor name -> expert minus pretrained model. All experts' have the same names in one order."""

Shapes = Mapping[str, torch.Size]

Packed = dict[str, Tensor]
"""The content of one file."""


@dataclass(frozen=True)
class Kept:
    """What a rival stores beside the pretrained model.

    experts: task -> its file
    shared:  one for all experts
    """

    experts: dict[str, Packed]
    shared: Packed = field(default_factory=dict)


def to_file(packed: Packed) -> bytes:
    """A safetensors file, as an expert's file of an artifact is; nothing for no tensors."""
    return save({name: x.contiguous() for name, x in packed.items()}) if packed else b""


def from_file(file: bytes) -> Packed:
    return load(file) if file else {}


def flat(vector: Mapping[str, Tensor]) -> Float[Tensor, " weight"]:
    return torch.cat([x.flatten() for x in vector.values()])


def shaped(values: Float[Tensor, " weight"], shapes: Shapes) -> Vector:
    """The inverse of `flat`."""
    parts = values.split([prod(shape) for shape in shapes.values()])
    return {name: x.view(shape) for (name, shape), x in zip(shapes.items(), parts, strict=True)}


def to_bits(values: Bool[Tensor, " size"]) -> UInt8[Tensor, " byte"]:
    """One bit a value, up to the next whole byte."""
    return pack_bits(torch.nn.functional.pad(values, (0, -len(values) % 8)))


def from_bits(packed: UInt8[Tensor, " byte"], size: int) -> Bool[Tensor, " size"]:
    return unpack_bits(packed)[:size]
