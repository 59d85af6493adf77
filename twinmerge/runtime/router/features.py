"""Features of an input: hidden states of the shared expert after some block, averaged over tokens.

Layer 0 is what enters the first block (the embeddings), layer k what leaves block k. A forward is
stopped as soon as the wanted layer is known, so routing on layer k of L costs about k/L of a
forward. Hidden states are averaged over the tokens that the attention mask keeps.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import InputError, UnsupportedModel
from ..routing import routed


class _Enough(Exception):
    """Ends a forward: every wanted layer is known."""


@dataclass
class _Collector:
    wanted: set[int]
    mask: Tensor | None
    found: dict[int, Tensor] = field(default_factory=dict)

    def take(self, layer: int, hidden: Tensor) -> None:
        if layer in self.wanted:
            self.found[layer] = _mean(hidden, self.mask)
        if len(self.found) == len(self.wanted):
            raise _Enough


_COLLECTOR: ContextVar[_Collector | None] = ContextVar("twinmerge_features", default=None)


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, seq, width) -> (batch, width) in float32, over unmasked tokens."""
    if hidden.ndim != 3:
        raise UnsupportedModel(
            f"router features need hidden states (batch, seq, width), got {tuple(hidden.shape)}"
        )
    hidden = hidden.float()
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(dim=1)
    kept = mask.to(hidden.dtype)[:, :, None]
    return (hidden * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


class FeatureReader:
    """Reads features from a model by hooks on its blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = _blocks(model)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(_reader(index), with_kwargs=True)
        self.blocks[-1].register_forward_hook(_last_reader(len(self.blocks)))

    @property
    def layers(self) -> int:
        """Number of blocks: layers 0 to this one can be read."""
        return len(self.blocks)

    @torch.no_grad()
    def read(
        self, inputs: Mapping[str, Tensor], layers: list[int]
    ) -> dict[int, Float[Tensor, "batch width"]]:
        """Features at each of `layers`, float32, under the shared expert alone."""
        wrong = [layer for layer in layers if not 0 <= layer <= self.layers]
        if wrong:
            raise InputError(
                f"router layer {wrong[0]}: this model has layers 0 (the embeddings) to "
                f"{self.layers}."
            )
        inputs = dict(inputs)
        mask = inputs.get("attention_mask")
        if getattr(self.model, "can_generate", bool)() and mask is not None:
            inputs.setdefault("use_cache", False)  # type: ignore[arg-type]
            if self._takes_positions and "position_ids" not in inputs:
                # As generate() numbers them: left padding must not move a prompt's tokens.
                inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        collector = _Collector(set(layers), mask)
        token = _COLLECTOR.set(collector)
        try:
            with routed(None):
                self.model(**inputs)
        except _Enough:
            pass
        finally:
            _COLLECTOR.reset(token)
        return collector.found


def _reader(layer: int):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        collector = _COLLECTOR.get()
        if collector is not None:
            collector.take(layer, args[0] if args else kwargs["hidden_states"])

    return hook


def _last_reader(layer: int):
    def hook(module: nn.Module, args: tuple, output) -> None:
        collector = _COLLECTOR.get()
        if collector is not None:
            collector.take(layer, output if isinstance(output, Tensor) else output[0])

    return hook


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks: its first module list as long as its configuration has layers."""
    config = model.config
    get_text = getattr(config, "get_text_config", None)
    counts = {getattr(config, "num_hidden_layers", None)}
    if get_text is not None:
        counts.add(getattr(get_text(), "num_hidden_layers", None))
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) in counts and len(module) > 0:
            return list(module)
    raise UnsupportedModel(
        f"{type(model).__name__}: found no list of {sorted(c for c in counts if c)} blocks to read "
        "router features from. Give weights= or task= with every call."
    )
