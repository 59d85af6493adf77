"""The headline cell beside dense rebuilds, plain experts of each row, and peft's mixed batches."""

from __future__ import annotations

from dataclasses import asdict
from itertools import cycle
from typing import Any

import torch
from runtime_bench import Bench
from runtime_results import Results, progress, shown
from subjects import DenseSums, OwnExperts, answer, difference, folders, moved, real_batch
from timing import bounds, in_turn


def rivals(bench: Bench, results: Results) -> None:
    cell = bench.headline
    kinds = {"full fine-tunes": beside_dense, "LoRA adapters": beside_peft}
    todo = results.missing("rivals", [{"experts_are": kind} for kind in kinds])
    with progress("rivals", len(todo)) as advance:
        for key in todo:
            found = kinds[key["experts_are"]](bench)
            results.add("rivals", key | asdict(cell) | found)
            advance(f"{key['experts_are']}: {shown(found['ratio'])}")


def beside_dense(bench: Bench) -> dict[str, Any]:
    """A dense model for each row, and the rows sent to their own models."""
    cell = bench.headline
    twin = bench.load(bench.artifact(cell.rank, cell.experts))
    plain, sums, own = bench.plain(twin), DenseSums(twin), OwnExperts(twin)
    batch = bench.batch(twin, cell)
    given = bench.weightings(cell.batch, cell.experts)
    modes = given.modes()
    chosen = given.top_1.argmax(dim=-1).tolist()
    turns, soft = cycle(chosen), cycle(given.soft)
    found = in_turn(
        {
            "plain": lambda: plain(**batch),
            "twin, soft": modes["soft"].calls(twin, batch),
            "twin, top-1": modes["top-1"].calls(twin, batch),
            "own plain experts, top-1": lambda: own.rows(batch, next(turns)),
            "dense rebuild row by row, soft": lambda: sums.rows(batch, next(soft)),
        },
        bench.limits,
        bench.device,
    )
    mixed = answer(twin(**batch, weights=given.soft[0]))
    one = answer(twin(**batch, weights=given.top_1[0]))
    alone = sums.rows(batch, given.soft[0])
    theirs = own.rows(batch, chosen[0])
    return found | {
        "bound": bounds(plain, batch, twin.manifest),
        "model_bytes": _bytes(plain),
        "held_bytes": {"twin": _bytes(twin), "own plain experts": sum(map(_bytes, own.models))},
        "largest_difference": {
            "dense rebuild row by row, soft": max(map(difference, mixed, alone)),
            "own plain experts, top-1": max(difference(one[i], theirs[i]) for i in theirs),
        },
    }


def beside_peft(bench: Bench) -> dict[str, Any]:
    """peft's own mixed batches, with the adapters that our artifact is made of."""
    cell = bench.headline
    adapters = bench.adapters()
    twin = bench.load(adapters.artifact)
    peft = adapters.model.to(bench.device, bench.dtype)
    plain = bench.plain(twin)
    tokenizer = bench.load(bench.artifact(cell.rank)).tokenizer
    names = [path.name for path in folders(bench.experts)]
    texts = real_batch(tokenizer, bench.data, names, cell.batch, cell.tokens)
    batch = moved(texts, bench.device)
    given = bench.weightings(cell.batch, cell.experts)
    chosen = [
        [adapters.names[index] for index in each] for each in given.top_1.argmax(dim=-1).tolist()
    ]
    modes, turns = given.modes(), cycle(chosen)
    found = in_turn(
        {
            "plain": lambda: plain(**batch),
            "twin, soft": modes["soft"].calls(twin, batch),
            "twin, top-1": modes["top-1"].calls(twin, batch),
            "peft adapter_names, top-1": lambda: peft(**batch, adapter_names=next(turns)),
        },
        bench.limits,
        bench.device,
    )
    ours = answer(twin(**batch, weights=given.top_1[0]))
    theirs = answer(peft(**batch, adapter_names=chosen[0]))
    return found | {
        "bound": bounds(plain, batch, twin.manifest),
        "largest_difference": {"peft adapter_names, top-1": difference(ours, theirs)},
        "largest_answer": float(theirs.abs().max()),
    }


def _bytes(model: torch.nn.Module) -> int:
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in model.parameters()}
    tensors |= {t.data_ptr(): t.numel() * t.element_size() for t in model.buffers()}
    return sum(tensors.values())
