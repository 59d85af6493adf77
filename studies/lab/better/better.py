"""Better than the paper at equal bytes: what else an expert's bytes may hold, chosen by a rule.

Oracle protocol: true expert, true head. The shared expert is the average. Two budgets: what
one expert's file may weigh, on average over experts. All validation rows choose (of 200 for each
task, CoLA's make ways look better that are not); only what is kept, and the paper's own cut beside
it, is scored on test rows.

The rule, for each budget:

1. alone: the dtypes of factors; then, on the best of them, each other idea by itself
2. together: any of {bias correction, another dtype of the vectors, budgeted ranks}, each in its
   best form, whether or not it won alone: what bytes are worth depends on what they buy
3. on top of the best so far: each other idea that won alone, and the other dtypes
4. the best of all of them is kept

What does not fit, or cannot be together with what was best, is recorded with why it is left out.

Inputs, ridges, rounds, and budgeted ranks and bases in a dtype that is not the best, are tried at
the first budget; the second takes what was best there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..lab import ALL, Lab, Settings
from ..static import Say
from .cutter import Cutter, TooLarge
from .made import Made
from .store import Dtype
from .way import MOST_INPUTS, Way

BUDGETS = {0.0035: 0.96, 0.035: 0.995}
"""Share of one float16 base model -> the normalised score that is aimed at."""


@dataclass(frozen=True)
class Dials:
    """What is tried.

    spread: dtypes in which budgeted ranks and bases are tried beside the best
    inputs: for the bias correction
    kinds:  whether biases are corrected under the activation-aware SVD; both are tried with the
            first of `ridges`, the better one with the others
    """

    factors: tuple[Dtype, ...] = ("float16", "int8", "int4")
    vectors: tuple[Dtype, ...] = ("int8", "float32")
    spread: tuple[Dtype, ...] = ("float16", "int4")
    inputs: tuple[int, ...] = (64, 16, 256)
    ridges: tuple[float, ...] = (0.1, 0.01, 1.0)
    kinds: tuple[bool, ...] = (True, False)
    rounds: tuple[int, ...] = (1, 3, 5)


FEW = Dials(("float16", "int4"), ("int8",), (), (64,), (0.1,), (True,), (1,))
"""For a quick study."""


def better(lab: Lab, say: Say) -> None:
    cutter = Cutter(lab)
    dials = Dials() if max(lab.settings.ranks) >= max(Settings.ranks) else FEW
    for budget in BUDGETS:
        dials = Search(cutter, say, budget).run(dials)


class Search:
    """All ways at one budget. scores: way -> normalised score on validation rows"""

    def __init__(self, cutter: Cutter, say: Say, budget: float) -> None:
        self.cutter, self.say, self.budget = cutter, say, budget
        self.scores: dict[Way, float] = {}

    def run(self, dials: Dials) -> Dials:
        """Returns the dials that were best."""
        plain = Way()
        ground = self.best(replace(plain, factors=dtype) for dtype in dials.factors)
        if ground is None:
            self.say(f"budget {self.budget:.2%}: heads and vectors do not fit; nothing is tried")
            return dials
        fixed = self.best(replace(ground, correct=True, inputs=n) for n in dials.inputs)
        aware = self.aware(ground, dials)
        refitted = self.best(replace(ground, rounds=n) for n in dials.rounds)
        dtypes = dict.fromkeys((ground.factors, *dials.spread))
        spread = self.best(
            replace(plain, factors=dtype, ranks=ranks)
            for dtype in dtypes
            for ranks in ("budget", "across")
        )
        based = self.best(replace(plain, factors=dtype, ranks="basis") for dtype in dtypes)
        self.best([replace(ground, vectors="none")])
        other = self.best(replace(ground, vectors=dtype) for dtype in dials.vectors)
        assert fixed and refitted and aware and spread, "they take no more bytes than the ground"

        axes: list[dict[str, Any]] = [{"correct": True, "inputs": fixed.inputs}]
        axes += [{"ranks": spread.ranks}, *([{"vectors": other.vectors}] if other else [])]
        self.best(
            replace(ground, **{key: x for axis in chosen for key, x in axis.items()})
            for count in range(2, len(axes) + 1)
            for chosen in itertools.combinations(axes, count)
        )
        top = self.kept()
        beside_aware = fixed if aware.correct else ground
        if self.scores[refitted] > self.scores[ground]:
            self.best([replace(top, rounds=refitted.rounds)])
        if self.scores[aware] > self.scores[beside_aware]:
            changes = {"ridge": aware.ridge, "inputs": aware.inputs, "correct": aware.correct}
            self.best([replace(top, **changes)])
        if based and self.scores[based] > self.scores[ground]:
            self.best([replace(top, ranks="basis", factors=based.factors)])
        self.best(replace(self.kept(), factors=dtype) for dtype in dials.factors[1:])

        self.report(plain)
        assert aware.ridge is not None
        return replace(
            dials,
            inputs=(fixed.inputs,),
            ridges=(aware.ridge,),
            kinds=(aware.correct,),
            rounds=(refitted.rounds,),
            spread=(),
        )

    def aware(self, ground: Way, dials: Dials) -> Way | None:
        ground = replace(ground, inputs=MOST_INPUTS)
        first, *others = dials.ridges
        kind = self.best(replace(ground, ridge=first, correct=correct) for correct in dials.kinds)
        if kind is None:
            return None
        return self.best([kind, *(replace(kind, ridge=ridge) for ridge in others)])

    def best(self, ways: Iterable[Way]) -> Way | None:
        """Of those that are possible and fit; the first of equal ones."""
        tried = [way for way in ways if self.score(way) is not None]
        return max(tried, key=lambda way: self.scores[way]) if tried else None

    def kept(self) -> Way:
        return max(self.scores, key=lambda way: self.scores[way])

    def score(self, way: Way) -> float | None:
        """On validation rows. None if it is left out."""
        if way in self.scores:
            return self.scores[way]

        def scored() -> dict[str, Any]:
            if way.clash:
                return {"left out": way.clash}
            try:
                made = self.cutter.made(way, self.budget)
            except TooLarge as problem:
                return {"left out": str(problem)}
            return self.about(made) | {"validation": self.measured(made, ALL)}

        settings = {"budget": self.budget} | way.settings
        record = self.cutter.lab.records.once("better", way.title, settings, scored)
        if "left out" in record:
            self.say(f"{self.budget:.2%}, {way.title}: left out, {record['left out']}")
            return None
        found = record["validation"]["normalised"]
        said = f"{found:.4f} on validation rows at {record['bytes']['share']:.3%}"
        if way.correct:
            said += f", {record['corrected']} biases corrected"
        self.say(f"{self.budget:.2%}, {way.title} {way.settings}: {said}")
        self.scores[way] = found
        return found

    def report(self, plain: Way) -> None:
        """Test rows, for what was kept and for the paper's cut."""
        for start, way in (("kept", self.kept()), ("the paper's", plain)):
            if way not in self.scores:
                continue
            settings = {"budget": self.budget} | way.settings
            records = self.cutter.lab.records
            chosen = records.find("better", way.title, settings)
            assert chosen is not None

            def scored(way: Way = way, chosen: dict[str, Any] = chosen) -> dict[str, Any]:
                made = self.cutter.made(way, self.budget)
                test = self.measured(made, "test")
                return self.about(made) | {"validation": chosen["validation"], "test": test}

            record = records.once("better", f"{start}: {way.title}", settings, scored)
            found, goal = record["test"]["normalised"], BUDGETS.get(self.budget)
            wanted = "" if goal is None else f", goal {goal:.4f}"
            self.say(f"{self.budget:.2%}, {start}: {way.title}: {found:.4f} on test rows{wanted}")

    def about(self, made: Made) -> dict[str, Any]:
        return {
            "protocol": "oracle",
            "bytes": made.sizes(self.cutter.sources.base_float16),
            "ranks": list(made.ranks),
            "error": made.error,
            "corrected": made.corrected,
        }

    def measured(self, made: Made, split: str) -> dict[str, Any]:
        lab = self.cutter.lab
        scores = {task: lab.alone(task, self.cutter.model(made, task), split) for task in lab.names}
        return lab.normalised(scores, split)
