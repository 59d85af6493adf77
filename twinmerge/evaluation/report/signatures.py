"""Failure signatures of the method: what each looks like in numbers, and what to do about it.

Each function looks for one, in plain numbers, and gives None where it is not seen. Shares are from
0 to 1. `seen` looks for all of them in what `gather` measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .gather import Found

EVEN = 0.9
"""Of the highest entropy, log T: weights of more are near-uniform."""
ONE_EXPERT = 0.9
"""Mean weight of one expert over tasks: with more, all inputs get that one."""
LOST = 0.5
"""Share of a task's rows that go to their own expert: with less, the task is lost."""
ORACLE = 0.95
"""Of an expert's own score: its compressed form alone should reach this."""
ERROR = 0.75
"""Mean ‖D - kept‖ / ‖D‖ over matrices, where experts' own scores are not known."""
ECE = 0.1
"""Expected calibration error: above, confidence does not mean what it says."""
CONFUSED = 0.1
"""Share of both tasks' rows that go to the other one's expert."""
ROUTED_RIGHT = 0.8
"""Share of rows routed right from which on wrong answers are not the choice's fault."""
SOFT = 0.03
"""Share of the oracle's score that is lost beyond what rows routed wrong explain."""
NEW_FACTOR, NEW_MARGIN = 2.0, 0.02
"""Seen rows taken for new: this many times what the coverage allows, and this share more."""
NOTICED = 0.5
"""Share of unseen rows that should be noticed."""
CUT = 0.05
"""Share of a task's rows that are cut to the token limit."""
SHIFT = 0.1
"""Routing accuracy below that of the rows held out when the router was fitted."""
FEW = 50
"""Rows of a task: with fewer, a share is known to ± 14 points at best."""


@dataclass(frozen=True)
class Signature:
    """One failure that was seen."""

    name: str
    """For programs."""
    title: str
    said: str
    """What was seen, in numbers."""
    do: str
    """What to do about it."""
    serious: bool = True
    """Or a remark."""


def even_weights(entropy: float, experts: int) -> Signature | None:
    """entropy: of the weights of a row, in nats, mean over rows."""
    if experts < 2 or entropy < EVEN * log(experts):
        return None
    return Signature(
        "even-weights",
        "Near-uniform weights",
        f"The weights of a row have an entropy of {entropy:.2f} nats on average; the same weight "
        f"for all {experts} experts has {log(experts):.2f}. Every input gets about the same model.",
        "Fit the router on more rows or other layers (`fit-router --auto --rows N`), or sharpen it "
        "(`--sharpness top`). Look whether the experts' routing rows differ at all.",
    )


def one_expert(weights: Mapping[str, Mapping[str, float]]) -> Signature | None:
    """weights: mean weights by task, then by expert."""
    if len(weights) < 2:
        return None
    means = {
        name: fmean(of[name] for of in weights.values()) for name in next(iter(weights.values()))
    }
    top = max(means, key=lambda name: means[name])
    if len(means) < 2 or means[top] < ONE_EXPERT:
        return None
    return Signature(
        "one-expert",
        "Weights never leave one expert",
        f"'{top}' has a weight of {means[top]:.2f} on average over {len(weights)} tasks.",
        "Check that every expert's routing rows are its own (not one file under all names), and as "
        "many as the others'; then fit the router again, with another `--kind` or `--layer`.",
    )


def lost_tasks(confusion: Mapping[str, Mapping[str, int]]) -> Signature | None:
    """confusion: rows by task, then by chosen expert."""
    lost = []
    for task, chosen in confusion.items():
        total = sum(chosen.values())
        if total and (right := chosen.get(task, 0) / total) < LOST:
            most = max(chosen, key=lambda name: chosen[name])
            lost.append(f"{task} {right:.0%} (most go to {most})")
    if not lost:
        return None
    return Signature(
        "lost-tasks",
        "Tasks whose rows go elsewhere",
        f"Rows that reach their own expert: {', '.join(lost)}.",
        "Fit the router with more rows of these tasks, as they come in use; if the rows in the "
        "confusion matrix look alike to you too, name the task (`task=`) or restrict the choice "
        "(`allowed=`).",
    )


