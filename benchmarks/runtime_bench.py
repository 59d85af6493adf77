"""What all parts of the runtime benchmark share: artifacts, models, batches and limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runtime_cells import Cell
from runtime_weightings import Weightings
from subjects import (
    TINY,
    Adapters,
    Batch,
    folders,
    merged,
    moved,
    random_base,
    real_batch,
    replicated,
    with_router,
)
from timing import Limits

from twinmerge.runtime.export import DenseMerge
from twinmerge.runtime.load import load
from twinmerge.runtime.model import TwinModel

ROUTER_TOKENS = 96


@dataclass(frozen=True)
class Bench:
    """What all parts need to know."""

    experts: Path
    data: Path
    base: str
    work: Path
    device: torch.device
    dtype: torch.dtype
    headline: Cell
    limits: Limits
    quick: bool
    router_rows: int

    def artifact(self, rank: int, experts: int | None = None) -> Path:
        """The real experts at a rank, as many as there are or `experts` of them."""
        sources = {path.name: str(path) for path in folders(self.experts)}
        whole = merged(self.base, sources, self.work / f"rank-{rank}", rank)
        if experts is None or experts == len(sources):
            return whole
        return replicated(whole, experts, self.work / f"rank-{rank}-experts-{experts}")

    def routed(self) -> Path:
        rank, longest = self.headline.rank, min(ROUTER_TOKENS, self.headline.tokens)
        out = self.work / f"rank-{rank}-routed-{self.router_rows}-rows-{longest}-tokens"
        return with_router(self.artifact(rank), out, self.data, self.router_rows, longest)

    def adapters(self, shape: dict[str, Any] | None = None) -> Adapters:
        """Random adapters of the base, or of a random model of this shape."""
        name = "base" if shape is None else shape["model_type"]
        cell = self.headline
        kind = f"lora-{name}-rank-{cell.rank}-experts-{cell.experts}" + "-quick" * self.quick
        work = self.work / kind
        if self.quick and shape is not None:
            shape = shape | TINY | ({"num_key_value_heads": 1} if "llama" in name else {})
        base = self.base if shape is None else str(random_base(shape, work / "base"))
        return Adapters(base, cell.experts, cell.rank, work)

    def load(self, artifact: Path) -> TwinModel:
        return load(artifact, dtype=self.dtype, device=self.device, check=False)

    def plain(self, twin: TwinModel) -> Any:
        """The shared expert as a plain model, with one expert's head: what all is compared with."""
        zeros = torch.zeros(len(twin.experts), device=twin.device)
        return DenseMerge(twin).at(zeros, head=twin.experts[0])

    def weightings(self, rows: int, experts: int) -> Weightings:
        """Enough of them for all calls that are timed, and those before and after."""
        return Weightings(rows, experts, self.limits.most + 3, self.device)

    def batch(self, twin: TwinModel, cell: Cell) -> Batch:
        names = [path.name for path in folders(self.experts)]
        batch = real_batch(twin.tokenizer, self.data, names, cell.batch, cell.tokens)
        return moved(batch, self.device)
