"""Moments of what comes into the linear layers of an expert, from a few unlabelled inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass
class Moments:
    """Of all tokens that came into one layer, in float64."""

    count: int
    total: Float[Tensor, " in"]
    products: Float[Tensor, "in in"] | None = None
    """Sum of `x xᵀ`, where it was asked for."""

    @property
    def mean(self) -> Float[Tensor, " in"]:
        return self.total / self.count

    def second(self, *, centred: bool) -> Float[Tensor, "in in"]:
        """`E x xᵀ`, or the covariance."""
        assert self.products is not None
        found = self.products / self.count
        return found - self.mean.outer(self.mean) if centred else found

    def add(self, x: Float[Tensor, "token in"]) -> None:
        x = x.double()
        self.count += len(x)
        self.total += x.sum(dim=0)
        if self.products is not None:
            self.products += x.T @ x


@torch.no_grad()
def moments(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Tensor]],
    paths: Sequence[str],
    *,
    second: bool = False,
) -> dict[str, Moments]:
    """Path of a linear layer -> moments over the tokens that the mask of a batch shows.

    A layer that sees one vector of each row (a pooler) has all of them counted.
    """
    found: dict[str, Moments] = {}
    shown = torch.empty(0)

    def watched(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            found[path].add(x[shown] if x.shape[:-1] == shown.shape else x.flatten(0, -2))

        return hook

    hooks = []
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        n = layer.in_features
        products = torch.zeros(n, n, dtype=torch.float64) if second else None
        found[path] = Moments(0, torch.zeros(n, dtype=torch.float64), products)
        hooks.append(layer.register_forward_pre_hook(watched(path)))
    try:
        for batch in inputs:
            shown = batch["attention_mask"].bool()
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found
