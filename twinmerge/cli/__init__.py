"""The command line: parse, call one library function, print."""

from __future__ import annotations

from typing import NoReturn

import typer

from ..errors import TwinMergeError
from . import build, experts, route, run, score
from .app import app

__all__ = ["app", "build", "experts", "main", "route", "run", "score"]


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(1)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 1; ours is a traceback."""
    try:
        app()
    except TwinMergeError as problem:
        _fail(str(problem))
