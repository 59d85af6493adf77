"""Singular values of what experts keep of large matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...artifact.codec import decode_quantised, dequantise
from ...artifact.format import SCALE, A, B, Q, Share, TensorRecord
from ...artifact.reader import Artifact, TensorMap

MATRICES = 4
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Spectrum:
    """One matrix: what each expert keeps of it."""

    name: str
    shape: tuple[int, int]
    values: dict[str, list[float]]
    """Singular values of B_t A_t, largest first, of the experts that hold factors of it."""


def spectra(artifact: Artifact, matrices: int = MATRICES) -> list[Spectrum]:
    """Of the largest matrices, one of each shape: of several alike, the one in the middle."""
    by_shape: dict[tuple[int, int], list[TensorRecord]] = {}
    for record in artifact.manifest.tensors:
        if record.matrix is not None and any(_factored(s) for s in record.experts.values()):
            by_shape.setdefault(record.matrix, []).append(record)
    largest = sorted(by_shape, key=lambda shape: -shape[0] * shape[1])[:matrices]
    chosen = [by_shape[shape][len(by_shape[shape]) // 2] for shape in largest]
    values: dict[str, dict[str, list[float]]] = {record.name: {} for record in chosen}
    for expert in artifact.manifest.names:
        with artifact.expert(expert) as file:
            for record in chosen:
                share = record.experts.get(expert)
                if share is not None and _factored(share):
                    a, b = _factors(file, record, share)
                    values[record.name][expert] = singular_values(a, b).tolist()
    return [Spectrum(r.name, r.matrix, values[r.name]) for r in chosen if r.matrix is not None]


def singular_values(
    a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]
) -> Float[Tensor, " rank"]:
    """Of b @ a, without forming it; in float64."""
    _, left = torch.linalg.qr(b.double())
    _, right = torch.linalg.qr(a.double().T)
    return torch.linalg.svdvals(left @ right.T)[: len(a)]


def _factored(share: Share) -> bool:
    return bool(share.rank) and share.storage in ("factors", *BITS)


def _factors(file: TensorMap, record: TensorRecord, share: Share) -> tuple[Tensor, Tensor]:
    name = record.name
    if share.storage == "factors":
        return file[name + A].float(), file[name + B].float()
    assert record.matrix is not None and share.rank is not None, "_factored asks for it"
    out, in_ = record.matrix
    rows = []
    for side, n in ((A, in_), (B, out)):
        parts = {"q": file[name + side + Q], "scale": file[name + side + SCALE]}
        quantised = decode_quantised(parts, share.rank, n, BITS[share.storage], name + side)
        rows.append(dequantise(quantised))
    return rows[0], rows[1].T
