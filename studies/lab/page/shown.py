"""A study's records as they are shown: found by part, seeds together, numbers as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from twinmerge.evaluation.report import page
from twinmerge.evaluation.report.page import Cell

from ..lab import STORED
from ..records import Record, about, read
from ..static import STATIC
from ..twin import SHARED

NOTHING = Cell("–")
"""Where no record says anything."""

ROUTED = ("known-head", "routed")
PROTOCOLS = ("oracle", *ROUTED)

NEEDS = {"oracle": "yes", "known-head": "its head", "routed": "no"}
"""Whether an answer needs the task id, by protocol."""


LEFT_OUT = "left out"
"""Of a record: why there are no scores."""


@dataclass(frozen=True)
class Table(page.Table):
    """notes: said below it"""

    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section(page.Section):
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Twin:
    """Twin-Merging on one shared expert at one rank.

    experts: how many there are
    routed:  one for each seed of the router
    """

    shared: str
    rank: int
    experts: int
    oracle: Record | None
    routed: list[Record]

    @property
    def name(self) -> str:
        return f"Twin-Merging on {self.shared}, rank {self.rank}"

    def results(self, protocol: str) -> list[Record]:
        if protocol == "oracle":
            return [self.oracle] if self.oracle else []
        return [record[protocol] for record in self.routed]

    def share(self, protocol: str) -> float | None:
        """Bytes of one expert, with its part of the router where a row needs one."""
        if protocol == "oracle":
            return share_of(self.oracle)
        if not self.routed:
            return None
        router = fmean(record["router"]["bytes"] for record in self.routed)
        return share_of(self.oracle, router / self.experts)


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
        """What has been scored."""
        return [r for r in self._all(part, name) if LEFT_OUT not in r]

    def left_out(self, part: str) -> list[Record]:
        return [r for r in self._all(part) if LEFT_OUT in r]

    def _all(self, part: str, name: str | None = None) -> list[Record]:
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

    # ------------------------------------------------------------------------ what was chosen

    def chosen(self, name: str) -> Record | None:
        """The coefficients of a static merge that are best on validation rows."""
        return max(self.of("choice", name), key=lambda each: each["normalised"], default=None)

    def validated(self, record: Record) -> float:
        """Score on validation rows of the coefficients of a static merge, or of a shared expert;
        infinite for a method that has none to choose."""
        tried = self.of("choice", record["name"])
        mine = {"method": record["settings"]["method"]} | record["settings"]["parameters"]
        found = [each["normalised"] for each in tried if each["settings"] == mine]
        return found[0] if found else -inf if tried else inf

    def is_chosen(self, record: Record) -> bool:
        choice = self.chosen(record["name"])
        return choice is None or self.validated(record) == choice["normalised"]

    @cached_property
    def static(self) -> list[Record]:
        """One for each method; of several with the chosen coefficients, the last."""
        return list({r["name"]: r for r in self.of("static") if self.is_chosen(r)}.values())

    @cached_property
    def twin_records(self) -> list[Record]:
        """Of each shared expert those with the best coefficients that it has been measured with."""
        records = [*self.of("twin oracle"), *self.of("twin routed")]
        best: dict[str, float] = {}
        for record in records:
            score = self.validated(record)
            best[record["name"]] = max(score, best.get(record["name"], score))
        return [record for record in records if self.validated(record) == best[record["name"]]]

    @property
    def unscored(self) -> list[str]:
        """What has no test record with the chosen coefficients."""
        there = {record["name"] for record in self.static}
        names = [record["name"] for record in self.of("choice") if record["name"] not in there]
        found = [(name, name) for name in dict.fromkeys(names)]
        stale = [record["name"] for record in self.twin_records if not self.is_chosen(record)]
        found += [(f"Twin-Merging on {name}", name) for name in dict.fromkeys(stale)]
        return [
            f"{title} ({settings_said(choice, 'method')})"
            for title, name in found
            if (choice := self.chosen(name)) is not None
        ]

    @cached_property
    def twins(self) -> list[Twin]:
        """By shared expert, then by rank; what keeps more than a rank is `compressed`.

        Of several records of one thing (their storage may differ), the last.
        """
        found: dict[tuple[str, int], dict[int | None, Record]] = {}
        for record in self.twin_records:
            settings = record["settings"]
            if settings["exclusive"].keys() == {"rank"}:
                key = record["name"], settings["exclusive"]["rank"]
                found.setdefault(key, {})[settings.get("seed")] = record
        order = list(dict.fromkeys(name for name, _ in found))
        twins = []
        for key in sorted(found, key=lambda key: (order.index(key[0]), key[1])):
            oracle = found[key].pop(None, None)
            twins.append(Twin(*key, len(self.tasks), oracle, list(found[key].values())))
        return twins

    @property
    def gaps(self) -> str:
        """The ranks that have no record under a protocol under which others have one."""
        parts = []
        for protocol, title in (("oracle", "oracle"), ("routed", "known-head and routed")):
            known = [(twin.shared, twin.rank) for twin in self.twins if twin.results(protocol)]
            lacking = {
                shared: [str(r) for r in self.settings["ranks"] if (shared, r) not in known]
                for shared in SHARED
            }
            each = [f"{name} {', '.join(ranks)}" for name, ranks in lacking.items() if ranks]
            if known and each:
                parts.append(f"under {title}: on {'; on '.join(each)}")
        return f"Ranks without a record {', and '.join(parts)}." if parts else ""

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
        static = {record["name"] for record in self.static}
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


def share(found: float | None) -> Cell:
    """Bytes of one expert, in percent of the base's."""
    return NOTHING if found is None else Cell(f"{100 * found:.3g}", found)


def share_of(record: Record | None, more: float = 0.0) -> float | None:
    """more: bytes that each expert has beside its own"""
    if record is None or "bytes" not in record:
        return None
    return record["bytes"]["share"] + more / record["bytes"]["base_float16"]


def share_with_router(record: Record | None, experts: int) -> float | None:
    """Of a record that knows its router's bytes."""
    router = record["bytes"]["router"] if record and "bytes" in record else 0
    return share_of(record, router / experts) if router else None


def stored(records: Iterable[Record]) -> str:
    """The dtypes in which artifacts of Twin-Merging are stored."""
    return ", ".join(dict.fromkeys(r["settings"].get("stored", STORED) for r in records))


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


def at_most(limit: int | None) -> str:
    return "all" if limit is None else f"at most {limit:,}"


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
