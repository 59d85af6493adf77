r"""SMILE: in every linear layer, each token goes to the low-rank expert whose inputs it resembles.

With `Δ_t = U_t S_t V_tᵀ` the expert's change to one layer and x a token's input,

    t(x) = argmax_t ‖V_{t, gate}ᵀ x‖
    y    = W_0 x + b_0 + U_{t, k} S_{t, k} V_{t, k}ᵀ x + (b_t - b_0)      of t = t(x)

The paper takes a softmax of the norms and the first expert; its weight, made to sum to 1, is 1.
No task is asked for, so this is the known-head protocol. As in the authors' code
(tanganke/fusion_bench, read, not copied) embeddings, norms and layers that no expert changed stay
pretrained. Nothing is chosen by data but the gate's rank, on validation rows.

Ours: V is stored once for gate and expert (theirs: twice), so a layer costs max(k, gate) in + k out
numbers, and the difference of the biases out numbers, all in float16.

Source: Tang et al., SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From
Pre-Trained Foundation Models, arXiv:2408.10174. Our implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twinmerge.merging.linalg import SVD

from .packed import Packed, Vector

TITLE = "SMILE"
SOURCE = "https://arxiv.org/abs/2408.10174"


@dataclass(frozen=True)
class LowRank:
    """One expert's part of one layer.

    gate: V of the gate; v, us: V and U S of the expert; bias: difference to the pretrained one
    """

    gate: Float[Tensor, "gate in"]
    v: Float[Tensor, "rank in"]
    us: Float[Tensor, "out rank"]
    bias: Float[Tensor, " out"] | None


class SmileLinear(nn.Module):
    """Stands where a linear layer stood."""

    def __init__(self, pretrained: nn.Linear, experts: Sequence[LowRank]) -> None:
        super().__init__()
        self.pretrained, self.experts = pretrained, experts

    def choice(self, x: Float[Tensor, "*token in"]) -> Tensor:
        """The expert of each token: (*token)."""
        norms = [(x @ expert.gate.T).norm(dim=-1) for expert in self.experts]
        return torch.stack(norms, dim=-1).argmax(dim=-1)

    def forward(self, x: Float[Tensor, "*token in"]) -> Float[Tensor, "*token out"]:
        y = self.pretrained(x)
        choice = self.choice(x)
        for index, expert in enumerate(self.experts):
            chosen = choice == index
            update = x[chosen] @ expert.v.T @ expert.us.T
            y[chosen] += update if expert.bias is None else update + expert.bias
        return y


def pack(
    vector: Vector, factors: Mapping[str, SVD], paths: Sequence[str], rank: int, gate: int
) -> Packed:
    """paths: of the layers; factors: weight -> triplets, as many as rank and gate ask for"""
    packed: Packed = {}
    for path in paths:
        weight, bias = f"{path}.weight", f"{path}.bias"
        found = factors[weight].cut(max(rank, gate))
        packed[f"{weight}.v"] = found.vh.half()
        packed[f"{weight}.us"] = (found.u * found.s)[:, :rank].half()
        if bias in vector:
            packed[bias] = vector[bias].half()
    return packed


def unpack(packed: Packed, path: str, gate: int) -> LowRank:
    v, us = packed[f"{path}.weight.v"].float(), packed[f"{path}.weight.us"].float()
    bias = packed.get(f"{path}.bias")
    bias = None if bias is None else bias.float()
    return LowRank(v[:gate], v[: us.shape[1]], us, bias)


def install(model: nn.Module, experts: Sequence[Packed], paths: Sequence[str], gate: int) -> None:
    """Give a pretrained model the experts, in place."""
    for path in paths:
        parent, _, attribute = path.rpartition(".")
        pretrained = model.get_submodule(path)
        assert isinstance(pretrained, nn.Linear)
        parts = [unpack(packed, path, gate) for packed in experts]
        setattr(model.get_submodule(parent), attribute, SmileLinear(pretrained, parts))
