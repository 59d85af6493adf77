"""What `twinmerge report` prints: the failure signatures, and where the page is."""

from __future__ import annotations

from typing import Any

import typer


def report_text(result: dict[str, Any]) -> None:
    """result: `Found.to_dict()` and the files `written`."""
    for each in result["signatures"]:
        typer.echo(f"{'look at this' if each['serious'] else 'remark'}: {each['title']}")
        typer.echo(f"  {each['said']}\n  What to do: {each['do']}")
    if not result["signatures"]:
        typer.echo("no failure signature was seen")
    typer.echo(f"written: {', '.join(result['written'])}")
