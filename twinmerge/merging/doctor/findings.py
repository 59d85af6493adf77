"""What the numbers mean for a person: one sentence each, and what to do about it."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...checkpoint import Checkpoint, Expert
from ...errors import MissingTensor, TwinMergeError
from ...recipe import Recipe
from ...weightfiles import some
from ..plan import Plan
from ..stream import UNRELATED_DRIFT
from .diagnosis import ExpertReport, Finding, Level, Needs
from .measure import Measured
from .vocabulary import TokenizerDifference

NEARLY_EQUAL = 0.999
"""Cosine of two task vectors that are copies but for rounding, or one run's neighbouring steps."""
SAME_WAY = 0.8
"""Mean cosine above which all experts have a long way in common: the base's, most likely."""
LOUDER = 4.0
"""Times the median drift at which one expert outweighs the others in a plain average."""
OPPOSED = 0.55
"""Share of entries moved in opposite directions; two unrelated experts have 0.5."""
LITTLE_ENERGY = 0.25
"""Share of the exclusive energy that a recipe's rank holds, below which it is worth a look."""
FULL_MEMORY = 0.9
"""Share of the free memory that a build can take before the system swaps or kills."""


def as_finding(subject: str, problem: TwinMergeError, more: str = "") -> Finding:
    """The parts of our messages: what is wrong, and below it what to do."""
    text, _, todo = str(problem).removeprefix(f"{subject}: ").partition("\n  ")
    todo = " ".join(todo.split()) or "Change the recipe accordingly."
    return Finding("fail", subject, text + more, todo)


def folded(findings: Sequence[Finding]) -> list[Finding]:
    """What is said of several experts in the same words is said once."""
    subjects: dict[tuple[Level, str, str], list[str]] = {}
    for f in findings:
        subjects.setdefault((f.level, f.text, f.todo), []).append(f.subject)
    folded = []
    for (level, text, todo), held in subjects.items():
        names = [found[1] for s in held if (found := re.fullmatch(r"expert ('.*?')", s))]
        if len(names) == len(held) > 1:
            held = [f"experts {', '.join(names)}"]
        folded += [Finding(level, subject, text, todo) for subject in dict.fromkeys(held)]
    return folded


def fits(plan: Plan | None, base: Checkpoint, experts: Sequence[Expert]) -> Iterator[Finding]:
    if plan is None:
        return
    heads = [t.name for t in plan.tensors if t.kind == "head"]
    buffers = [t.name for t in plan.tensors if t.kind == "buffer" and not t.running]
    merged = sum(t.kind in ("matrix", "vector") for t in plan.tensors)
    yield Finding(
        "ok",
        "models",
        f"{len(experts)} experts fit the base: {merged} tensors are merged, "
        f"{len(heads)} head tensors kept whole ({plan.model_class}).",
    )
    for name in buffers:
        value = base.read(name)
        for expert in experts:
            try:
                same = torch.equal(expert.read(name), value)
            except MissingTensor:  # constants that newer transformers no longer store
                continue
            if not same:
                yield Finding(
                    "fail",
                    f"expert '{expert.name}'",
                    f"{name}: a {value.dtype} tensor, which cannot be merged and must be equal "
                    "everywhere, has other values than the base's.",
                    "Leave the expert out, or give it the base's values.",
                )


def values(found: Measured, experts: Sequence[Expert]) -> Iterator[Finding]:
    """Broken numbers, and how far each expert is from the base."""
    for kind, listed in (("NaN or infinity", found.not_finite), ("", found.too_large)):
        for who in dict.fromkeys(who for _, who in listed):
            names = [name for name, whose in listed if whose == who]
            subject = "base" if who is None else f"expert '{who}'"
            if kind:
                todo = "The checkpoint is broken (a diverged run?): save it again or leave it out."
                text = f"{kind} in {some(names)}."
                yield Finding("fail", subject, text, todo)
            else:
                text = f"entries beyond float16's largest number, 65504, in {some(names)}."
                yield Finding("look", subject, text, "Set out_dtype: bfloat16 or float32.")
    drifts: dict[str, float] = {}
    still: set[str] = set()
    for index, expert in enumerate(experts):
        drift = found.drift(index)
        moved = float(found.products[index, index]) > 0
        if not moved:
            still.add(expert.name)
            head = "; only its head is its own" if expert.head_names() else ""
            yield Finding(
                "look",
                f"expert '{expert.name}'",
                f"every merged tensor equals the base's{head}: is it the base itself?",
                "Check its path. Leave it out, unless a head on the plain base is meant.",
            )
        elif drift is not None and drift > UNRELATED_DRIFT:
            yield Finding(
                "look",
                f"expert '{expert.name}'",
                f"its matrices are {drift:.2f} of the base's norm away from the base; fine-tuning "
                "moves them by a few hundredths, two unrelated models are about 1.41 apart.",
                "It was almost surely tuned from another base: check both paths.",
            )
        if drift is not None and moved:
            drifts[expert.name] = drift
    if drifts and max(drifts.values()) <= UNRELATED_DRIFT and not still:
        low, high = min(drifts.values()), max(drifts.values())
        span = f"{low:.2g}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"
        yield Finding(
            "ok", "base", f"experts are {span} of the base's norm away from it, as fine-tunes are."
        )
    middle = statistics.median(drifts.values()) if len(drifts) > 2 else 0.0
    for name, drift in drifts.items():
        if middle and LOUDER * middle < drift <= UNRELATED_DRIFT:
            yield Finding(
                "look",
                f"expert '{name}'",
                f"moved {drift / middle:.1f} times as far as the median expert ({drift:.3f} of the "
                f"base's norm): in a plain average it outweighs the others.",
                "Give it a smaller `weight`, and look at its scores in `eval`.",
            )


