"""The command line: parse, call one library function, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .errors import InputError, TwinMergeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Many fine-tuned models of one base in one folder that picks, per input, what it needs.

    The usual order: **merge** a recipe into a folder, **fit-router** on a few dozen texts per
    expert, then **run** or **eval** it, and **inspect** what it holds.
    """,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Out = Annotated[Path, typer.Argument(help="The artifact's folder, as `merge` wrote it.")]
MaxTokens = Annotated[
    int | None, typer.Option(help="Cut longer inputs to this many tokens. Default: 512 or less.")
]
Columns = Annotated[
    str | None, typer.Option(help="Columns that hold the text, e.g. `premise,hypothesis`.")
]


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(help="YAML: base_model, models, merge_method, ...")],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what it needs, write nothing.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Where the base model is, instead of the recipe's base_model."),
    ] = None,
    max_shard_bytes: Annotated[
        int, typer.Option(help="Size limit of the shared expert's files, in bytes.", min=1)
    ] = 5_000_000_000,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Merge experts as RECIPE says into the new folder OUT."""
    from .recipe import load_recipe

    written = load_recipe(recipe)
    resolved = written.resolved(recipe.parent)
    if base is not None:  # not resolved: a path on the command line counts from here
        written = written.model_copy(update={"base_model": base})
        resolved = resolved.model_copy(update={"base_model": base})
    if dry_run:
        from .artifact.writer import check_target
        from .merging.plan import make_plan

        plan = make_plan(resolved)
        check_target(out)
        summary = plan.summary()
        plan.close()
        _print(summary, as_json, _dry_run_text)
        return
    from .merging.build import build

    with _progress(quiet, "merging") as progress:
        manifest = build(
            resolved, out, written=written, shard_bytes=max_shard_bytes, progress=progress
        )
    for warning in manifest.warnings:
        typer.echo(f"warning: {warning}", err=True)
    _print(_summary(manifest, out), as_json, _inspect_text)


@app.command()
def fit_router(
    out: Out,
    data: Annotated[
        Path,
        typer.Argument(help="Folder with EXPERT.jsonl or EXPERT/SPLIT.jsonl for every expert."),
    ],
    split: Annotated[str, typer.Option(help="Which file of EXPERT/ to read.")] = "train",
    layer: Annotated[
        str, typer.Option(help="Layer to read features from: `auto` or a number (0: embeddings).")
    ] = "",
    rows: Annotated[int | None, typer.Option(help="Rows per expert, at most.")] = None,
    columns: Columns = None,
    max_tokens: MaxTokens = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit the router on rows of DATA and store it in OUT.

    A few dozen texts per expert, like those that it is for, will do; labels are not needed. What
    to use (epoch, layer) is decided on a fifth of the rows that is set aside.
    """
    from .artifact.reader import Artifact
    from .data import read_tasks, text_of
    from .recipe import Router
    from .runtime.router.fit import fit_router as fit

    manifest = Artifact(out, check=False).manifest
    settings: dict[str, Any] = dict(manifest.recipe.get("router", {}))
    if layer:
        settings["layer"] = int(layer) if layer.isdecimal() else layer
    if rows is not None:
        settings["rows_per_task"] = rows
    found, unused = read_tasks(data, manifest.names, split)
    for name in unused:
        typer.echo(f"note: {data}: '{name}' is no expert of {out}; its rows are not used", err=True)
    texts = {
        name: [text_of(row, _columns(columns)) for row in table] for name, table in found.items()
    }
    with _stages(quiet) as progress:
        fitted = fit(
            out, texts, _checked(Router, settings), max_tokens=max_tokens, progress=progress
        )
    _print(fitted.model_dump(mode="json"), as_json, _router_text)


