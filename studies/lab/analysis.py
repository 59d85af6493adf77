"""Where a router sends a task, what grouping rows costs, and what all of it costs.

The paper's Figure 5, its grouped variant (Table 12) and the formulas of its Appendix E beside what
was counted and measured (Tables 7 and 12).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from twinmerge.artifact.format import HEAD
from twinmerge.artifact.reader import Artifact
from twinmerge.data import Encoded, batches, drawn
from twinmerge.evaluation.grouped import Way, compare_grouped
from twinmerge.evaluation.score import Prepared
from twinmerge.merging.build import build
from twinmerge.recipe import Router
from twinmerge.runtime.attach import differs
from twinmerge.runtime.grouped import GROUPS, By, run_grouped
from twinmerge.runtime.model import TwinModel
from twinmerge.runtime.router.fit import fit_router

from .lab import STORED, Lab, bytes_of, opened
from .static import STATIC, Say
from .tasks import RANK, SEED, among
from .twin import MAIN
from .unseen import mean_weights

ANALYSED = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli")
"""The paper's order; the last is routed among the others, and then among all."""

WAYS: tuple[tuple[int, By], ...] = ((1, "logits"), (5, "logits"), (GROUPS, "logits"))

TIMED_ROWS = 100
"""Of each task."""

TURNS = 3
BATCH = 32

# ------------------------------------------------------------------------------------------ router


def routing(lab: Lab, say: Say) -> None:
    """One task's rows, routed among two experts and on to all."""
    order = analysed(lab.names)
    task = order[-1]
    for count in range(2, len(order) + 1):
        with among(lab, order[:count]) as some:

            def routed(some: Lab = some) -> dict[str, Any]:
                artifact = some.built(some.recipe(STATIC[MAIN][0], stored=STORED, rank=RANK))
                model = some.route(artifact, SEED)
                route = lab.routed(model, task, "test")
                likely = route.probabilities.mean(dim=0).tolist()
                return {
                    "weights": mean_weights(model.experts, route),
                    "probabilities": dict(zip(model.experts, likely, strict=True)),
                    "new": float(route.new.double().mean()),
                }

            settings = {"names": some.names, "exclusive": {"rank": RANK}, "seed": SEED}
            record = lab.records.once("routing", task, settings, routed)
            weights = record["weights"]
            top = max(weights, key=lambda name: weights[name])
            say(f"{task} among {count}: {weights[top]:.2f} to {top}, {record['new']:.2f} new")


def analysed(names: Sequence[str]) -> list[str]:
    """Experts in the order in which they join; the last one's task is looked at."""
    known = [name for name in ANALYSED if name in names]
    return known if len(known) > 1 and known[-1] == ANALYSED[-1] else list(names)


# ------------------------------------------------------------------------------------------ groups


def grouped(lab: Lab, say: Say) -> None:
    """One record for the exact mixed batch (no groups), and one for each way to group it."""
    found: list[Way] = []

    def compared() -> list[Way]:
        if not found:
            model = lab.route(
                lab.built(lab.recipe(STATIC[MAIN][0], stored=STORED, rank=RANK)), SEED
            )
            found.extend(
                compare_grouped(model, lab.prepared("test"), WAYS, reference=lab.own["test"])
            )
        return found

    for place, (groups, by) in enumerate([(None, None), *WAYS]):

        def way(place: int = place) -> dict[str, Any]:
            return compared()[place].to_dict()

        settings = {"groups": groups, "by": by, "exclusive": {"rank": RANK}, "seed": SEED}
        record = lab.records.once("grouped", MAIN, settings, way)
        scores = {name: report["normalised"] for name, report in record["protocols"].items()}
        shown = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
        say(f"{groups or 'no'} groups: {shown}, {record['seconds']['total']:.0f} s")


# -------------------------------------------------------------------------------------------- cost

SAID = {
    "storage": "Appendix E in float16, bytes: of separate experts 2 (T P_a + P_f), of a static "
    "merge 2 P, of Twin-Merging 2 T k P_a + 2 P + P_r, as printed. P_a are the parameters in which "
    "the experts differ, k the share of them that an expert keeps.",
    "operations": "Appendix E, one row of s tokens (b = 1): a forward, and as much again for "
    "routing, m (24 s h² + 4 b s² h); merging T m (12 h² + 9 h). All are called multiply-adds "
    "there; the factor of 24 counts each as two, that of 12 as one.",
    "counted": "Operations of all matrix products of one batch of as many tokens, two for each "
    "multiply-add, counted by torch while it ran, for one row: a plain model, and routed answers. "
    "Our routing ends at the layer that the router reads, and factors run beside the weights.",
    "bytes": f"On disk: the shared expert in {STORED}; experts with their heads; router.",
    "parameters": "P, P_a and P_f as above; stored by all experts, of which heads; the router's.",
    "seconds_per_1000_rows": "Median of turns over the same rows of all tasks, mixed: a plain "
    "model, routed answers, the paper's grouped variant with its merges. Few rows make groups "
    "small and merges dear; the part `grouped` has the time for all test rows.",
    "seconds": "To build the artifact and to fit its router, once each.",
}
"""What each entry of the record is."""


