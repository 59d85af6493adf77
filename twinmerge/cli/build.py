"""Commands that make an artifact, and look at one: merge, doctor, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import show
from ..errors import InputError, TwinMergeError
from .app import app
from .options import (
    Json,
    Out,
    Quiet,
    RecipeFile,
)
from .plumbing import bar


@app.command()
def merge(
    recipe: RecipeFile,
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
    from ..recipe import load_recipe

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
        from ..artifact.writer import check_space, check_target
        from ..merging.plan import make_plan

        check_target(out)
        plan = make_plan(resolved)
        summary = plan.summary()
        check_space(out, plan.work_bytes())
        plan.close()
        show.print_result(summary, as_json, show.dry_run_text)
        return
    from ..merging.build import build, build_part, join_parts
    from ..merging.journal import Workspace

    with bar(quiet, "merging") as progress:
        try:
            if engine == "ray":
                from ..merging.ray_engine import build_on_ray

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
    recipe: RecipeFile,
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
    from ..merging.doctor import diagnose
    from ..recipe import load_recipe
    from ..show.doctor import doctor_text

    if plots is not None:
        from ..plots import check_extra

        check_extra()
    resolved = load_recipe(recipe).resolved(recipe.parent)
    if base is not None:  # not resolved: a path on the command line counts from here
        resolved = resolved.model_copy(update={"base_model": base})
    with bar(quiet, "examining") as progress:
        found = diagnose(resolved, sample=sample or None, out=out, progress=progress)
    show.print_result(found.to_dict(), as_json, doctor_text)
    if plots is not None:
        from ..plots import write_plots

        for path in write_plots(found, plots):
            typer.echo(f"drawn: {path}", err=as_json)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def inspect(
    out: Out,
    tensors: Annotated[bool, typer.Option("--tensors", help="One line per tensor.")] = False,
    check: Annotated[bool, typer.Option(help="Compare all files with their digests.")] = True,
    as_json: Json = False,
) -> None:
    """What OUT holds: experts, ranks, bytes, errors and the router; checks that it is whole."""
    from ..artifact.reader import Artifact

    manifest = Artifact(out, check=check).manifest
    summary = show.summarise(manifest, out)
    if as_json and tensors:
        summary["tensors"] = [record.model_dump(mode="json") for record in manifest.tensors]
    show.print_result(summary, as_json, show.inspect_text)
    if tensors and not as_json:
        show.print_tensors(manifest)