def over_compressed(
    oracle: Mapping[str, float],
    own: Mapping[str, float] | None,
    errors: Mapping[str, float | None],
) -> Signature | None:
    """own: the experts' own scores, by task; errors: mean relative error of their matrices.

    Scores decide where they are known: a large error may cost nothing.
    """
    if own is not None:
        bad = [
            f"{name} {oracle[name]:.3f} of {own[name]:.3f}"
            for name in oracle
            if own.get(name, 0) > 0 and oracle[name] < ORACLE * own[name]
        ]
        said = "Alone and chosen by hand, experts score below their own checkpoints: {}."
    else:
        bad = [f"{name} {error:.2f}" for name, error in errors.items() if (error or 0) > ERROR]
        said = (
            "Of what experts know beyond the shared one, most is lost (mean relative error): {}. "
            "What that costs in score is told with `--experts RECIPE`."
        )
    if not bad:
        return None
    return Signature(
        "over-compressed",
        "Over-compressed experts",
        said.format(", ".join(bad)),
        "Merge again with a higher `exclusive: {rank: ...}`, or `{budget: ...}`, which spends the "
        "same bytes where they count; `twinmerge doctor` tells the rank that keeps 95 %.",
    )


def useless_shared(
    shared: Mapping[str, float], other: Mapping[str, float], what: str
) -> Signature | None:
    """other: scores of what the shared expert should beat, by task; what: its name in words."""
    ours, theirs = fmean(shared.values()), fmean(other[name] for name in shared)
    if ours > theirs:
        return None
    return Signature(
        "useless-shared",
        "A shared expert that is no better than nothing",
        f"With every task's own head, the shared expert scores {ours:.3f} on average; {what} "
        f"scores {theirs:.3f}.",
        "Inputs that are taken for new get this model. Try another `merge_method` "
        "(task_arithmetic with a smaller scale, ties, dare_ties); `twinmerge doctor` tells which "
        "experts pull apart.",
    )


def miscalibrated(error: float, uncalibrated: float, rows: int) -> Signature | None:
    """Expected calibration errors: of the probabilities as given, and at temperature 1."""
    if error <= ECE:
        return None
    return Signature(
        "miscalibrated",
        "Confidence that does not mean what it says",
        f"Confidence is {error:.2f} off the share of right choices (expected calibration error, "
        f"{rows:,} rows; up to {ECE} is usual); at temperature 1, {uncalibrated:.2f}"
        + (": the temperature does harm here." if uncalibrated < error else "."),
        "Fit the router again with more rows (`--rows`): the temperature is set on a part of them "
        "that is small now, or unlike these rows.",
    )


def confused_pairs(confusion: Mapping[str, Mapping[str, int]]) -> Signature | None:
    """confusion: rows by task, then by chosen expert."""
    share = {
        task: {name: count / max(sum(chosen.values()), 1) for name, count in chosen.items()}
        for task, chosen in confusion.items()
    }
    names = list(confusion)
    pairs = [
        f"{a} and {b} ({share[a].get(b, 0):.0%} and {share[b].get(a, 0):.0%})"
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if min(share[a].get(b, 0), share[b].get(a, 0)) >= CONFUSED
    ]
    if not pairs:
        return None
    return Signature(
        "confused-pairs",
        "Tasks that cannot be told apart",
        f"Rows of each go to the other's expert: {', '.join(pairs)}.",
        "The inputs themselves are alike, only what is asked differs. Where the caller knows it, "
        "say it (`task=`, `allowed=`, `run --allowed`).",
    )


def soft_weights(
    known: Mapping[str, float],
    oracle: Mapping[str, float],
    accuracy: Mapping[str, float],
    new: Mapping[str, float],
) -> Signature | None:
    """known: scores with routed weights and the true head; accuracy, new: shares of rows."""
    bad = []
    for name, score in known.items():
        if accuracy[name] < ROUTED_RIGHT or oracle[name] <= 0:
            continue
        explained = (1 - accuracy[name]) + new[name]
        if 1 - score / oracle[name] > explained + SOFT:
            bad.append(f"{name} {score:.3f} of {oracle[name]:.3f} at {accuracy[name]:.0%}")
    if not bad:
        return None
    return Signature(
        "soft-weights",
        "Routed right, answered wrong",
        f"With the right head, mixed weights score less than the expert alone, by more than rows "
        f"routed wrong explain: {', '.join(bad)} routed right.",
        "Other experts' shares disturb the answer. Sharpen the weights: `fit-router --sharpness "
        "top`, or `auto` with more rows.",
    )


