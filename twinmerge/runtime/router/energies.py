"""How much of an input's activations lies in each expert's own right singular space.

An expert's exclusive knowledge of a matrix, `B_t A_t`, reads its input through the row space of
A_t. Inputs of the expert's own task have more of their activations there than others do. Nothing
needs to be fitted. Source: Tang et al., SMILE, arXiv:2408.10174, whose gate is `‖V_tᵀ x‖`; ours is
the share `‖V_tᵀ x‖² / ‖x‖²`, mean over tokens, under the shared expert, one number for each block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import UnsupportedModel
from ..layers.affine import Affine
from ..parts.factors import Factors
from ..parts.packed import Packed
from .features import FeatureReader, Features, keys


class EnergyReader:
    """Reads energies from a model whose experts are held as factors."""

    def __init__(self, features: FeatureReader, experts: int) -> None:
        self.features, self.experts = features, experts
        self._spaces: dict[int, list[tuple[Affine, Float[Tensor, "expert width rank"]]]] = {}

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Tensor], blocks: Sequence[int]) -> Features:
        """Shares of the activations within each of `blocks` (1: the first): (batch, expert).

        Raises `UnsupportedModel` if no expert has factors there.
        """
        mask = inputs.get("attention_mask")
        sums: dict[int, list[Tensor]] = {block: [] for block in blocks}
        with self._watching(sums, mask):
            self.features.read(inputs, keys([max(blocks)]))
        return {(block, "mean"): torch.stack(found).mean(dim=0) for block, found in sums.items()}

    @contextmanager
    def _watching(self, sums: dict[int, list[Tensor]], mask: Tensor | None) -> Iterator[None]:
        handles = []

        def watch(block: int, layer: Affine, space: Tensor) -> None:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                sums[block].append(_shares(args[0], space.to(args[0].device), mask))

            handles.append(layer.register_forward_pre_hook(hook))

        try:
            for block in sums:
                for layer, space in self.spaces(block):
                    watch(block, layer, space)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def spaces(self, block: int) -> list[tuple[Affine, Float[Tensor, "expert width rank"]]]:
        """The layers of a block, with an orthonormal basis for each expert, padded with zeros."""
        if block not in self._spaces:
            modules = self.features.blocks[block - 1].modules()
            found = [(m, self._space(m)) for m in modules if isinstance(m, Affine)]
            self._spaces[block] = [(m, space) for m, space in found if space is not None]
        if not self._spaces[block]:
            raise UnsupportedModel(
                f"router kind projection: block {block} holds no factors of the experts to project "
                "on. Use another kind, or build with exclusive factors (rank)."
            )
        return self._spaces[block]

    def _space(self, layer: Affine) -> Float[Tensor, "expert width rank"] | None:
        bases = []
        for expert in range(self.experts):
            rows = [a for part in layer.parts for a in _rows(part, expert)]
            if not rows:
                return None  # compared are only layers in which every expert has knowledge
            _, s, v = torch.linalg.svd(torch.cat(rows).double(), full_matrices=False)
            bases.append(v[s > 1e-6 * s[0].clamp(min=1e-30)].T.float())
        widest = max(basis.shape[1] for basis in bases)
        return torch.stack(
            [nn.functional.pad(basis, (0, widest - basis.shape[1])) for basis in bases]
        )


def _rows(part: Any, expert: int) -> Iterator[Float[Tensor, "rank in"]]:
    for span in part._span(expert):
        if isinstance(part, Factors):
            yield part.a[span]
        elif isinstance(part, Packed):
            yield part._floats(span, torch.float32)[0]


def _shares(
    x: Tensor, space: Float[Tensor, "expert width rank"], mask: Tensor | None
) -> Float[Tensor, "batch expert"]:
    """Mean over the tokens that the mask keeps of ‖V_tᵀ x‖² / ‖x‖²; x: (batch, ..., in)."""
    shape = x.shape[:-1]
    x = x.float().reshape(shape[0], -1, x.shape[-1])
    inside = torch.stack([(x @ basis).square().sum(dim=-1) for basis in space], dim=-1)
    share = inside / x.square().sum(dim=-1, keepdim=True).clamp(min=1e-30)
    if mask is None or mask.shape != shape:
        return share.mean(dim=1)
    kept = mask.bool()[:, :, None].to(share.device)
    return share.masked_fill(~kept, 0.0).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
