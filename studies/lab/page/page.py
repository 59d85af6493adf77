"""One page of a study: the tables of `tables`, the pictures of `plots`, in the report's style.

The page needs nothing else: style, script and pictures are in it.
"""

from __future__ import annotations

import re
from base64 import b64encode
from html import escape
from pathlib import Path

from twinmerge.artifact.writer import replace_text
from twinmerge.evaluation import report

from .plots import Picture, drawn, save
from .shown import Study
from .tables import lead, sections, tables, title, unmeasured

TEMPLATES = (Path(__file__).parent, Path(report.__file__).parent / "templates")


def page(folder: Path) -> str:
    """HTML of a study's folder. Raises `InputError` for a folder that is none."""
    study = Study.of_folder(folder)
    return _html(study, drawn(study))


def write(folder: Path) -> list[Path]:
    """Make `tables.md`, `plots/` and `report.html` in a study's folder; gives the files' paths.

    Raises `InputError` for a folder that is none, `MissingExtra` without matplotlib, `OutputError`.
    """
    study = Study.of_folder(folder)
    pictures = drawn(study)
    texts = {"tables.md": tables(folder), "report.html": _html(study, pictures)}
    for name, text in texts.items():
        replace_text(folder / name, text)
    return [*(folder / name for name in texts), *save(pictures, folder)]


def _html(study: Study, pictures: list[Picture]) -> str:
    import jinja2
    from markupsafe import Markup

    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    pages.filters["marked"] = lambda text: Markup(_marked(text))
    pages.filters["inlined"] = lambda svg: f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
    return pages.get_template("study.html.j2").render(
        title=title(study), lead=lead(study), sections=sections(study), pictures=pictures,
        unmeasured=unmeasured(study),
    )  # fmt: skip


def _marked(text: str) -> str:
    """HTML of a paragraph: all is escaped but our own `code` and *emphasis*."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*([\w -]+)\*", r"<em>\1</em>", text)
