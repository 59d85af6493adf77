"""Options and arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
RecipeFile = Annotated[Path, typer.Argument(help="YAML: base_model, models, merge_method, ...")]
Data = Annotated[
    Path, typer.Argument(help="Folder with EXPERT/SPLIT.jsonl (text columns and `label`).")
]
MostRows = Annotated[int | None, typer.Option(help="Rows of every task, drawn with a seed.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Rows per forward.", min=1)]
Device = Annotated[str, typer.Option(help="`cpu`, `cuda`, ...")]
Dtype = Annotated[str, typer.Option(help="`float32`, `bfloat16`, `float16`; `auto`: as stored.")]
