"""What `twinmerge explain` shows: the router's reading, bars of weights, answers, near examples."""

from __future__ import annotations

import sys
from typing import Any

import typer

from ..artifact.format import layers_said

MOST_EXPERTS = 12
"""In a table; the rest is in `--json`."""

BAR = 20
"""Characters of a whole one."""

WIDTH = 160
"""Of what is shown where nobody looks at a terminal."""

LONG = ("text", "answer")
"""Columns that give way where a line has no room."""

MEASURES = {
    "mahalanobis": "Mahalanobis distance under the router's precision",
    "cosine": "1 - cosine of the router's centred features",
}


def explain_text(result: dict[str, Any]) -> None:
    """Print `Explanation.to_dict()`."""
    _head(result)
    ranked = ranking(result)
    _weights(result, ranked[:MOST_EXPERTS])
    _answers(result, ranked[:MOST_EXPERTS])
    hidden = len(ranked) - MOST_EXPERTS
    if hidden > 0:
        typer.echo(f"\n{hidden} more experts of lower probability: see --json")
    _nearest(result)
    for note in result["notes"]:
        typer.echo(f"note: {printable(note)}")


def ranking(result: dict[str, Any]) -> list[str]:
    """All experts, the likeliest first; without a router in the artifact's order."""
    names = [reply["expert"] for reply in result["answers"] if reply["way"] == "expert"]
    routing = result["routing"]
    if routing is None:
        return names
    return sorted(names, key=lambda name: -routing["probabilities"][name])


