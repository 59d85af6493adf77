"""How sure a router of a few lines may be: none are set aside, so each is left out in turn."""

from __future__ import annotations

from statistics import median

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...recipe import Router as Settings
from .choosing import train

LEFT_OUT = 64
"""Times that lines are left out to see whether they would reach their own expert."""


def left_out(
    x: Float[Tensor, "row width"], truth: Int[Tensor, " row"], experts: int, settings: Settings
) -> Float[Tensor, "row expert"] | None:
    """Logits of every line by prototypes of the others; None if an expert has only one."""
    if int(torch.bincount(truth, minlength=experts).min()) < 2:
        return None
    logits = torch.empty(len(truth), experts)
    apart = torch.arange(len(truth)) % LEFT_OUT if len(truth) > LEFT_OUT else None
    for number in range(min(len(truth), LEFT_OUT)):
        left = torch.arange(len(truth)) == number if apart is None else apart == number
        rest = (~left).nonzero()[:, 0]
        scorer, _ = train("prompts", x, truth, rest, experts, settings)
        logits[left] = scorer(x[left])
    return logits


def guessed_temperature(own: Float[Tensor, "row expert"], truth: Int[Tensor, " row"]) -> float:
    """From logits of the lines themselves: nothing tells how sure to be, so about 9 in 10."""
    lead = own.gather(1, truth[:, None])[:, 0] - own.scatter(1, truth[:, None], float("-inf")).amax(
        dim=1
    )
    return max(median(lead.tolist()) / 2, 1e-3)
