"""What all commands belong to."""

from __future__ import annotations

from typing import Annotated

import typer

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
        from .. import __version__

        typer.echo(f"twinmerge {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _twinmerge(
    version: Annotated[
        bool,
        typer.Option("--version", help="Say the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass
