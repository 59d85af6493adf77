"""Which features a fit reads: those that may route, and those that may tell new inputs."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from ...errors import InputError
from ...recipe import Router as Settings
from ..model import TwinModel
from .choosing import layer_sets
from .features import Features, Key, Pooling, keys

SMALL = 1024
"""Widths up to which several layers are looked at to tell new inputs."""
LOOKED = 5
"""Layers, at most: two matrices of each are stored."""


def tried_layers(model: TwinModel, settings: Settings) -> list[tuple[int, ...]]:
    """Sets of layers to choose from on held-out rows."""
    if settings.encoder is not None:
        return [(0,)]
    width = _width(model) or 1 << 30
    return layer_sets(model.features.layers, width, settings.layer)


def only_layers(model: TwinModel, settings: Settings) -> tuple[int, ...]:
    """Without rows to choose on: what was asked for, else a layer past the middle."""
    if settings.encoder is not None:
        return (0,)
    if settings.layer == "auto":
        return (-(-2 * model.features.layers // 3),)
    return layer_sets(model.features.layers, 0, settings.layer)[0]


def projected_blocks(model: TwinModel, settings: Settings) -> tuple[int, ...]:
    """Blocks that projections are read in: numbered from 1."""
    layers, asked = model.features.layers, settings.layer
    if asked == "auto":
        return tuple(range(1, layers + 1))
    blocks = layer_sets(layers, 0, asked)[0]
    if min(blocks) < 1 or max(blocks) > layers:
        raise InputError(
            f"router layer {asked}: a projection reads within blocks, 1 to {layers} here."
        )
    return blocks


def looks(model: TwinModel, settings: Settings, layers: Sequence[int]) -> list[tuple[Key, ...]]:
    """Features by which new inputs may be told, up to the last of the layers that route.

    They are on the way of these. The last token's first: what it has of a text is more unlike
    for another format than the mean over tokens is.
    """
    if settings.encoder is not None:
        return [keys(layers, settings.pooling)]
    last = max(layers)
    looked = sorted({round(last * part / (LOOKED - 1)) for part in range(LOOKED)})
    if (_width(model) or SMALL + 1) > SMALL:
        looked = [last]
    poolings: tuple[Pooling, ...] = ("last", "mean")
    return [keys(looked, pooling) for pooling in poolings]


def telling(
    sets: list[tuple[int, ...]], pooling: Pooling, features: Features, parts: Sequence[Tensor]
) -> list[tuple[int, ...]]:
    """Without those that name a layer which says the same of every row of a part.

    The embedding of the first token is such a layer. All of them if none is left: then trying
    says what is wrong.
    """
    found = [
        each
        for each in sets
        if all(tells(features[key][own]) for key in keys(each, pooling) for own in parts)
    ]
    return found or sets


def tells(features: Float[Tensor, "row width"]) -> bool:
    """Whether they are not the same for every row."""
    return bool((features != features[0]).any())


def _width(model: TwinModel) -> int | None:
    return getattr(model.model.config, "hidden_size", None)
