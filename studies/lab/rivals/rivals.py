"""Other methods that compress experts of one base, at their true bytes.

Each is our own implementation from its paper (see its `own` module); none is the authors' code.
What is stored is built as files, with each expert's head in its file as in an artifact's, and
scores are those of models made from these files.

Bytes: `experts` is all experts' files, `extra_shared` a tensor of the pretrained model's size that
a method needs beside that model. `share` counts both, divided by the experts, in the bytes of one
float16 base model. (Twin-Merging's shared expert takes the pretrained model's place and is none.)
`experts_deflated`: the experts' files under zlib, for masks that a paper would compress further.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..lab import Lab, Scores
from ..static import Say
from . import emr, smile, switch, tall, tsv
from .packed import Kept, Packed, Shapes, Vector, from_file, to_file
from .sources import Sources

RANKS = (1, 4, 16, 32, 64)
"""Of TSV-Compress beside the paper's own, and of SMILE's experts."""

GATES = (1, 4, 16)
"""Ranks of SMILE's gate; chosen on validation rows for experts of rank `GATED_AT`."""

GATED_AT = 16

DENSITIES = (0.05, 0.1, 0.3, 0.5)
"""Of T-Switch."""

Unpack = Callable[[Packed, Packed, Shapes], Vector]
"""Shared file, expert's file, shapes -> task vector."""


@dataclass(frozen=True)
class Method:
    """A rival that makes one model for each task, and so must know the task."""

    title: str
    source: str
    unpack: Unpack


TSV = Method(tsv.TITLE, tsv.SOURCE, lambda _, own, shapes: tsv.unpack(own, shapes))
EMR = Method(emr.TITLE, emr.SOURCE, emr.unpack)
SWITCH = Method(switch.TITLE, switch.SOURCE, lambda _, own, shapes: switch.unpack(own, shapes))


def rivals(lab: Lab, say: Say) -> None:
    """One record for each method and size."""
    ranks = [rank for rank in RANKS if rank <= max(lab.settings.ranks)]
    tasks = len(lab.names)
    sources = Sources(lab, lambda shape: max(*RANKS, *GATES, tsv.count(shape, tasks)))
    add_tsv(sources, say, ranks)
    add_smile(sources, say, ranks)
    by_task(sources, say, EMR, {}, lambda: emr.pack(sources.vectors))
    for title in tall.VECTORS:
        add_tall(sources, say, title)
    for density in DENSITIES:
        add_switch(sources, say, density)


def add_tsv(sources: Sources, say: Say, ranks: Sequence[int]) -> None:
    """The paper's share of every matrix's triplets, and the same rank for all."""
    tasks = len(sources.lab.names)
    for rank in (None, *ranks):

        def kept(rank: int | None = rank) -> Kept:
            counts = {
                name: rank or tsv.count(shape, tasks) for name, shape in sources.shapes.items()
            }
            return Kept(
                {
                    task: tsv.pack(vector, sources.factors[task], counts)
                    for task, vector in sources.vectors.items()
                }
            )

        settings = {"rank": f"1/{tasks}" if rank is None else rank}
        by_task(sources, say, TSV, settings, kept)


def add_switch(sources: Sources, say: Say, density: float) -> None:
    def kept() -> Kept:
        vectors = sources.vectors
        return Kept({task: switch.pack(vectors[task], density) for task in vectors})

    by_task(sources, say, SWITCH, {"density": density}, kept)


def add_tall(sources: Sources, say: Say, title: str) -> None:
    """λ of each task: the best of those tried on its validation rows, the least of equal ones."""
    method = Method(title, tall.SOURCE, tall.unpack)
    tried: dict[float, Scores] = {}
    for value in tall.LAMBDAS:

        def scored(value: float = value) -> dict[str, Any]:
            lambdas = dict.fromkeys(sources.lab.names, value)
            files = Files.of(sources, tall.pack(title, sources.vectors, lambdas))
            return scores(sources, method, files, "validation")

        record = sources.lab.records.once("rival choice", title, {"lambda": value}, scored)
        say(f"{title}, lambda {value}: {record['normalised']:.4f} on validation rows")
        tried[value] = record["scores"]
    lambdas = {task: max(tried, key=lambda value: tried[value][task]) for task in sources.lab.names}
    by_task(
        sources,
        say,
        method,
        {"lambda": lambdas},
        lambda: tall.pack(title, sources.vectors, lambdas),
    )


