"""What the doctor found, as plain data: findings, one report per expert, and the numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .measure import Moved
from .spectra import Spectrum
from .vocabulary import TokenizerDifference

SCHEMA = 1
"""Of `Diagnosis.to_dict`: counts up when a key goes or changes its meaning."""

Level = Literal["ok", "look", "fail"]
"""A usual trouble is not there; a build runs, but may disappoint; a build would stop."""


@dataclass(frozen=True)
class Finding:
    """One sentence about one subject, and what to do about it ("" for ok)."""

    level: Level
    subject: str
    text: str
    todo: str = ""


@dataclass(frozen=True)
class ExpertReport:
    """One expert. What could not be measured is None."""

    name: str
    reference: str
    kind: Literal["full", "LoRA"] | None
    """None: it could not be opened."""
    outputs: int | None = None
    heads: tuple[str, ...] = ()
    drift: float | None = None
    """‖W_t - W_0‖ / ‖W_0‖ over all matrices, as the build reports it."""
    layers: dict[str, float | None] | None = None
    """The same by layer."""
    changed: int | None = None
    """Tensors that differ from the base's."""
    unchanged: int | None = None
    tokenizer: TokenizerDifference | None = None
    """None: it has none, or the base has none."""
    ranks: dict[str, dict[str, float]] | None = None
    """"90%", "95%", "99%" of the energy: median and max rank over the sampled matrices."""
    bytes: dict[str, int] | None = None
    """Bytes of the factors at these shares, an estimate from the sample."""
    kept: dict[str, float] | None = None
    """Share of the energy that the recipe's rank holds: median and min over the sampled ones."""


@dataclass(frozen=True)
class Needs:
    """What the build takes. Bytes and seconds; None where the plan cannot say."""

    peak_memory_bytes: int | None
    free_memory_bytes: int | None
    disk_bytes: int | None
    """At least: where data decide the rank, factors are not in it."""
    free_disk_bytes: int
    folder: str
    """Whose disk `free_disk_bytes` is of."""
    read_bytes: int
    read_seconds: float
    svd_seconds: float
    seconds: float
    """An estimate: reading as measured here, SVDs as one typical one took, on all cores."""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found, in the order in which it is shown."""

    base: str
    method: str
    exclusive: dict[str, Any]
    experts: tuple[ExpertReport, ...]
    findings: tuple[Finding, ...]
    measured: tuple[str, ...] = ()
    """The experts that matrices and lists below are of, in their order."""
    tensors: tuple[Moved, ...] = ()
    unchanged: tuple[str, ...] = ()
    """Merged tensors that are the base's in every expert."""
    cosines: tuple[tuple[float | None, ...], ...] = ()
    opposed: tuple[tuple[float | None, ...], ...] = ()
    """Of the entries that both experts moved, the share that they moved in opposite directions."""
    conflicts: float | None = None
    """Of the entries that two experts or more moved, the share that some moved up, some down."""
    spectra: tuple[Spectrum, ...] = ()
    sampled: tuple[str, ...] = ()
    matrices: int = 0
    """That at least one expert changed: `sampled` is a part of them."""
    against: str = ""
    """What stands for W_s in `spectra`."""
    shared_bytes: int | None = None
    needs: Needs | None = None
    plan: dict[str, Any] | None = None
    schema: int = SCHEMA

    @property
    def ok(self) -> bool:
        """Whether a build would run to its end, as far as can be told."""
        return all(finding.level != "fail" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: only text, numbers, lists, mappings and None."""
        return {"schema": self.schema, "ok": self.ok} | asdict(self)