def directions(found: Measured) -> Iterator[Finding]:
    """Experts that are one, nearly one, or all on the same way."""
    names = found.experts
    both = float(found.both.triu(1).sum())
    if both and (opposed := float(found.opposed.triu(1).sum()) / both) > OPPOSED:
        yield Finding(
            "look",
            "experts",
            f"two experts pull an entry in opposite directions {opposed:.0%} of the time; by "
            "chance it would be 50 %.",
            "They undo each other in an average: rely on the router, and keep a larger rank.",
        )
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    cosines = {p: cosine for p in pairs if (cosine := found.cosine(*p)) is not None}
    near = False
    for i, j in pairs:
        subject = f"experts '{names[i]}' and '{names[j]}'"
        cosine = cosines.get((i, j))
        if (i, j) in found.alike:
            near = True
            text = "all their tensors are equal: the same expert twice."
            yield Finding("fail", subject, text, "Leave one of them out, or check the paths.")
        elif cosine is not None and cosine > NEARLY_EQUAL:
            near = True
            text = f"nearly the same expert: their task vectors have cosine {cosine:.4f}."
            todo = "Leave one out, unless two checkpoints of one run are meant."
            yield Finding("look", subject, text, todo)
    if not cosines:
        return
    mean = sum(cosines.values()) / len(cosines)
    if mean > SAME_WAY and not near:
        yield Finding(
            "look",
            "base",
            f"all experts went the same way (mean cosine {mean:.2f}): most of what they learnt is "
            "in common, or they were tuned from a later checkpoint than this base.",
            "Check that base_model is what they were tuned from (the instruct version, perhaps).",
        )
    elif not near:
        i, j = max(cosines, key=lambda p: cosines[p])
        low = min(cosines, key=lambda p: cosines[p])
        text = f"all different: cosines from {cosines[low]:.2f} ({names[low[0]]}, {names[low[1]]})"
        text += f" to {cosines[i, j]:.2f} ({names[i]}, {names[j]})."
        yield Finding("ok", "experts", text)


def tokenizers(
    base: Checkpoint, known: bool, count: int, differences: dict[str, TokenizerDifference]
) -> Iterator[Finding]:
    if not known and not {"vocab_size", "text_config"} & base.config.keys():
        return  # a model of images
    if not known:
        text = "has no tokenizer that can be read; the artifact will have none of its own."
        yield Finding("look", "tokenizer", text, "Copy the tokenizer's files into the base folder.")
        return
    for name, difference in differences.items():
        parts = []
        for number, what in (
            (difference.renumbered, "have other numbers"),
            (difference.added, "are new"),
            (difference.lacking, "are missing"),
        ):
            parts += [f"{number:,} tokens {what}"] if number else []
        if difference.rules:
            parts.append(f"cuts text by other rules ({', '.join(difference.rules)})")
        if parts:
            shown = f": {'; '.join(difference.examples)}" if difference.examples else ""
            yield Finding(
                "look",
                f"expert '{name}'",
                f"its tokenizer is not the base's: {', '.join(parts)}{shown}. The artifact has the "
                "base's.",
                "Make the vocabularies equal first (resize the base, use its tokenizer in "
                "training), or leave the expert out.",
            )
        if difference.chat_template:
            yield Finding(
                "look",
                f"expert '{name}'",
                "its chat template is not the base's; the artifact has the base's.",
                "Copy the template that prompts shall have into the base folder.",
            )
    if not any(differences.values()):
        own = f"{len(differences)} of {count} experts have one"
        text = f"the base's; {own}, all equal to it." if differences else "only the base has one."
        yield Finding("ok", "tokenizer", text)