def too_many_new(new: Mapping[str, float], coverage: float) -> Signature | None:
    """new: share of a task's rows taken for unlike all experts' data; coverage: asked for."""
    limit = NEW_FACTOR * (1 - coverage) + NEW_MARGIN
    bad = [f"{name} {share:.0%}" for name, share in new.items() if share > limit]
    if not bad:
        return None
    return Signature(
        "too-many-new",
        "Known inputs taken for new",
        f"At {coverage:.0%} coverage about {1 - coverage:.0%} should be; of these it is more: "
        f"{', '.join(bad)}. Such rows get less of their expert.",
        "These rows are unlike those that the router was fitted on: fit it on rows like them, or "
        "with a higher `--coverage` (1: never).",
    )


def not_noticed(noticed: Mapping[str, float]) -> Signature | None:
    """noticed: share of an unseen task's rows that is taken for new."""
    if not noticed or fmean(noticed.values()) >= NOTICED:
        return None
    least = sorted(noticed, key=lambda name: noticed[name])[:3]
    return Signature(
        "not-noticed",
        "Unseen tasks taken for known ones",
        f"{fmean(noticed.values()):.0%} of their rows are noticed; least of "
        + ", ".join(f"{name} ({noticed[name]:.0%})" for name in least)
        + ".",
        "The coverage table says what a lower `fit-router --coverage` would notice, and what it "
        "costs; another `--layer` may tell more.",
    )


def cut_rows(cut: Mapping[str, int], rows: Mapping[str, int]) -> Signature | None:
    """cut: rows of a task that are longer than the token limit."""
    bad = [f"{name} {cut[name] / rows[name]:.0%}" for name in cut if cut[name] > CUT * rows[name]]
    if not bad:
        return None
    return Signature(
        "cut-rows",
        "Rows cut to fit",
        f"Longer than the token limit: {', '.join(bad)}. Their ends were not read.",
        "Raise `--max-tokens` where the model has more positions, or shorten the texts.",
        serious=False,
    )


def shifted(accuracy: float, held_out: float | None) -> Signature | None:
    """held_out: routing accuracy that was measured when the router was fitted."""
    if held_out is None or accuracy >= held_out - SHIFT:
        return None
    return Signature(
        "shifted",
        "Rows unlike those the router was fitted on",
        f"{accuracy:.0%} of these rows go to their own expert; of rows held out when the router "
        f"was fitted, {held_out:.0%} did.",
        "Fit the router on rows that are like those in use.",
    )


def few_rows(rows: Mapping[str, int]) -> Signature | None:
    few = [f"{name} {count}" for name, count in rows.items() if count < FEW]
    if not few:
        return None
    return Signature(
        "few-rows",
        "Few rows",
        f"Fewer than {FEW} rows: {', '.join(few)}. Scores and shares may be off by chance.",
        "Measure on more rows before you decide anything by these numbers.",
        serious=False,
    )


def seen(found: Found) -> tuple[Signature, ...]:
    """All that is seen in what was measured, serious ones first."""
    looked: list[Signature | None] = []
    scores = {
        protocol: {name: task.score for name, task in report.tasks.items()}
        for protocol, report in found.reports.items()
    }
    routing = found.routing
    if routing is not None:
        if routing.learns:
            looked.append(even_weights(routing.entropy, len(routing.experts)))
            of_experts = {n: w for n, w in routing.weights.items() if n not in routing.unseen}
            looked.append(one_expert(of_experts))
            looked.append(
                miscalibrated(
                    routing.calibration_error,
                    routing.uncalibrated_error,
                    sum(found.rows.values()),
                )
            )
        looked.append(lost_tasks(routing.confusion))
        looked.append(confused_pairs(routing.confusion))
        if routing.coverage is not None:
            looked.append(too_many_new(routing.new, routing.coverage))
            looked.append(not_noticed(routing.noticed))
        looked.append(shifted(routing.accuracy, routing.held_out_accuracy))
        if {"known-head", "oracle"} <= scores.keys():
            looked.append(
                soft_weights(
                    scores["known-head"], scores["oracle"], routing.accuracies, routing.new
                )
            )
    errors = {e["name"]: e["mean_relative_error"] for e in found.summary["experts"]}
    looked.append(over_compressed(scores.get("oracle", {}), found.reference, errors))
    if "shared" in scores:
        if found.base is not None:
            looked.append(useless_shared(scores["shared"], found.base, "the base"))
        elif found.majority:
            what = "the commonest label, always,"
            looked.append(useless_shared(scores["shared"], found.majority, what))
    looked += [cut_rows(found.truncated, found.rows), few_rows(found.rows)]
    return tuple(sorted(_kept(looked), key=lambda each: not each.serious))


def _kept(looked: Iterable[Signature | None]) -> list[Signature]:
    return [each for each in looked if each is not None]
