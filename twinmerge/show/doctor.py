"""What `twinmerge doctor` shows: tables first, then one line per finding."""

from __future__ import annotations

from typing import Any

import typer

from . import table

LEVELS = {"ok": "ok", "look": "look at this", "fail": "will fail"}
MOST_TENSORS = 6
MOST_EXPERTS = 12
"""In a table of all pairs; beyond it, only the extremes are told."""


def doctor_text(result: dict[str, Any]) -> None:
    """Print `Diagnosis.to_dict()`."""
    kept = " ".join(
        f"{key} {value}" for key, value in result["exclusive"].items() if value != "svd"
    )
    typer.echo(
        f"{len(result['experts'])} experts of {result['base']}, shared expert by "
        f"{result['method']}, exclusive {kept}"
    )
    if result["measured"]:
        _experts(result)
        _cosines(result)
        _tensors(result)
        _needs(result)
    typer.echo("")
    for finding in result["findings"]:
        typer.echo(f"{LEVELS[finding['level']]:<13} {finding['subject']}: {finding['text']}")
        if finding["todo"]:
            typer.echo(f"{'':<13} -> {finding['todo']}")


def _experts(result: dict[str, Any]) -> None:
    rows = []
    for expert in result["experts"]:
        layers = {k: v for k, v in (expert["layers"] or {}).items() if v}
        most = max(layers, key=layers.__getitem__, default=None)
        ranks, size, held = expert["ranks"], expert["bytes"], expert["kept"]
        shared = result["shared_bytes"]
        rows.append(
            [
                expert["name"],
                expert["kind"] or "not opened",
                _number(expert["drift"], ".3f"),
                f"{most} {layers[most]:.3f}" if most else "-",
                "-" if expert["changed"] is None else f"{expert['changed']}",
                " / ".join(f"{r['median']:g}" for r in ranks.values()) if ranks else "-",
                " / ".join(f"{r['max']:g}" for r in ranks.values()) if ranks else "-",
                f"{size['95%'] / shared:.1%}" if size and shared else "-",
                _number(held and held["median"], ".0%"),
            ]
        )
    columns = ["expert", "kind", "drift", "most in", "changed", "rank for 90 / 95 / 99 %"]
    typer.echo("")
    table("", [*columns, "at most", "95 %, of base", "recipe keeps"], rows)
    typer.echo(
        f"\ndrift: ‖W_t - W_0‖ / ‖W_0‖ over all matrices. ranks: median and largest over "
        f"{len(result['sampled'])} of the {result['matrices']} matrices that moved (--sample), of "
        f"W_t minus {result['against']}."
    )


def _cosines(result: dict[str, Any]) -> None:
    names, cosines = result["measured"], result["cosines"]
    if len(names) < 2:
        return
    if len(names) <= MOST_EXPERTS:
        rows = [
            [name, *(_number(cosines[i][j], ".2f") if j < i else "" for j in range(len(names) - 1))]
            for i, name in enumerate(names)
            if i
        ]
        typer.echo("\ncosines between task vectors")
        table("", ["", *names[:-1]], rows)
    opposed = [
        share for i, row in enumerate(result["opposed"]) for share in row[:i] if share is not None
    ]
    if opposed:
        chance = 1 - 0.5 ** (len(names) - 1)
        typer.echo(
            f"\nsigns: where two experts moved an entry, they moved it in opposite directions "
            f"{sum(opposed) / len(opposed):.0%} of the time (unrelated: 50%); "
            f"{result['conflicts']:.1%} of the entries that several moved are pulled both ways "
            f"({len(names)} unrelated experts: {chance:.1%})."
        )


def _tensors(result: dict[str, Any]) -> None:
    tensors, names = result["tensors"], result["measured"]
    drifts = [
        (max(t["moved"]) / t["base"], t["name"], names[t["moved"].index(max(t["moved"]))])
        for t in tensors
        if t["matrix"] and t["base"] and any(t["moved"])
    ]
    drifts.sort(key=lambda d: (-d[0], d[1]))
    rows = [[name, f"{drift:.3f}", who] for drift, name, who in drifts[:MOST_TENSORS]]
    if rows:
        typer.echo("")
        table("", ["matrices that moved most", "drift", "of expert"], rows)
    still = result["unchanged"]
    if still:
        matrices = [t["name"] for t in tensors if t["name"] in set(still) and t["matrix"]]
        shown = f"; matrices: {', '.join(matrices[:4])}" if matrices else ""
        more = ", ..." if len(matrices) > 4 else ""
        typer.echo(
            f"\nunchanged in every expert: {len(still)} of {len(tensors)} tensors{shown}{more}"
        )


def _needs(result: dict[str, Any]) -> None:
    needs = result["needs"]
    typer.echo(
        f"\nthe build reads {needs['read_bytes'] / 1e6:,.0f} MB and takes about "
        f"{_duration(needs['seconds'])} (an estimate: reading {_duration(needs['read_seconds'])}, "
        f"SVDs {_duration(needs['svd_seconds'])} of one core; merging and writing come on top)"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
