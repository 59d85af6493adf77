"""What callers give to a `TwinModel`, checked and put into one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import InputError, did_you_mean

Weights = Float[Tensor, "batch expert"]
Given = Tensor | Mapping[str, float] | Sequence | None
"""Weights as a caller writes them: (batch, expert), (expert,), {name: weight}, or one per row."""
Allowed = str | Sequence[str] | Sequence[Sequence[str]] | None
"""Experts that the router may choose from: names, or names for each row."""

OPTIONS = ("weights", "task", "head", "allowed", "top_k", "threshold", "plan")
TOKENIZE = (
    "Tokenize text first: model(**model.tokenizer(texts, return_tensors='pt', padding=True))."
)
_CONTENT = {
    "input_ids": TOKENIZE,
    "inputs_embeds": "Give one tensor, batch first.",
    "pixel_values": "Prepare images first: model(**model.image_processor(images, "
    "return_tensors='pt')).",
}
"""The inputs of which one must be there, and what to do where it is no tensor."""

_OF_TEXT = (
    *("attention_mask", "token_type_ids", "position_ids", "decoder_input_ids"),
    *("decoder_attention_mask", "decoder_inputs_embeds"),
)
"""Inputs that have the rows of the text, or one row for all."""


def check_names(inputs: Iterable[str], taken: Iterable[str]) -> None:
    """A misspelt option of ours must not pass for an input that the task model ignores.

    taken: what the task model's forward takes by name
    """
    known = {*taken, *OPTIONS}
    for name in inputs:
        hint = did_you_mean(name, list(OPTIONS)) if name not in known else ""
        if hint:
            raise InputError(f"{name}=: no such option.{hint} Options: {', '.join(OPTIONS)}.")


def by_position(unnamed: Sequence[Any]) -> InputError:
    """Inputs that came without a name."""
    return InputError(
        f"expected inputs by name, got a {type(unnamed[0]).__name__} by position. {TOKENIZE}"
    )


def expert_indices(
    names: Any, experts: Sequence[str], batch: int, what: str, device: torch.device
) -> Int[Tensor, " batch"]:
    """One name for all rows, or one for each, as indices into `experts`."""
    if not hasattr(names, "__getitem__") or isinstance(names, Mapping):  # a set has no order
        raise InputError(
            f"{what}=: expected the name of an expert or {batch} of them, got {names!r} "
            f"({type(names).__name__}). Known: {', '.join(experts)}."
        )
    listed = [names] * batch if isinstance(names, str) else list(names)
    if len(listed) != batch:
        raise InputError(f"{what}=: expected one name or {batch} of them, got {len(listed)}.")
    for name in listed:
        if name not in experts:
            hint = did_you_mean(str(name), list(experts))
            raise InputError(f"{what}={name!r}: no such expert.{hint} Known: {', '.join(experts)}.")
    return torch.tensor([experts.index(name) for name in listed], device=device)


def as_weights(weights: Given, experts: Sequence[str], batch: int, device: torch.device) -> Weights:
    """Weights as a caller writes them: (batch, expert), float32."""
    numbers: Any = weights
    if isinstance(weights, Mapping):
        numbers = _by_name(weights, experts)
    elif isinstance(weights, str):
        raise InputError(
            f"weights={weights!r}: expected numbers, one per expert or {{name: number}}. One "
            f"expert alone is weights={{{weights!r}: 1.0}}, in a call also task={weights!r}."
        )
    elif isinstance(weights, Sequence) and any(isinstance(row, Mapping) for row in weights):
        numbers = [_by_name(row, experts) for row in weights]
    try:
        tensor = torch.as_tensor(numbers, dtype=torch.float32, device=device)
    except (TypeError, ValueError) as problem:
        raise InputError(f"weights=: expected numbers ({problem}).") from None
    came = tuple(tensor.shape)
    if tensor.ndim == 1:
        tensor = tensor.expand(batch, -1)
    if tensor.shape != (batch, len(experts)):
        raise InputError(
            f"weights=: expected shape ({batch}, {len(experts)}) (batch, expert) or "
            f"({len(experts)},), got {came}. Experts in order: {', '.join(experts)}."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise InputError("weights=: expected finite numbers, got NaN or infinity.")
    return tensor


def _by_name(weights: Any, experts: Sequence[str]) -> list[float]:
    if not isinstance(weights, Mapping):
        raise InputError(f"weights=: expected a {{name: weight}} for every row, got {weights!r}.")
    for name in weights:
        expert_indices(str(name), experts, 1, "weights", torch.device("cpu"))
    for name, weight in weights.items():
        if isinstance(weight, str) or not hasattr(weight, "__float__"):
            raise InputError(f"weights={{{name!r}: {weight!r}}}: expected a number.")
    return [float(weights.get(name, 0.0)) for name in experts]


def allowed_experts(
    allowed: Allowed, experts: Sequence[str], batch: int, device: torch.device
) -> Bool[Tensor, "batch expert"] | None:
    """Which experts each row may be given to; None: all.

    One name, names for all rows, or a list of names per row. Raises `InputError` for unknown names,
    and where nothing is allowed.
    """
    if allowed is None:
        return None
    names = [allowed] if isinstance(allowed, str) else list(allowed)
    per_row = names and not isinstance(names[0], str)
    rows = [list(each) for each in names] if per_row else [names]
    if per_row and len(rows) != batch:
        raise InputError(f"allowed=: expected names for {batch} rows, got {len(rows)}.")
    found = torch.zeros(len(rows), len(experts), dtype=torch.bool)
    for row, each in enumerate(rows):
        if not each:
            where = f" of row {row}" if per_row else ""
            raise InputError(f"allowed=: expected at least one expert{where}, got none.")
        for name in each:
            if name not in experts:
                hint = did_you_mean(str(name), list(experts))
                known = ", ".join(experts)
                raise InputError(f"allowed=: no expert is called {name!r}.{hint} Known: {known}.")
            found[row, experts.index(name)] = True
    return found.expand(batch, -1).to(device)


def highest(weights: Weights) -> Int[Tensor, " batch"]:
    """The expert of the highest weight of each row; one without a weight is not asked."""
    none = weights == 0
    return weights.masked_fill(none & ~none.all(dim=-1, keepdim=True), float("-inf")).argmax(dim=-1)


def tensors(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that are tensors."""
    return {key: value for key, value in inputs.items() if isinstance(value, Tensor)}


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Rows of the batch. Raises `InputError` if inputs of text differ in it."""
    for name in _CONTENT:
        if not isinstance(inputs.get(name), Tensor):
            continue
        batch = int(inputs[name].shape[0]) if inputs[name].ndim else 0
        if not batch:
            raise InputError(
                f"{name}=: expected at least one row, got {tuple(inputs[name].shape)}."
            )
        for other in _OF_TEXT if name != "pixel_values" else ():
            value = inputs.get(other)
            if not isinstance(value, Tensor) or value.ndim < 2:
                continue
            rows = value.shape[-2 if other == "position_ids" else 0]  # (kind, batch, seq)
            if rows not in (1, batch):
                raise InputError(
                    f"{other}: has {rows} rows, {name} has {batch}. Expected as many, or one."
                )
        return batch
    for name, advice in _CONTENT.items():
        if inputs.get(name) is not None:
            came = type(inputs[name]).__name__
            raise InputError(f"{name}=: expected a tensor, batch first, got a {came}. {advice}")
    given = ", ".join(sorted(inputs)) or "nothing"
    raise InputError(
        f"expected input_ids, inputs_embeds or pixel_values (a tensor, batch first), got {given}. "
        f"{TOKENIZE}"
    )


def tokens_of(inputs: Mapping[str, Any]) -> int:
    """Tokens of a row, as far as the inputs tell; an image's patches are not counted."""
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    return int(ids.shape[1]) if isinstance(ids, Tensor) and ids.ndim > 1 else 0


def check_images(inputs: Mapping[str, Any], batch: int, weights: Weights) -> None:
    """Each row has one image where rows have other weights: else whose it is cannot be told."""
    images = inputs.get("pixel_values")
    if not isinstance(images, Tensor) or (len(images) == batch and images.ndim > 2):
        return  # of two axes: patches of all images
    if bool((weights != weights[0]).any()):
        raise InputError(
            f"pixel_values: {tuple(images.shape)} does not have one image for each of {batch} "
            "rows, so which weights an image runs with cannot be told. Expected that, or one "
            "weighting for the whole batch."
        )
