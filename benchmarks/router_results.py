"""The rows of the router benchmark, kept in a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinmerge.artifact.writer import replace_text
from twinmerge.evaluation.provenance import provenance


class Results:
    """A JSON file that grows row by row."""

    def __init__(self, path: Path, settings: dict[str, Any], data_folder: Path) -> None:
        self.path, self.data_folder = path, data_folder
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        if self.data.get("settings", settings) != settings:
            raise SystemExit(f"{path}: holds results of {self.data['settings']}, not {settings}.")
        self.data["settings"] = settings
        self.data.setdefault("provenance", provenance())

    def find(self, part: str, key: Mapping[str, Any]) -> Any:
        rows = self.data.get(part, [])
        return next((r for r in rows if all(r.get(k) == v for k, v in key.items())), None)

    def has(self, part: str, key: Mapping[str, Any]) -> bool:
        return self.find(part, key) is not None

    def add(self, part: str, row: dict[str, Any]) -> None:
        self.data.setdefault(part, []).append(row)
        replace_text(self.path, json.dumps(self.data, indent=1) + "\n")
