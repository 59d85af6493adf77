"""Features of an input: hidden states of the shared expert after some blocks, pooled over tokens.

Layer 0 is what enters the first block (the embeddings), layer k what leaves block k. A forward is
stopped as soon as the wanted layers are known, so routing on layer k of L costs about k/L of a
forward. Of hidden states (batch, seq, width) the mean over the tokens that the attention mask keeps
is taken, or the first or the last of these; of maps (batch, channel, height, width) the mean over
all positions. Blocks are those of the encoder where a model has one beside a decoder, and stages in
convolutional models.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import InputError, UnsupportedModel
from ..routing import routed

Pooling = Literal["mean", "first", "last"]

Key = tuple[int, Pooling]
"""A layer, and what is taken over the tokens there."""

Features = dict[Key, Float[Tensor, "batch width"]]
"""Float32."""


def keys(layers: Iterable[int], pooling: Pooling = "mean") -> tuple[Key, ...]:
    """The same of several layers."""
    return tuple((layer, pooling) for layer in layers)


_COUNTS = ("num_hidden_layers", "encoder_layers", "num_layers", "n_layers", "n_layer")
"""What configurations call the number of their blocks."""


class _Enough(Exception):
    """Ends a forward: every wanted layer is known."""


@dataclass
class _Collector:
    tower: _Tower
    wanted: set[Key]
    mask: Tensor | None
    then: Callable[[Features], None] | None
    """Called once when all is known, and the forward goes on; None: the forward ends there."""
    found: Features = field(default_factory=dict)
    done: bool = False

    def take(self, tower: _Tower, layer: int, hidden: Any) -> None:
        if self.done or tower is not self.tower:
            return
        for key in self.wanted:
            if key[0] == layer:
                self.found[key] = pooled(hidden, self.mask, key[1])
        if len(self.found) == len(self.wanted):
            self.done = True
            if self.then is None:
                raise _Enough
            self.then(self.found)


_take: Any = torch.compiler.disable(_Collector.take)
"""Not as part of a compiled graph: the forward may end there."""


class _Current(threading.local):
    # As in `routing`: torch.compile looks into it, and compiles a forward without features whole.
    collector: _Collector | None = None


_CURRENT = _Current()


def pooled(
    hidden: Any, mask: Tensor | None, pooling: Pooling = "mean"
) -> Float[Tensor, "batch width"]:
    """The mean over tokens that the mask keeps, or the first or last of these, in float32.

    Of a map the mean over its positions. Raises `UnsupportedModel` for anything else.
    """
    if isinstance(hidden, Tensor) and hidden.ndim == 4:
        if pooling != "mean":
            raise UnsupportedModel(f"pooling={pooling!r}: maps have no tokens; expected mean.")
        return hidden.float().mean(dim=(2, 3))
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        came = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise UnsupportedModel(
            f"router features need hidden states (batch, seq, width) or maps (batch, channel, "
            f"height, width), got {came}. Give weights= or task= with every call."
        )
    if mask is not None and mask.shape != hidden.shape[:2]:
        mask = None
    if pooling != "mean":
        seq = hidden.shape[1]
        place = torch.arange(seq, device=hidden.device).expand(len(hidden), -1)
        if mask is not None:
            outside = seq if pooling == "first" else -1
            place = place.masked_fill(~mask.bool().to(place.device), outside)
        chosen = place.amin(dim=1) if pooling == "first" else place.amax(dim=1)
        chosen = chosen.clamp(0, seq - 1)  # of a row without tokens: any
        return hidden[torch.arange(len(hidden), device=hidden.device), chosen].float()
    hidden = hidden.float()
    if mask is None:
        return hidden.mean(dim=1)
    kept = mask.bool()[:, :, None]
    # Not a product with the mask: what stands at padded positions may be NaN.
    total = hidden.masked_fill(~kept, 0.0).sum(dim=1)
    return total / kept.sum(dim=1).clamp(min=1)


@dataclass(eq=False)
class _Tower:
    """Blocks that are called one after the other, and the module that calls them."""

    module: nn.Module
    blocks: list[nn.Module]
    given: str
    """Name of the input that it starts from."""

    def __post_init__(self) -> None:
        # Kept, for a pickle: a process that opens it then gives these hooks' numbers to no other.
        self.handles = [
            block.register_forward_pre_hook(partial(self._before, index), with_kwargs=True)
            for index, block in enumerate(self.blocks)
        ]
        after = partial(self._after, len(self.blocks))
        self.handles.append(self.blocks[-1].register_forward_hook(after))

    def _before(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        collector = _CURRENT.collector
        if collector is not None:
            given = (*args, kwargs.get("hidden_states"), *kwargs.values())
            hidden = next((x for x in given if isinstance(x, Tensor)), None)
            _take(collector, self, layer, hidden)

    def _after(self, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        collector = _CURRENT.collector
        if collector is not None:
            _take(collector, self, layer, output if isinstance(output, Tensor) else output[0])


class FeatureReader:
    """Reads features from a model by hooks on its blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.towers = [_Tower(*found) for found in _found(model)]

    @property
    def blocks(self) -> list[nn.Module]:
        """Of the tower that reads text, where there are several."""
        return self.towers[0].blocks

    @property
    def layers(self) -> int:
        """Number of blocks: layers 0 to this one can be read."""
        return len(self.blocks)

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Tensor], wanted: Iterable[Key]) -> Features:
        """Features as `wanted`, float32, under the shared expert alone.

        They do not depend on the batch, nor on padding; for decoders that generate, also not on
        the side of it. Raises `InputError` for layers that the model does not have.
        """
        tower, inputs = self._tower(inputs), self.completed(inputs)
        # One tower of several is called alone: the others need inputs that may not be there.
        module = self.model if len(self.towers) == 1 else tower.module
        taken = inspect.signature(module.forward).parameters
        if module is not self.model:
            inputs = {key: value for key, value in inputs.items() if key in taken}
        with routed(None), self._collecting(tower, inputs, wanted, None) as collector:
            try:
                module._call_impl(**inputs)  # not as it may be compiled: it ends on the way
            except _Enough:
                pass
        return self._all(collector)

    @contextmanager
    def watching(
        self,
        inputs: Mapping[str, Tensor],
        wanted: Iterable[Key],
        then: Callable[[Features], None],
    ) -> Iterator[None]:
        """Within it, a forward of the model calls `then` once, as soon as all `wanted` is known.

        Before the block after the last layer of it, that is. `inputs` are those of the forward.
        """
        tower = self._tower(inputs)
        with self._collecting(tower, inputs, wanted, then) as collector:
            yield
        self._all(collector)

    def completed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs as a forward for features needs them.

        A decoder that generates gets positions as `generate` numbers them: padding on the left
        must not move a prompt's tokens.
        """
        inputs, mask = dict(inputs), inputs.get("attention_mask")
        if getattr(self.model, "can_generate", bool)() and mask is not None:
            inputs.setdefault("use_cache", False)
            positions = "position_ids" in inspect.signature(self.model.forward).parameters
            if positions and inputs.get("position_ids") is None:
                inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return inputs

    def _tower(self, inputs: Mapping[str, Any]) -> _Tower:
        """The first whose input is there."""
        first, *others = self.towers
        if inputs.get(first.given) is None:
            return next((t for t in others if inputs.get(t.given) is not None), first)
        return first

    @contextmanager
    def _collecting(
        self,
        tower: _Tower,
        inputs: Mapping[str, Any],
        wanted: Iterable[Key],
        then: Callable[[Features], None] | None,
    ) -> Iterator[_Collector]:
        count = len(tower.blocks)
        wanted = set(wanted)
        wrong = sorted(layer for layer, _ in wanted if not 0 <= layer <= count)
        if wrong:
            raise InputError(
                f"router layer {wrong[-1]}: this model has layers 0 (the embeddings) to {count}."
            )
        mask = inputs.get("attention_mask") if tower.given != "pixel_values" else None
        collector = _Collector(tower, wanted, mask, then)
        before, _CURRENT.collector = _CURRENT.collector, collector
        try:
            yield collector
        finally:
            _CURRENT.collector = before

    def _all(self, collector: _Collector) -> Features:
        missing = sorted(layer for layer, _ in collector.wanted - set(collector.found))
        if missing:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: a forward did not come past layer {missing[0]}, so "
                "router features cannot be read there. Give weights= or task= with every call."
            )
        return collector.found


def _found(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module], str]]:
    """The blocks of a model: of its encoder if it has one, of text and image towers one each.

    With the module that calls them, and the name of the input that it starts from.
    """
    config: Any = model.config
    parts = [getattr(config, name, None) for name in ("text_config", "vision_config")]
    if None not in parts and not config.is_encoder_decoder:
        owned = [_owner(model, part) for part in parts]
        if None not in owned:
            towers = [(module, _blocks(module, module.config)) for module in owned]
            if all(blocks for _, blocks in towers):
                return [(module, blocks, _given(module)) for module, blocks in towers]
    root = model
    if getattr(config, "is_encoder_decoder", False):
        root = model.get_encoder() or model  # type: ignore[operator]
    blocks = _blocks(root, getattr(root, "config", config))
    if not blocks:
        counts = sorted(_counts(config))
        raise UnsupportedModel(
            f"{type(model).__name__}: found no list of {counts} blocks to read router features "
            "from. Give weights= or task= with every call."
        )
    return [(root, blocks, _given(model))]


def find_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of each tower that features are read from. Raises `UnsupportedModel`."""
    return [blocks for _, blocks, _ in _found(model)]


