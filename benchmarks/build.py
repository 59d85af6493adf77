#!/usr/bin/env python3
"""Building an artifact: time beside pure reading and writing, memory beside its bound, mergekit.

    python benchmarks/build.py EXPERTS --base BASE [--part linear --part budget ...]

linear   a linear merge without factors of Llama-shaped families of growing size, in turn with
         the bound (read every source file, write as many bytes as the merge does) and with mergekit
methods  task arithmetic and TIES of one of these families, in turn with mergekit
experts  the real EXPERTS at rank 16, and without factors, in turn with the same kind of bound
budget   the real EXPERTS under budgets, beside one rank for all matrices at the same bytes

Everything runs in fresh processes, imports not counted, and nothing is fsynced. Sources are in the
kernel's cache, but for one run of each with files that were dropped from it (`cold`). A part
replaces its own section of `results/build.json` and leaves the others.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from family import Family, make_family, weight_files
from measure import Measured, forget, measured, read_and_write
from safetensors import safe_open

from twinmerge.evaluation.provenance import provenance

SHARD_BYTES = 1_000_000_000
"""Of the outputs of both tools. mergekit holds a shard in memory until it is written."""

METHODS = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 0.5, "density": 0.5},
}
POINTS = ["0.5", "1", "2", "4", "2:2048", "1:1024:bfloat16"]
BUDGETS = ["1%", "3%", "6%", "12%"]
STORAGES = ["float16", "int8", "int4"]


class Part(str, Enum):
    linear = "linear"
    methods = "methods"
    experts = "experts"
    budget = "budget"


# --------------------------------------------------------------------------- what is measured


def ours(recipe: str, out: str) -> Callable[[], Any]:
    """A build; returns the record of its budget, if it has one."""
    from twinmerge.merging.build import build
    from twinmerge.recipe import Recipe

    made = Recipe.from_yaml(recipe)

    def work() -> Any:
        budget = build(made, out, shard_bytes=SHARD_BYTES).budget
        return None if budget is None else budget.model_dump()

    return work


def mergekits(config: str, out: str) -> Callable[[], None]:
    """The same merge by mergekit, with the options that its documentation has for large models."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    made = MergeConfiguration.model_validate(yaml.safe_load(config))
    options = MergeOptions(
        copy_tokenizer=False,
        lazy_unpickle=True,
        async_write=True,
        out_shard_size=SHARD_BYTES,
        quiet=True,
    )
    return lambda: run_merge(made, out, options)


def in_turn(
    calls: dict[str, Callable[[Path], Measured]],
    sources: list[Path],
    scratch: Path,
    repeats: int,
    cold: bool = False,
) -> dict[str, list[Measured]]:
    """Each call `repeats` times, one after the other, then with `cold` sources once more.

    Each gets a folder in `scratch` to make and to write to, gone before the next runs. Cold runs
    stand under the call's name and " cold".
    """
    found: dict[str, list[Measured]] = {}
    for number in range(repeats + cold):
        for name, call in calls.items():
            key = name
            if number == repeats:
                forget(sources)
                key += " cold"
            run = call(scratch / "out")
            shutil.rmtree(scratch / "out")
            found.setdefault(key, []).append(run)
            typer.echo(f"    {key}: {run.seconds:.2f} s")
    return found


def bound(sources: list[Path], amount: int) -> Callable[[Path], Measured]:
    def call(out: Path) -> Measured:
        out.mkdir()
        return Measured(read_and_write(sources, amount, out / "bytes"), 0, 0)

    return call


def median(runs: list[Measured]) -> float:
    return statistics.median(run.seconds for run in runs)


def times(found: dict[str, list[Measured]]) -> dict[str, Any]:
    """Seconds by call: median and all runs; what the builds are to the bound and to mergekit."""
    out: dict[str, Any] = {}
    for name, runs in found.items():
        out[name] = {"seconds": median(runs), "all_seconds": [run.seconds for run in runs]}
        if runs[0].resident:
            out[name]["peak_memory_bytes"] = max(run.anonymous for run in runs)
            out[name]["peak_resident_bytes"] = max(run.resident for run in runs)
    return out


# ------------------------------------------------------------------------- families of any size


def configuration(family: Family, method: str, dtype: torch.dtype) -> dict[str, Any]:
    """What mergekit takes and we do too."""
    return {
        "merge_method": method,
        "base_model": str(family.base),
        "models": [{"model": str(folder)} for folder in family.experts],
        "parameters": METHODS[method],
        "dtype": str(dtype).removeprefix("torch."),
    }


