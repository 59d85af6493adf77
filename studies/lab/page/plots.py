"""A study's records as pictures, PNG and SVG; the same records give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinmerge.artifact.writer import explained
from twinmerge.plots import check_extra

from .drawing import HOLLOW
from .plots_bars import static
from .plots_lines import compression, more_tasks, ranks, score_by_bytes
from .plots_weights import few_experts, weights
from .shown import Study

DPI = 130


@dataclass(frozen=True)
class Picture:
    """section: of the page, by its id; title: what is seen, in a sentence"""

    name: str
    section: str
    title: str
    svg: bytes
    png: bytes


def plots(folder: Path) -> list[Path]:
    """Draw what a study's folder holds to its `plots/`; gives the files' paths.

    Raises `InputError` for a folder that is none, `MissingExtra` without matplotlib, `OutputError`.
    """
    return save(drawn(Study.of_folder(folder)), folder)


def save(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    written = []
    with explained(folder / "plots"):
        for picture in pictures:
            for suffix, content in (("png", picture.png), ("svg", picture.svg)):
                path = folder / "plots" / f"{picture.name}.{suffix}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                written.append(path)
    return written


def drawn(study: Study) -> list[Picture]:
    """What there are records of."""
    check_extra()
    from matplotlib import rc_context

    pictures: list[tuple[str, str, str, Callable[[Study], Any]]] = [
        ("static", "merges", "Normalised scores of static merges and Twin-Merging", static),
        ("ranks", "merges", f"Normalised score by rank and protocol ({HOLLOW})", ranks),
        ("compression", "compression", f"Normalised score by what is kept ({HOLLOW})", compression),
        (
            "bytes",
            "merges",
            f"Normalised score against bytes, beside rivals ({HOLLOW})",
            score_by_bytes,
        ),
        ("tasks", "more", f"Normalised score and bytes by number of tasks ({HOLLOW})", more_tasks),
        ("weights", "routing", "Mean weights of each task's rows", weights),
        ("few-experts", "routing", "Mean weights where some experts are there", few_experts),
    ]
    found = []
    with rc_context({"svg.hashsalt": "twinmerge", "font.size": 9, "axes.titlesize": 9}):
        for name, section, title, draw in pictures:
            if (figure := draw(study)) is not None:
                svg = _bytes(figure, "svg", metadata={"Date": None})
                found.append(Picture(name, section, title, svg, _bytes(figure, "png", dpi=DPI)))
    return found


def _bytes(figure: Any, suffix: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, **options)
    return buffer.getvalue()
