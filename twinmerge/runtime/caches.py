"""Key-value caches that know which weights they were made with, and by which artifact.

A cache that outlives its request carries its weights with it. A later call that brings the cache
runs with these weights and does not route: the second turn of a chat keeps the weights of the
first. A call that asks for others, or brings a cache of which nobody knows how it was made, is
refused. `PromptCache` is the same for a prefix that many prompts share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError
from .arguments import Given, Weights
from .plan import drop

if TYPE_CHECKING:
    from .model import TwinModel


CACHE = "past_key_values"
_TAG = "_twinmerge_weights"
_ORIGIN = "_twinmerge_origin"
_MOVES = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")
RECURRENT = "cache_params"
"""What models with a state (Mamba) call theirs."""
UNTRACKED = ("mems", "state", "past_buckets_states")
"""What is kept of earlier calls in other forms, and does not say what it was made with."""


@dataclass(frozen=True)
class PromptCache:
    """The keys and values of a prompt, or of the prefix that many prompts share.

    Made by `TwinModel.prefill`, used by `TwinModel.generate(prompt_cache=...)`, and never changed:
    each use runs on a copy.
    """

    cache: Any
    """transformers' cache after these tokens."""
    weights: Float[Tensor, "row expert"]
    """What it was made with, and what everything that goes on from it runs with."""
    input_ids: Int[Tensor, "row seq"]
    attention_mask: Int[Tensor, "row seq"]

    def __len__(self) -> int:
        """Tokens of the prefix, padding included."""
        return self.input_ids.shape[1]


def brought(options: Mapping[str, Any]) -> Any:
    """The cache that a call brings, under either name; None if there is none.

    Raises `InputError` for what is kept of earlier calls and does not say what it was made with.
    """
    for name in UNTRACKED:
        if options.get(name) is not None:
            raise InputError(
                f"{name}=: is valid for the weights that it was made with, and does not say which. "
                "Run the whole input again."
            )
    return _either(options.get(CACHE), options.get(RECURRENT))


def given_back(output: Any) -> Any:
    """The cache in what a model gives; None if there is none."""
    return _either(getattr(output, CACHE, None), getattr(output, RECURRENT, None))


def _either(cache: Any, recurrent: Any) -> Any:
    return recurrent if cache is None else cache  # a cache without tokens counts as false


def tag(twin: TwinModel, cache: Any, weights: Float[Tensor, "row expert"]) -> None:
    """Write into a cache what it is made with, and by. A copy of the cache has it too.

    Where its rows are put in another order, picked or repeated, the weights follow.
    """
    setattr(cache, _TAG, weights.detach().clone())
    setattr(cache, _ORIGIN, twin.origin)
    for name in _MOVES:
        if hasattr(type(cache), name):
            setattr(cache, name, partial(_moved, cache, name))


def _moved(cache: Any, name: str, rows: Any) -> None:
    getattr(type(cache), name)(cache, rows)
    weights = getattr(cache, _TAG)
    if name == "batch_repeat_interleave":
        weights = weights.repeat_interleave(rows, dim=0)
    else:
        weights = weights[rows.to(weights.device) if isinstance(rows, Tensor) else rows]
    setattr(cache, _TAG, weights)


def check_origin(twin: TwinModel, cache: Any, name: str) -> None:
    """A cache is of one artifact's tensors, in one dtype."""
    files, dtype = getattr(cache, _ORIGIN, twin.origin)
    own_files, own_dtype = twin.origin
    if files != own_files:
        raise InputError(
            f"{name}=: was made by a model of another artifact than {twin.folder}, so it is not "
            "valid here. Run the prompt with this model."
        )
    if dtype != own_dtype:
        raise InputError(
            f"{name}=: was made in {dtype}, this model runs in {own_dtype}. Run the prompt again."
        )


def cached_weights(
    twin: TwinModel,
    cache: Any,
    rows: int,
    weights: Given = None,
    task: str | Sequence[str] | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
) -> Weights | None:
    """The weights that a cache of `rows` rows demands; None if it demands none.

    An empty cache demands none. Raises `InputError` for a cache of another artifact or dtype, if a
    call asks for other weights, also by dropping some of the cache's, and where nobody knows the
    cache's and the call would leave them to the router.
    """
    if cache is None:
        return None
    if isinstance(cache, PromptCache):
        raise InputError(
            f"{CACHE}=: got what model.prefill() made. Give it to generate as prompt_cache=."
        )
    known = getattr(cache, _TAG, None)
    if not filled(cache):
        return None
    check_origin(twin, cache, CACHE)
    if known is None:
        if weights is None and task is None:
            raise InputError(
                f"{CACHE}=: this cache was not made by this model's forward, generate or prefill, "
                "so what it was made with is not known. It is valid for those weights only: give "
                "them as weights= or task=."
            )
        return None
    held = _held_rows(cache) or len(known)
    if rows != held or rows % len(known):
        raise InputError(
            f"{CACHE}=: holds {held} rows, made of {len(known)}; the call has {rows}. Bring the "
            "cache of these rows."
        )
    known = known.repeat_interleave(rows // len(known), dim=0)
    asked = drop(known, top_k, threshold).weights
    if weights is not None or task is not None:
        given = {"weights": weights, "task": task, "top_k": top_k, "threshold": threshold}
        asked = twin.weights_for(rows_alone(rows), **given)
    check_same(twin, known, asked)
    return known


def filled(cache: Any) -> bool:
    """Whether anything was run with it. Caches of recurrent models count no tokens."""
    if getattr(cache, "is_linear", None) and any(cache.is_linear):
        return any(getattr(layer, "has_previous_state", False) for layer in cache.layers)
    count = getattr(cache, "get_seq_length", None)
    return count is None or int(count()) > 0


def _held_rows(cache: Any) -> int | None:
    """Rows of a cache, beams and samples counted each; None of a kind that does not tell."""
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.numel():
            return len(keys)
    return None


def check_same(twin: TwinModel, known: Weights, asked: Weights) -> None:
    if len(known) != len(asked):
        known = known[:: len(known) // len(asked)]
    different = (known - asked).abs().amax(dim=1) > 1e-6
    if bool(different.any()):
        row = int(different.nonzero()[0, 0])
        one, other = (_shown(twin, each[row]) for each in (known, asked))
        raise InputError(
            f"the cache was made with the weights {one} in row {row}, the call asks for {other}. A "
            "cache is valid for the weights that it was made with. Ask for no others to go on with "
            "those, or leave the cache out."
        )


def _shown(twin: TwinModel, weights: Tensor) -> str:
    pairs = zip(twin.experts, weights.tolist(), strict=True)
    return "{" + ", ".join(f"{name}: {w:.3g}" for name, w in pairs if w) + "}"


def rows_alone(count: int) -> dict[str, Any]:
    """A prompt that nothing is read from but its number of rows."""
    return {"input_ids": torch.zeros(count, 1, dtype=torch.long)}