def preprocessors(base: Checkpoint, experts: Sequence[Expert]) -> Iterator[Finding]:
    """How images become pixels, for models that see."""
    ours = _preprocessor(base.folder)
    for expert in experts:
        theirs = _preprocessor(expert.folder)
        differ = sorted(key for key in ours.keys() & theirs if ours[key] != theirs[key])
        if differ:
            key = differ[0]
            text = f"its preprocessor_config.json has {key} = {theirs[key]!r}, the base's "
            text += f"{ours[key]!r}" + (f", and {len(differ) - 1} more" if differ[1:] else "")
            todo = "The artifact has the base's: check that the expert learnt with those values."
            yield Finding("look", f"expert '{expert.name}'", f"{text}.", todo)


def _preprocessor(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = re.compile(r"^_|_type$|_class$|^(dtype|device)$")
    return {key: content[key] for key in content if not names.search(key)}


_TODO = (
    (r"its config\.json has", "Make sure that the experts learnt with the base's value, or leave "
     "this one out."),
    (r"carries no names", "Add `labels` to its entry in the recipe."),
    (r"was trained on", "Check that this is the same model under another name."),
    (r"ties its output", "Nothing, if the adapter's training had them tied as well."),
)  # fmt: skip


def warnings(plan: Plan | None) -> Iterator[Finding]:
    """What the plan itself finds odd: configs that differ, labels, an adapter's own base."""
    for warning in plan.warnings if plan is not None else ():
        subject, _, text = warning.partition(": ")
        if not re.fullmatch(r"expert '.*'", subject):
            subject, text = "models", warning
        todo = next(
            (todo for pattern, todo in _TODO if re.search(pattern, warning)),
            "Check that this is meant.",
        )
        text = text.partition(" Give `labels")[0]
        yield Finding("look", subject, " ".join(text.split()), todo)


def shrunk(found: Measured) -> Iterator[Finding]:
    """Averages whose weights do not sum to 1."""
    sums = [f"{1 + rest:.3g}" for rest in sorted(found.rests.values())]
    if not sums:
        return
    span = sums[0] if sums[0] == sums[-1] else f"{sums[0]} to {sums[-1]}"
    yield Finding(
        "look",
        "shared expert",
        f"the weights of {len(sums)} tensors sum to {span} and are not normalised, so the shared "
        "expert is about that many times a model, and experts have to keep the rest.",
        "Leave out `normalize: false`, or give weights that sum to 1.",
    )


def energy(
    reports: Sequence[ExpertReport],
    recipe: Recipe,
    shared_bytes: int | None,
    stand_in: str | None = None,
) -> Iterator[Finding]:
    """What the recipe's rank holds of the exclusive parts.

    Measured against a `stand_in` for the shared expert, a large share assures of nothing.
    """
    kept = {r.name: r.kept["median"] for r in reports if r.kept is not None}
    if not kept:
        return
    rank = f"rank {recipe.exclusive.rank}"
    worst = min(kept, key=kept.__getitem__)
    low, high = f"{min(kept.values()):.0%}", f"{max(kept.values()):.0%}"
    text = f"{rank} holds {low if low == high else f'{low} to {high}'} of the energy of what is "
    text += "exclusive to an expert (medians)"
    if stand_in is not None:
        text += f", measured against {stand_in}"
    if kept[worst] >= LITTLE_ENERGY:
        if stand_in is None:
            yield Finding("ok", "exclusive", f"{text}.")
        return
    sizes = [r.bytes["90%"] for r in reports if r.bytes]
    cost = f", {max(sizes) / shared_bytes:.0%} of the base per expert" if shared_bytes else ""
    todo = f"`energy: 0.9` would hold 90 %{cost}. A low share need not hurt the scores: compare "
    todo += "`eval --protocol oracle` at two ranks."
    yield Finding("look", "exclusive", f"{text}; least {worst}'s.", todo)


def room(needs: Needs) -> Iterator[Finding]:
    disk, free = needs.disk_bytes, needs.free_disk_bytes
    if disk is not None and disk > free:
        text = f"the artifact takes {_size(disk)}, the disk of {needs.folder} has {_size(free)}."
        todo = "Free some, give `merge` a folder on another disk, or keep a smaller rank."
        yield Finding("fail", "disk", text, todo)
    elif disk is not None:
        yield Finding("ok", "disk", f"{_size(disk)} of {_size(free)} free.")
    peak, memory = needs.peak_memory_bytes, needs.free_memory_bytes
    if peak is None or memory is None:
        return
    if peak > FULL_MEMORY * memory:
        text = f"the build may hold {_size(peak)} at once, {_size(memory)} are free."
        todo = "Close what else runs, or build where there is more: it may be killed."
        yield Finding("look", "memory", text, todo)
    else:
        yield Finding("ok", "memory", f"{_size(peak)} at most of {_size(memory)} free.")


def _size(count: int) -> str:
    """Bytes in words: powers of 1000, as disks are sold."""
    power = min(4, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