def add_smile(sources: Sources, say: Say, ranks: Sequence[int]) -> None:
    at = min(GATED_AT, max(ranks))
    best: tuple[float, int] | None = None
    for gate in GATES:
        record = sources.lab.records.once(
            "rival choice",
            smile.TITLE,
            {"rank": at, "gate": gate},
            lambda gate=gate: smile_scores(
                sources, smile_files(sources, at, gate), gate, "validation"
            ),
        )
        say(f"SMILE, gate {gate}: {record['normalised']:.4f} on validation rows")
        if best is None or record["normalised"] > best[0]:
            best = record["normalised"], gate
    assert best is not None
    gate = best[1]
    for rank in ranks:

        def scored(rank: int = rank) -> dict[str, Any]:
            files = smile_files(sources, rank, gate)
            found = smile_scores(sources, files, gate, "test")
            return about(smile.SOURCE, False, files.sizes(sources)) | found

        settings = {"rank": rank, "gate": gate}
        record = sources.lab.records.once("rival", smile.TITLE, settings, scored)
        say_record(say, record)


def smile_files(sources: Sources, rank: int, gate: int) -> Files:
    packed = {
        task: smile.pack(vector, sources.factors[task], sources.layers, rank, gate)
        for task, vector in sources.vectors.items()
    }
    return Files.of(sources, Kept(packed))


def smile_scores(sources: Sources, files: Files, gate: int, split: str) -> dict[str, Any]:
    experts = [from_file(file) for file in files.experts.values()]
    found: Scores = {}
    for task in sources.lab.names:
        model = sources.model(task, {})
        smile.install(model, experts, sources.layers, gate)
        found[task] = sources.lab.alone(task, model, split)
    return sources.lab.normalised(found, split)


@dataclass(frozen=True)
class Files:
    """What a method stores, as it would be written."""

    shared: bytes
    experts: dict[str, bytes]

    @classmethod
    def of(cls, sources: Sources, kept: Kept) -> Files:
        experts = {
            task: to_file(packed | sources.heads[task]) for task, packed in kept.experts.items()
        }
        return cls(to_file(kept.shared), experts)

    def sizes(self, sources: Sources) -> dict[str, Any]:
        experts = sum(map(len, self.experts.values()))
        stored = experts + len(self.shared)
        return {
            "experts": experts,
            "experts_deflated": sum(len(zlib.compress(file)) for file in self.experts.values()),
            "extra_shared": len(self.shared),
            "base_float16": sources.base_float16,
            "share": stored / len(self.experts) / sources.base_float16,
        }


def scores(sources: Sources, method: Method, files: Files, split: str) -> dict[str, Any]:
    """Of one model for each task, made from the files alone."""
    shared = from_file(files.shared)
    found: Scores = {}
    for task, file in files.experts.items():
        vector = method.unpack(shared, from_file(file), sources.shapes)
        found[task] = sources.lab.alone(task, sources.model(task, vector), split)
    return sources.lab.normalised(found, split)


def by_task(
    sources: Sources,
    say: Say,
    method: Method,
    settings: Mapping[str, Any],
    kept: Callable[[], Kept],
) -> None:
    def scored() -> dict[str, Any]:
        files = Files.of(sources, kept())
        found = scores(sources, method, files, "test")
        return about(method.source, True, files.sizes(sources)) | found

    say_record(say, sources.lab.records.once("rival", method.title, settings, scored))


def about(source: str, needs_task: bool, bytes_: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "implementation": "ours",
        "source": source,
        "needs_task": needs_task,
        "protocol": "oracle" if needs_task else "known-head",
        "bytes": bytes_,
    }


def say_record(say: Say, record: Mapping[str, Any]) -> None:
    share = record["bytes"]["share"]
    say(f"{record['name']} {record['settings']}: {record['normalised']:.4f} at {share:.2%}")
