"""Where the tensors of a checkpoint live in a model.

Files keep names and shapes that models have left behind: ViT's `encoder.layer.0.attention.query` is
`layers.0.attention.q_proj` in a live model, and the experts of a mixture, a matrix each in the
files, are slices of one parameter. `from_pretrained` translates on loading; here the same rules of
transformers say for every tensor of the files which parameter or buffer, or which part of one, it
becomes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Index = tuple[slice | int, ...]


@dataclass(frozen=True)
class Place:
    """The part of a model that a tensor of a checkpoint fills."""

    parameter: str
    """Name of a parameter or float buffer of the model."""
    index: Index = ()
    """Of the part of it, as in `parameter[index]`; () is all of it, and (expert, slice of its rows)
    is one matrix of a stack of experts."""


def places(
    model: nn.Module, prefix: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Place]:
    """Base tensor name -> where it lives in `model`.

    prefix: the model's base_model_prefix
    shapes: of all tensors of the files; those of a stack of experts find their place together

    A tensor that the model lacks, has in another shape, or makes in another way than by stacking
    (`MergeModulelist` along the first axis, then or not `Concatenate` along the second) is left
    out.
    """
    live = _live(model)
    rename = _renaming(model, prefix)
    found: dict[str, Place] = {}
    stacks: dict[tuple[str, int], dict[str, list[str]]] = {}
    converters: dict[int, Any] = {}
    # As transformers stacks them: in the order of the numbers in the names as they are stored.
    for name in sorted(shapes, key=_natural):
        renamed, converter, pattern = rename(name)
        if converter is None:
            candidates = (renamed, name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            fits = (each for each in candidates if live.get(each) == tuple(shapes[name]))
            match = next(fits, None)
            if match is not None:
                found[name] = Place(match)
        elif renamed in live:
            converters[id(converter)] = converter
            stack = stacks.setdefault((renamed, id(converter)), {})
            stack.setdefault(pattern, []).append(name)
    for (parameter, which), members in stacks.items():
        found |= _stacked(parameter, live[parameter], converters[which], members, shapes)
    return {name: found[name] for name in shapes if name in found}


def by_parameter(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Parameter or buffer -> the tensors that live in it, in the order of `places`."""
    groups: dict[str, list[str]] = {}
    for name, place in places.items():
        groups.setdefault(place.parameter, []).append(name)
    return groups


def _live(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of what a checkpoint fills: parameters, and the float buffers that are saved."""
    saved = model.state_dict(keep_vars=True)
    live = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in saved and buffer.is_floating_point():
            live[name] = tuple(buffer.shape)
    return live


Rename = Callable[[str], tuple[str, Any, str]]
"""Name in a file -> name in the model, the converter that makes it (None: it is only renamed), and
which of the converter's source patterns the name fits."""


def _renaming(model: nn.Module, prefix: str) -> Rename:
    """transformers' own way, as `convert_and_load_state_dict_in_model` goes it. peft calls the same
    functions."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:  # a release that translates nothing
        return lambda name: (name, None, "")
    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    owner = {pattern: each for each in converters for pattern in each.source_patterns}
    state = model.state_dict()

    def rename(name: str) -> tuple[str, Any, str]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        return renamed, None if pattern is None else owner[pattern], pattern or ""

    return rename


def _stacked(
    parameter: str,
    live: tuple[int, ...],
    converter: Any,
    members: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Place]:
    """Places of the matrices (out, in) that are stacked to `parameter` (expert, Σ out, in).

    members: by source pattern, in the order of the stack

    Empty if that is not what the converter does, or the shapes say otherwise.
    """
    patterns = [pattern for pattern in converter.source_patterns if pattern in members]
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    joined = operations == [("MergeModulelist", 0), ("Concatenate", 1)]
    if not joined and not (operations == [("MergeModulelist", 0)] and len(patterns) == 1):
        return {}
    matrices = len(live) == 3 and all(len(shapes[n]) == 2 for p in patterns for n in members[p])
    if not matrices or any(len(members[pattern]) != live[0] for pattern in patterns):
        return {}
    found: dict[str, Place] = {}
    row = 0
    for pattern in patterns:
        rows = shapes[members[pattern][0]][0]
        if any(tuple(shapes[name]) != (rows, *live[2:]) for name in members[pattern]):
            return {}
        for expert, name in enumerate(members[pattern]):
            found[name] = Place(parameter, (expert, slice(row, row + rows)))
        row += rows
    return found if row == live[1] else {}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """The order of `dot_natural_key` of transformers: layer 2 before layer 10."""
    return [(0, int(p)) if p.isdecimal() else (1, p) for p in re.split(r"(\d+)", name) if p]
