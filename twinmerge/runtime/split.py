"""A batch cut by weighting: each group of rows on its own, and the outputs put together again.

The way out for models that cannot run rows of other weights in one forward. Exact for every
architecture; it costs one forward for each weighting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput

from ..errors import InputError, UnsupportedModel
from .caches import brought
from .plan import Group
from .routing import routed


def run_split(
    call: Callable[..., Any],
    inputs: Mapping[str, Any],
    groups: list[Group],
    batch: int,
    *,
    heads: bool = False,
) -> Any:
    """What `call(**inputs)` gives, with every group under its own routing.

    heads: whether the experts' heads may differ in width

    Raises `InputError` for a key-value cache, `UnsupportedModel` for an output without rows.
    """
    if brought(inputs) is not None:
        raise InputError(
            "past_key_values=, cache_params=: rows of other weights run one group after the other "
            "here, and a cache cannot be cut. Pass one weighting for the whole batch, or no "
            "plan='split'."
        )
    outputs = []
    for group in groups:
        own = {name: picked(value, group.rows, batch, name) for name, value in inputs.items()}
        with routed(group.routing):
            outputs.append(call(**own))
    order = torch.cat([group.rows for group in groups]).argsort()
    return joined(outputs, [len(group.rows) for group in groups], order, heads=heads)


def picked(value: Any, rows: Tensor, batch: int, name: str) -> Any:
    """The rows of an input whose first axis is the batch; whatever else as it is.

    Positions of several kinds (kind, batch, seq) have it second. Raises `UnsupportedModel` where
    it cannot be told: a vector as long as the batch may be one number for each row, or for each
    token.
    """
    if isinstance(value, Tensor):
        kinds = name.endswith("position_ids") and value.ndim == 3
        if (value.ndim == 1 or kinds) and 1 < batch == len(value):
            raise UnsupportedModel(
                f"{name}: has {batch} entries, as many as the batch has rows, so whether they are "
                "one for each row cannot be told. Pass one weighting for the whole batch."
            )
        axis = 1 if kinds else 0
        own = value.ndim > 1 and value.shape[axis] == batch
        return value.index_select(axis, rows.to(value.device)) if own else value
    if isinstance(value, ModelOutput):
        own = {key: picked(each, rows, batch, key) for key, each in value.items()}
        return type(value)(**own)
    if isinstance(value, tuple | list):
        return type(value)(picked(each, rows, batch, name) for each in value)
    return value


def joined(
    outputs: list[Any],
    sizes: list[int],
    order: Tensor,
    name: str = "output",
    *,
    heads: bool = False,
) -> Any:
    """Outputs of groups of rows as that of the batch, rows in `order`.

    heads: whether heads may differ in width: logits that a row's head does not have are -inf

    Raises `UnsupportedModel` for what has no rows, or has them of other sizes.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        if any(o.ndim == 0 or len(o) != size for o, size in zip(outputs, sizes, strict=True)):
            raise UnsupportedModel(
                f"{name} of {tuple(first.shape)} has no axis of rows, so it cannot be put together "
                f"from groups of rows of other weights. Ask for no {name}, or pass one weighting "
                "for the whole batch."
            )
        if heads and "logits" in name and first.ndim > 1:
            width = max(o.shape[-1] for o in outputs)
            outputs = [F.pad(o, (0, width - o.shape[-1]), value=float("-inf")) for o in outputs]
        shapes = sorted({tuple(o.shape[1:]) for o in outputs})
        if len(shapes) > 1:
            raise UnsupportedModel(
                f"{name}: rows of other weights have other shapes, {shapes[0]} and {shapes[1]}, so "
                f"it cannot be put together. Ask for no {name}, or pass one weighting for the "
                "whole batch."
            )
        return torch.cat(outputs)[order.to(first.device)]
    if isinstance(first, Mapping):
        keys = first.keys()
        return type(first)(
            **{
                key: joined([o[key] for o in outputs], sizes, order, str(key), heads=heads)
                for key in keys
            }
        )
    if isinstance(first, tuple | list):
        return type(first)(
            joined(list(each), sizes, order, name, heads=heads)
            for each in zip(*outputs, strict=True)
        )
    if first is None:
        return None
    raise UnsupportedModel(
        f"{name}: a {type(first).__name__} cannot be put together from groups of rows of other "
        "weights. Pass use_cache=False, or one weighting for the whole batch."
    )
