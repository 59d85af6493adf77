#!/usr/bin/env python3
"""The runtime's speed: mixed batches, rivals, routing and generation beside one plain forward.

    python benchmarks/runtime.py EXPERTS DATA --base BASE [--part grid --part decode ...]

grid     batch x tokens x experts x rank: soft (every row all experts), top-1 (every row one expert,
         other rows others), uniform (one weighting for the batch), merged (the same one again and
         again, kept merged). By default lines through the headline cell and some corners; `--full`
         for the whole grid, `--cells "experts=2,8 tokens=32"` for some of it
rivals   the headline cell beside a dense rebuild for each row (the reference code's way), each row
         sent to its own plain expert, and peft's mixed batches (`adapter_names`)
routing  route, forward, and both at every layer that a router can read; in all with top_k=1
plans    each way to run a batch, asked for by name, over the number of tokens: the break-even
decode   generation with a key-value cache: a Llama of the shape of SmolLM2-135M, random weights
wide     the headline cell, and routing at layers 0 and 2, on a model of the shape of BERT-base with
         random weights; minutes on a CPU, so not by default

Calls are timed in turn (a b c a b c ...) after one of each, and compared with one plain forward of
the same base on the same batch in the same run. Weights are new in every call but where it says
otherwise, so that no cache of merged models answers. Beside a ratio stand the bound that arithmetic
sets and the largest difference from densely merged models.

EXPERTS are real full fine-tunes. More than there are of them are copies of their files, each with
factors, biases, norms and a head of its own. Adapters are random, and so are the bases of decode
and wide.

Each part has its section in `results/runtime.json`. A run goes on where one of the same commit and
settings left off; rows say how many rounds they had. `--work FOLDER` keeps what is built of these
EXPERTS (artifacts, the router), and `--prepare` builds it and measures nothing. Pictures stand
beside the JSON file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from itertools import cycle, groupby, pairwise, product
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import plots_runtime
import torch
import typer
from subjects import (
    BERT_BASE,
    SEED,
    SMOL,
    TINY,
    Adapters,
    Batch,
    DenseSums,
    OwnExperts,
    TokenClock,
    answer,
    difference,
    folders,
    merged,
    moved,
    random_base,
    random_batch,
    real_batch,
    replicated,
    row,
    with_router,
)
from timing import Limits, bounds, flops, in_turn, settle, summary
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList

from twinmerge.evaluation.provenance import provenance
from twinmerge.runtime.cost import plan_costs, routing_share
from twinmerge.runtime.export import DenseMerge
from twinmerge.runtime.load import load
from twinmerge.runtime.model import TwinModel
from twinmerge.runtime.router.mlp import RouterMLP
from twinmerge.runtime.router.router import Router

AXES = {"batch": (1, 8, 32, 64), "tokens": (32, 128, 512), "experts": (2, 8, 32, 64)}
AXES |= {"rank": (1, 16, 64)}
PLAN_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
ROUTER_TOKENS = 96


class Part(str, Enum):
    """In the order in which they run."""

    grid = "grid"
    rivals = "rivals"
    routing = "routing"
    plans = "plans"
    decode = "decode"
    wide = "wide"


@dataclass(frozen=True)
class Cell:
    batch: int = 32
    tokens: int = 128
    experts: int = 8
    rank: int = 16

    @classmethod
    def product(cls, text: str, headline: Cell) -> Iterator[Cell]:
        """Cells of "experts=2,8 tokens=32"; what is not named is as in the headline."""
        axes: dict[str, tuple[int, ...]] = {k: (v,) for k, v in asdict(headline).items()}
        for word in text.split():
            key, _, values = word.partition("=")
            if key not in axes or not all(v.isdigit() for v in values.split(",")):
                raise typer.BadParameter(
                    f"{word!r}: expected axis=number,number,... with an axis of {', '.join(axes)}."
                )
            axes[key] = tuple(int(v) for v in values.split(","))
        yield from (cls(*values) for values in product(*axes.values()))


def chosen_cells(words: list[str], headline: Cell, full: bool, quick: bool) -> list[Cell]:
    """In an order that opens each artifact once."""
    if words:
        cells = [cell for text in words for cell in Cell.product(text, headline)]
    elif full:
        cells = [Cell(*values) for values in product(*AXES.values())]
    elif quick:
        cells = [headline, replace(headline, experts=2)]
    else:
        cells = [
            replace(headline, **{axis: value}) for axis, values in AXES.items() for value in values
        ]
        cells += [Cell(*values) for values in product((1, 64), (32,), (2, 64), (1, 64))]
    return sorted(set(cells), key=lambda c: (c.experts, c.rank, c.batch, c.tokens))


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


class Results:
    """The JSON file, written after every row; rows of the same commit and settings are kept."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings, self.made = path, settings, provenance()
        if settings["device"].startswith("cuda"):
            self.made["hardware"]["gpu"] = torch.cuda.get_device_name(settings["device"])
        text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        self.data: dict[str, Any] = json.loads(text)

    def begin(self, part: str) -> None:
        """Keep the rows of this part if this very code made them with these settings."""
        commit, before = self.made["commit"], self.data.get(part, {})
        section = {"commit": commit, "settings": self.settings, "rows": []}
        # With changes that are not committed, the commit does not say which code ran.
        if commit is not None and not commit.endswith("+") and before.keys() == section.keys():
            same = (before["commit"], before["settings"]) == (commit, self.settings)
            section["rows"] = before["rows"] if same else []
        self.data[part] = section

    def missing(self, part: str, keys: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those keys that no row of the part has."""
        rows = self.data[part]["rows"]
        return [key for key in keys if not any(key.items() <= row.items() for row in rows)]

    def add(self, part: str, found: dict[str, Any]) -> None:
        self.data[part]["rows"].append(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {"provenance": self.made} | {k: v for k, v in self.data.items() if k != "provenance"}
        self.path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; call it with what was finished."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total)

        def advance(text: str) -> None:
            bar.console.print(text, highlight=False)
            bar.advance(task)

        yield advance


def shown(ratio: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}x" for name, value in list(ratio.items())[1:])


# ------------------------------------------------------------------------------------------- grid


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


def forward_cell(
    bench: Bench, twin: TwinModel, dense: DenseMerge, plain: Any, batch: Batch
) -> dict[str, Any]:
    """All modes on one batch: times, bounds, differences."""
    rows = len(batch["input_ids"])
    modes = bench.weightings(rows, len(twin.experts)).modes()
    calls: dict[str, Callable[[], Any]] = {"plain": lambda: plain(**batch)}
    calls |= {name: mode.calls(twin, batch) for name, mode in modes.items()}
    found = in_turn(calls, bench.limits, bench.device)
    differences, plans = {}, {}
    for name, mode in modes.items():
        weights = mode.weights[0]
        output = twin(**batch, weights=weights, plan=mode.plan)
        plans[name] = output.plan
        differences[name] = 0.0
        for index in sorted({0, rows - 1}):
            own = weights if weights.ndim == 1 else weights[index]
            alone = answer(dense.at(own)(**row(batch, index)))[0]
            each = difference(answer(output)[index], alone)
            differences[name] = max(differences[name], each)
    return found | {
        "plan": plans,
        "bound": bounds(plain, batch, twin.manifest),
        "largest_difference": differences,
    }


def grid(bench: Bench, results: Results, cells: list[Cell]) -> None:
    cells = [Cell(**key) for key in results.missing("grid", map(asdict, cells))]
    if not cells:
        return
    plain = bench.plain(bench.load(bench.artifact(cells[0].rank)))
    with progress("grid", len(cells)) as advance:
        for (experts, rank), group in groupby(cells, key=lambda cell: (cell.experts, cell.rank)):
            twin = bench.load(bench.artifact(rank, experts))
            dense = DenseMerge(twin)
            for cell in group:
                batch = bench.batch(twin, cell)
                found = forward_cell(bench, twin, dense, plain, batch)
                results.add("grid", asdict(cell) | found)
                advance(f"{cell}: {shown(found['ratio'])}")
            del twin, dense  # before the next is read


def wide(bench: Bench, results: Results) -> None:
    """The headline cell on a twelve-layer model of width 768."""
    cell = bench.headline
    if not results.missing("wide", [asdict(cell)]):
        return
    with progress("wide", 1) as advance:
        twin = bench.load(bench.adapters(BERT_BASE).artifact)
        plain, dense = bench.plain(twin), DenseMerge(twin)
        vocabulary = plain.config.vocab_size
        batch = moved(random_batch(vocabulary, cell.batch, cell.tokens), bench.device)
        found = forward_cell(bench, twin, dense, plain, batch)
        # What a router chooses does not matter here, that it chooses one expert for each row does.
        width = plain.config.hidden_size
        twin.router = Router(RouterMLP(width, width, cell.experts), (0,)).to(bench.device).eval()
        calls: dict[str, Callable[[], Any]] = {"plain": lambda: plain(**batch)}
        for layer in (0, 2):
            calls[f"route {layer}"] = at_layer(
                twin, layer, lambda: twin.route(allowed=None, **batch)
            )
            calls[f"routed {layer}, top_k=1"] = at_layer(
                twin, layer, lambda: twin(**batch, top_k=1)
            )
        in_all = in_turn(calls, bench.limits, bench.device)
        sizes = {"layers": twin.features.layers, "width": width}
        results.add("wide", asdict(cell) | sizes | found | {"routing": in_all})
        advance(f"{cell}: {shown(found['ratio'])}")


# ------------------------------------------------------------------------------------------ plans


def plans(bench: Bench, results: Results) -> None:
    """One row per number of tokens and kind of weights; each way that is exact for them."""
    cell = bench.headline
    tokens = (4, 8) if bench.quick else PLAN_TOKENS
    kinds = {"soft": ("stacked",), "top-1": ("stacked", "selected", "split")}
    kinds["uniform"] = ("stacked", "uniform", "merged")
    keys = [{"weights": kind, "tokens": each} for kind in kinds for each in tokens]
    todo = results.missing("plans", keys)
    if not todo:
        return
    twin = bench.load(bench.artifact(cell.rank, cell.experts))
    plain = bench.plain(twin)
    modes = bench.weightings(cell.batch, cell.experts).modes()
    with progress("plans", len(todo)) as advance:
        for key in todo:
            texts = random_batch(plain.config.vocab_size, cell.batch, key["tokens"])
            batch, weights = moved(texts, bench.device), modes[key["weights"]].weights
            calls: dict[str, Callable[[], Any]] = {"plain": lambda batch=batch: plain(**batch)}
            calls |= {way: Mode(weights, way).calls(twin, batch) for way in kinds[key["weights"]]}
            found = in_turn(
                calls, replace(bench.limits, seconds=bench.limits.seconds / 5), bench.device
            )
            row = {"chosen": twin(**batch, weights=weights[0]).plan}
            row |= {"predicted_break_even": plan_costs(twin).break_even}
            results.add("plans", key | {"batch": cell.batch, "experts": cell.experts} | row | found)
            advance(f"{key}: {shown(found['ratio'])}")


# ----------------------------------------------------------------------------------------- rivals


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


# ---------------------------------------------------------------------------------------- routing


def at_layer(twin: TwinModel, layer: int, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with a router that reads this layer."""

    def work() -> Any:
        assert twin.router is not None
        twin.router.layers = (layer,)
        return call()

    return work


def routing(bench: Bench, results: Results) -> None:
    """One row per layer; the router's net is the fitted one, which costs the same at every layer.

    The weights that it gives at other layers mean nothing, so the forward that "routed" is
    compared with has the same ones.
    """
    cell = bench.headline
    twin = bench.load(bench.routed())
    assert twin.router is not None
    layers, fitted = twin.features.layers, twin.router.last
    if not results.missing("routing", [{"layer": layer} for layer in range(layers + 1)]):
        return
    results.data["routing"]["rows"] = []  # all layers are timed in turn, or none
    plain, batch = bench.plain(twin), bench.batch(twin, cell)
    calls: dict[str, Callable[[], Any]] = {"plain": lambda: plain(**batch)}

    def given(weights: Tensor) -> Callable[[], Any]:
        return lambda: twin(**batch, weights=weights)

    share = {}
    total = flops(lambda: plain(**batch))
    for layer in range(layers + 1):
        route = at_layer(twin, layer, lambda: twin.route(allowed=None, **batch))
        share[layer] = flops(route) / total
        calls[f"route {layer}"] = route
        calls[f"forward {layer}"] = given(route())
        calls[f"routed {layer}"] = at_layer(twin, layer, lambda: twin(**batch))
        if layer == fitted:
            calls["routed, top_k=1"] = at_layer(twin, layer, lambda: twin(**batch, top_k=1))
    with progress("routing", 1) as advance:
        found = in_turn(calls, bench.limits, bench.device)
        advance(f"fitted at layer {fitted}: {shown(found['ratio'])}")
    for layer in range(layers + 1):
        ratio = {name: found["ratio"][f"{name} {layer}"] for name in ("route", "forward", "routed")}
        if layer == fitted:
            ratio["routed, top_k=1"] = found["ratio"]["routed, top_k=1"]
        results.add(
            "routing",
            {
                "layer": layer,
                "layers": layers,
                "fitted": layer == fitted,
                "share_of_layers": layer / layers,
                "share_of_flops": share[layer],
                "predicted": routing_share(plain, layer, cell.tokens),
                "repeats": found["repeats"],
                "plain_milliseconds": found["milliseconds"]["plain"],
                "ratio": {"plain": 1.0, **ratio},
                "added": ratio["routed"] - ratio["forward"],
            }
            | {k: v for k, v in asdict(cell).items() if k != "experts"}
            | {"experts": len(twin.experts)},
        )


# ----------------------------------------------------------------------------------------- decode


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


# ------------------------------------------------------------------------------------------- main


def main(
    experts: Annotated[Path, typer.Argument(help="One full checkpoint folder per task.")],
    data: Annotated[Path, typer.Argument(help="`<task>/{train,validation}.jsonl.gz`.")],
    base: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    out: Annotated[Path, typer.Option()] = Path("results/runtime.json"),
    part: Annotated[list[Part] | None, typer.Option(help="Default: all but wide.")] = None,
    cells: Annotated[
        list[str] | None, typer.Option(help='"experts=2,8 tokens=32": these instead.')
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All 144 cells of the grid.")] = False,
    headline: Annotated[str, typer.Option(help="The cell that lines run through.")] = "",
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seconds: Annotated[float, typer.Option(help="For each cell, beyond 3 rounds.")] = 8.0,
    router_rows: Annotated[int, typer.Option(help="Rows per task that fit the router.")] = 300,
    work: Annotated[Path | None, typer.Option(help="Keep what is built here.")] = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Build, do not measure.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few cells, tiny decoder, 1 round.")
    ] = False,
    plots: Annotated[bool, typer.Option(help="Draw PNG and SVG files beside the JSON.")] = True,
) -> None:
    """Time the runtime beside a plain forward."""
    (cell,) = Cell.product(headline, Cell())
    chosen = chosen_cells(cells or [], cell, full, quick)
    parts = part or [each for each in Part if each is not Part.wide]
    limits = Limits(least=1, most=2, seconds=0.0) if quick else Limits(3, 15, seconds)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            experts,
            data,
            base,
            work or Path(scratch),
            torch.device(device),
            getattr(torch, dtype),
            cell,
            limits,
            quick,
            router_rows,
        )
        build_all(bench, parts, chosen)
        if prepare:
            return
        settings = {
            "device": device,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "quick": quick,
            "seed": SEED,
            "headline": asdict(cell),
            "real_experts": [path.name for path in folders(experts)],
            "router_rows_per_task": router_rows,
        }
        results = Results(out, settings)
        run = {
            Part.grid: lambda: grid(bench, results, chosen),
            Part.plans: lambda: plans(bench, results),
            Part.rivals: lambda: rivals(bench, results),
            Part.routing: lambda: routing(bench, results),
            Part.decode: lambda: decode(bench, results),
            Part.wide: lambda: wide(bench, results),
        }
        for each in parts:
            results.begin(each.value)
            with torch.inference_mode():
                run[each]()
    if plots:
        plots_runtime.write(json.loads(out.read_text(encoding="utf-8")), out)


def build_all(bench: Bench, parts: list[Part], cells: list[Cell]) -> None:
    """Everything that the parts load, under `bench.work`."""
    if Part.grid in parts:
        for cell in cells:
            bench.artifact(cell.rank, cell.experts)
    if Part.plans in parts or Part.rivals in parts:
        bench.artifact(bench.headline.rank, bench.headline.experts)
    if Part.rivals in parts:
        bench.adapters()
    if Part.routing in parts:
        bench.routed()
    if Part.decode in parts:
        bench.adapters(SMOL)
    if Part.wide in parts:
        bench.adapters(BERT_BASE)


if __name__ == "__main__":
    typer.run(main)