def merge_family(
    family: Family, method: str, dtype: torch.dtype, *, repeats: int, cold: bool, mergekit: bool
) -> dict[str, Any]:
    """One merge by all that do it, in turn."""
    config = configuration(family, method, dtype)
    # Given a base, mergekit's linear counts it as one more model of the average.
    text = yaml.safe_dump(
        {k: v for k, v in config.items() if (k, method) != ("base_model", "linear")}
    )
    recipe = yaml.safe_dump({**config, "exclusive": {"rank": "none"}})
    sources = family.sources()
    calls: dict[str, Callable[[Path], Measured]] = {
        "read and write": bound(sources, family.model_bytes),
        "twinmerge": lambda out: measured(ours, recipe, str(out)),
    }
    if mergekit:
        calls["mergekit"] = lambda out: measured(mergekits, text, str(out))
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=family.base.parent) as scratch:
        # All once without a clock: they read the sources into memory, and what they write is
        # compared.
        outputs = {name: Path(scratch) / name for name in calls}
        for name, call in calls.items():
            call(outputs[name])
        if mergekit:
            difference = largest_difference(outputs["twinmerge"], outputs["mergekit"])
            row["largest_difference"] = difference
        for path in outputs.values():
            shutil.rmtree(path)
        runs = in_turn(calls, sources, Path(scratch), repeats, cold)
    row |= {
        "method": method,
        "dtype": config["dtype"],
        "experts": len(family.experts),
        "model_bytes": family.model_bytes,
        "bytes_read": sum(path.stat().st_size for path in sources),
        "largest_tensor_bytes": family.largest_bytes,
        "memory_bound_bytes": (len(family.experts) + 2) * family.largest_bytes,
        "runs": times(runs),
        "ratio_to_read_and_write": median(runs["twinmerge"]) / median(runs["read and write"]),
    }
    if mergekit:
        row["ratio_to_mergekit"] = median(runs["twinmerge"]) / median(runs["mergekit"])
    peak = row["runs"]["twinmerge"]["peak_memory_bytes"]
    row["beyond_memory_bound_bytes"] = peak - row["memory_bound_bytes"]
    typer.echo(
        f"  {method}, {family.model_bytes / 1e9:.2f} GB {row['dtype']}: "
        f"{row['ratio_to_read_and_write']:.2f}× read and write, "
        f"{row.get('ratio_to_mergekit', float('nan')):.2f}× mergekit; peak {peak / 1e6:.0f} MB, "
        f"(T + 2) × largest {row['memory_bound_bytes'] / 1e6:.0f} MB"
    )
    return row


