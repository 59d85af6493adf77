#!/usr/bin/env python3
"""The paper's text study: static merges and Twin-Merging on real experts, honestly.

    python studies/glue.py --experts EXPERTS --data DATA --base BASE --out results/glue [--quick]

EXPERTS holds one folder per task, a checkpoint or an adapter, named as the task; DATA holds
`<task>/{train,validation,test}.jsonl.gz`. `--experts` and `--data` may be given several times.

OUT/records.jsonl grows record by record, and a second run goes on where one stopped; several runs
may share the work (`--part`, and one `--work`). Then OUT/tables.md, plots (PNG and SVG) and
OUT/report.html are made from the records alone. `--tables` makes them and measures nothing.

Chosen on validation rows: coefficients of static merges, and what `better` keeps. Routers learn
from train rows. Test rows choose nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from lab.analysis import cost, grouped, routing
from lab.better.better import better
from lab.compression import compression
from lab.inputs import inputs
from lab.lab import Lab, Settings
from lab.page.page import write
from lab.paths import paths
from lab.records import Records
from lab.rivals.rivals import rivals
from lab.static import Say, static
from lab.tasks import tasks
from lab.twin import ablation, twin
from lab.unseen import unseen

from twinmerge.errors import InputError, TwinMergeError


class Part(str, Enum):
    """Of the study, by the paper's tables and figures."""

    static = "static"
    twin = "twin"
    ablation = "ablation"
    compression = "compression"
    rivals = "rivals"
    tasks = "tasks"
    unseen = "unseen"
    routing = "routing"
    grouped = "grouped"
    cost = "cost"
    paths = "paths"
    better = "better"


PARTS: dict[Part, Callable[[Lab, Say], None]] = {
    Part.static: static,
    Part.twin: twin,
    Part.ablation: ablation,
    Part.compression: compression,
    Part.rivals: rivals,
    Part.tasks: tasks,
    Part.unseen: unseen,
    Part.routing: routing,
    Part.grouped: grouped,
    Part.cost: cost,
    Part.paths: paths,
    Part.better: better,
}

QUICK = Settings(
    choose_rows=8, better_rows=8, test_rows=24, router_rows=40, seeds=(0,), ranks=(1, 16)
)


def folders(places: list[Path], files: tuple[str, ...]) -> dict[str, Path]:
    """Folder name -> folder, for those in `places` that hold one of `files`.

    Raises `InputError` for none, and for a name that is in two places.
    """
    found: dict[str, Path] = {}
    for place in places:
        if not place.is_dir():
            raise InputError(f"{place}: expected a folder, found none.")
        for each in sorted(place.iterdir()):
            if any((each / file).is_file() for file in files):
                if each.name in found:
                    raise InputError(f"'{each.name}' is in {found[each.name].parent} and {place}.")
                found[each.name] = each
    if not found:
        places_said = ", ".join(map(str, places))
        raise InputError(f"{places_said}: no folder in it with {' or '.join(files)}.")
    return found


def noise(asked: str | None, names: list[str]) -> tuple[str, ...]:
    """Raises `InputError` for a task that the study does not have."""
    if asked is None:
        return tuple(name for name in Settings.noisy if name in names)
    found = tuple(name for name in asked.split(",") if name)
    if unknown := [name for name in found if name not in names]:
        raise InputError(f"--noisy {unknown[0]}: no such task here. Known: {', '.join(names)}.")
    return found


def done(files: list[Path]) -> None:
    typer.echo("\n".join(map(str, files)))


def main(
    out: Annotated[Path, typer.Option(help="Gets records, tables, plots, report.")],
    experts: Annotated[
        list[Path] | None, typer.Option(help="Folder of experts; may be repeated.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Folder of tasks; may be repeated.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Folder or hub id of the base model.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="Default: all.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where artifacts stay for the next run.")
    ] = None,
    title: Annotated[str, typer.Option(help="What the experts are.")] = "",
    choose_rows: Annotated[
        int | None, typer.Option(help="Validation rows per task that choose. Default: 200.")
    ] = None,
    test_rows: Annotated[int | None, typer.Option(help="Test rows per task. Default: all.")] = None,
    router_rows: Annotated[
        int | None, typer.Option(help="Train rows per task for the router. Default: 1,000.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longer rows are cut.")] = 96,
    noisy: Annotated[
        str | None,
        typer.Option(help="Tasks that a second mean leaves out. Default: rte, if it is there."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A fraction of everything that is not said otherwise.")
    ] = False,
    tables: Annotated[
        bool, typer.Option("--tables", help="Only make tables, plots and report again.")
    ] = False,
) -> None:
    """The paper's text study on your experts: records, tables, plots and a report page."""
    started = time.perf_counter()

    def say(text: str) -> None:
        typer.echo(f"{time.perf_counter() - started:6.0f} s  {text}", err=True)

    try:
        if tables:
            done(write(out))
            return
        for name, given in (("experts", experts), ("data", data), ("base", base)):
            if not given:
                raise InputError(f"--{name}: missing. Only --tables measures nothing.")
        assert experts and data and base
        found = folders(experts, ("config.json", "adapter_config.json"))
        splits = ("train.jsonl.gz", "train.jsonl")
        rows = folders(data, splits)
        if lacking := [name for name in found if name not in rows]:
            raise InputError(f"expert '{lacking[0]}': no rows in {', '.join(map(str, data))}.")
        given = {"choose_rows": choose_rows, "test_rows": test_rows, "router_rows": router_rows}
        settings = replace(
            QUICK if quick else Settings(),
            title=title,
            max_tokens=max_tokens,
            noisy=noise(noisy, list(found)),
            **{name: value for name, value in given.items() if value is not None},
        )
        say("reading what the study is of")
        records = Records(
            out,
            asdict(settings)
            | {"experts": list(found)}
            | {"inputs": inputs(base, found, {name: rows[name] for name in found})},
        )
        with tempfile.TemporaryDirectory() as temporary:
            places = {name: rows[name].parent for name in found}
            lab = Lab(list(found), found, places, base, work or Path(temporary), settings, records)
            for each in part or PARTS:
                say(f"part {each.value}")
                PARTS[each](lab, say)
        done(write(out))
    except TwinMergeError as problem:
        raise SystemExit(f"error: {problem}") from problem


if __name__ == "__main__":
    typer.run(main)
