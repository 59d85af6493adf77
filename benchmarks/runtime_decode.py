"""Generation with a key-value cache, by a Llama of the shape of SmolLM2-135M."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

from runtime_bench import Bench
from runtime_results import Results, progress
from subjects import SMOL, Batch, TokenClock, answer, difference, moved, random_batch, row
from timing import bounds, settle, summary
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList

from twinmerge.runtime.export import DenseMerge
from twinmerge.runtime.model import TwinModel


def decode(bench: Bench, results: Results) -> None:
    """Tokens per second after the first (median step), and milliseconds until the first."""
    batches = (1, 2) if bench.quick else (1, 8, 32)
    prompt, new = (8, 4) if bench.quick else (64, 32)
    keys = [{"batch": rows, "prompt": prompt, "new": new} for rows in batches]
    todo = results.missing("decode", keys)
    if not todo:
        return
    twin = bench.load(bench.adapters(SMOL).artifact)
    dense, plain = DenseMerge(twin), bench.plain(twin)
    with progress("decode", len(todo)) as advance:
        for key in todo:
            text = random_batch(plain.config.vocab_size, key["batch"], prompt)
            found = decode_batch(bench, twin, dense, plain, moved(text, bench.device), new)
            results.add("decode", key | {"experts": len(twin.experts)} | found)
            speed = {k: f"{v:.1f}" for k, v in found["tokens_per_second"].items()}
            advance(f"batch {key['batch']}: {speed} tokens/s")


@dataclass(frozen=True)
class Generated:
    """One generation: seconds until the first token, from each to the next, and all tokens."""

    first: float
    steps: list[float]
    tokens: Tensor


def decode_batch(
    bench: Bench, twin: TwinModel, dense: DenseMerge, plain: Any, batch: Batch, new: int
) -> dict[str, Any]:
    rows = len(batch["input_ids"])
    given = bench.weightings(rows, len(twin.experts))
    # One weighting: a new one for each generation, so that the first token waits for the merge.
    modes = {"soft": given.soft, "top-1": given.top_1, "merged": given.uniform}

    def generate(mode: str, number: int, new: int) -> Generated:
        model: Any = plain if mode == "plain" else twin
        options = {} if mode == "plain" else {"weights": modes[mode][number]}
        clock = TokenClock()
        settle(bench.device)
        started = perf_counter()
        tokens = model.generate(
            **batch,
            **options,
            do_sample=False,
            max_new_tokens=new,
            logits_processor=LogitsProcessorList([clock]),
        )
        steps = [b - a for a, b in pairwise(clock.times)]
        return Generated(clock.times[0] - started, steps, tokens)

    names = ("plain", *modes)
    for mode in names:
        generate(mode, 0, 2)
    runs: dict[str, list[Generated]] = {mode: [] for mode in names}
    limits, begin, number = bench.limits, perf_counter(), 0
    # A generation has many steps, so two of them are enough.
    while number < min(2, limits.least) or (
        number < limits.most and perf_counter() - begin < limits.seconds
    ):
        number += 1
        for mode in names:
            runs[mode].append(generate(mode, number, new))
    steps = summary({mode: [s for run in runs[mode] for s in run.steps] for mode in names})
    agreement = {}
    for mode, weights in modes.items():
        tokens = runs[mode][0].tokens[-1]
        agreement[mode] = beside_merged(twin, dense, weights[1], batch, tokens, new)
    return {
        "repeats": number,
        "first_token": summary({mode: [run.first for run in runs[mode]] for mode in names}),
        "step": steps,
        "tokens_per_second": {
            mode: 1000 * rows / value for mode, value in steps["milliseconds"].items()
        },
        "bound": bounds(plain, {k: v[:, :1] for k, v in batch.items()}, twin.manifest),
        "agreement": agreement,
    }


def beside_merged(
    twin: TwinModel, dense: DenseMerge, weights: Tensor, batch: Batch, tokens: Tensor, new: int
) -> dict[str, Any]:
    """The last row beside its densely merged model alone: logits of the prompt, new tokens."""
    alone = row(batch, -1)
    model: Any = dense.at(weights if weights.ndim == 1 else weights[-1])
    logits = answer(twin(**batch, weights=weights))[-1]
    wanted = model.generate(**alone, do_sample=False, max_new_tokens=new)[0]
    return {
        "largest_difference": difference(logits, answer(model(**alone))[0]),
        "same_tokens": int((tokens == wanted)[-new:].sum()),
        "tokens": new,
    }
