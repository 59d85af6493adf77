#!/usr/bin/env python3
"""Truncated SVDs against LAPACK's: seconds, and how far above the Eckart-Young optimum.

    python benchmarks/svd.py [EXPERTS --base BASE] [--large 4096] [--threads 1 --threads 2]

For every shape, spectrum, rank and number of threads: `torch.linalg.svd(full_matrices=False)` once
or a few times, `truncated_svd` a few times, and the best of each in processor seconds per thread
and in wall seconds. The error is that of the product, relative to the optimum (from the exact
singular values in float64); beside it stands the bound that `truncated_svd` itself reports.

Spectra: Gaussian noise (flat), twelve directions in noise, power laws, a geometric decay, and with
EXPERTS the differences of real experts from their base. `--large N` adds N x N noise and a power
law at rank 16: minutes, since the exact SVD is what takes them.

Writes `results/svd.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from twinmerge.evaluation.provenance import provenance
from twinmerge.merging.linalg import truncated_svd

SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]
RANKS = (1, 8, 16, 64)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(out: int, in_: int, s: Tensor) -> Tensor:
    u = torch.linalg.qr(randn(out, len(s), seed=1)).Q
    v = torch.linalg.qr(randn(in_, len(s), seed=2)).Q
    return (u * s) @ v.T


def made(out: int, in_: int) -> Iterator[tuple[str, Tensor]]:
    """Spectra from flat to steep."""
    index = torch.arange(1.0, min(out, in_) + 1)
    noise = randn(out, in_, seed=0)
    yield "noise", noise
    yield "rank 12 + noise", 0.3 * randn(out, 12, seed=3) @ randn(12, in_, seed=4) + noise
    for power in (0.3, 0.7, 1.5):
        yield f"k^-{power}", with_spectrum(out, in_, index**-power)
    yield "0.8^k", with_spectrum(out, in_, 0.8**index)


def large(side: int) -> Iterator[tuple[str, Tensor]]:
    noise = randn(side, side, seed=0)
    yield "noise", noise
    scaled = noise * torch.arange(1.0, side + 1) ** -0.7
    yield "power law", scaled @ randn(side, side, seed=1) / side**0.5


def real(experts: Path, base: Path, shape: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    """Differences of the first expert with this shape: its first and its last such weight."""
    from safetensors.torch import load_file

    start = load_file(base / "model.safetensors")
    for folder in sorted(p for p in experts.iterdir() if p.is_dir()):
        deltas = {}
        for name, weight in load_file(folder / "model.safetensors").items():
            plain = name if name in start else name.partition(".")[2]  # `bert.` and the like
            if plain in start and start[plain].shape == weight.shape == shape:
                deltas[plain] = weight.float() - start[plain].float()
        for plain in [*deltas][:1] + [*deltas][-1:]:
            yield f"{folder.name} {plain}", deltas[plain]
        return


def best_seconds(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """The least wall time and the least processor time (over all threads) of some calls."""
    wall, cpu = [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    return {"wall": min(wall), "cpu": min(cpu)}


def measure(
    kind: str,
    matrix: Tensor,
    ranks: list[int],
    threads: list[int],
    repeats: int,
    exact_repeats: int,
) -> Iterator[dict[str, Any]]:
    """One row for each rank and number of threads."""
    s = torch.linalg.svdvals(matrix.double() if min(matrix.shape) < 2000 else matrix).double()
    energy = float(matrix.double().square().sum())
    for number in threads:
        torch.set_num_threads(number)
        exact = best_seconds(lambda: torch.linalg.svd(matrix, full_matrices=False), exact_repeats)
        for rank in ranks:
            found = truncated_svd(matrix, rank)
            ours = best_seconds(lambda rank=rank: truncated_svd(matrix, rank), repeats)
            optimum = float(s[rank:].square().sum()) ** 0.5
            error = float(
                (matrix.double() - (found.u * found.s).double() @ found.vh.double()).norm()
            )
            yield {
                "shape": list(matrix.shape),
                "spectrum": kind,
                "rank": rank,
                "threads": number,
                "exact_seconds": exact,
                "seconds": ours,
                "ratio": exact["wall"] / ours["wall"],
                "ratio_cpu": exact["cpu"] / ours["cpu"],
                "energy_kept": float(found.s.double().square().sum()) / energy,
                # Below 1e-5 of the norm, errors are float32 rounding: no excess to speak of.
                "excess_error": error / optimum - 1 if optimum > 1e-5 * energy**0.5 else None,
                "excess_bound": (1 + found.missed / optimum**2) ** 0.5 - 1 if optimum else None,
            }


def show(row: dict[str, Any]) -> None:
    out, in_ = row["shape"]
    excess = "rounding" if row["excess_error"] is None else f"{row['excess_error']:.1e}"
    typer.echo(
        f"{out} x {in_}, {row['spectrum']}, rank {row['rank']}, {row['threads']} threads: "
        f"{1e3 * row['exact_seconds']['wall']:.1f} -> {1e3 * row['seconds']['wall']:.2f} ms "
        f"({row['ratio']:.1f}x, {row['ratio_cpu']:.1f}x in processor time), "
        f"excess {excess}, bound {row['excess_bound'] or 0.0:.1e}"
    )


def main(
    experts: Annotated[Path | None, typer.Argument(help="One checkpoint folder per task.")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model.")] = None,
    out: Annotated[Path, typer.Option()] = Path("results/svd.json"),
    threads: Annotated[list[int] | None, typer.Option(help="Default: 1 and 2.")] = None,
    side: Annotated[int, typer.Option("--large", help="Add square matrices of this side.")] = 0,
    repeats: Annotated[int, typer.Option()] = 5,
) -> None:
    """Time and error of `truncated_svd` beside the exact SVD."""
    rows = []
    for shape in SHAPES:
        kinds = list(made(*shape))
        if experts is not None and base is not None:
            kinds += real(experts, base, shape)
        ranks = sorted({*RANKS, min(shape) // 10})
        for kind, matrix in kinds:
            for row in measure(kind, matrix, ranks, threads or [1, 2], repeats, exact_repeats=2):
                rows.append(row)
                show(row)
    for kind, matrix in large(side) if side else ():
        for row in measure(kind, matrix, [16], (threads or [1])[:1], repeats, exact_repeats=1):
            rows.append(row)
            show(row)
    torch.set_num_threads((threads or [1])[0])
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"provenance": provenance(), "svd": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
