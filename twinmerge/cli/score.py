"""Commands that measure: eval and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import show
from ..errors import InputError
from .app import app
from .options import (
    BatchSize,
    Columns,
    Data,
    Json,
    MaxTokens,
    MostRows,
    Out,
    Quiet,
    Split,
    Threshold,
    TopK,
)
from .plumbing import listed, stages


@app.command("eval")
def evaluate(
    out: Out,
    data: Data,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="routed, known-head, oracle or shared; may be repeated. Default: routed."
        ),
    ] = None,
    split: Split = "test",
    experts: Annotated[
        Path | None,
        typer.Option(
            help="The recipe that OUT was built from: also score its experts themselves, which "
            "gives normalised scores.",
            metavar="RECIPE",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="With --experts: where the base is, if not as in RECIPE.")
    ] = None,
    rows: MostRows = None,
    columns: Columns = None,
    top_k: TopK = None,
    threshold: Threshold = None,
    batch_size: BatchSize = 32,
    max_tokens: MaxTokens = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score OUT on the labelled rows of DATA, under one or more named protocols.

    *routed*: weights and head both from the router, nothing known (the headline). *known-head*: the
    true task's head, routed weights. *oracle*: the true expert chosen. *shared*: the static merge
    alone, with the true task's head. `--top-k` and `--threshold` count where the router decides, in
    *routed* and *known-head*: compare the scores with and without before using them.
    """
    from ..data import drawn, read_tasks, task_files
    from ..evaluation.reference import expert_model, score_plain
    from ..evaluation.score import PROTOCOLS, Protocol, evaluate, prepare
    from ..recipe import load_recipe
    from ..runtime.load import load

    asked: list[Protocol] = [p for name in protocol or ["routed"] for p in PROTOCOLS if p == name]
    for name in protocol or []:
        if name not in PROTOCOLS:
            raise InputError(f"--protocol {name}: expected one of {', '.join(PROTOCOLS)}.")
    model = load(out)
    found, unused = read_tasks(data, model.experts, split)
    for name in unused:
        typer.echo(f"note: {data}: '{name}' is no expert of {out}; not scored", err=True)
    whole = [name for name, path in task_files(data, split).items() if path.parent == data]
    if whole:
        typer.echo(
            f"note: {data}: '{whole[0]}' has one file and no {split} part. If the router was "
            "fitted on the same rows, routed scores flatter: keep rows apart in "
            f"{whole[0]}/train.jsonl and {whole[0]}/{split}.jsonl",
            err=True,
        )
    found = {name: drawn(table, rows) for name, table in found.items()}
    prepared = prepare(model, found, max_tokens=max_tokens, columns=listed(columns))
    for name, task in prepared.items():
        if task.encoded.truncated:
            typer.echo(f"note: {name}: {task.encoded.truncated} rows were cut to fit", err=True)
    reports = []
    with stages(quiet) as progress:
        reference = None
        if experts is not None:
            reference = {}
            recipe = load_recipe(experts).resolved(experts.parent)
            for done, (name, task) in enumerate(prepared.items()):
                progress("experts", done, len(prepared))
                plain = expert_model(model, name, recipe, base=base)
                reference[name] = score_plain(model, plain, name, task, batch_size=batch_size).score
        for each in asked:
            report = evaluate(
                model,
                prepared,
                each,
                reference=reference,
                batch_size=batch_size,
                top_k=top_k,
                threshold=threshold,
                progress=lambda _, done, total, stage=each: progress(stage, done, total),
            )
            reports.append(report)
    result = {"artifact": str(out), "split": split, "reports": [r.to_dict() for r in reports]}
    show.print_result(result, as_json, show.eval_text)


@app.command()
def report(
    out: Out,
    data: Data,
    to: Annotated[
        Path | None,
        typer.Option(
            help="HTML file to write, and beside it one of markdown (.md); both are replaced. "
            "Default: OUT-report.html, here."
        ),
    ] = None,
    split: Split = "test",
    unseen: Annotated[
        Path | None,
        typer.Option(help="Such a folder of tasks that no expert saw: how many are noticed?"),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(
            help="The recipe that OUT was built from: also score its experts and its base "
            "themselves, which gives normalised scores.",
            metavar="RECIPE",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Score this base too, under each expert's head.")
    ] = None,
    rows: MostRows = None,
    columns: Columns = None,
    batch_size: BatchSize = 32,
    max_tokens: MaxTokens = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """One page about OUT on the labelled rows of DATA, to look at in a browser; and as markdown.

    Scores under all protocols, what is confused with what, mean weights by task, calibration,
    accuracy against coverage, bytes and spectra, and what is wrong, with what to do about it.
    """
    from ..data import drawn, read_rows, read_tasks, task_files
    from ..evaluation.report import gather
    from ..evaluation.report.page import write
    from ..evaluation.report.show import report_text
    from ..recipe import load_recipe
    from ..runtime.load import load

    to = to or Path(f"{out.resolve().name}-report.html")
    if to.suffix != ".html":
        raise InputError(f"--to {to}: expected a name that ends in .html.")
    model = load(out)
    found, unused = read_tasks(data, model.experts, split)
    for name in unused:
        typer.echo(f"note: {data}: '{name}' is no expert of {out}; not measured", err=True)
    others = {}
    for name, path in task_files(unseen, split).items() if unseen is not None else ():
        if name in model.experts:
            typer.echo(f"note: {unseen}: '{name}' is an expert of {out}; not used", err=True)
        elif table := read_rows(path):
            others[name] = table
    if unseen is not None and not others:
        raise InputError(f"--unseen {unseen}: has no rows of other tasks, TASK/{split}.jsonl.")
    with stages(quiet) as progress:
        measured = gather(
            model,
            {name: drawn(table, rows) for name, table in found.items()},
            unseen={name: drawn(table, rows) for name, table in others.items()},
            recipe=None if experts is None else load_recipe(experts).resolved(experts.parent),
            base=base,
            data=str(data),
            split=split,
            batch_size=batch_size,
            max_tokens=max_tokens,
            columns=listed(columns),
            progress=progress,
        )
    files = write(measured, to)
    written = [str(file) for file in files]
    show.print_result({"written": written} | measured.to_dict(), as_json, report_text)
