"""The command line: parse, call one library function, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import show
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


def _version(asked: bool) -> bool:
    if asked:
        from . import __version__

        typer.echo(f"twinmerge {__version__}")
        raise typer.Exit
    return asked


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Out = Annotated[Path, typer.Argument(help="The artifact's folder, as `merge` wrote it.")]
MaxTokens = Annotated[
    int | None, typer.Option(help="Cut longer inputs to this many tokens. Default: 512 or less.")
]
TopK = Annotated[
    int | None,
    typer.Option(help="Use each row's K largest weights only; the rest is not rescaled.", min=1),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Leave out weights below this, from 0 to below 1; likewise."),
]
Columns = Annotated[
    str | None, typer.Option(help="Columns that hold the text, e.g. `premise,hypothesis`.")
]


@app.callback()
def _twinmerge(
    version: Annotated[
        bool,
        typer.Option("--version", help="Say the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


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
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw an unfinished build of OUT away, begin anew.")
    ] = False,
    num_shards: Annotated[
        int | None,
        typer.Option(help="Divide the work into this many parts; see --shard-index.", min=1),
    ] = None,
    shard_index: Annotated[
        int | None,
        typer.Option(help="Do this part only (0, 1, ...): one call on each machine.", min=0),
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Put the finished parts of --num-shards together.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="`local`, or `ray`: the parts as tasks of a Ray cluster.")
    ] = "local",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Merge experts as RECIPE says into the new folder OUT.

    A build that was stopped goes on where it was when the same command is given again. To divide
    it over machines that share OUT's disk: on each `--num-shards 4 --shard-index I` (with I from 0
    to 3), then once `--num-shards 4 --join`. The result has the same bytes either way.
    """
    from .recipe import load_recipe

    written = load_recipe(recipe)
    resolved = written.resolved(recipe.parent)
    if base is not None:  # not resolved: a path on the command line counts from here
        written = written.model_copy(update={"base_model": base})
        resolved = resolved.model_copy(update={"base_model": base})
    _check_division(num_shards, shard_index, join, engine)
    if join and restart:
        raise InputError(
            "--join --restart: a join begins anew in any case. To do a part again, give --restart "
            "with its --shard-index."
        )
    if dry_run:
        from .artifact.writer import check_space, check_target
        from .merging.plan import make_plan

        check_target(out)
        plan = make_plan(resolved)
        summary = plan.summary()
        check_space(out, plan.work_bytes())
        plan.close()
        show.print_result(summary, as_json, show.dry_run_text)
        return
    from .merging.build import build, build_part, join_parts
    from .merging.journal import Workspace

    with _progress(quiet, "merging") as progress:
        try:
            if engine == "ray":
                from .merging.ray_engine import build_on_ray

                manifest = build_on_ray(
                    resolved,
                    out,
                    num_shards,
                    written=written,
                    shard_bytes=max_shard_bytes,
                    progress=progress,
                    restart=restart,
                )
            elif num_shards is None:
                manifest = build(
                    resolved,
                    out,
                    written=written,
                    shard_bytes=max_shard_bytes,
                    progress=progress,
                    restart=restart,
                )
            elif join:
                manifest = join_parts(
                    resolved, out, num_shards, written=written, shard_bytes=max_shard_bytes
                )
            else:
                assert shard_index is not None, "_check_division asks for it"
                build_part(
                    resolved,
                    out,
                    shard_index,
                    num_shards,
                    shard_bytes=max_shard_bytes,
                    progress=progress,
                    restart=restart,
                )
                done = {"part": shard_index, "of": num_shards, "finished": True}
                show.print_result(done, as_json, show.part_text)
                return
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on where it was", err=True)
            raise SystemExit(130) from None
        except TwinMergeError:
            unfinished = Workspace(out).folder
            if unfinished.is_dir():
                typer.echo(f"note: what was done so far is in {unfinished}", err=True)
            raise
    for warning in manifest.warnings if as_json else ():
        typer.echo(f"warning: {warning}", err=True)
    show.print_result(show.summarise(manifest, out), as_json, show.inspect_text)


