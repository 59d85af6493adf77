"""What a task's rows look like and how it is scored; one file a suite."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """Columns that hold the text (None: any that `data.COLUMNS` knows) and a metric's name."""

    metric: str
    columns: tuple[str, ...] | None = None


def task_for(name: str, outputs: int | None) -> Task:
    """A known task by name, else accuracy, or correlation for a head of one output."""
    from .glue import GLUE

    if name in GLUE:
        return GLUE[name]
    return Task("pearson_spearman" if outputs == 1 else "accuracy")
