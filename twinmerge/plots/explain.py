"""One explanation as a picture: weights and probabilities, answers, nearest examples."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError
from ..plots import check_extra
from ..show.explain import (
    MEASURES,
    MOST_EXPERTS,
    forced_by,
    in_order,
    mixture,
    printable,
    ranking,
    said_of,
    way_of,
)

SUFFIXES = (".png", ".svg")
WIDTH = 12.0
"""Inches."""

DPI = 120
ROW = 0.3
"""Inches of one line of a table or one expert's bars."""


def check_target(path: Path | str) -> None:
    """Raises `MissingExtra`, and `InputError` for another kind of file, before anything runs."""
    check_extra()
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {path}: expected a file name that ends in .png or .svg.")


def write_plot(result: dict[str, Any], path: Path | str) -> Path:
    """Draw `Explanation.to_dict()` into a PNG or SVG file, which is replaced; gives its path.

    Raises `MissingExtra`, `InputError` for another suffix, `OutputError` if it cannot be written.
    """
    check_target(path)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():  # signs that the font lacks are drawn as boxes
            warnings.filterwarnings("ignore", message=".*missing from.*font", category=UserWarning)
            draw(result).savefig(path, dpi=DPI)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise OutputError(f"{path}: cannot write the picture there: {reason}.") from problem
    return path


def draw(result: dict[str, Any]) -> Any:
    """The figure: `WIDTH` inches wide, as high as there are experts and examples."""
    from matplotlib.figure import Figure

    names = ranking(result)[:MOST_EXPERTS]
    replies = in_order(result, names)
    near = result["nearest"]
    examples = [] if near is None else near["neighbours"]
    above, below = ROW * (max(len(names), len(replies)) + 2), ROW * (len(examples) + 2)
    heights = [above, below] if examples else [above]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.9), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=(4, 6))
    figure.suptitle(_title(result), fontsize="medium", parse_math=False)
    _bars(figure.add_subplot(grid[0, 0]), result, names)
    _replies(figure.add_subplot(grid[0, 1]), replies)
    if near is not None and examples:
        _examples(figure.add_subplot(grid[1, :]), examples, near)
    return figure


def _title(result: dict[str, Any]) -> str:
    text = _clipped(" | ".join(map(printable, result["text"])), 130)
    routing, lines = result["routing"], [text]
    if routing is not None:
        lines.append(
            f"{routing['likeliest']}, confidence {routing['confidence']:.2f}; {routing['outcome']}"
        )
    if result["forced"] is not None:
        lines.append(f"forced: {forced_by(result['forced'])}")
    return "\n".join(lines)


def _bars(axes: Any, result: dict[str, Any], names: list[str]) -> None:
    routing, forced = result["routing"], result["forced"]
    series: list[tuple[str, dict[str, float]]] = []
    if routing is not None:
        series += [("weight", routing["weights"]), ("probability", routing["probabilities"])]
    if forced is not None:
        reply = next(reply for reply in result["answers"] if reply["way"] == "forced")
        series.append(("forced weight", reply["weights"]))
    height = 0.8 / max(len(series), 1)
    for index, (title, values) in enumerate(series):
        at = [place + (index - (len(series) - 1) / 2) * height for place in range(len(names))]
        axes.barh(at, [values[name] for name in names], height, label=title, color=f"C{index}")
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    low = min([0.0, *(values[name] for _, values in series for name in names)])
    high = max([1.0, *(values[name] for _, values in series for name in names)])
    axes.set_xlim(low, high)
    axes.set_title("Weights and probabilities" if series else "No router", fontsize="medium")
    if series:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.07), "ncols": len(series)}
        axes.legend(fontsize="small", frameon=False, **below)


def _replies(axes: Any, replies: list[dict[str, Any]]) -> None:
    """A line each; bars are the scores of labels."""
    scores = [reply["score"] or 0.0 for reply in replies]
    colors = [
        "C0" if r["way"] == "routed" else "C2" if r["way"] == "forced" else "0.8" for r in replies
    ]
    axes.barh(range(len(replies)), scores, 0.8, color=colors, alpha=0.5)
    for place, reply in enumerate(replies):
        line = said_of(reply)
        if reply["score"] is not None:
            line += f"  {reply['score']:.2f}"
        if reply["way"] in ("routed", "forced"):
            line += f"  ({mixture(reply['weights'])})"
        elif reply["head"] is not None and reply["head"] != reply["expert"]:
            line += f"  (head of {reply['head']})"
        line = _clipped(line, 75)
        axes.text(0.01, place, line, va="center", fontsize="small", parse_math=False)
    axes.set_yticks(range(len(replies)), [way_of(reply) for reply in replies], parse_math=False)
    axes.set_ylim(len(replies) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    if not any(scores):
        axes.set_xticks([])
    axes.set_title(
        "Answers" + (" (bars: score of the label)" if any(scores) else ""), fontsize="medium"
    )


def _examples(axes: Any, examples: list[dict[str, Any]], near: dict[str, Any]) -> None:
    """A line each; bars are distances."""
    distances = [each["distance"] for each in examples]
    axes.barh(range(len(examples)), distances, 0.8, color="C1", alpha=0.4)
    if near["usual"] is not None:
        axes.axvline(near["usual"], color="C1", ls="--", label="usual from one to the next")
        axes.legend(fontsize="small", loc="lower right")
    axes.set_xlim(0, 1.02 * max(*distances, near["usual"] or 0.0) or 1.0)
    for place, each in enumerate(examples):
        words = " | ".join(map(printable, each["text"]))
        line = _clipped(f"{each['distance']:.2f}  {words}", 140)
        axes.text(
            0.005,
            place,
            line,
            va="center",
            fontsize="small",
            parse_math=False,
            transform=axes.get_yaxis_transform(),
        )
    axes.set_yticks(range(len(examples)), [e["expert"] for e in examples], parse_math=False)
    axes.set_ylim(len(examples) - 0.5, -0.5)
    title = f"Nearest of {near['rows']:,} routing examples: {MEASURES[near['measure']]}"
    axes.set_title(title, fontsize="medium", parse_math=False)


def _clipped(line: str, most: int) -> str:
    return line if len(line) <= most else f"{line[: most - 4]} ..."
