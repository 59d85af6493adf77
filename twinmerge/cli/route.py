"""The command that fits the router: fit-router."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import show
from ..errors import InputError
from .app import app
from .options import (
    Columns,
    Dtype,
    Json,
    MaxTokens,
    Out,
    Quiet,
    Split,
)
from .plumbing import checked, layers_of, listed, number_or_word, stages, weighting


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
    split: Split = "train",
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
            "are get less of the experts, down to the shared expert alone; 1: none ever."
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
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit the router on rows of DATA and store it in OUT.

    A few dozen texts per expert, like those that it is for, will do; labels are not needed. The
    rows are divided in parts that train, calibrate and choose; rows that are nearly alike stay
    together. What is printed is measured on rows that were held out.
    """
    from ..artifact.reader import Artifact
    from ..data import read_tasks, text_of
    from ..recipe import Router
    from ..runtime.router.fit import fit_router as fit

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
        "layer": layers_of(layer),
        "pooling": pooling,
        "encoder": encoder,
        "weights": weighting(weights),
        "sharpness": number_or_word(sharpness),
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
            name: [text_of(row, listed(columns)) for row in table] for name, table in found.items()
        }
    with stages(quiet) as progress:
        fitted = fit(
            out,
            texts,
            checked(Router, settings),
            max_tokens=max_tokens,
            dtype=dtype,
            progress=progress,
        )
    show.print_result(
        fitted.model_dump(mode="json") | {"said": fitted.said}, as_json, show.router_text
    )