@app.command()
def run(
    out: Out,
    file: Annotated[
        Path | None, typer.Argument(help="Lines of text or JSON lines; default: standard input.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Use this expert for every row.")] = None,
    columns: Columns = None,
    batch_size: Annotated[int, typer.Option(help="Rows per forward.", min=1)] = 32,
    max_tokens: MaxTokens = None,
    max_new_tokens: Annotated[int, typer.Option(help="Generation: tokens to add.", min=1)] = 128,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, ...")] = "cpu",
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines: always so.")] = True,
) -> None:
    """Answer every row: JSON lines out, in the order of the input.

    Each says which expert answered, with what weight, and the answer. A plain line is one text
    (a tab separates a pair); JSON lines hold `text` and `text_pair`, or columns as public data sets
    name them.
    """
    from .data import parse_inputs, text_of
    from .runtime.answer import answer_texts
    from .runtime.load import load

    lines = _lines(file)
    rows = parse_inputs(lines, str(file or "standard input"))
    if not rows:
        raise InputError(f"{file or 'standard input'}: no rows to answer.")
    texts = [text_of(row, _columns(columns)) for row in rows]
    model = load(out, device=_device(device))
    with _progress(quiet, "answering") as progress:
        results = answer_texts(
            model,
            texts,
            task=task,
            batch_size=batch_size,
            max_tokens=max_tokens,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
        for row, result in zip(rows, results, strict=True):
            typer.echo(json.dumps(row | result, ensure_ascii=False))


@app.command("eval")
def evaluate(
    out: Out,
    data: Annotated[
        Path, typer.Argument(help="Folder with EXPERT/SPLIT.jsonl (text columns and `label`).")
    ],
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="routed, known-head, oracle or shared; may be repeated. Default: routed."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which file of EXPERT/ to read.")] = "test",
    experts: Annotated[
        bool,
        typer.Option("--experts", help="Also score the experts themselves: normalised scores."),
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Where the base model is, for --experts.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="First rows of every task only.", min=1)] = None,
    columns: Columns = None,
    batch_size: Annotated[int, typer.Option(help="Rows per forward.", min=1)] = 32,
    max_tokens: MaxTokens = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score OUT on the labelled rows of DATA, under one or more named protocols.

    *routed*: weights and head both from the router, nothing known (the headline). *known-head*: the
    true task's head, routed weights. *oracle*: the true expert chosen. *shared*: the static merge
    alone, with the true task's head.
    """
    from .data import read_tasks
    from .evaluation.reference import expert_model, score_plain
    from .evaluation.score import PROTOCOLS, evaluate, prepare
    from .runtime.load import load

    asked = [p for name in protocol or ["routed"] for p in PROTOCOLS if p == name]
    for name in protocol or []:
        if name not in PROTOCOLS:
            raise InputError(f"--protocol {name}: expected one of {', '.join(PROTOCOLS)}.")
    model = load(out)
    found, unused = read_tasks(data, model.experts, split)
    for name in unused:
        typer.echo(f"note: {data}: '{name}' is no expert of {out}; not scored", err=True)
    if rows is not None:
        found = {name: table[:rows] for name, table in found.items()}
    prepared = prepare(model, found, max_tokens=max_tokens, columns=_columns(columns))
    for name, task in prepared.items():
        if task.encoded.truncated:
            typer.echo(f"note: {name}: {task.encoded.truncated} rows were cut to fit", err=True)
    reports = []
    with _stages(quiet) as progress:
        reference = None
        if experts:
            reference = {}
            for done, (name, task) in enumerate(prepared.items()):
                progress("experts", done, len(prepared))
                plain = expert_model(model, name, base=base)
                reference[name] = score_plain(model, plain, name, task, batch_size=batch_size).score
        for each in asked:

            def step(task: str, done: int, total: int, stage: str = each) -> None:
                progress(stage, done, total)

            reports.append(
                evaluate(
                    model, prepared, each, reference=reference, batch_size=batch_size, progress=step
                )
            )
    result = {"artifact": str(out), "split": split, "reports": [r.to_dict() for r in reports]}
    _print(result, as_json, _eval_text)


@app.command()
def inspect(
    out: Out,
    tensors: Annotated[bool, typer.Option("--tensors", help="One line per tensor.")] = False,
    check: Annotated[bool, typer.Option(help="Compare all files with their digests.")] = True,
    as_json: Json = False,
) -> None:
    """What OUT holds: experts, ranks, bytes, errors and the router; checks that it is whole."""
    from .artifact.reader import Artifact

    manifest = Artifact(out, check=check).manifest
    summary = _summary(manifest, out)
    if as_json and tensors:
        summary["tensors"] = [record.model_dump(mode="json") for record in manifest.tensors]
    _print(summary, as_json, _inspect_text)
    if tensors and not as_json:
        _print_tensors(manifest)


# ---------------------------------------------------------------------------------- printing


def _print(result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], None]) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        text(result)


def _summary(manifest: Any, out: Path) -> dict[str, Any]:
    shared = sum(tensor.bytes for tensor in manifest.tensors)
    ranks = {
        expert.name: [
            share.rank
            for tensor in manifest.tensors
            if (share := tensor.experts.get(expert.name)) and share.rank is not None
        ]
        for expert in manifest.experts
    }
    errors = {
        expert.name: [
            share.error
            for tensor in manifest.tensors
            if tensor.kind == "matrix" and (share := tensor.experts.get(expert.name))
        ]
        for expert in manifest.experts
    }
    return {
        "artifact": str(out),
        "base": manifest.base,
        "model_class": manifest.model_class,
        "merge_method": manifest.recipe.get("merge_method"),
        "bytes": {
            "shared": shared,
            "experts": sum(expert.bytes for expert in manifest.experts),
            "router": manifest.router.bytes if manifest.router else 0,
            "all": sum(record.bytes for record in manifest.files.values()),
        },
        "experts": [
            {
                "name": expert.name,
                "reference": expert.reference,
                "kind": "LoRA" if expert.adapter else "full",
                "bytes": expert.bytes,
                "share_of_base": expert.bytes / shared,
                "max_rank": max(ranks[expert.name], default=0),
                "mean_relative_error": (
                    sum(errors[expert.name]) / len(errors[expert.name])
                    if errors[expert.name]
                    else None
                ),
                "drift": expert.drift,
            }
            for expert in manifest.experts
        ],
        "router": None
        if manifest.router is None
        else {
            key: getattr(manifest.router, key)
            for key in ("layer", "held_out_accuracy", "held_out_rows", "bytes")
        },
        "warnings": list(manifest.warnings),
    }


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def _inspect_text(result: dict[str, Any]) -> None:
    size = result["bytes"]
    typer.echo(
        f"{result['artifact']}: {len(result['experts'])} experts of {result['base']} "
        f"({result['model_class']}, shared expert by {result['merge_method']})"
    )
    _table(
        "",
        ["expert", "kind", "bytes", "of base", "max rank", "mean error", "drift"],
        [
            [
                expert["name"],
                expert["kind"],
                f"{expert['bytes']:,}",
                f"{expert['share_of_base']:.2%}",
                str(expert["max_rank"]),
                "-" if (e := expert["mean_relative_error"]) is None else f"{e:.3f}",
                f"{expert['drift']:.4f}",
            ]
            for expert in result["experts"]
        ],
    )
    typer.echo(
        f"\nbytes: shared {size['shared']:,}, experts {size['experts']:,}, router "
        f"{size['router']:,}, whole folder {size['all']:,}"
    )
    router = result["router"]
    if router is None:
        typer.echo("router: none yet; fit one with 'twinmerge fit-router'")
    else:
        typer.echo(
            f"router: reads layer {router['layer']}; right on {router['held_out_accuracy']:.1%} of "
            f"{router['held_out_rows']:,} rows held out from its own data"
        )
    for warning in result["warnings"]:
        typer.echo(f"warning: {warning}")


def _print_tensors(manifest: Any) -> None:
    rows = []
    for record in manifest.tensors:
        shares = list(record.experts.values())
        ranks = sorted({share.rank for share in shares if share.rank is not None})
        rank = "-" if not ranks else "-".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))
        error = f"{max(share.error for share in shares):.3f}" if shares else "-"
        shape = "×".join(str(n) for n in record.shape) or "scalar"
        size = f"{sum(share.bytes for share in shares):,}"
        rows.append([record.name, record.kind, shape, record.dtype, rank, size, error])
    columns = ["tensor", "kind", "shape", "dtype", "rank", "experts' bytes", "worst error"]
    _table("\ntensors", columns, rows)


def _dry_run_text(result: dict[str, Any]) -> None:
    typer.echo("nothing written. The build would hold and write:")
    for key, value in result.items():
        if isinstance(value, int | float):
            typer.echo(f"  {key.replace('_', ' ')}: {value:,}")
        elif isinstance(value, dict):
            inner = ", ".join(f"{name} {count:,}" for name, count in value.items())
            typer.echo(f"  {key.replace('_', ' ')}: {inner}")
    for warning in result["warnings"]:
        typer.echo(f"warning: {warning}")


def _router_text(result: dict[str, Any]) -> None:
    _table(
        "",
        ["layer", "held-out accuracy", ""],
        [
            [layer, f"{accuracy:.1%}", "chosen" if int(layer) == result["layer"] else ""]
            for layer, accuracy in result["accuracy_by_layer"].items()
        ],
    )
    typer.echo(
        f"\nrouter: {result['held_out_accuracy']:.1%} of {result['held_out_rows']:,} held-out rows "
        f"go to their own expert; fitted on {sum(result['rows'].values()):,} rows, "
        f"{result['bytes']:,} bytes"
    )
    confused = sorted(
        (
            (count, true, chosen)
            for true, row in result["confusion"].items()
            for chosen, count in row.items()
            if true != chosen
        ),
        reverse=True,
    )
    for count, true, chosen in confused[:5]:
        typer.echo(f"  {count} rows of {true} went to {chosen}")


def _eval_text(result: dict[str, Any]) -> None:
    for report in result["reports"]:
        normalised = report["normalised"]
        rows = []
        for name, task in report["tasks"].items():
            routed, expert = task["routing_accuracy"], task.get("expert")
            rows.append(
                [
                    name,
                    task["metric"],
                    f"{task['rows']:,}",
                    f"{task['score']:.4f}",
                    "-" if expert is None else f"{expert:.4f}",
                    "-" if not expert else f"{100 * task['score'] / expert:.1f}",
                    "-" if routed is None else f"{routed:.1%}",
                ]
            )
        columns = ["task", "metric", "rows", "score", "expert", "normalised", "routed right"]
        _table(f"\nprotocol: {report['protocol']}", columns, rows)
        typer.echo(
            f"mean score {report['mean']:.4f}"
            + ("" if normalised is None else f", normalised {100 * normalised:.1f}")
            + f", {report['seconds_per_1000_rows']:.1f} s per 1,000 rows"
        )


# ---------------------------------------------------------------------------------- plumbing


def _columns(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _checked(model: Any, settings: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return model.model_validate(settings)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = "--" + str(first["loc"][0]).replace("rows_per_task", "rows")
        raise InputError(f"{where}: {first['msg']}, got {first['input']!r}.") from None


def _lines(file: Path | None) -> list[str]:
    from .data import ENCODING

    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        text = data.decode(ENCODING)
    except (OSError, UnicodeDecodeError) as problem:
        where = file or "standard input"
        raise InputError(f"{where}: cannot be read as UTF-8 text ({problem}).") from None
    # Not splitlines(): JSON strings and plain text may hold U+2028 and its like.
    return text.replace("\r\n", "\n").split("\n")


def _device(name: str) -> str:
    """A device that torch can use here, or an `InputError`."""
    import torch

    try:
        torch.empty(1, device=name).add(1)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise InputError(f"--device {name}: cannot be used here ({reason}).") from None
    return name


@contextmanager
def _stages(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress display on stderr, one bar per stage name."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
    ) as display:
        bars: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = display.add_task(stage, total=total)
            display.update(bars[stage], completed=done, total=total)

        yield progress


@contextmanager
def _progress(quiet: bool, stage: str) -> Iterator[Callable[[int, int, str], None]]:
    with _stages(quiet) as stages:
        yield lambda done, total, name: stages(stage, done, total)


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(1)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 1; ours is a traceback."""
    try:
        app()
    except TwinMergeError as problem:
        _fail(str(problem))


if __name__ == "__main__":
    main()
