#!/usr/bin/env python3
"""Building an artifact against only reading and writing the same bytes, and its peak memory.

    python benchmarks/build.py EXPERTS --base BASE

Time: the build at rank 16 (fresh process, imports not counted), and beside it, in turn, the bound:
reading every source file and writing as many bytes as the artifact has, with Python's own files.
Sources are in the page cache for both; both write without fsync.

Memory: the most anonymous memory that the process held beyond what it held before the build (mapped
source files do not count: the kernel drops them when it likes), and the bound (T + 2) × the largest
tensor. The second part builds Llama-shaped families of growing depth and equal width: memory must
stay flat.

Writes `results/build.json`.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from twinmerge.evaluation.provenance import provenance


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("needs Linux: no RssAnon in /proc/self/status")


class PeakMemory:
    """Samples anonymous memory every two milliseconds while its block runs."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self.peak - self.before


def one_build(recipe: dict[str, Any], out: str, sample: bool) -> dict[str, Any]:
    """Build in this (fresh) process; seconds, or peak memory if `sample`."""
    from twinmerge.merging.build import build
    from twinmerge.recipe import Recipe

    made = Recipe.model_validate(recipe)
    if sample:
        with PeakMemory() as memory:
            build(made, out)
        return {"peak_bytes": memory.grown}
    started = time.perf_counter()
    build(made, out)
    return {"seconds": time.perf_counter() - started}


def in_fresh_process(recipe: dict[str, Any], out: Path, *, sample: bool) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(one_build, (recipe, str(out), sample))


def copy_bytes(sources: list[Path], amount: int, out: Path) -> float:
    """Seconds to read all sources and write `amount` bytes."""
    block = bytearray(8 << 20)
    started = time.perf_counter()
    for path in sources:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass
    with open(out, "wb", buffering=0) as file:
        left = amount
        while left > 0:
            left -= file.write(memoryview(block)[: min(left, len(block))])
    return time.perf_counter() - started


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def time_build(experts: Path, base: str, rank: int, repeats: int) -> dict[str, Any]:
    folders = sorted(p for p in experts.iterdir() if p.is_dir())
    recipe = recipe_of(base, folders, rank)
    sources = weight_files(Path(base)) + [f for p in folders for f in weight_files(p)]
    builds, bounds = [], []
    written = 0
    for number in range(repeats + 1):
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "artifact"
            took = in_fresh_process(recipe, out, sample=False)["seconds"]
            written = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
            bound = copy_bytes(sources, written, Path(temporary) / "bytes")
        if number:  # the first warms the page cache
            builds.append(took)
            bounds.append(bound)
    with tempfile.TemporaryDirectory() as temporary:
        memory = in_fresh_process(recipe, Path(temporary) / "a", sample=True)["peak_bytes"]
    largest = largest_tensor(Path(base))
    return {
        "experts": len(folders),
        "rank": rank,
        "bytes_read": sum(p.stat().st_size for p in sources),
        "bytes_written": written,
        "build_seconds": statistics.median(builds),
        "read_and_write_seconds": statistics.median(bounds),
        "ratio": statistics.median(builds) / statistics.median(bounds),
        "all_build_seconds": builds,
        "all_read_and_write_seconds": bounds,
        "peak_memory_bytes": memory,
        "largest_tensor_bytes": largest,
        "memory_bound_bytes": (len(folders) + 2) * largest,
    }


def recipe_of(base: str, folders: list[Path], rank: int) -> dict[str, Any]:
    models = [{"model": str(folder), "name": folder.name} for folder in folders]
    return {"base_model": base, "models": models, "exclusive": {"rank": rank}}


def largest_tensor(folder: Path) -> int:
    from safetensors import safe_open

    sizes = []
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            sizes += [prod(file.get_slice(name).get_shape()) * 4 for name in file.keys()]
    return max(sizes)


def growing_family(root: Path, layers: int, experts: int = 3) -> tuple[str, list[Path]]:
    """A Llama-shaped base of `layers` blocks and experts a little away from it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=4000,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    base = root / f"base-{layers}"
    model.save_pretrained(base)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    folders = []
    for number in range(experts):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name] + 0.001 * torch.randn_like(parameter))
        folders.append(root / f"expert-{layers}-{number}")
        model.save_pretrained(folders[-1])
    return str(base), folders


def memory_by_depth(depths: list[int]) -> list[dict[str, Any]]:
    rows = []
    for layers in depths:
        with tempfile.TemporaryDirectory() as temporary:
            base, folders = growing_family(Path(temporary), layers)
            size = sum(p.stat().st_size for p in weight_files(Path(base)))
            out = Path(temporary) / "artifact"
            peak = in_fresh_process(recipe_of(base, folders, 8), out, sample=True)["peak_bytes"]
            largest = largest_tensor(Path(base))
        rows.append(
            {
                "layers": layers,
                "model_bytes": size,
                "experts": len(folders),
                "peak_memory_bytes": peak,
                "memory_bound_bytes": (len(folders) + 2) * largest,
            }
        )
        typer.echo(f"{layers} layers, {size:,} bytes a model: peak {peak:,} bytes")
    return rows


def main(
    experts: Annotated[Path, typer.Argument(help="One checkpoint folder per task.")],
    base: Annotated[str, typer.Option(help="Folder of the base model.")],
    out: Annotated[Path, typer.Option()] = Path("results/build.json"),
    rank: Annotated[int, typer.Option()] = 16,
    repeats: Annotated[int, typer.Option()] = 5,
    depths: Annotated[list[int] | None, typer.Option(help="Default: 2, 4, 8 and 16.")] = None,
) -> None:
    """Time and memory of a build, each beside its bound."""
    timing = time_build(experts, base, rank, repeats)
    typer.echo(
        f"build {timing['build_seconds']:.2f} s, read and write "
        f"{timing['read_and_write_seconds']:.2f} s: {timing['ratio']:.1f}×; peak "
        f"{timing['peak_memory_bytes']:,} of (T + 2) × largest = {timing['memory_bound_bytes']:,}"
    )
    results = {
        "provenance": provenance(),
        "build": timing,
        "memory": memory_by_depth(depths or [2, 4, 8, 16]),
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
