"""A dry run at load: whether rows of other weights can share a forward, before anyone relies on it.

Three rows of five tokens, so that no axis is mistaken for the batch by a coincidence of sizes. The
batch must come out as its rows do one by one, where a single weighting leaves no room for mistakes.
A model that does not pass runs one weighting at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..errors import UnsupportedModel, first_line
from .layers import STATIC_INSTEAD
from .per_row import NotRowWise
from .router.features import find_blocks
from .routing import Mix, Routing, cell, routed

ROWS, TOKENS = 3, 5
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}
"""How far two orders of sums may be apart, of the largest output; else 5e-2, in 16 bits."""
MIXED = 0.02
"""How far a row may be from what it is alone, of what its weights change of the shared expert."""

LARGE = 4 << 30
"""Bytes of a 16-bit model from which the dry run takes it as it is."""

Call = Callable[[int | None], Any]


@dataclass(frozen=True)
class Found:
    """What the dry run saw.

    mixes_rows: why rows of other weights cannot share a forward; None if they can
    untouched:  the last layer before which no tensor differs between the experts: features up to
                there are those of the forward itself; -1 if the embeddings differ
    """

    mixes_rows: str | None = None
    untouched: int = -1


@torch.no_grad()
def dry_run(model: nn.Module, experts: int) -> Found:
    """Run `model` on three rows with other weights each, together and alone.

    A model that cannot be run on made-up inputs runs one weighting at a time, to be safe. Raises
    `UnsupportedModel` if one weighting for all rows fails.
    """
    heads = torch.arange(ROWS) % experts
    with _in_float32(model):
        calls, problem = _working(model, heads)
        if not calls:
            return Found(f"no inputs could be made up for a dry run ({problem})")
        return _compared(model, calls, heads, experts)


def _compared(model: nn.Module, calls: list[Call], heads: Tensor, experts: int) -> Found:
    weights = torch.rand(ROWS, experts, generator=torch.Generator().manual_seed(0))
    weights = weights / weights.sum(dim=1, keepdim=True)
    every, mixes, untouched = tuple(range(experts)), None, []
    for place, call in enumerate(calls):
        alone = []
        for row in range(ROWS):
            one = Mix(weights[row : row + 1], every, convex=True)
            try:
                with routed(Routing(one, heads[row : row + 1], 1)):
                    alone.append(call(row))
            except Exception as problem:
                raise UnsupportedModel(
                    f"{type(model).__name__}: a dry run of one row failed "
                    f"({type(problem).__name__}: {problem}). " + STATIC_INSTEAD
                ) from problem
        reads: list[int] = []
        try:
            routing = Routing(Mix(weights, every, convex=True), heads, ROWS)
            with routed(routing), _Counted(model, place, reads):
                mixed = call(None)
            with routed(Routing(None, heads, ROWS)):
                shared = call(None)
            mixes = mixes or _differ(mixed, alone, shared)
        except NotRowWise as problem:
            mixes = str(problem)
        except Exception as problem:  # any model at all may stand here
            mixes = f"{type(problem).__name__} in a dry run: {problem}"
        untouched.append(len([count for count in reads if count == 0]) - 1)
    return Found(mixes, min(untouched, default=-1))


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Within it, 16-bit tensors are float32, so that rounding hides nothing; then as before.

    Not in a model of more than `LARGE` bytes.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    small = [(t, t.data) for t in tensors if t.dtype in (torch.bfloat16, torch.float16)]
    if sum(data.nbytes for _, data in small) > LARGE:
        small = []
    try:
        for tensor, data in small:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in small:
            tensor.data = data


def _working(model: nn.Module, heads: Tensor) -> tuple[list[Call], str]:
    """Calls of the model on made-up rows, or on one of them, that work without any weights.

    If there are none, also what went wrong in the last try.
    """
    seen = f"{type(model).__name__} takes nothing that is known"
    for inputs in _inputs(model):
        methods = [
            name for name in ("get_text_features", "get_image_features") if hasattr(model, name)
        ]
        calls: list[Call] = []
        for method in methods or ["forward"]:
            own = inputs
            if method != "forward":
                images = method == "get_image_features"
                own = {k: v for k, v in inputs.items() if (k == "pixel_values") == images}
            calls.append(_calling(model if method == "forward" else getattr(model, method), own))
        try:
            with routed(Routing(None, heads, ROWS)):
                for call in calls:
                    call(None)
            return calls, ""
        except Exception as problem:  # any model at all may stand here; this one wants other inputs
            seen = f"{type(problem).__name__}: {first_line(problem)}"
    return [], seen


def _calling(function: Callable[..., Any], inputs: dict[str, Tensor]) -> Call:
    def call(row: int | None) -> Any:
        if row is None:
            return function(**inputs)
        return function(**{name: value[row : row + 1] for name, value in inputs.items()})

    return call


class _Counted:
    """Notes how many layers have read their weights when each block is entered, and at the end."""

    def __init__(self, model: nn.Module, tower: int, reads: list[int]) -> None:
        try:
            self.blocks = find_blocks(model)[tower]
        except (UnsupportedModel, IndexError):
            self.blocks = []
        self.reads = reads

    def _note(self, *_: Any) -> None:
        found = cell()
        assert found is not None
        self.reads.append(found.reads)

    def __enter__(self) -> None:
        self.handles = [block.register_forward_pre_hook(self._note) for block in self.blocks]
        if self.blocks:
            self.handles.append(self.blocks[-1].register_forward_hook(self._note))

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _differ(mixed: Any, alone: list[Any], shared: Any) -> str | None:
    """Whether the batch is not its rows; how."""
    together, rows, without = _tensors(mixed), [_tensors(each) for each in alone], _tensors(shared)
    if any(len(each) != len(together) for each in (*rows, without)):
        return "a batch gives other outputs than its rows"
    for place, tensor in enumerate(together):
        for row, each in enumerate(rows):
            want = each[place]
            if tensor.ndim == 0 or tensor.shape[1:-1] != want.shape[1:-1] or len(tensor) != ROWS:
                return f"output {place} of {tuple(tensor.shape)} has no axis of rows"
            got, plain = (
                t[row] if t.ndim == 1 else t[row, ..., : want.shape[-1]]
                for t in (tensor, without[place])
            )
            changed = float((plain - want[0]).abs().max())
            rounding = ROUNDING.get(tensor.dtype, 5e-2) * float(want.abs().max())
            if not float((got - want[0]).abs().max()) <= max(MIXED * changed, rounding):
                return f"row {row} of a dry run's batch is not what it is alone"
    return None


def _tensors(output: Any) -> list[Tensor]:
    """The float tensors of an output, but for caches."""
    values = output.values() if hasattr(output, "values") else [output]
    flat = tree_flatten([v for v in values if isinstance(v, Tensor | tuple)])[0]
    return [v.detach() for v in flat if isinstance(v, Tensor) and v.is_floating_point()]


def _inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Made-up inputs by the model's own name for them; none if it takes neither text nor images."""
    config: Any = model.config
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        words = getattr(text, "vocab_size", None) or 2
        # From the upper half: the lower ids are padding and other marks.
        ids = words // 2 + torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % (words - words // 2)
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int) and end < words:
            ids[:, -1] = end  # encoder-decoders read their answer off it
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield inputs
        yield inputs | {"decoder_input_ids": ids}
        yield inputs | {"pixel_values": _image(model, getattr(config, "vision_config", config))}
    elif name == "pixel_values":
        yield {"pixel_values": _image(model, config)}


def _image(model: nn.Module, config: Any) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", 3)
    dtype = next(model.parameters()).dtype
    return torch.randn(
        ROWS, channels, height, width, generator=torch.Generator().manual_seed(0)
    ).to(dtype)
