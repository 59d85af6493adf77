"""From what is typed to what the library takes, and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError


def listed(text: str | None) -> list[str] | None:
    """["a", "b"] of `a,b`."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def layers_of(text: str) -> Any:
    """`auto`, 3 or [0, 2, 4], as a recipe writes it."""
    parts = [int(part) if part.strip().isdecimal() else part for part in text.split(",")]
    return parts[0] if len(parts) == 1 else parts


def number_or_word(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def weighting(text: str) -> dict[str, float] | None:
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


def checked(model: Any, settings: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return model.model_validate(settings)
    except ValidationError as problem:
        first = problem.errors()[0]
        # What a check of our own says has all in it.
        said = first.get("ctx", {}).get("error") or f"{first['msg']}, got {first['input']!r}."
        where = str(first["loc"][0]).replace("rows_per_task", "rows") if first["loc"] else ""
        raise InputError(f"--{where}: {said}" if where else str(said)) from None


def lines_of(file: Path | None) -> list[str]:
    from ..data import ENCODING

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
def stages(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
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
def bar(quiet: bool, stage: str) -> Iterator[Callable[[int, int, str], None]]:
    """One bar, for what calls with steps done, steps in all and a name."""
    with stages(quiet) as told:
        yield lambda done, total, name: told(stage, done, total)
