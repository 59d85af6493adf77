"""What a task's rows look like and how it is scored; one file a suite."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """How one task's rows are read and scored.

    metric:  a name that `metrics.metric` knows
    columns: that hold the text; None: any that `data.COLUMNS` knows
    labels:  the classes in the order of their numbers; none: a regression, or not known
    """

    metric: str
    columns: tuple[str, ...] | None = None
    labels: tuple[str, ...] = ()


def known_tasks() -> dict[str, Task]:
    """Every task that a suite describes, by name."""
    from .glue import GLUE
    from .more_text import MORE_TEXT

    return GLUE | MORE_TEXT


def task_for(name: str, outputs: int | None) -> Task:
    """A known task by name, else accuracy, or correlation for a head of one output."""
    found = known_tasks().get(name)
    return found or Task("pearson_spearman" if outputs == 1 else "accuracy")