def _owner(model: nn.Module, config: Any) -> Any:
    """The outermost module, other than the model, that was made from this part of the config."""
    kind = type(config)
    inside = (m for m in model.modules() if m is not model)
    return next((m for m in inside if isinstance(getattr(m, "config", None), kind)), None)


def _given(module: nn.Module) -> str:
    return getattr(module, "main_input_name", "input_ids")


def _blocks(root: nn.Module, config: Any) -> list[nn.Module]:
    """The first module list as long as the configuration has layers or stages.

    Where none is: the first outermost list of at least two modules of one class (EfficientNet's
    configuration does not say how many blocks there are).
    """
    counts, lists = _counts(config), list(_lists(root))
    for _, each in lists:
        if len(each) in counts:
            return list(each)
    for outermost, each in lists:
        if outermost and len(each) > 1 and len({type(module) for module in each}) == 1:
            return list(each)
    return []


def _counts(config: Any) -> set[int]:
    get_text = getattr(config, "get_text_config", None)
    configs = [config] if get_text is None else [config, get_text()]
    named = {getattr(each, name, None) for each in configs for name in _COUNTS}
    stages = getattr(config, "depths", None)
    counts = named | {len(stages) if isinstance(stages, list | tuple) else None}
    return {count for count in counts if isinstance(count, int) and count > 0}


def _lists(root: nn.Module, outermost: bool = True) -> Iterator[tuple[bool, nn.ModuleList]]:
    """Module lists in order, and whether they are in no other; not those within our own layers."""
    for child in root.children():
        if type(child).__module__.startswith(__name__.partition(".")[0] + "."):
            continue
        inside = isinstance(child, nn.ModuleList)
        if inside and len(child) > 0:
            yield outermost, child
        yield from _lists(child, outermost and not inside)
