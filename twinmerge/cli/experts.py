"""Commands that change which experts an artifact has: add, remove, replace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import show
from ..errors import InputError
from .app import app
from .options import (
    Base,
    Columns,
    Json,
    Labels,
    NewRows,
    NewWeights,
    Out,
    Quiet,
    Split,
)
from .plumbing import listed, stages, weighting


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
    from ..grow import add
    from ..recipe.references import default_name
    from ..show.grow import grow_text

    rows = _new_rows(out, data, name or default_name(expert), split, columns)
    with stages(quiet) as progress:
        result = add(
            out,
            expert,
            name=name,
            labels=listed(labels),
            base=base,
            rows=rows,
            weights=weighting(weights),
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
    from ..grow import remove
    from ..show.grow import grow_text

    with stages(quiet) as progress:
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
    from ..grow import replace
    from ..show.grow import grow_text

    rows = _new_rows(out, data, name, split, columns)
    with stages(quiet) as progress:
        result = replace(
            out,
            name,
            expert,
            labels=listed(labels),
            base=base,
            rows=rows,
            weights=weighting(weights),
            progress=progress,
        )
    show.print_result(result, as_json, grow_text)


def _new_rows(
    out: Path, data: Path | None, name: str, split: str, columns: str | None
) -> dict[str, list[Any]] | None:
    """Texts by expert: the new one's, and others' that DATA holds."""
    from ..artifact.reader import Artifact
    from ..data import read_rows, read_tasks, task_files, text_of

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
        expert: [text_of(row, listed(columns)) for row in table] for expert, table in found.items()
    }
