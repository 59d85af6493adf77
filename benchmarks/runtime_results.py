"""The rows of the runtime benchmark: kept in a JSON file, and told on stderr as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from twinmerge.evaluation.provenance import provenance


class Results:
    """The JSON file, written after every row; rows of the same commit and settings are kept."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings, self.made = path, settings, provenance()
        if settings["device"].startswith("cuda"):
            self.made["hardware"]["gpu"] = torch.cuda.get_device_name(settings["device"])
        text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        self.data: dict[str, Any] = json.loads(text)

    def begin(self, part: str) -> None:
        """Keep the rows of this part if this very code made them with these settings."""
        commit, before = self.made["commit"], self.data.get(part, {})
        section = {"commit": commit, "settings": self.settings, "rows": []}
        # With changes that are not committed, the commit does not say which code ran.
        if commit is not None and not commit.endswith("+") and before.keys() == section.keys():
            same = (before["commit"], before["settings"]) == (commit, self.settings)
            section["rows"] = before["rows"] if same else []
        self.data[part] = section

    def missing(self, part: str, keys: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those keys that no row of the part has."""
        rows = self.data[part]["rows"]
        return [key for key in keys if not any(key.items() <= row.items() for row in rows)]

    def add(self, part: str, found: dict[str, Any]) -> None:
        self.data[part]["rows"].append(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {"provenance": self.made} | {k: v for k, v in self.data.items() if k != "provenance"}
        self.path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; call it with what was finished."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total)

        def advance(text: str) -> None:
            bar.console.print(text, highlight=False)
            bar.advance(task)

        yield advance


def shown(ratio: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}x" for name, value in list(ratio.items())[1:])
