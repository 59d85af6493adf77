"""What every part of a matrix can do, and what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..routing import Mix

BLOCK = 1 << 20
"""Entries of a quantised or sparse part that are floats at one time: 4 MiB in float32."""


Convolve = Callable[[Tensor, Tensor, None], Tensor]
"""x, kernels and no bias -> y, with stride and padding of the layer."""


def aligned(mixed: Tensor, ndim: int) -> Tensor:
    """(batch, n) as (batch, 1, ..., 1, n) with `ndim` axes."""
    return mixed.view(mixed.shape[0], *[1] * (ndim - 2), mixed.shape[-1])


class Part(nn.Module, ABC):
    """What some experts know of one matrix. `mix` has weights for each row, or one for all.

    Axes of x and y but the first and last are free. Results have the dtype of x or y, or the one
    asked for.
    """

    out: int
    in_: int
    ranks: tuple[int, ...]
    """Of every expert of the artifact: how much one row of its weights costs, about."""

    @abstractmethod
    def linear(self, y: Tensor, x: Tensor, mix: Mix) -> Tensor:
        """y + Σ_t w_t D_t x, x: (batch, ..., in), y: (batch, ..., out). May overwrite `y`."""

    @abstractmethod
    def conv(
        self, y: Tensor, x: Tensor, mix: Mix, kernel: torch.Size, convolve: Convolve
    ) -> Tensor:
        """y + Σ_t w_t D_t * x, where a row of D_t is a kernel of that shape."""

    @abstractmethod
    def lookup(self, y: Tensor, ids: Tensor, mix: Mix) -> Tensor:
        """y + Σ_t w_t D_t[ids], ids: (batch, ...) or (1, ...), y: (batch or 1, ..., in)."""

    @abstractmethod
    def look(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """What `back` makes rows `ids` of D_t from, of all experts: (..., stacked)."""

    @abstractmethod
    def back(self, y: Tensor, found: Tensor, mix: Mix) -> Tensor:
        """y + the rows of Σ_t w_t D_t that `found` (of `look`) stands for: (..., in)."""

    @abstractmethod
    def dense(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ_t w_t D_t for each row of weights (batch, expert): (batch, out, in)."""

    @abstractmethod
    def turned(self) -> Part:
        """The part of the transposed matrix."""

    @abstractmethod
    def one_channel(self) -> Part:
        """The part of the matrix laid out as one row: (1, out · in). Packed ones give float32."""

    def active(self, mix: Mix) -> bool:
        """Whether it adds anything."""
        return any(self.ranks[t] for t in mix.active)

    def _put(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            kept = None if tensor is None else tensor.contiguous()
            self.register_buffer(name, kept, persistent=False)

    def _span(self, expert: int) -> list[slice]:
        """The components of one expert; none if it has no rank here."""
        begin = sum(self.ranks[:expert])
        return [slice(begin, begin + self.ranks[expert])] if self.ranks[expert] else []


def slices(count: int, entries: int) -> Iterator[slice]:
    """Slices of `count` rows of that many entries, `BLOCK` entries in each, or one row."""
    step = max(1, BLOCK // max(entries, 1))
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


def back_to(
    y: Tensor, z: Float[Tensor, "*rows stacked"], bt: Float[Tensor, "stacked out"]
) -> Tensor:
    """y + z Bᵀ."""
    # Autocast leaves factors in another type than y, and operations in place alone.
    z, bt = z.to(y.dtype), bt.to(y.dtype)
    if y.shape[0] != z.shape[0]:  # one row of x served the whole batch
        return y + z @ bt
    if y.requires_grad:
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), bt).view(y.shape)
    # y is ours and fresh: adding in place saves a pass over the activations.
    y.view(-1, y.shape[-1]).addmm_(z.flatten(0, -2), bt)
    return y


def convolved(
    a: Float[Tensor, "stacked in"],
    bt: Float[Tensor, "stacked out"],
    y: Tensor | None,
    x: Tensor,
    weights: Float[Tensor, "row stacked"],
    kernel: torch.Size,
    convolve: Convolve,
) -> Tensor:
    """The kernels of A, scaled, then B as a 1×1 convolution; added to y if there is one."""
    z = convolve(x, a.view(-1, *kernel), None)
    z = z * over_channels(weights.to(z.dtype), z.ndim)
    more = (bt.T @ z.flatten(2)).unflatten(2, z.shape[2:])
    return more if y is None else y + more


def over_channels(mixed: Tensor, ndim: int) -> Tensor:
    """(batch, channel) as (batch, channel, 1, ..., 1) with `ndim` axes."""
    return mixed.view(*mixed.shape, *[1] * (ndim - 2))
