"""What is odd about the rows of a fit: the same under two experts, or experts that look alike."""

from __future__ import annotations

from ...artifact.format import RouterRecord
from ...data import segments
from .encoder import TextEncoder
from .rows import Rows

CONFUSED = 0.1
"""Share of an expert's held-out rows that go to one other from which both are named."""


def oddities(rows: Rows, record: RouterRecord, encoder: TextEncoder | None) -> tuple[str, ...]:
    """In sentences; `record` has the confusion among held-out rows."""
    told = []
    if encoder is not None and encoder.cut:
        told.append(
            f"{encoder.cut} of {len(rows.texts)} texts are longer than the "
            f"{encoder.max_tokens} tokens that the encoder reads: it routes on their "
            "beginning"
        )
    own: dict[str, set[int]] = {}
    for text, expert in zip(rows.texts, rows.truth.tolist(), strict=True):
        own.setdefault("\t".join(segments(text)).lower(), set()).add(expert)
    twice: dict[tuple[int, ...], int] = {}
    for experts in own.values():
        if len(experts) > 1:
            twice[tuple(sorted(experts))] = twice.get(tuple(sorted(experts)), 0) + 1
    for experts, count in sorted(twice.items(), key=lambda item: -item[1]):
        names = " and ".join(rows.experts[t] for t in experts)
        told.append(
            f"{names}: {count} texts are among the rows of each. No router can tell whose they "
            "are; say task= or allowed= where you know."
        )
    for true, row in record.confusion.items():
        total = sum(row.values())
        for chosen, count in row.items():
            if chosen == true or count < max(3, CONFUSED * total):
                continue
            most = " Are its rows in the right file?" if count > total / 2 else ""
            told.append(f"{true}: {count} of its {total} held-out rows look like {chosen}.{most}")
    return tuple(told)
