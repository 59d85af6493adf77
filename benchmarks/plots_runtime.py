#!/usr/bin/env python3
"""Pictures of the runtime's speed, as PNG and SVG beside the JSON file that they show.

python benchmarks/plots_runtime.py results/runtime.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from twinmerge.plots import check_extra

Rows = list[dict[str, Any]]
AXES = ("batch", "tokens", "experts", "rank")
COLORS = {"soft": "C0", "top-1": "C1", "uniform": "C2", "merged": "C3", "plain": "grey"}


def write(data: dict[str, Any], beside: Path) -> list[Path]:
    """Draw what `data` has, to `<beside without suffix>-<name>.png` and `.svg`; gives their paths.

    Raises `MissingExtra` without matplotlib.
    """
    check_extra()
    from matplotlib import rc_context

    pictures: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
        "experts": ("grid", lambda data: along(data, "experts")),
        "tokens": ("grid", lambda data: along(data, "tokens")),
        "batch": ("grid", lambda data: along(data, "batch")),
        "rank": ("grid", lambda data: along(data, "rank")),
        "plans": ("plans", plans),
        "rivals": ("rivals", rivals),
        "routing": ("routing", routing),
        "decode": ("decode", decode),
    }
    written = []
    # The same data gives the same bytes.
    with rc_context({"svg.hashsalt": "twinmerge", "svg.fonttype": "none"}):
        for name, (part, draw) in pictures.items():
            figure = draw(data) if data.get(part, {}).get("rows") else None
            if figure is None:
                continue
            for suffix, options in (("png", {"dpi": 120}), ("svg", {"metadata": {"Date": None}})):
                path = beside.with_name(f"{beside.stem}-{name}.{suffix}")
                figure.savefig(path, **options)
                written.append(path)
    return written


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    # Not pyplot: it keeps figures, and looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _made_on(data: dict[str, Any], part: str) -> str:
    hardware, settings = data["provenance"]["hardware"], data[part]["settings"]
    cores = f"{settings['threads']} of {hardware['cores']} cores of {hardware['processor']}"
    device = hardware.get("gpu", cores) if settings["device"] != "cpu" else cores
    return f"{device}, {settings['dtype']}; commit {data[part]['commit']}"


def _line(rows: Rows, axis: str, headline: dict[str, int]) -> Rows:
    """The rows that differ from the headline in this axis alone, in its order."""
    others = {key: value for key, value in headline.items() if key != axis}
    mine = [row for row in rows if others.items() <= row.items()]
    return sorted(mine, key=lambda row: row[axis])


def along(data: dict[str, Any], axis: str) -> Any:
    """Ratio to plain against one axis through the headline cell; dotted: what arithmetic allows."""
    rows = _line(data["grid"]["rows"], axis, headline := data["grid"]["settings"]["headline"])
    if len(rows) < 2:
        return None
    figure, (axes,) = _figure(7.5, 5.0)
    places = [row[axis] for row in rows]
    for mode in (name for name in rows[0]["ratio"] if name != "plain"):
        color = COLORS[mode]
        axes.plot(places, [row["ratio"][mode] for row in rows], "o-", color=color, label=mode)
        axes.plot(places, [row["bound"][mode] for row in rows], ":", color=color, lw=1)
    axes.axhline(1, color="grey", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(axis)
    axes.set_ylabel("time of a forward / plain forward")
    fixed = ", ".join(f"{key} {value}" for key, value in headline.items() if key != axis)
    axes.set_title(f"{fixed} (dotted: arithmetic alone)\n{_made_on(data, 'grid')}", size=9)
    axes.legend(fontsize="small")
    return figure


def plans(data: dict[str, Any]) -> Any:
    """Ratio to plain of every way to run a batch, over the number of tokens."""
    rows = sorted(data["plans"]["rows"], key=lambda row: row["tokens"])
    kinds = list(dict.fromkeys(row["weights"] for row in rows))
    figure, panels = _figure(5.0 * len(kinds), 4.2, len(kinds))
    for axes, kind in zip(panels, kinds, strict=True):
        mine = [row for row in rows if row["weights"] == kind]
        places = [row["tokens"] for row in mine]
        for way in (name for name in mine[0]["ratio"] if name != "plain"):
            axes.plot(places, [row["ratio"][way] for row in mine], "o-", label=way)
        chosen = [row["ratio"].get(row["chosen"], float("nan")) for row in mine]
        axes.plot(places, chosen, "o", ms=11, mfc="none", color="black", label="the planner's")
        if kind == "uniform":  # the batch has one weighting, so all its tokens share a merge
            even = mine[0]["predicted_break_even"] / mine[0]["batch"]
            axes.axvline(even, color="grey", lw=0.8, ls="--", label="in · out / (in + out)")
        axes.axhline(1, color="grey", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.set_xlabel(f"tokens per row, {mine[0]['batch']} rows")
        axes.set_ylabel("time of a forward / plain forward")
        axes.set_title(f"weights: {kind}", size=9)
        axes.legend(fontsize="small")
    figure.suptitle(_made_on(data, "plans"), size=9)
    return figure


def rivals(data: dict[str, Any]) -> Any:
    """Ratios to plain as bars, one panel for each kind of experts."""
    rows = data["rivals"]["rows"]
    figure, panels = _figure(7.0 * len(rows), 3.6, len(rows))
    for axes, row in zip(panels, rows, strict=True):
        names = list(row["ratio"])[::-1]
        values = [row["ratio"][name] for name in names]
        own = ["C0" if name.startswith("twin") else "grey" for name in names]
        bars = axes.barh(names, values, color=own)
        axes.bar_label(bars, [f"{value:.2f}×" for value in values], padding=3, size=8)
        axes.axvline(1, color="grey", lw=0.8)
        axes.set_xlim(0, 1.15 * max(values))
        axes.set_xlabel("time / plain forward")
        cell = ", ".join(f"{key} {row[key]}" for key in AXES)
        axes.set_title(f"{row['experts_are']}: {cell}", size=9)
    figure.suptitle(_made_on(data, "rivals"), size=9)
    return figure


def routing(data: dict[str, Any]) -> Any:
    """What routing at each layer costs, as a share of a plain forward, beside k/L."""
    rows = sorted(data["routing"]["rows"], key=lambda row: row["layer"])
    figure, (axes,) = _figure(7.5, 5.0)
    layers = [row["layer"] for row in rows]
    axes.plot(layers, [row["ratio"]["route"] for row in rows], "o-", label="route alone")
    axes.plot(layers, [row["added"] for row in rows], "s-", label="routed - forward, measured")
    axes.plot(layers, [row["share_of_layers"] for row in rows], "--", color="grey", label="k / L")
    axes.plot(layers, [row["predicted"] for row in rows], "x:", color="C2", label="cost model")
    for row in rows:
        if row["fitted"]:
            axes.axvline(
                row["layer"], color="C1", lw=0.8, ls="-.", label="layer of the fitted router"
            )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer k that the router reads")
    axes.set_ylabel("share of a plain forward")
    axes.set_title(_made_on(data, "routing"), size=9)
    axes.legend(fontsize="small")
    return figure


def decode(data: dict[str, Any]) -> Any:
    """Tokens per second by batch, and the time until the first token beside plain's."""
    rows = sorted(data["decode"]["rows"], key=lambda row: row["batch"])
    figure, (left, right) = _figure(12.0, 4.5, 2)
    modes = list(rows[0]["tokens_per_second"])
    width = 0.8 / len(modes)
    for index, mode in enumerate(modes):
        places = [group + (index - (len(modes) - 1) / 2) * width for group in range(len(rows))]
        color = COLORS[mode]
        values = [row["tokens_per_second"][mode] for row in rows]
        bars = left.bar(places, values, width, color=color, label=mode)
        shares = [1 / row["step"]["ratio"][mode] for row in rows]
        left.bar_label(bars, [f"{share:.2f}" for share in shares], padding=2, size=7)
        first = [row["first_token"]["ratio"][mode] for row in rows]
        bars = right.bar(places, first, width, color=color)
        right.bar_label(bars, [f"{value:.2f}" for value in first], padding=2, size=7)
    for axes in (left, right):
        axes.set_xticks(range(len(rows)), [f"batch {row['batch']}" for row in rows])
    left.set_ylabel("tokens per second after the first")
    left.set_title("Decoding (above bars: share of plain's speed)", size=9)
    left.legend(fontsize="small")
    right.axhline(1, color="grey", lw=0.8)
    right.set_ylabel("time until the first token / plain")
    right.set_title(f"Prompt of {rows[0]['prompt']} tokens", size=9)
    figure.suptitle(_made_on(data, "decode"), size=9)
    return figure


def main(
    results: Annotated[Path, typer.Argument(help="What benchmarks/runtime.py wrote.")],
) -> None:
    """Draw the results again."""
    for path in write(json.loads(results.read_text(encoding="utf-8")), results):
        typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
