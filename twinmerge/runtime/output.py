"""One call in data classes: `Decided` is what it runs with, `TwinOutput` what it gives, `Answer` a
row of that in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers.utils.generic import ModelOutput

from .arguments import Weights
from .router.router import Routed
from .routing import Routing


@dataclass
class TwinOutput(ModelOutput):
    """What a forward gives.

    logits:  as the task model gives them: (batch, class), (batch, seq, vocab), ... Where heads
             differ in width, outputs that a row's head does not have are -inf.
    weights: (batch, expert), how much of each expert's exclusive knowledge every row ran with.
    expert:  (batch,), index into `TwinModel.experts` of the head that answered each row.
    model_output: everything else that the task model returned (caches, hidden states). Its fields
             are found as attributes of this, too (`start_logits`, `last_hidden_state`, ...).
    dropped: (batch,), how much weight `top_k` and `threshold` left out; None if neither was given.
    routed:  what the router said (`Routed`: probabilities, novelty, whether a row is new and so ran
             nearer to the shared expert); None where it was not asked.
    plan:    which way the batch ran, see `runtime.plan`.
    """

    logits: Tensor | None = None
    weights: Tensor | None = None
    expert: Tensor | None = None
    model_output: Any = None
    dropped: Tensor | None = None
    routed: Any = None
    plan: str | None = None

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("model_output")
        if name.startswith("_") or inner is None or not hasattr(inner, name):
            raise AttributeError(f"{type(self).__name__} has no {name!r}, nor has its model_output")
        return getattr(inner, name)


@dataclass(frozen=True)
class Answer:
    """One row's answer in words."""

    expert: str
    """Whose head answered."""
    weight: float
    """Routing weight of that expert."""
    label: str | None
    """The label with the highest score; None for a regression."""
    score: float
    """Softmax probability of the label, or the regression's value."""


@dataclass(frozen=True)
class Decided:
    """What one call runs with."""

    routing: Routing
    weights: Weights
    """After `top_k` and `threshold`."""
    expert: Int[Tensor, " batch"]
    """Whose head answers."""
    dropped: Float[Tensor, " batch"] | None
    way: str
    routed: Routed | None = None
    """What the router said, if it was asked."""
