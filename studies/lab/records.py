"""Records of a study: one JSON object a line, each with its settings and the commit that made it.

A record is known by its part, its name and its settings. A second run finds what is there and goes
on; several runs may write to one file.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from twinmerge.artifact.writer import replace_text
from twinmerge.errors import InputError
from twinmerge.evaluation.provenance import provenance

RECORDS = "records.jsonl"
STUDY = "study.json"

Record = dict[str, Any]


class Records:
    """The records of one folder.

    folder:   made if it is not there; `study.json` holds the settings of all records and the
              machine, `records.jsonl` the records
    settings: what all records have in common. Raises `InputError` where the folder has others.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.file = folder, folder / RECORDS
        folder.mkdir(parents=True, exist_ok=True)
        settings, about = _plain(settings), folder / STUDY
        if about.is_file():
            found = json.loads(about.read_text())["settings"]
            differing = [key for key in settings if found.get(key) != settings[key]]
            if differing:
                key = differing[0]
                raise InputError(
                    f"{folder}: holds records with {key} {found.get(key)!r}; now it is "
                    f"{settings[key]!r}. Give another --out, or the same settings."
                )
        else:
            text = {"settings": settings, "provenance": provenance()}
            replace_text(about, json.dumps(text, indent=1) + "\n")
        self.settings = settings
        self.commit = provenance()["commit"]

    def all(self) -> list[Record]:
        return list(read(self.folder))

    def find(self, part: str, name: str, settings: Mapping[str, Any]) -> Record | None:
        wanted = _plain(settings)
        for record in read(self.folder):
            if (record["part"], record["name"], record["settings"]) == (part, name, wanted):
                return record
        return None

    def once(
        self,
        part: str,
        name: str,
        settings: Mapping[str, Any],
        make: Callable[[], Mapping[str, Any]],
    ) -> Record:
        """The record if it is there, else what `make` returns, written down."""
        found = self.find(part, name, settings)
        if found is None:
            head = {"part": part, "name": name, "settings": _plain(settings)}
            found = head | {"commit": self.commit} | _plain(make())
            with open(self.file, "a", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                other = self.find(part, name, settings)  # another run may have been faster
                if other is not None:
                    return other
                file.write(json.dumps(found) + "\n")
        return found


def read(folder: Path) -> Iterator[Record]:
    """Raises `InputError` for a line that is no record."""
    if not (folder / RECORDS).is_file():
        return
    for number, line in enumerate((folder / RECORDS).read_text().splitlines(), start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as problem:
            raise InputError(
                f"{folder / RECORDS}, line {number}: expected a JSON object, {problem}. Remove the "
                "line; what it held is measured again."
            ) from problem


def about(folder: Path) -> dict[str, Any]:
    """Settings and provenance of a study's folder. Raises `InputError` if there is none."""
    file = folder / STUDY
    if not file.is_file():
        raise InputError(f"{folder}: expected a study's folder with {STUDY}, found none.")
    return json.loads(file.read_text())


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON reads it back, so that tuples and lists are equal."""
    return json.loads(json.dumps(dict(values)))