def in_order(result: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The answers: routed, forced, of these experts, shared, base."""
    ways = [("routed", ""), ("forced", ""), *(("expert", name) for name in names)]
    ways += [("shared", ""), ("base", "")]
    keyed = {(r["way"], r["expert"] if r["way"] == "expert" else ""): r for r in result["answers"]}
    return [keyed[way] for way in ways if way in keyed]


def printable(text: str) -> str:
    """One line without control characters: the text may be anybody's."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def bar(share: float) -> str:
    """A share of 1 as blocks, of eighths."""
    eighths = round(8 * BAR * min(abs(share), 1.0))
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def said_of(reply: dict[str, Any]) -> str:
    """An answer in a few words."""
    if reply["label"] is not None:
        return printable(reply["label"])
    if reply["value"] is not None:
        return f"{reply['value']:.3f}"
    if reply["text"] is not None:
        return printable(reply["text"]) or "(nothing)"
    return ", ".join(f"{k} {tuple(v)}" for k, v in (reply["shapes"] or {}).items())


def way_of(reply: dict[str, Any]) -> str:
    """`routed`, `cola alone`, ..."""
    way: str = reply["way"]
    return {"expert": f"{reply['expert']} alone", "shared": "shared expert"}.get(way, way)


def forced_by(forced: dict[str, Any]) -> str:
    """What was forced, as it was asked for."""
    parts = [f"{key} {forced[key]}" for key in ("task", "head") if forced[key] is not None]
    if forced["weights"] is not None:
        parts.append(f"weights {mixture(forced['weights'])}")
    if forced["allowed"] is not None:
        parts.append(f"allowed {', '.join(forced['allowed'])}")
    return ", ".join(parts)


def mixture(weights: dict[str, float] | None) -> str:
    """`sst2 0.93, cola 0.07`: the largest three."""
    if weights is None:
        return "-"
    kept = sorted(((n, w) for n, w in weights.items() if abs(w) >= 0.005), key=lambda e: -abs(e[1]))
    shown = ", ".join(f"{name} {weight:.2f}" for name, weight in kept[:3])
    return shown + (", ..." if len(kept) > 3 else "") if kept else "all 0"


def _head(result: dict[str, Any]) -> None:
    router, routing = result["router"], result["routing"]
    what = "chat" if result["chat"] else "pair" if len(result["text"]) == 2 else "text"
    text = " | ".join(map(printable, result["text"]))
    cut = ", cut" if result["truncated"] else ""
    rows = [[what, f"{text}  ({result['tokens']:,} tokens{cut})"]]
    if router is not None:
        rows.append(["router", _reading(router)])
    if routing is not None:
        sure = f"{routing['likeliest']}, confidence {routing['confidence']:.3f}"
        rows.append(["likeliest", sure + _record(routing)])
        rows.append(["new", _novelty(routing)])
        rows.append(["so", routing["outcome"]])
    if result["forced"] is not None:
        rows.append(["forced", forced_by(result["forced"])])
    _grid(rows)


def _reading(router: dict[str, Any]) -> str:
    line = f"{router['said']}; temperature {router['temperature']:.3g}, sharpness "
    line += str(router["sharpness"])
    if router["held_out_accuracy"] is None:
        return line
    right = f"{router['held_out_accuracy']:.1%} of {router['held_out_rows']:,}"
    return f"{line}; right on {right} held-out rows"


def _record(routing: dict[str, Any]) -> str:
    held_out, own = routing["held_out"], routing["likeliest"]
    total = sum(held_out.values())
    if not total:
        return ""
    line = f"; of {total:,} held-out rows that went there, {held_out.get(own, 0):,} were its own"
    others = {name: count for name, count in held_out.items() if name != own}
    return line + "".join(f", {count:,} of {name}" for name, count in others.items())


def _novelty(routing: dict[str, Any]) -> str:
    found = routing["novelty"]
    if found is None:
        return "this router does not look for inputs unlike all experts' data"
    line = f"{'yes' if routing['new'] else 'no'}: score {found['score']:.2f}, threshold "
    line += f"{found['threshold']:.2f} ({layers_said(found['layers'])}"
    if found["coverage"] is not None:
        line += f"; {found['coverage']:.0%} of the experts' own rows lie below"
    return line + ")"


def _weights(result: dict[str, Any], names: list[str]) -> None:
    routing, forced = result["routing"], result["forced"]
    ways = {reply["way"]: reply for reply in result["answers"]}
    columns: list[tuple[str, dict[str, float]]] = []
    if routing is not None:
        columns += [("weight", routing["weights"]), ("probability", routing["probabilities"])]
    if forced is not None:
        columns.append(("forced weight", ways["forced"]["weights"]))
    if not columns:
        return
    rows = [
        [name, *(f"{values[name]:.3f} {bar(values[name]):<{BAR}}" for _, values in columns)]
        for name in names
    ]
    _table(["expert", *(title for title, _ in columns)], rows)


def _answers(result: dict[str, Any], names: list[str]) -> None:
    replies = in_order(result, names)
    heads = any(reply["head"] is not None for reply in replies)
    scored = any(reply["score"] is not None for reply in replies)
    rows = []
    for reply in replies:
        row = [way_of(reply), said_of(reply)]
        if scored:
            row.append("" if reply["score"] is None else f"{reply['score']:.3f}")
        if heads:
            row.append(reply["head"] or "")
        rows.append([*row, mixture(reply["weights"])])
    columns = ["answered by", "answer", *["score"] * scored, *["head"] * heads, "weights"]
    _table(columns, rows)


def _nearest(result: dict[str, Any]) -> None:
    near = result["nearest"]
    if near is None:
        return
    rows = [
        [each["expert"], f"{each['distance']:.3f}", " | ".join(map(printable, each["text"]))]
        for each in near["neighbours"]
    ]
    _table(["nearest example of", "distance", "text"], rows)
    line = f"of {near['rows']:,} routing examples; {MEASURES[near['measure']]}"
    if near["usual"] is not None:
        line += f"; usual from an example to the next: {near['usual']:.3f}"
    typer.echo(line)


def _console() -> Any:
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def _table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.cells import cell_len
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    console = _console()
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    for name, width in zip(columns, widths, strict=True):
        if name in LONG:  # ends in dots: all of it is in --json
            others = sum(widths) - width + 2 * (len(columns) - 1)
            width = min(width, max(console.width - others, 20))
        table.add_column(name, no_wrap=True, overflow="ellipsis", width=width)
    for row in rows:
        table.add_row(*row)
    typer.echo("")
    console.print(table)


def _grid(rows: list[list[str]]) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for row in rows:
        grid.add_row(*row)
    _console().print(grid)
