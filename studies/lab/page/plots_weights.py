"""Weights that the router gives to experts, as fields of colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .drawing import new_figure
from .shown import Study
from .tables_further import main_routing


def weights(study: Study) -> Any:
    """Left: mean weights, right: the expert found likeliest (share of rows)."""
    record = main_routing(study)
    if record is None:
        return None
    tasks = record["routing"]["tasks"]
    names = list(tasks)
    chosen = [[n / sum(each["chosen"]) for n in each["chosen"]] for each in tasks.values()]
    size = 1.6 + 0.42 * len(names)
    figure, (left, right) = new_figure(2 * size + 0.8, size + 0.3, 2)
    _heat(left, [each["weights"] for each in tasks.values()], names, names)
    _heat(right, chosen, names, names)
    left.set_title("mean weight of each expert")
    right.set_title("share of rows for which it is likeliest")
    left.set_ylabel("task")
    figure.suptitle(
        f"router of seed {record['settings']['seed']}, shared expert: {record['name']}", size=9
    )
    return figure


def few_experts(study: Study) -> Any:
    """The paper's Figure 5a: who answers a task while the number of experts grows."""
    records = study.of("routing")
    if not records:
        return None
    names = list(dict.fromkeys(n for record in records for n in record["settings"]["names"]))
    cells = [[record["weights"].get(name) for name in names] for record in records]
    labels = [f"{r['name']}: {len(r['settings']['names'])} experts" for r in records]
    figure, (axes,) = new_figure(2.4 + 0.5 * len(names), 1.3 + 0.36 * len(records))
    _heat(axes, cells, labels, names)
    axes.set_title("mean weight of each expert that is there")
    return figure


def _heat(
    axes: Any, cells: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Numbers in coloured fields; None: an empty field."""
    missing = float("nan")
    axes.imshow(
        [[missing if value is None else value for value in row] for row in cells],
        cmap="Blues", vmin=0, vmax=1, aspect="auto",
    )  # fmt: skip
    for y, x, value in _fields(cells):
        if value >= 0.005:
            axes.text(
                x, y, f"{value:.2f}".lstrip("0"), ha="center", va="center", size=7,
                color="white" if value > 0.55 else "black",
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), columns, rotation=55, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _fields(cells: Sequence[Sequence[float | None]]) -> Iterator[tuple[int, int, float]]:
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if value is not None:
                yield y, x, value
