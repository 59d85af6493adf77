"""Weights for the calls of the runtime benchmark, new in every one, and how they are to be run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from subjects import SEED, Batch
from torch import Tensor

from twinmerge.runtime.model import TwinModel


@dataclass(frozen=True)
class Mode:
    """Weights for one call after the other, and how they are to be run."""

    weights: list[Tensor]
    """(batch, expert), or (expert,): one weighting for the whole batch."""
    plan: str = "auto"

    def calls(self, twin: TwinModel, batch: Batch) -> Callable[[], Any]:
        turns = cycle(self.weights)
        return lambda: twin(**batch, weights=next(turns), plan=self.plan)


class Weightings:
    """Random weights for so many calls, of which no two have the same."""

    def __init__(self, rows: int, experts: int, calls: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(SEED)
        self.soft = torch.randn(calls, rows, experts, generator=draw).softmax(dim=-1).to(device)
        place = torch.arange(rows) + torch.arange(calls)[:, None]
        own = torch.nn.functional.one_hot(place % experts, experts)
        self.top_1 = own.to(device, torch.float32)
        self.uniform = torch.randn(calls, experts, generator=draw).softmax(dim=-1).to(device)

    def modes(self) -> dict[str, Mode]:
        return {
            "soft": Mode(list(self.soft)),
            "top-1": Mode(list(self.top_1)),
            "uniform": Mode(list(self.uniform[1:])),
            "merged": Mode([self.uniform[0]], plan="merged"),
        }
