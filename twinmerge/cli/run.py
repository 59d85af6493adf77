"""Commands that answer: run, and explain, which says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .. import show
from ..errors import InputError
from .app import app
from .options import (
    BatchSize,
    Columns,
    Device,
    Dtype,
    Json,
    MaxTokens,
    Out,
    Quiet,
    Threshold,
    TopK,
)
from .plumbing import bar, lines_of, listed, stages, weighting


@app.command()
def run(
    out: Out,
    file: Annotated[
        Path | None, typer.Argument(help="Lines of text or JSON lines; default: standard input.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Use this expert for every row.")] = None,
    allowed: Annotated[
        str | None, typer.Option(help="Experts that the router may choose from, e.g. `qqp,mrpc`.")
    ] = None,
    top_k: TopK = None,
    threshold: Threshold = None,
    columns: Columns = None,
    batch_size: BatchSize = 32,
    max_tokens: MaxTokens = None,
    max_new_tokens: Annotated[int, typer.Option(help="Generation: tokens to add.", min=1)] = 128,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines: always so.")] = True,
) -> None:
    """Answer every row: JSON lines out, in the order of the input.

    Each says which expert answered, with what weight, and the answer. A plain line is one text
    (a tab separates a pair); JSON lines hold `text` and `text_pair`, or columns as public data sets
    name them. A batch in which every row uses few experts runs faster: `--top-k 1` gives each row
    its best one. Rows then say how much weight was `dropped`. `confidence` is the probability of
    the likeliest expert; a row that is unlike all experts' data says `new`, and its weights sum
    below 1, down to 0: the shared expert, with the head of the likeliest.
    """
    from ..artifact.reader import Artifact
    from ..data import parse_inputs, text_of
    from ..runtime.answer import KEYS, answer_texts
    from ..runtime.devices import usable
    from ..runtime.load import load

    Artifact(out, check=False)  # a wrong folder is told before standard input is waited for
    lines = lines_of(file)
    rows = parse_inputs(lines, str(file or "standard input"))
    if not rows:
        raise InputError(f"{file or 'standard input'}: no rows to answer.")
    texts = []
    for number, row in enumerate(rows, 1):
        try:
            texts.append(text_of(row, listed(columns)))
        except InputError as problem:
            raise InputError(f"{file or 'standard input'}: row {number}: {problem}") from None
    model = load(out, device=usable(device, "--device"), dtype=dtype)
    with bar(quiet, "answering") as progress:
        results = answer_texts(
            model,
            texts,
            task=task,
            allowed=listed(allowed),
            batch_size=batch_size,
            max_tokens=max_tokens,
            max_new_tokens=max_new_tokens,
            top_k=top_k,
            threshold=threshold,
            progress=progress,
        )
        for row, result in zip(rows, results, strict=True):
            # A column that is called as one of ours is renamed in every row, also where this result
            # has no such key: what a name means must not depend on the row.
            kept = {f"input_{key}" if key in KEYS else key: row[key] for key in row}
            typer.echo(json.dumps(kept | result, ensure_ascii=False))


@app.command()
def explain(
    out: Out,
    text: Annotated[
        str, typer.Argument(help="A text; or JSON: a row as `run` reads it, or a chat's messages.")
    ],
    text_pair: Annotated[str | None, typer.Argument(help="Its second part, for pairs.")] = None,
    task: Annotated[str | None, typer.Option(help="Force this expert, and its head.")] = None,
    weights: Annotated[str, typer.Option(help="Force weights: `a=0.7,b=0.3`.")] = "",
    allowed: Annotated[
        str | None, typer.Option(help="Let the router choose from these only: `qqp,mrpc`.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Force whose head answers.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Routing examples to compare with: a folder like fit-router's. Default: those "
            "that `fit-router --examples N` kept."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which file of EXPERT/ in --data to read.")] = "train",
    nearest: Annotated[int, typer.Option(help="How many nearest examples to show.", min=1)] = 5,
    base: Annotated[
        str | None, typer.Option(help="Where the base is, if not where the artifact says.")
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Do not run the base.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw it: FILE.png or FILE.svg (needs matplotlib).")
    ] = None,
    columns: Columns = None,
    max_tokens: MaxTokens = None,
    max_new_tokens: Annotated[int, typer.Option(help="Generation: tokens to add.", min=1)] = 24,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Why OUT answers TEXT as it does: the router's choice, and what every expert would say.

    Weights, calibrated probabilities and novelty; the routing examples that come nearest; and the
    answers as routed, of each expert alone, of the shared expert and of the base. With `--task`,
    `--weights`, `--allowed` or `--head` also the answer that this forces, beside the routed one.
    """
    from ..artifact.reader import Artifact
    from ..data import read_tasks, text_of
    from ..runtime.devices import usable
    from ..runtime.explain import explain, read_text
    from ..runtime.load import load
    from ..show.explain import explain_text

    if plot is not None:
        from ..plots.explain import check_target

        check_target(plot)
    manifest = Artifact(out, check=False).manifest
    examples = None
    if data is not None:
        found, _ = read_tasks(data, manifest.names, split)
        names = listed(columns)
        examples = {name: [text_of(row, names) for row in rows] for name, rows in found.items()}
    read = read_text(text, text_pair, listed(columns))
    model = load(out, device=usable(device, "--device"), dtype=dtype)
    with stages(quiet) as progress:
        found = explain(
            model,
            read,
            task=task,
            weights=weighting(weights),
            allowed=listed(allowed),
            head=head,
            examples=examples,
            count=nearest,
            base=False if no_base else base or True,
            max_tokens=max_tokens,
            max_new_tokens=max_new_tokens,
            progress=progress,
        ).to_dict()
    show.print_result(found, as_json, explain_text)
    if plot is not None:
        from ..plots.explain import write_plot

        write_plot(found, plot)
        typer.echo(f"drawn: {plot}", err=as_json)
