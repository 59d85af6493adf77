"""A study's records as sections of tables, and these as markdown.

Nothing is measured here, and what no record holds is left out; a line at the end names it.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import tables_further as further
from . import tables_quality as quality
from .shown import Section, Study, Table, at_most

SECTIONS = (
    quality.experts,
    quality.merges,
    quality.per_task,
    quality.ablation,
    quality.compression,
    quality.rivals,
    further.more_tasks,
    further.unseen,
    further.routing,
    further.grouped,
    further.cost,
    further.paths,
    further.better,
    quality.paper,
)


def tables(folder: Path) -> str:
    """Markdown of all tables of a study's folder. Raises `InputError` for a folder that is none."""
    study = Study.of_folder(folder)
    parts = [f"# {_plain(title(study))}", _paragraph(lead(study))]
    for section in sections(study):
        parts.append(f"## {_plain(section.title)}")
        parts += [_paragraph(text) for text in section.text]
        for table in section.tables:
            parts += [f"{_plain(table.caption)}:", _table(table)]
            parts += [_paragraph(note) for note in table.notes]
    return "\n\n".join([*parts, _paragraph(unmeasured(study))]) + "\n"


def sections(study: Study) -> list[Section]:
    return [section for make in SECTIONS if (section := make(study)).tables]


def title(study: Study) -> str:
    return f"Merging: {study.settings['title'] or 'a text study'}"


def lead(study: Study) -> str:
    """Rows, and what made the records."""
    settings, made = study.settings, study.provenance
    hardware, versions = made["hardware"], made["versions"]
    test, better = settings["test_rows"], settings.get("better_rows")
    records = [record for part in study.records.values() for record in part]
    commits = dict.fromkeys(str(record["commit"]) for record in records)
    choose, tokens = at_most(settings["choose_rows"]), settings["max_tokens"]
    return (
        f"{len(study.tasks)} experts: {', '.join(study.tasks)}. Of each task {choose} "
        f"validation rows choose, and {at_most(better)} where it is to be better than the paper; "
        f"routers learn from at most {settings['router_rows']:,} train rows, and {at_most(test)} "
        f"test rows score; test rows choose nothing. Rows are cut to {tokens} tokens. Made on "
        f"{hardware['processor']}, {hardware['threads']} of {hardware['cores']} cores; torch "
        f"{versions['torch']}, transformers {versions['transformers']}; {len(records):,} records "
        f"of commit {', '.join(commits) or made['commit']}."
    )


def unmeasured(study: Study) -> str:
    lacking = [name for name, there in study.parts.items() if not there]
    said = f"Not measured, and left out: {'; '.join(lacking)}."
    if not lacking:
        said = "All parts of the study have been measured."
    return f"{said} {study.gaps}".strip()


# ------------------------------------------------------------------------------------- markdown


def _table(table: Table) -> str:
    lines = [list(table.columns), ["---", *["---:"] * (len(table.columns) - 1)]]
    lines[0] = [_plain(name) for name in lines[0]]
    lines += [[_plain(cell.text) for cell in row] for row in table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _paragraph(text: str) -> str:
    """Our own `code` and *emphasis* stay; no HTML, no links."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[")


def _plain(text: str) -> str:
    """Text that others wrote: no marks at all."""
    return re.sub(r"([\\`*|])", r"\\\1", _paragraph(" ".join(text.split())))