def _check_division(
    num_shards: int | None, shard_index: int | None, join: bool, engine: str
) -> None:
    """Raise `InputError` for options of a divided build that do not go together."""
    if engine not in ("local", "ray"):
        raise InputError(f"--engine {engine}: expected local or ray.")
    if num_shards is None:
        if shard_index is not None or join:
            given = "--join" if join else f"--shard-index {shard_index}"
            raise InputError(f"{given}: of how many parts? Give --num-shards too.")
        return
    if engine == "ray":
        if shard_index is not None or join:
            raise InputError("--engine ray: does all parts and joins them; give --num-shards only.")
        return
    if join == (shard_index is not None):
        raise InputError(
            f"--num-shards {num_shards}: give --shard-index 0 to {num_shards - 1} to do a part, or "
            "--join to put the finished ones together (one of the two)."
        )
    if shard_index is not None and shard_index >= num_shards:
        raise InputError(
            f"--shard-index {shard_index}: parts of --num-shards {num_shards} are numbered 0 to "
            f"{num_shards - 1}."
        )


@app.command()
def doctor(
    recipe: Annotated[Path, typer.Argument(help="YAML: base_model, models, merge_method, ...")],
    base: Annotated[
        str | None,
        typer.Option(help="Where the base model is, instead of the recipe's base_model."),
    ] = None,
    sample: Annotated[
        int,
        typer.Option(help="Matrices whose singular values are taken, at most; 0: all.", min=0),
    ] = 40,
    plots: Annotated[
        Path | None, typer.Option(help="Also draw what was found, as PNG files in this folder.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Where the merge is to go: is there room on that disk?")
    ] = Path("."),
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Examine the models of RECIPE before anything long runs: do they fit, how do they differ?

    Reads every tensor once and writes nothing. Exit code 1 if a merge would fail.
    """
    from .merging.doctor import diagnose
    from .recipe import load_recipe
    from .show_doctor import doctor_text

    if plots is not None:
        from .plots import check_extra

        check_extra()
    resolved = load_recipe(recipe).resolved(recipe.parent)
    if base is not None:  # not resolved: a path on the command line counts from here
        resolved = resolved.model_copy(update={"base_model": base})
    with _progress(quiet, "examining") as progress:
        found = diagnose(resolved, sample=sample or None, out=out, progress=progress)
    show.print_result(found.to_dict(), as_json, doctor_text)
    if plots is not None:
        from .plots import write_plots

        for path in write_plots(found, plots):
            typer.echo(f"drawn: {path}", err=as_json)
    if not found.ok:
        raise typer.Exit(1)


Base = Annotated[
    str | None,
    typer.Option(help="Where the base model is, if not where the artifact's recipe says."),
]
Labels = Annotated[
    str | None, typer.Option(help="Names of its classes, in order: `no,yes`. For adapters.")
]
NewRows = Annotated[
    Path | None,
    typer.Argument(
        help="Rows of the new expert for the router: a .jsonl file, or a folder as for fit-router "
        "(a `linear` or `mlp` router needs rows of all experts)."
    ),
]
NewWeights = Annotated[
    str, typer.Option(help="For a router of kind none: `a=0.7,b=0.3`. Default: even.")
]
Split = Annotated[str, typer.Option(help="Which file of EXPERT/ to read.")]


@app.command()
def add(
    out: Out,
    expert: Annotated[str, typer.Argument(help="Folder or hub id: a full model or an adapter.")],
    data: NewRows = None,
    name: Annotated[
        str | None, typer.Option(help="What to call it. Default: the last part of EXPERT.")
    ] = None,
    labels: Labels = None,
    base: Base = None,
    weights: NewWeights = "",
    split: Split = "train",
    columns: Columns = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Add EXPERT to OUT, the others left as they are.

    What it keeps is taken against the shared expert as it is, cut as OUT's recipe says. The router
    follows where it can: from DATA, or from none.
    """
    from .grow import add
    from .recipe.references import default_name
    from .show_grow import grow_text

    rows = _new_rows(out, data, name or default_name(expert), split, columns)
    with _stages(quiet) as progress:
        result = add(
            out,
            expert,
            name=name,
            labels=_columns(labels),
            base=base,
            rows=rows,
            weights=_weighting(weights),
            progress=progress,
        )
    show.print_result(result, as_json, grow_text)


@app.command()
def remove(
    out: Out,
    name: Annotated[str, typer.Argument(help="The expert that goes.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Remove an expert from OUT. The shared expert keeps its part of it."""
    from .grow import remove
    from .show_grow import grow_text

    with _stages(quiet) as progress:
        result = remove(out, name, progress=progress)
    show.print_result(result, as_json, grow_text)


@app.command()
def replace(
    out: Out,
    name: Annotated[str, typer.Argument(help="The expert that goes; the new one has its name.")],
    expert: Annotated[str, typer.Argument(help="Folder or hub id: a full model or an adapter.")],
    data: NewRows = None,
    labels: Labels = None,
    base: Base = None,
    weights: NewWeights = "",
    split: Split = "train",
    columns: Columns = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Put EXPERT in the place of NAME in OUT: remove, then add."""
    from .grow import replace
    from .show_grow import grow_text

    rows = _new_rows(out, data, name, split, columns)
    with _stages(quiet) as progress:
        result = replace(
            out,
            name,
            expert,
            labels=_columns(labels),
            base=base,
            rows=rows,
            weights=_weighting(weights),
            progress=progress,
        )
    show.print_result(result, as_json, grow_text)


def _new_rows(
    out: Path, data: Path | None, name: str, split: str, columns: str | None
) -> dict[str, list[Any]] | None:
    """Texts by expert: the new one's, and others' that DATA holds."""
    from .artifact.reader import Artifact
    from .data import read_rows, read_tasks, task_files, text_of

    manifest = Artifact(out, check=False).manifest
    if data is None:
        return None
    fitted = manifest.router is not None and manifest.router.kind in ("linear", "mlp")
    if data.is_file():
        found = {name: read_rows(data)}
        if not found[name]:
            raise InputError(f"{data}: is empty; expected at least one row.")
    else:
        files = task_files(data, split) if fitted else {}
        others = [expert for expert in manifest.names if expert in files]
        found, _ = read_tasks(data, list(dict.fromkeys([*others, name])), split)
    return {
        expert: [text_of(row, _columns(columns)) for row in table]
        for expert, table in found.items()
    }


@app.command()
def fit_router(
    out: Out,
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Folder with EXPERT.jsonl or EXPERT/SPLIT.jsonl for every expert. Not needed for "
            "the kinds `projection` and `none`."
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            help="`prototype` (default), `linear`, `mlp` (the paper's): learn from rows. "
            "`prompts`: a few lines per expert. `projection`: no data. `none`: fixed weights."
        ),
    ] = "",
    auto: Annotated[
        bool, typer.Option("--auto", help="Compare prototype, linear and mlp, and say why one.")
    ] = False,
    split: Annotated[str, typer.Option(help="Which file of EXPERT/ to read.")] = "train",
    layer: Annotated[
        str,
        typer.Option(
            help="Layers to read: `auto`, a number (0: embeddings), or several such as `0,2,4`."
        ),
    ] = "",
    pooling: Annotated[
        str, typer.Option(help="Of a layer's tokens: `mean` (default), `first` or `last`.")
    ] = "",
    encoder: Annotated[
        str, typer.Option(help="Folder or hub id of a small encoder to read instead.")
    ] = "",
    weights: Annotated[
        str, typer.Option(help="With --kind none: `a=0.7,b=0.3`. Default: even.")
    ] = "",
    sharpness: Annotated[
        str,
        typer.Option(
            help="Power on probabilities: `auto`, a number from 1 on, or `top`: one each."
        ),
    ] = "",
    coverage: Annotated[
        float | None,
        typer.Option(
            help="Share of the experts' own inputs that are not taken for new (0.99). Inputs that "
            "are get the shared expert; 1: none ever."
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            help="Texts per expert to keep in OUT for `explain` (default 0: none of your rows).",
            min=0,
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Rows per expert, at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws rows and parts.", min=0)] = None,
    columns: Columns = None,
    max_tokens: MaxTokens = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit the router on rows of DATA and store it in OUT.

    A few dozen texts per expert, like those that it is for, will do; labels are not needed. The
    rows are divided in parts that train, calibrate and choose; rows that are nearly alike stay
    together. What is printed is measured on the last part.
    """
    from .artifact.reader import Artifact
    from .data import read_tasks, text_of
    from .recipe import Router
    from .runtime.router.fit import fit_router as fit

    manifest = Artifact(out, check=False).manifest
    settings: dict[str, Any] = dict(manifest.recipe.get("router", {}))
    if auto and kind not in ("", "auto"):
        raise InputError(f"--auto --kind {kind}: --auto compares kinds. Give one of them.")
    if weights and kind != "none":
        raise InputError(f"--weights {weights}: only a router of --kind none has fixed weights.")
    if encoder and kind in ("none", "projection"):
        raise InputError(f"--encoder {encoder}: a router of --kind {kind} reads no text with it.")
    if examples and data is None:
        raise InputError(f"--examples {examples}: expected DATA, whose rows are kept; got none.")
    given = {
        "kind": "auto" if auto else kind,
        "layer": _numbers(layer),
        "pooling": pooling,
        "encoder": encoder,
        "weights": _weighting(weights),
        "sharpness": _number_or_word(sharpness),
    }
    settings |= {name: value for name, value in given.items() if value not in ("", None)}
    counted = {"coverage": coverage, "rows_per_task": rows, "seed": seed, "examples": examples}
    settings |= {name: value for name, value in counted.items() if value is not None}
    texts = None
    if data is not None:
        found, unused = read_tasks(data, manifest.names, split)
        for name in unused:
            typer.echo(
                f"note: {data}: '{name}' is no expert of {out}; its rows are not used", err=True
            )
        texts = {
            name: [text_of(row, _columns(columns)) for row in table]
            for name, table in found.items()
        }
    with _stages(quiet) as progress:
        fitted = fit(
            out, texts, _checked(Router, settings), max_tokens=max_tokens, progress=progress
        )
    show.print_result(
        fitted.model_dump(mode="json") | {"said": fitted.said}, as_json, show.router_text
    )


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
    batch_size: Annotated[int, typer.Option(help="Rows per forward.", min=1)] = 32,
    max_tokens: MaxTokens = None,
    max_new_tokens: Annotated[int, typer.Option(help="Generation: tokens to add.", min=1)] = 128,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, ...")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="`float32`, `bfloat16`, `float16`; `auto`: as stored.")
    ] = "auto",
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines: always so.")] = True,
) -> None:
    """Answer every row: JSON lines out, in the order of the input.

    Each says which expert answered, with what weight, and the answer. A plain line is one text
    (a tab separates a pair); JSON lines hold `text` and `text_pair`, or columns as public data sets
    name them. A batch in which every row uses few experts runs faster: `--top-k 1` gives each row
    its best one. Rows then say how much weight was `dropped`. `confidence` is the probability of
    the likeliest expert; a row that is unlike all experts' data says `new` and is answered by the
    shared expert, with the head of the likeliest.
    """
    from .artifact.reader import Artifact
    from .data import parse_inputs, text_of
    from .runtime.answer import KEYS, answer_texts
    from .runtime.devices import usable
    from .runtime.load import load

    Artifact(out, check=False)  # a wrong folder is told before standard input is waited for
    lines = _lines(file)
    rows = parse_inputs(lines, str(file or "standard input"))
    if not rows:
        raise InputError(f"{file or 'standard input'}: no rows to answer.")
    texts = [text_of(row, _columns(columns)) for row in rows]
    model = load(out, device=usable(device, "--device"), dtype=dtype)
    with _progress(quiet, "answering") as progress:
        results = answer_texts(
            model,
            texts,
            task=task,
            allowed=_columns(allowed),
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
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, ...")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="`float32`, `bfloat16`, `float16`; `auto`: as stored.")
    ] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Why OUT answers TEXT as it does: the router's choice, and what every expert would say.

    Weights, calibrated probabilities and novelty; the routing examples that come nearest; and the
    answers as routed, of each expert alone, of the shared expert and of the base. With `--task`,
    `--weights`, `--allowed` or `--head` also the answer that this forces, beside the routed one.
    """
    from .artifact.reader import Artifact
    from .data import read_tasks, text_of
    from .runtime.devices import usable
    from .runtime.explain import explain, read_text
    from .runtime.load import load
    from .show_explain import explain_text

    if plot is not None:
        from .plots_explain import check_target

        check_target(plot)
    manifest = Artifact(out, check=False).manifest
    examples = None
    if data is not None:
        found, _ = read_tasks(data, manifest.names, split)
        names = _columns(columns)
        examples = {name: [text_of(row, names) for row in rows] for name, rows in found.items()}
    read = read_text(text, text_pair, _columns(columns))
    model = load(out, device=usable(device, "--device"), dtype=dtype)
    with _stages(quiet) as progress:
        found = explain(
            model,
            read,
            task=task,
            weights=_weighting(weights),
            allowed=_columns(allowed),
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
        from .plots_explain import write_plot

        write_plot(found, plot)
        typer.echo(f"drawn: {plot}", err=as_json)


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
    rows: Annotated[int | None, typer.Option(help="First rows of every task only.", min=1)] = None,
    columns: Columns = None,
    top_k: TopK = None,
    threshold: Threshold = None,
    batch_size: Annotated[int, typer.Option(help="Rows per forward.", min=1)] = 32,
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
    from .data import read_tasks, task_files
    from .evaluation.reference import expert_model, score_plain
    from .evaluation.score import PROTOCOLS, Protocol, evaluate, prepare
    from .recipe import load_recipe
    from .runtime.load import load

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
    if rows is not None:
        found = {name: table[:rows] for name, table in found.items()}
    prepared = prepare(model, found, max_tokens=max_tokens, columns=_columns(columns))
    for name, task in prepared.items():
        if task.encoded.truncated:
            typer.echo(f"note: {name}: {task.encoded.truncated} rows were cut to fit", err=True)
    reports = []
    with _stages(quiet) as progress:
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
    data: Annotated[
        Path, typer.Argument(help="Folder with EXPERT/SPLIT.jsonl (text columns and `label`).")
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            help="HTML file to write, and beside it one of markdown (.md); both are replaced. "
            "Default: OUT-report.html, here."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which file of EXPERT/ to read.")] = "test",
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
    rows: Annotated[int | None, typer.Option(help="First rows of every task only.", min=1)] = None,
    columns: Columns = None,
    batch_size: Annotated[int, typer.Option(help="Rows per forward.", min=1)] = 32,
    max_tokens: MaxTokens = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """One page about OUT on the labelled rows of DATA, to look at in a browser; and as markdown.

    Scores under all protocols, what is confused with what, mean weights by task, calibration,
    accuracy against coverage, bytes and spectra, and what is wrong, with what to do about it.
    """
    from .data import read_rows, read_tasks, task_files
    from .evaluation.report import gather
    from .evaluation.report.page import write
    from .evaluation.report.show import report_text
    from .recipe import load_recipe
    from .runtime.load import load

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
    with _stages(quiet) as progress:
        measured = gather(
            model,
            {name: table[:rows] for name, table in found.items()},
            unseen={name: table[:rows] for name, table in others.items()},
            recipe=None if experts is None else load_recipe(experts).resolved(experts.parent),
            base=base,
            data=str(data),
            split=split,
            batch_size=batch_size,
            max_tokens=max_tokens,
            columns=_columns(columns),
            progress=progress,
        )
    files = write(measured, to)
    written = [str(file) for file in files]
    show.print_result({"written": written} | measured.to_dict(), as_json, report_text)


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
    summary = show.summarise(manifest, out)
    if as_json and tensors:
        summary["tensors"] = [record.model_dump(mode="json") for record in manifest.tensors]
    show.print_result(summary, as_json, show.inspect_text)
    if tensors and not as_json:
        show.print_tensors(manifest)


# ---------------------------------------------------------------------------------- plumbing


def _columns(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> Any:
    """`auto`, 3 or [0, 2, 4], as a recipe writes it."""
    parts = [int(part) if part.strip().isdecimal() else part for part in text.split(",")]
    return parts[0] if len(parts) == 1 else parts


def _number_or_word(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _weighting(text: str) -> dict[str, float] | None:
    """{"a": 0.7, "b": 0.3} of `a=0.7,b=0.3`."""
    if not text:
        return None
    try:
        pairs = [part.split("=") for part in text.split(",")]
        found = {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise InputError(f"--weights {text}: expected names and numbers, `a=0.7,b=0.3`.") from None
    if len(found) < len(pairs):
        raise InputError(f"--weights {text}: expected every name once.")
    return found


def _checked(model: Any, settings: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return model.model_validate(settings)
    except ValidationError as problem:
        first = problem.errors()[0]
        # What a check of our own says has all in it.
        said = first.get("ctx", {}).get("error") or f"{first['msg']}, got {first['input']!r}."
        where = str(first["loc"][0]).replace("rows_per_task", "rows") if first["loc"] else ""
        raise InputError(f"--{where}: {said}" if where else str(said)) from None


def _lines(file: Path | None) -> list[str]:
    from .data import ENCODING

    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        text = data.decode(ENCODING)
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file. Check the path.") from None
    except (OSError, UnicodeDecodeError) as problem:
        where = file or "standard input"
        raise InputError(f"{where}: cannot be read as UTF-8 text ({problem}).") from None
    # Not splitlines(): JSON strings and plain text may hold U+2028 and its like.
    return text.replace("\r\n", "\n").split("\n")


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
