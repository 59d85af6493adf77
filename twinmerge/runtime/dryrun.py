"""A dry run at load: what cannot have a weighting per row is refused before anyone relies on it.

Three rows of five tokens, so that no axis is mistaken for the batch by a coincidence of sizes.
Architectures whose layers pass the checks one by one may still mix rows before a layer (tables of
relative positions, shared over the batch) or read a layer's weight without calling the layer. Both
end in an error here, at load, and not in a wrong number later.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from .layers import STATIC_INSTEAD
from .routing import Routing, routed

ROWS, TOKENS = 3, 5


@torch.no_grad()
def dry_run(model: nn.Module, experts: int) -> None:
    """Run `model` on three rows with other weights each. Raises `UnsupportedModel` if that fails.

    A model that cannot be run on made-up inputs at all, weights or no weights, is not judged.
    """
    heads = torch.arange(ROWS) % experts
    for inputs in _inputs(model):
        try:
            with routed(Routing(None, heads)):
                plain = _first(model(**inputs))
            break
        except Exception:  # any model at all may stand here; this one wants other inputs
            continue
    else:
        return
    weights = torch.rand(ROWS, experts, generator=torch.Generator().manual_seed(0))
    try:
        with routed(Routing(weights, heads)):
            mixed = _first(model(**inputs))
    except UnsupportedModel:
        raise
    except Exception as problem:
        raise UnsupportedModel(
            f"{type(model).__name__}: a dry run of {ROWS} rows with a weighting each failed "
            f"({type(problem).__name__}: {problem}). " + STATIC_INSTEAD
        ) from problem
    if plain is not None and mixed is not None and plain.shape != mixed.shape:
        raise UnsupportedModel(
            f"{type(model).__name__}: with a weighting per row its output is {tuple(mixed.shape)}, "
            f"without {tuple(plain.shape)}. " + STATIC_INSTEAD
        )


def _inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
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
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield inputs
        yield inputs | {"decoder_input_ids": ids}
    elif name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        dtype = next(model.parameters()).dtype
        yield {"pixel_values": torch.zeros(ROWS, channels, height, width, dtype=dtype)}


def _first(output: Any) -> Tensor | None:
    """The first tensor of a model's output."""
    values = output.values() if hasattr(output, "values") else output
    return next((value for value in values if isinstance(value, Tensor)), None)
