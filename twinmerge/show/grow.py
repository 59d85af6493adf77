"""What `twinmerge add`, `remove` and `replace` show."""

from __future__ import annotations

from typing import Any

import typer

from . import folded


def grow_text(result: dict[str, Any]) -> None:
    """Print what `twinmerge.grow` returns."""
    if (gone := result.get("removed")) is not None:
        typer.echo(f"removed: {gone['name']}, {gone['bytes']:,} bytes")
    if (new := result.get("added")) is not None:
        typer.echo(f"added: {new['name']} ({new['kind']}, {new['bytes']:,} bytes)")
        typer.echo(f"  {_kept(new)}")
    change = result["bytes_after"] - result["bytes_before"]
    typer.echo(
        f"experts: {', '.join(result['experts'])}; whole folder {result['bytes_after']:,} bytes "
        f"({change:+,})"
    )
    if result["shared_unchanged"]:
        typer.echo(
            "unchanged: the shared expert and the other experts' files, so with weights given (or "
            "task=) the others answer as before"
        )
    _router(result["router"])
    for warning in folded(result["warnings"]):
        typer.echo(f"warning: {warning}")


def _kept(new: dict[str, Any]) -> str:
    """Ranks and errors of a new expert, beside those of the others."""
    parts = []
    if new["most_rank"] is not None:
        ranks = dict.fromkeys((new["least_rank"], new["most_rank"]))
        parts.append(f"rank {' to '.join(map(str, ranks))}")
    if new["mean_relative_error"] is not None:
        others = new["mean_relative_error_of_others"]
        beside = "" if others is None else f" (of the others {others:.3f})"
        parts.append(f"mean relative error {new['mean_relative_error']:.3f}{beside}")
    parts.append(f"drift from the base {new['drift']:.4f}")
    return ", ".join(parts)


def _router(router: dict[str, Any]) -> None:
    for said in router["said"]:
        typer.echo(f"router: {said}")
    measured = router["measured"]
    chosen = measured.get("chosen") or {}
    if len(chosen) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in chosen.items())
        typer.echo(f"router: its held-out rows go to {counts}")
    moved = measured.get("moved") or {}
    if moved:
        counts = ", ".join(
            f"{name} {count} of {measured['examples'][name]}" for name, count in moved.items()
        )
        typer.echo(f"router: kept examples of the others that go to it now: {counts}")
