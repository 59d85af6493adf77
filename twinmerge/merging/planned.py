"""One tensor and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from ..artifact.format import HEAD, Kind


@dataclass(frozen=True)
class Planned:
    """One tensor and its fate."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    """In which it is stored: the recipe's out_dtype, or the base's own."""
    matrix: tuple[int, int] | None = None
    tied_to: str | None = None
    running: bool = False
    """A batch norm's running mean or variance: the shared expert's is the experts' average,
    whatever the method. Or its count of batches: the base's. See `Checkpoint.running`."""

    @property
    def key(self) -> str:
        """Names it alone: a base and its experts may have different heads of one name."""
        return self.name + HEAD if self.kind == "head" else self.name

    @property
    def bytes(self) -> int:
        """Bytes in the shared expert."""
        if self.kind in ("head", "tied"):
            return 0
        return prod(self.shape) * self.dtype.itemsize
