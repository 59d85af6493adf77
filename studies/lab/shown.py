"""A study's records as they are shown: found by part, seeds together, numbers as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from twinmerge.evaluation.report.page import Cell

from .records import Record, about, read
from .static import STATIC

NOTHING = Cell("–")
"""Where no record says anything."""

ROUTED = ("known-head", "routed")
PROTOCOLS = ("oracle", *ROUTED)

NEEDS = {"oracle": "yes", "known-head": "its head", "routed": "no"}
"""Whether an answer needs the task id, by protocol."""


@dataclass(frozen=True)
class Twin:
    """Twin-Merging on one shared expert at one rank."""

    shared: str
    rank: int
    oracle: Record | None
    routed: list[Record]
    """One for each seed of the router."""

    @property
    def name(self) -> str:
        return f"Twin-Merging on {self.shared}, rank {self.rank}"

    def results(self, protocol: str) -> list[Record]:
        if protocol == "oracle":
            return [self.oracle] if self.oracle else []
        return [record[protocol] for record in self.routed]


@dataclass(frozen=True)
class Study:
    """What one study's folder holds.

    records: part -> records in the order in which they were made
    """

    settings: Record
    provenance: Record
    records: Mapping[str, list[Record]]

    @classmethod
    def of_folder(cls, folder: Path) -> Study:
        """Raises `InputError` for a folder that is none, or a line that is no record."""
        found: dict[str, list[Record]] = {}
        for record in read(folder):
            found.setdefault(record["part"], []).append(record)
        return cls(**about(folder), records=found)

    def of(self, part: str, name: str | None = None) -> list[Record]:
        return [r for r in self.records.get(part, []) if name in (None, r["name"])]

    @property
    def tasks(self) -> list[str]:
        return self.settings["experts"]

    @property
    def noisy(self) -> str:
        """Tasks that the second mean leaves out; empty if there is no second mean."""
        return ", ".join(self.settings["noisy"])

    @cached_property
    def own(self) -> dict[str, float]:
        """Task -> its expert's score on test rows."""
        return {record["name"]: record["test"]["score"] for record in self.of("experts")}

    @cached_property
    def twins(self) -> list[Twin]:
        """By shared expert, then by rank; what keeps more than a rank is `compressed`."""
        found: dict[tuple[str, str, int], tuple[list[Record], list[Record]]] = {}
        for place, part in enumerate(("twin oracle", "twin routed")):
            for record in self.of(part):
                settings = record["settings"]
                if settings["exclusive"].keys() == {"rank"}:
                    parameters = json.dumps(settings["parameters"], sort_keys=True)
                    key = record["name"], parameters, settings["exclusive"]["rank"]
                    found.setdefault(key, ([], []))[place].append(record)
        order = list(dict.fromkeys(key[:2] for key in found))
        return [
            Twin(key[0], key[2], next(iter(found[key][0]), None), found[key][1])
            for key in sorted(found, key=lambda key: (order.index(key[:2]), key[2]))
        ]

    @cached_property
    def compressed(self) -> list[Record]:
        """`oracle` with more said than the rank: Figure 6."""
        return [
            record
            for record in self.of("twin oracle")
            if record["settings"]["exclusive"].keys() != {"rank"}
        ]

    @cached_property
    def parts(self) -> dict[str, bool]:
        """What a whole study has -> whether there is a record of it."""
        static = {record["name"] for record in self.of("static")}
        lacking = [name for name in ("pretrained", *STATIC) if name not in static]
        some = f"static merges ({' / '.join(lacking)})" if static and lacking else "static merges"
        return {
            "expert quality": bool(self.of("experts")),
            some: bool(static) and not lacking,
            "Twin-Merging under oracle": any(twin.oracle for twin in self.twins),
            "Twin-Merging under known-head and routed": any(twin.routed for twin in self.twins),
            "ablation": bool(self.of("ablation")),
            "compression": bool(self.compressed),
            "rivals": bool(self.of("rival")),
            "more tasks": bool(self.of("tasks")),
            "unseen tasks": bool(self.of("unseen")),
            "routing with few experts": bool(self.of("routing")),
            "grouped variant": bool(self.of("grouped")),
            "cost": bool(self.of("cost")),
            "better than the paper": bool(self.of("better")),
        }


# -------------------------------------------------------------------------------------- numbers


def percent(value: float | None) -> Cell:
    return NOTHING if value is None else Cell(f"{100 * value:.2f}", value)


def score(value: float | None) -> Cell:
    return NOTHING if value is None else Cell(f"{value:.3f}", value)


def share(record: Record | None) -> Cell:
    """Bytes of one expert, in percent of the base's."""
    found = share_of(record)
    return NOTHING if found is None else Cell(f"{100 * found:.3g}", found)


def share_of(record: Record | None) -> float | None:
    return record["bytes"]["share"] if record and "bytes" in record else None


def spread(values: Sequence[float | None]) -> Cell:
    """In percent: the mean, and the standard deviation of a sample where there are two or more."""
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    text = f"{100 * fmean(known):.2f}"
    if len(known) > 1:
        text += f" ± {100 * stdev(known):.2f}"
    return Cell(text, fmean(known))


def number(value: Any) -> Cell:
    """Anything that a record holds."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell(said(value))
    whole = isinstance(value, int) or abs(value) >= 10_000
    return Cell(f"{value:,.0f}" if whole else f"{value:.4g}", value)


def said(value: Any) -> str:
    """Settings in words: names and values, but of what speaks for itself only the value."""
    if isinstance(value, Mapping):
        return ", ".join(
            said(each) if name in ("dtype", "form") else f"{name} {said(each)}"
            for name, each in value.items()
        )
    if isinstance(value, list | tuple):
        return " + ".join(said(each) for each in value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def rows_said(results: Iterable[Record]) -> str:
    """On how many rows, of how many tasks; `results` as `Lab.normalised` makes them."""
    counts = sorted({sum(result["rows"].values()) for result in results})
    tasks = sorted({len(result["rows"]) for result in results})
    return f"{_range(counts)} rows of {_range(tasks)} task{'' if tasks == [1] else 's'}"


def _range(values: Sequence[int]) -> str:
    ends = dict.fromkeys((values[0], values[-1]))
    return " to ".join(f"{value:,}" for value in ends)


def grouped_said(record: Record) -> str:
    """Of the grouped variant: by what rows were put together."""
    settings = record["settings"]
    if settings["groups"] is None:
        return "every row exactly"
    return f"{settings['groups']} groups by {settings['by']}"


def needs(rival: Record) -> str:
    """Whether a rival's answers need the task id, as `NEEDS` says it."""
    return NEEDS["oracle"] if rival["needs_task"] else NEEDS[rival["protocol"]]


def settings_said(record: Record, *without: str) -> str:
    return said({k: v for k, v in record["settings"].items() if k not in without})
