"""What the command line shows: tables and sentences for people, JSON for programs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from math import sqrt
from pathlib import Path
from typing import Any

import typer


def print_result(
    result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], None]
) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        text(result)


def summarise(manifest: Any, out: Path) -> dict[str, Any]:
    shared = sum(tensor.bytes for tensor in manifest.tensors)
    ranks = {
        expert.name: [
            share.rank
            for tensor in manifest.tensors
            if (share := tensor.experts.get(expert.name)) and share.rank is not None
        ]
        for expert in manifest.experts
    }
    matrices = {
        expert.name: [
            share
            for tensor in manifest.tensors
            if tensor.kind == "matrix" and (share := tensor.experts.get(expert.name))
        ]
        for expert in manifest.experts
    }
    return {
        "artifact": str(out),
        "base": manifest.base,
        "model_class": manifest.model_class,
        "merge_method": manifest.recipe.get("merge_method"),
        "bytes": {
            "shared": shared,
            "experts": sum(expert.bytes for expert in manifest.experts),
            "router": manifest.router.bytes if manifest.router else 0,
            "all": sum(record.bytes for record in manifest.files.values()),
        },
        "experts": [
            {
                "name": expert.name,
                "reference": expert.reference,
                "kind": "LoRA" if expert.adapter else "full",
                "bytes": expert.bytes,
                "share_of_base": expert.bytes / shared,
                "max_rank": max(ranks[expert.name], default=0),
                "mean_relative_error": _mean(share.error for share in matrices[expert.name]),
                "mean_truncation": _mean(share.truncation for share in matrices[expert.name]),
                "mean_bound": _mean(share.bound for share in matrices[expert.name]),
                "drift": expert.drift,
            }
            for expert in manifest.experts
        ],
        "router": None
        if manifest.router is None
        else {
            key: getattr(manifest.router, key)
            for key in ("said", "kind", "layers", "held_out_accuracy", "held_out_rows", "bytes")
        },
        "budget": None if manifest.budget is None else manifest.budget.model_dump(),
        "warnings": list(manifest.warnings),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of what was measured; None if nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def inspect_text(result: dict[str, Any]) -> None:
    size = result["bytes"]
    typer.echo(
        f"{result['artifact']}: {len(result['experts'])} experts of {result['base']} "
        f"({result['model_class']}, shared expert by {result['merge_method']})"
    )
    table(
        "",
        [
            "expert",
            "kind",
            "bytes",
            "of base",
            "max rank",
            "mean error",
            "truncation",
            "bound",
            "drift",
        ],
        [
            [
                expert["name"],
                expert["kind"],
                f"{expert['bytes']:,}",
                f"{expert['share_of_base']:.2%}",
                str(expert["max_rank"] or "-"),
                *(
                    "-" if (e := expert[key]) is None else f"{e:.3f}"
                    for key in ("mean_relative_error", "mean_truncation", "mean_bound")
                ),
                f"{expert['drift']:.4f}",
            ]
            for expert in result["experts"]
        ],
    )
    typer.echo(
        f"\nbytes: shared {size['shared']:,}, experts {size['experts']:,}, router "
        f"{size['router']:,}, whole folder {size['all']:,}"
    )
    if (budget := result["budget"]) is not None:
        typer.echo(
            f"budget: {budget['spent']:,} of {budget['bytes']:,} bytes spent; relative error "
            f"{budget['error']:.4f}, where one rank for all (about {budget['even_rank']}) leaves "
            f"{budget['even_error']:.4f} at the same bytes"
            + (
                f"; {budget['at_reach']} matrices might have used more rank than was computed"
                if budget["at_reach"]
                else ""
            )
        )
    router = result["router"]
    if router is None:
        typer.echo("router: none yet; fit one with 'twinmerge fit-router'")
    else:
        line = f"router: {router['said']}"
        if router["held_out_accuracy"] is not None:
            line += (
                f"; right on {router['held_out_accuracy']:.1%} of {router['held_out_rows']:,} rows "
                "held out from its own data"
            )
        typer.echo(line)
    for warning in folded(result["warnings"]):
        typer.echo(f"warning: {warning}")


def folded(warnings: list[str]) -> list[str]:
    """What is said of several experts in the same words, said once."""
    said: dict[str, list[str]] = {}
    for warning in warnings:
        match = re.match(r"expert ('[^']*'): (.*)", warning, re.DOTALL)
        said.setdefault(match[2] if match else warning, []).extend([match[1]] if match else [])
    return [
        f"expert{'s' if len(names) > 1 else ''} {', '.join(names)}: {text}" if names else text
        for text, names in said.items()
    ]


def print_tensors(manifest: Any) -> None:
    rows = []
    for record in manifest.tensors:
        shares = list(record.experts.values())
        ranks = sorted({share.rank for share in shares if share.rank is not None})
        rank = "-" if not ranks else "-".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))
        error = f"{max(share.error for share in shares):.3f}" if shares else "-"
        shape = "×".join(str(n) for n in record.shape) or "scalar"
        size = f"{sum(share.bytes for share in shares):,}"
        rows.append([record.name, record.kind, shape, record.dtype, rank, size, error])
    columns = ["tensor", "kind", "shape", "dtype", "rank", "experts' bytes", "worst error"]
    table("\ntensors", columns, rows)


def dry_run_text(result: dict[str, Any]) -> None:
    typer.echo("nothing written. The build would hold and write:")
    for key, value in result.items():
        if isinstance(value, int | float):
            typer.echo(f"  {key.replace('_', ' ')}: {value:,}")
        elif isinstance(value, dict):
            inner = ", ".join(f"{name} {count:,}" for name, count in value.items())
            typer.echo(f"  {key.replace('_', ' ')}: {inner}")
    for warning in folded(result["warnings"]):
        typer.echo(f"warning: {warning}")


def part_text(result: dict[str, Any]) -> None:
    typer.echo(
        f"part {result['part']} of {result['of']} is done; when all are, run with "
        f"--num-shards {result['of']} --join"
    )


def _interval(rows: int, rate: float) -> str:
    """Where the rate on new rows lies, 95 times in 100 (Wilson, 1927)."""
    z2 = 1.96**2
    middle, width = rate + z2 / (2 * rows), sqrt(z2 * (rate * (1 - rate) + z2 / (4 * rows)) / rows)
    low, high = ((middle + side) / (1 + z2 / rows) for side in (-width, width))
    return f"{low:.1%} to {high:.1%}"


def router_text(result: dict[str, Any]) -> None:
    from ..artifact.format import layers_said

    if result["tried"]:
        table(
            "",
            ["router", "layers", "right", "loss", ""],
            [
                [
                    each["kind"],
                    ", ".join(map(str, each["layers"])),
                    f"{each['accuracy']:.1%}",
                    _number(each["loss"], ".3f"),
                    "chosen" if _same(each, result) else "",
                ]
                for each in result["tried"]
            ],
        )
        typer.echo(f"chosen: {result['reason']}")
    rows = sum(result["rows"].values())
    if result["held_out_accuracy"] is None:
        typer.echo(
            f"\nrouter: {result['said']}; nothing says how often it is right: no rows were held "
            f"out. {result['bytes']:,} bytes"
        )
    else:
        rate, held_out = result["held_out_accuracy"], result["held_out_rows"]
        typer.echo(
            f"\nrouter: {rate:.1%} of {held_out:,} held-out rows go to their own expert "
            f"(95 % interval {_interval(held_out, rate)}); fitted on {rows:,} rows, "
            f"{result['bytes']:,} bytes"
        )
        typer.echo(
            f"calibration: temperature {result['temperature']:.3g}, expected calibration error "
            f"{result['calibration_error']:.3f} (before: {result['uncalibrated_error']:.3f}); "
            f"sharpness {result['sharpness']}"
        )
    novelty = result["novelty"]
    if novelty is not None:
        over = {"mean": "mean over tokens"}.get(novelty["pooling"], f"{novelty['pooling']} token")
        told = f"{layers_said(novelty['layers'])} ({over})"
        line = f"new inputs: told by {told}, at {novelty['coverage']:.0%} coverage"
        if novelty["noticed"]:
            shares = [f"{name} {share:.0%}" for name, share in novelty["noticed"].items()]
            each = result["calibration_rows"] / len(result["experts"])
            line += (
                f"; of an expert's calibration rows (about {each:.0f}) noticed if it were unknown: "
                f"{', '.join(shares)}"
            )
        typer.echo(line)
    for warning in result["warnings"]:
        typer.echo(f"warning: {warning}")


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _same(each: dict[str, Any], result: dict[str, Any]) -> bool:
    return each["kind"] == result["kind"] and list(each["layers"]) == list(result["layers"])


def eval_text(result: dict[str, Any]) -> None:
    for report in result["reports"]:
        normalised = report["normalised"]
        rows = []
        for name, task in report["tasks"].items():
            routed, expert = task["routing_accuracy"], task.get("expert")
            rows.append(
                [
                    name,
                    task["metric"],
                    f"{task['rows']:,}",
                    f"{task['score']:.4f}",
                    "-" if expert is None else f"{expert:.4f}",
                    "-" if not expert else f"{100 * task['score'] / expert:.1f}",
                    "-" if routed is None else f"{routed:.1%}",
                ]
            )
        columns = ["task", "metric", "rows", "score", "expert", "normalised", "routed right"]
        table(f"\nprotocol: {report['protocol']}", columns, rows)
        typer.echo(
            f"mean score {report['mean']:.4f}"
            + ("" if normalised is None else f", normalised {100 * normalised:.1f}")
            + f", {report['seconds_per_1000_rows']:.1f} s per 1,000 rows"
        )
        given = [f"{name} {report[name]}" for name in ("top_k", "threshold") if name in report]
        if given:
            total = sum(task["rows"] for task in report["tasks"].values())
            lost = sum(task["dropped"] * task["rows"] for task in report["tasks"].values()) / total
            typer.echo(f"{', '.join(given)}: {lost:.1%} of a row's weight dropped on average")