def largest_difference(one: Path, other: Path) -> float:
    """The largest |x - y| over all tensors of two models. Raises `ValueError` if names differ."""
    ours, theirs = tensors_of(one), tensors_of(other)
    if ours.keys() != theirs.keys():
        raise ValueError(f"tensors differ: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    largest = 0.0
    for name, path in ours.items():
        with safe_open(path, "pt") as x, safe_open(theirs[name], "pt") as y:
            difference = x.get_tensor(name).float() - y.get_tensor(name).float()
            largest = max(largest, float(difference.abs().max()))
    return largest


def tensors_of(folder: Path) -> dict[str, Path]:
    """Tensor -> its file."""
    found = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def parsed(point: str) -> tuple[int, int, torch.dtype]:
    """Bytes, width and dtype of "2:2048:bfloat16"; 1024 and float32 where they are left out."""
    size, width, dtype = [*point.split(":"), "", ""][:3]
    return int(float(size) * 1e9), int(width or 1024), getattr(torch, dtype or "float32")


def over_families(
    points: list[str], methods: list[str], work: Path | None, **settings: Any
) -> list[dict[str, Any]]:
    rows = []
    for point in points:
        size, width, dtype = parsed(point)
        with tempfile.TemporaryDirectory(dir=work, prefix="family-") as root:
            typer.echo(f"  making {point} GB, four times")
            family = make_family(Path(root), size, width=width, dtype=dtype)
            for path in family.sources():
                forget([path])  # waits until it is on the disk: that must not go on meanwhile
            rows += [merge_family(family, method, dtype, **settings) for method in methods]
    return rows


# --------------------------------------------------------------------------------- real experts


def recipe_of(base: str, experts: Path, exclusive: dict[str, Any]) -> str:
    folders = sorted(p for p in experts.iterdir() if p.is_dir())
    models = [{"model": str(folder.resolve()), "name": folder.name} for folder in folders]
    return yaml.safe_dump({"base_model": base, "models": models, "exclusive": exclusive})


def real_experts(experts: Path, base: str, rank: int, repeats: int) -> dict[str, Any]:
    """Rank `rank` factors of real experts beside the bound, and beside the same without factors."""
    folders = sorted(p for p in experts.iterdir() if p.is_dir())
    sources = [f for folder in (Path(base), *folders) for f in weight_files(folder)]
    recipe = recipe_of(base, experts, {"rank": rank})
    static = recipe_of(base, experts, {"rank": "none"})
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "artifact"
        measured(ours, recipe, str(out))
        written = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        largest = max(_float32_bytes(path) for path in weight_files(Path(base)))
        shutil.rmtree(out)
        runs = in_turn(
            {
                "read and write": bound(sources, written),
                "twinmerge": lambda out: measured(ours, recipe, str(out)),
                "without factors": lambda out: measured(ours, static, str(out)),
            },
            sources,
            Path(scratch),
            repeats,
        )
    row = {
        "experts": len(folders),
        "rank": rank,
        "bytes_read": sum(p.stat().st_size for p in sources),
        "bytes_written": written,
        "largest_tensor_bytes": largest,
        "memory_bound_bytes": (len(folders) + 2) * largest,
        "runs": times(runs),
        "ratio_to_read_and_write": median(runs["twinmerge"]) / median(runs["read and write"]),
    }
    typer.echo(
        f"  rank {rank} of {len(folders)} experts: {row['ratio_to_read_and_write']:.1f}× read and "
        f"write; peak {row['runs']['twinmerge']['peak_memory_bytes'] / 1e6:.0f} MB, (T + 2) × "
        f"largest {row['memory_bound_bytes'] / 1e6:.0f} MB"
    )
    return row


def _float32_bytes(path: Path) -> int:
    with safe_open(path, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    return 4 * max(torch.Size(shape).numel() for shape in shapes)


def budgets(experts: Path, base: str, amounts: list[str], storages: list[str]) -> list[dict]:
    """How far a budget comes, and how far one rank for all matrices does at the same bytes."""
    rows = []
    for storage in storages:
        for amount in amounts:
            recipe = recipe_of(base, experts, {"budget": amount, "dtype": storage})
            with tempfile.TemporaryDirectory() as scratch:
                run = measured(ours, recipe, str(Path(scratch) / "artifact"))
            spent = run.returned
            rows.append({"budget": amount, "dtype": storage, **spent, "seconds": run.seconds})
            typer.echo(
                f"  {amount} as {storage}: error {spent['error']:.4f}, one rank for all "
                f"{spent['even_error']:.4f} ({run.seconds:.1f} s)"
            )
    return rows


# ----------------------------------------------------------------------------------------- main


def main(
    experts: Annotated[
        Path | None, typer.Argument(help="One checkpoint folder per task; for experts, budget.")
    ] = None,
    base: Annotated[str, typer.Option(help="Folder of their base model.")] = "",
    part: Annotated[list[Part] | None, typer.Option(help="Default: all four.")] = None,
    out: Annotated[Path, typer.Option()] = Path("results/build.json"),
    point: Annotated[
        list[str] | None,
        typer.Option(help="GB of a model[:width[:dtype]]; default: " + " ".join(POINTS)),
    ] = None,
    method_point: Annotated[str, typer.Option(help="The same, for methods.")] = "0.5",
    rank: Annotated[int, typer.Option()] = 16,
    budget: Annotated[list[str] | None, typer.Option(help="Default: 1, 3, 6 and 12 %.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Storages under a budget.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    cold: Annotated[bool, typer.Option(help="Also with sources that are not in memory.")] = True,
    mergekit: Annotated[bool, typer.Option(help="Also by mergekit.")] = True,
    work: Annotated[
        Path | None, typer.Option(help="Where families are made: six times the largest, in bytes.")
    ] = None,
) -> None:
    """Time and memory of builds, each beside its bound and beside mergekit."""
    parts = part or list(Part)
    if experts is None or not base:
        if {Part.experts, Part.budget} & set(parts):
            raise typer.BadParameter("experts and budget need EXPERTS and --base")
    settings = {"repeats": repeats, "cold": cold, "mergekit": mergekit}
    todo: dict[Part, Callable[[], Any]] = {
        Part.linear: lambda: over_families(point or POINTS, ["linear"], work, **settings),
        Part.methods: lambda: over_families(
            [method_point],
            [m for m in METHODS if m != "linear"],
            work,
            **settings | {"cold": False},
        ),
        Part.experts: lambda: real_experts(experts or Path(), base, rank, repeats),
        Part.budget: lambda: budgets(experts or Path(), base, budget or BUDGETS, dtype or STORAGES),
    }
    for name in parts:
        typer.echo(name.value)
        found = todo[name]()
        made = provenance()
        results = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        kept = {key.value: results[key.value] for key in Part if key.value in results}
        kept[name.value] = {"commit": made["commit"], "rows": found}
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps({"provenance": made, **kept}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
