"""Opens what a recipe names, measures it, and puts the findings together.

Where a build could not even be planned, every expert is looked at by itself: all of them are told
that do not fit, and the others are measured all the same.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Checkpoint, Expert, check_shapes, open_expert, resolve
from ...errors import RecipeError, TwinMergeError
from ...recipe import Depths, Exclusive, Recipe
from ...weightfiles import some
from ..exclusive import Cut
from ..plan import Plan, make_plan
from ..shared import coefficients
from . import findings as say
from .diagnosis import Diagnosis, ExpertReport, Finding, Needs
from .measure import Measured, Progress, Shared, measure
from .spectra import Subject, expected_bytes, subjects_of
from .vocabulary import TokenizerDifference, compare, read_tokenizer

FLOAT16_MAX = 65504.0
CGROUP = Path("/sys/fs/cgroup")
SAMPLE = 40
"""Matrices whose singular values are taken, where not told otherwise."""


def diagnose(
    recipe: Recipe,
    *,
    sample: int | None = SAMPLE,
    out: Path | str = ".",
    progress: Progress | None = None,
) -> Diagnosis:
    """Look at the models of a recipe.

    Spectra are those of `sample` matrices at most (None: of all). `out` is where the artifact is
    meant to go: its disk is asked for room. What is wrong with a model is a finding, no exception.
    """
    recipe = recipe.located()
    try:
        plan = make_plan(recipe)
    except TwinMergeError as problem:
        refused, base, experts = _refusals(recipe, problem)
        try:
            return _diagnosis(recipe, None, base, experts, refused, sample, out, progress)
        finally:
            for each in [*experts, *([base] if base else [])]:
                each.close()
    try:
        return _diagnosis(recipe, plan, plan.base, plan.experts, [], sample, out, progress)
    finally:
        plan.close()


def _diagnosis(
    recipe: Recipe,
    plan: Plan | None,
    base: Checkpoint | None,
    experts: list[Expert],
    findings: list[Finding],
    sample: int | None,
    out: Path | str,
    progress: Progress | None,
) -> Diagnosis:
    head: dict[str, Any] = {
        "base": recipe.base_model,
        "method": recipe.merge_method,
        "exclusive": recipe.exclusive.model_dump(mode="json", exclude_none=True),
    }
    if base is None or not experts:
        reports = tuple(ExpertReport(e.name, e.model, None) for e in recipe.models)
        return Diagnosis(**head, experts=reports, findings=tuple(findings))
    if plan is not None:
        subjects = [
            Subject(
                t.name, t.shape, t.matrix, plan.keep.component_bytes(t) if t.matrix else t.bytes
            )
            for t in plan.tensors
            if t.kind in ("matrix", "vector")
        ]
        heads = [t.name for t in plan.tensors if t.kind == "head"]
    else:
        subjects = subjects_of(base, experts)
        heads = sorted({name for expert in experts for name in expert.head_names()})
    try:
        found = measure(
            base,
            experts,
            subjects,
            heads=heads,
            shared=_shared(recipe, base, len(experts)),
            limit=_limit(recipe.exclusive),
            sample=sample,
            largest=FLOAT16_MAX if recipe.out_dtype == "float16" else None,
            progress=progress,
        )
    except TwinMergeError as problem:  # a file that lies about itself shows when it is read
        findings = [*findings, say.as_finding("models", problem)]
        reports = tuple(ExpertReport(e.name, e.model, None) for e in recipe.models)
        return Diagnosis(**head, experts=reports, findings=tuple(findings))
    summary = plan.summary() if plan is not None else None
    shared_bytes = summary.get("shared_bytes") if summary else None
    known = {e.name: e for e in experts}
    tokenizer = read_tokenizer(base.folder)
    theirs = {e.name: read_tokenizer(e.folder) for e in experts}
    differences = {
        name: compare(tokenizer, other)
        for name, other in theirs.items()
        if tokenizer is not None and other is not None
    }
    outputs = plan.outputs if plan is not None else {}
    reports = tuple(
        _report(known[e.name], found, subjects, outputs.get(e.name), differences.get(e.name))
        if e.name in known
        else ExpertReport(e.name, e.model, None)
        for e in recipe.models
    )
    needs = _needs(summary, found, recipe, Path(out))
    against, exact = _against(recipe, found, subjects)
    findings = [
        *findings,
        *say.fits(plan, base, experts),
        *say.values(found, experts),
        *say.directions(found),
        *say.tokenizers(base, tokenizer is not None, len(theirs), differences),
        *say.preprocessors(base, experts),
        *say.warnings(plan),
        *say.shrunk(found),
        *say.energy(reports, recipe, shared_bytes, None if exact else against),
        *say.room(needs),
    ]
    order = {"fail": 0, "look": 1, "ok": 2}
    count = range(len(experts))
    return Diagnosis(
        **head,
        experts=reports,
        findings=tuple(sorted(say.folded(findings), key=lambda f: order[f.level])),
        measured=tuple(found.experts),
        tensors=tuple(found.tensors),
        unchanged=tuple(t.name for t in found.tensors if not any(t.moved)),
        cosines=tuple(tuple(found.cosine(i, j) for j in count) for i in count),
        opposed=tuple(tuple(_share(found.opposed, found.both, i, j) for j in count) for i in count),
        conflicts=found.conflicts / found.shared_entries if found.shared_entries else None,
        spectra=tuple(found.spectra),
        sampled=tuple(found.sampled),
        matrices=found.matrices,
        against=against,
        shared_bytes=shared_bytes,
        needs=needs,
        plan=summary,
    )


# --------------------------------------------------------------------------- what would fail


def _refusals(
    recipe: Recipe, problem: TwinMergeError
) -> tuple[list[Finding], Checkpoint | None, list[Expert]]:
    """Why a plan cannot be made: every expert by itself, then those that are left together.

    Also gives the base (None if it is what fails) and the experts that are fine by themselves.
    """
    findings: list[Finding] = []
    try:
        base = Checkpoint.open(recipe.base_model)
    except TwinMergeError as refused:
        findings.append(say.as_finding("base", refused))
        for entry in recipe.models:
            try:
                if "+" not in entry.model:
                    resolve(entry.model)
            except TwinMergeError as missing:
                findings.append(say.as_finding(f"expert '{entry.name}'", missing))
        return findings, None, []
    good: list[Expert] = []
    for entry in recipe.models:
        subject = f"expert '{entry.name}'"
        try:
            expert = open_expert(entry.name, entry.model, base)
        except TwinMergeError as refused:
            findings.append(say.as_finding(subject, refused, _architectures(entry.model, base)))
            continue
        try:
            check_shapes(base, expert)
            make_plan(recipe.model_copy(update={"models": (entry,)})).close()
        except RecipeError as refused:  # of one expert's entry; else it is the whole plan's
            if str(refused).startswith(f"{subject}: "):
                findings.append(say.as_finding(subject, refused))
            good.append(expert)
        except TwinMergeError as refused:
            findings.append(say.as_finding(subject, refused, _more_shapes(base, expert)))
            expert.close()
        else:
            good.append(expert)
    if len(good) == len(recipe.models):
        if not findings:
            subject = "recipe" if isinstance(problem, RecipeError) else "experts"
            findings.append(say.as_finding(subject, problem))
    elif len(good) > 1:
        names = {expert.name for expert in good}
        left = tuple(entry for entry in recipe.models if entry.name in names)
        try:
            make_plan(recipe.model_copy(update={"models": left})).close()
        except TwinMergeError as refused:
            findings.append(say.as_finding("experts", refused))
    return findings, base, good


def _more_shapes(base: Checkpoint, expert: Expert) -> str:
    """The first tensor of another shape is named already; this tells of the others."""
    others = [n for n in expert.names() if base.info(n).shape != expert.info(n).shape]
    return f" {len(others)} tensors have other shapes: {some(others)}." if len(others) > 1 else ""


def _architectures(reference: str, base: Checkpoint) -> str:
    """The two architectures by name, where they differ."""
    try:
        own = Checkpoint.open(reference)
    except TwinMergeError:
        return ""
    own.close()
    ours, theirs = base.config.get("model_type"), own.config.get("model_type")
    if ours == theirs:
        return ""
    return f" Its config.json says model_type '{theirs}', the base's '{ours}'."


# ------------------------------------------------------------------------------ the numbers


def _report(
    expert: Expert,
    found: Measured,
    subjects: Sequence[Subject],
    outputs: int | None,
    tokenizer: TokenizerDifference | None,
) -> ExpertReport:
    index = found.experts.index(expert.name)
    mine = [s for s in found.spectra if s.expert == expert.name]
    kept = [s.kept for s in mine if s.kept is not None]
    ranks = {
        share: {
            "median": float(statistics.median(s.ranks[share] for s in mine)),
            "max": float(max(s.ranks[share] for s in mine)),
        }
        for share in (mine[0].ranks if mine else ())
    }
    changed = sum(t.moved[index] > 0 for t in found.tensors)
    return ExpertReport(
        name=expert.name,
        reference=expert.reference,
        kind="LoRA" if expert.is_adapter else "full",
        outputs=outputs,
        heads=tuple(expert.head_names()),
        drift=found.drift(index),
        layers={layer: found.drift(index, layer) for layer in found.layers()},
        changed=changed,
        unchanged=len(found.tensors) - changed,
        tokenizer=tokenizer,
        ranks=ranks or None,
        bytes=expected_bytes(mine, subjects, found.moved()) if mine else None,
        kept={"median": statistics.median(kept), "min": min(kept)} if kept else None,
    )


def _needs(summary: dict[str, Any] | None, found: Measured, recipe: Recipe, out: Path) -> Needs:
    while not out.exists():
        out = out.absolute().parent
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4  # as build does
    threads = max(1, min(len(recipe.models), cores))
    summary = summary or {}
    disk = summary.get("disk_bytes_while_building_at_least")
    return Needs(
        peak_memory_bytes=summary.get("peak_memory_bytes"),
        free_memory_bytes=free_memory(),
        disk_bytes=disk,
        free_disk_bytes=shutil.disk_usage(out).free,
        folder=str(out),
        read_bytes=found.read_bytes,
        read_seconds=found.read_seconds,
        svd_seconds=found.svd_seconds,
        seconds=found.read_seconds + found.svd_seconds / threads,
    )


def free_memory() -> int | None:
    """Bytes that a process can take here: Linux's own estimate, or what a container's limit leaves.

    Cached files, which count as used in a container, are given up before its limit is reached.
    """
    found = []
    try:
        text = Path("/proc/meminfo").read_text()
        found += [1024 * int(kb) for kb in re.findall(r"MemAvailable:\s+(\d+) kB", text)]
    except OSError:
        pass
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        files = re.findall(
            r"^(?:in)?active_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.M
        )
        found.append(max(0, limit - used + sum(map(int, files))))
    except (OSError, ValueError):  # another system, or "max"
        pass
    return min(found, default=None)


def _shared(recipe: Recipe, base: Checkpoint, experts: int) -> Callable[[str], Shared | None]:
    """How the shared expert of a tensor is made, by its name; None where only a merge can say.

    That is so of methods that are not affine, of weights that a merge refuses (which is a finding
    by then) and where experts are lacking.
    """
    depths = Depths(base.names())

    def of(name: str) -> Shared | None:
        if experts < len(recipe.models):
            return None
        parameters = recipe.parameters_at(name, depths.of(name))
        try:
            c = coefficients(recipe.merge_method, parameters, experts)
        except ValueError:
            return None
        if c is not None:
            return Shared(c)
        if recipe.merge_method != "linear":
            return None
        weight = torch.as_tensor(parameters.get("weight", 1.0), dtype=torch.float64)
        weight = weight.expand(experts)  # not normalised: Σ w W_t
        return Shared(weight, rest=float(weight.sum()) - 1)

    return of


def _against(recipe: Recipe, found: Measured, subjects: Sequence[Subject]) -> tuple[str, bool]:
    """What spectra are measured against, and whether it is the shared expert itself."""
    own = f"the shared expert by {recipe.merge_method}"
    if subjects and all(subject.name in found.known for subject in subjects):
        return own, True
    stand_in = "the experts' average" if len(found.experts) > 1 else "the base"
    return (f"{own}, or {stand_in} where that is not known" if found.known else stand_in), False


def _limit(exclusive: Exclusive) -> Callable[[int, int], int] | None:
    """The rank that the recipe keeps of an (out, in) matrix; None where data decide it.

    0 also for the forms that keep entries and take no SVD.
    """
    rank = exclusive.rank
    if exclusive.form != "svd" or rank == "none":
        return lambda out, in_: 0
    if isinstance(rank, int):
        return Cut(rank=rank).limit
    if isinstance(rank, str) and rank.endswith("%"):
        return Cut(share=float(rank.rstrip("% ")) / 100).limit
    return None


def _share(part: Tensor, whole: Tensor, i: int, j: int) -> float | None:
    return float(part[i, j] / whole[i, j]) if whole[i, j] else None
