"""Calls timed in turn, and what arithmetic alone would make of the same work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.pytorch_utils import Conv1D

from twinmerge.artifact.format import Manifest
from twinmerge.runtime.load import body_places

Call = Callable[[], Any]


@dataclass(frozen=True)
class Limits:
    """How often a set of calls is repeated: `least` rounds, then more until `seconds` or `most`."""

    least: int
    most: int
    seconds: float


def settle(device: torch.device) -> None:
    """Wait until everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(calls: Mapping[str, Call], limits: Limits, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each call, timed one after the other (a b c a b c ...) after one of each.

    "ratio" is each median over that of the first call.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds = time.perf_counter(), 0
    while rounds < limits.least or (
        rounds < limits.most and time.perf_counter() - begin < limits.seconds
    ):
        for name, call in calls.items():
            settle(device)
            started = time.perf_counter()
            call()
            settle(device)
            seconds[name].append(time.perf_counter() - started)
        rounds += 1
    return summary(seconds)


def summary(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians and extremes in milliseconds, and ratios of medians to the first."""
    middle = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    first = next(iter(middle.values()))
    return {
        "repeats": min(len(values) for values in seconds.values()),
        "milliseconds": middle,
        "fastest": {name: 1000 * min(values) for name, values in seconds.items()},
        "slowest": {name: 1000 * max(values) for name, values in seconds.items()},
        "ratio": {name: value / first for name, value in middle.items()},
    }


# ------------------------------------------------------------------------------------- arithmetic


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts attention's kernels for GPUs only.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@torch.no_grad()
def flops(call: Call) -> int:
    """Floating-point operations of all matrix products, attention's too."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        call()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class _Site:
    """One layer whose weight differs between experts, and what one forward brings to it."""

    ranks: list[int]
    tokens: int
    in_: int
    out: int
    table: bool

    def factored(self, rank: float) -> float:
        return 2 * self.tokens * rank * (self.out if self.table else self.in_ + self.out)

    def merging(self) -> float:
        """Adding up the dense matrix; of a table only the rows that are looked up."""
        rows = min(self.tokens, self.in_) if self.table else self.in_
        return 2.0 * sum(self.ranks) * rows * self.out


@torch.no_grad()
def bounds(plain: nn.Module, batch: Mapping[str, torch.Tensor], manifest: Manifest) -> dict:
    """Ratios to a plain forward of this batch that the number of operations allows.

    soft:    all factors of all experts: 1 + Σ 2 · tokens · Σ_t r_t · (in + out) / plain (of one
             row: as uniform)
    top-1:   only a row's own expert's
    uniform: of each matrix the cheaper of all factors and of adding up the dense sum
    merged:  1: the sum is there

    Matrix products only: norms, biases, softmax and the moving of bytes are not counted.
    """
    rows = len(next(iter(batch.values())))
    places = body_places(plain, manifest)  # type: ignore[arg-type]
    ranks = {
        places[record.name].parameter.rpartition(".")[0]: [
            s.rank or 0 for s in record.experts.values()
        ]
        for record in manifest.tensors
        if record.matrix is not None and record.experts and record.name in places
    }
    sites: list[_Site] = []

    def seen(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            table = isinstance(module, nn.Embedding)
            out = output.shape[-1]
            tokens = output[0].numel() // out * rows
            in_ = module.num_embeddings if table else args[0].shape[-1]
            sites.append(_Site(ranks[path], tokens, int(in_), out, table))

        return hook

    kinds = (nn.Linear, nn.Embedding, Conv1D)
    handles = [
        module.register_forward_hook(seen(path))
        for path, module in plain.named_modules()
        if path in ranks and isinstance(module, kinds)
    ]
    try:
        total = flops(lambda: plain(**batch))
    finally:
        for handle in handles:
            handle.remove()
    soft = sum(site.factored(sum(site.ranks)) for site in sites)
    own = sum(site.factored(sum(site.ranks) / len(site.ranks)) for site in sites)
    new = sum(min(site.factored(sum(site.ranks)), site.merging()) for site in sites)
    return {
        "plain_flops": total,
        "soft": 1 + (soft if rows > 1 else new) / total,
        "top-1": 1 + own / total,
        "uniform": 1 + new / total,
        "merged": 1.0,
    }