def cost(lab: Lab, say: Say) -> None:
    """One record: Appendix E's formulas for this backbone, beside what is counted and measured."""
    method = STATIC[MAIN][0]
    settings = {
        "method": method,
        "exclusive": {"rank": RANK},
        "seed": SEED,
        "groups": GROUPS,
        "rows": TIMED_ROWS,
        "turns": TURNS,
    }

    def measured() -> dict[str, Any]:
        lab.work.mkdir(parents=True, exist_ok=True)
        texts = {name: lab.texts(name, "train") for name in lab.names}
        router = Router(rows_per_task=lab.settings.router_rows, seed=SEED)
        with TemporaryDirectory(dir=lab.work) as work:
            folder, started = Path(work) / "artifact", time.perf_counter()
            build(lab.recipe(method, stored=STORED, rank=RANK), folder)
            built = time.perf_counter()
            limit = lab.settings.max_tokens
            fit_router(folder, texts, router, max_tokens=limit, dtype="float32")
            seconds = {"build": built - started, "router": time.perf_counter() - built}
            artifact = Artifact(folder, check=False)
            model, rows = opened(artifact), mixed(lab.prepared("test"))
            batch = middle(model, rows)
            return {
                "storage": storage(artifact),
                "operations": operations(model, batch["input_ids"].shape[1]),
                "counted": counted(model, batch),
                "bytes": bytes_of(artifact),
                "parameters": parameters(artifact),
                "seconds_per_1000_rows": in_turn(model, rows),
                "seconds": seconds,
                "said": SAID,
            }

    record = lab.records.once("cost", MAIN, settings, measured)
    took = record["seconds_per_1000_rows"]
    say("cost, seconds per 1,000 rows: " + ", ".join(f"{n} {s:.1f}" for n, s in took.items()))


def parameters(artifact: Artifact) -> dict[str, int]:
    """How many numbers there are: in the backbone, in what experts store, in the router."""
    manifest = artifact.manifest
    own = [tensor for tensor in manifest.tensors if tensor.bytes and tensor.tied_to is None]
    total = sum(prod(tensor.shape) for tensor in own)
    active = sum(prod(tensor.shape) for tensor in own if differs(tensor))
    stored = in_heads = 0
    for name in manifest.names:
        with artifact.expert(name) as tensors:
            sizes = {each: tensors[each].numel() for each in tensors.names()}
        stored += sum(sizes.values())
        in_heads += sum(size for each, size in sizes.items() if each.endswith(HEAD))
    return {
        "total": total,
        "active": active,
        "frozen": total - active,
        "experts": stored,
        "heads": in_heads,
        "router": sum(tensor.numel() for tensor in artifact.router().values()),
    }


def storage(artifact: Artifact) -> dict[str, float]:
    """Appendix E, in bytes."""
    count, experts = parameters(artifact), len(artifact.manifest.names)
    active, total = count["active"], count["total"]
    kept = (count["experts"] - count["heads"]) / (experts * active)
    return {
        "experts": experts,
        "kept": kept,
        "separate": 2 * (experts * active + count["frozen"]),
        "static": 2 * total,
        "twin": 2 * experts * kept * active + 2 * total + count["router"],
    }


def operations(model: TwinModel, tokens: int) -> dict[str, Any]:
    """Appendix E for one row of `tokens` tokens."""
    config: Any = model.config
    m, h, s, b = config.num_hidden_layers, config.hidden_size, tokens, 1
    forward = m * (24 * s * h**2 + 4 * b * s**2 * h)
    merging = len(model.experts) * m * (12 * h**2 + 9 * h)
    sizes = {"layers": m, "width": h, "tokens": s, "experts": len(model.experts)}
    parts = {"forward": forward, "routing": forward, "merging": merging}
    return sizes | parts | {"twin": sum(parts.values())}


@torch.no_grad()
def counted(model: TwinModel, batch: Mapping[str, Any]) -> dict[str, float]:
    """Operations for one row of a batch, two for each multiply-add."""
    found = {}
    for name, run in _plain_and_routed(model).items():
        # Fused attention of a CPU is one operation that the counter does not know.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run(**batch)
        found[name] = counter.get_total_flops() / len(batch["input_ids"])
    return found


def mixed(tasks: Mapping[str, Prepared]) -> Encoded:
    """Some rows of every task, shuffled."""
    rows = [row for task in tasks.values() for row in drawn(task.encoded.rows, TIMED_ROWS)]
    return Encoded(random.Random(0).sample(rows, len(rows)), [False] * len(rows))


def middle(model: TwinModel, rows: Encoded) -> dict[str, Any]:
    """The batch of median length."""
    found = [batch for _, batch in batches(model.tokenizer, rows, BATCH)]
    return found[len(found) // 2]


@torch.inference_mode()
def in_turn(model: TwinModel, rows: Encoded) -> dict[str, float]:
    """Seconds per 1,000 rows of each way to answer.

    The ways take turns, so that their ratio holds when the machine's speed drifts.
    """
    padded = [batch for _, batch in batches(model.tokenizer, rows, BATCH)]
    runs: dict[str, Callable[[], Any]] = {
        name: lambda run=run: [run(**batch) for batch in padded]
        for name, run in _plain_and_routed(model).items()
    }
    runs["grouped"] = lambda: run_grouped(model, rows, by="logits", batch_size=BATCH)
    for run in runs.values():
        run()  # warm up
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - started)
    return {name: 1000 * median(seconds) / len(rows) for name, seconds in took.items()}


def _plain_and_routed(model: TwinModel) -> dict[str, Callable[..., Any]]:
    plain = model.merged([0.0] * len(model.experts), head=model.experts[0])
    return {"plain": plain, "routed": model}
