"""mergekit's parameter settings: what a recipe may write where a method wants one number.

    weight: 0.5                                       a scalar
    weight: [0, 0.5, 1]                               a gradient over the depth of the model
    weight: [{filter: mlp, value: 0.5}, {value: 1}]   filters by the base's tensor names

Semantics are those of mergekit 0.1.5 (`evaluate_setting`), and a test compares the two. A gradient
of n numbers has them at the depths 0, 1/(n-1), ..., 1 and runs straight between; of booleans the
one at or before the depth holds. Of filters the first that is part of the tensor's name decides
("*" or none: any name), and its value may be a gradient. Where no filter fits, or a list is empty,
the next scope is asked: the model's own parameters, the recipe's, the method's default.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from ..errors import did_you_mean
from ..merging.shared.registry import Option
from .words import kind_of, shown

Scalar: TypeAlias = bool | int | float

Gradient: TypeAlias = Annotated[list[Scalar], Field(strict=False)]


FRACTIONS = ("common_space_fraction", "epsilon", "gamma", "select_topk")
"""Options that are parts of a whole, as density is."""


class Filtered(TypedDict):
    """A value for the tensors whose name contains `filter`."""

    filter: NotRequired[str | None]
    value: Scalar | Gradient


Setting: TypeAlias = Scalar | Gradient | Filtered | Annotated[list[Filtered], Field(strict=False)]


def value_at(setting: Setting, tensor: str, depth: float) -> Scalar | None:
    """What holds at a tensor `depth` deep, in [0, 1]; None where the next scope is to be asked."""
    if not isinstance(setting, list | dict):
        return setting
    filters = [setting] if isinstance(setting, dict) else setting
    if not any(isinstance(item, dict) for item in filters):
        return _along(filters, depth)  # pyright: ignore[reportArgumentType]
    for item in filters:
        assert isinstance(item, dict), "`setting_problems` refuses mixed lists"
        if _fits(item.get("filter"), tensor):
            return value_at(item["value"], tensor, depth)
    return None


def depends_on_tensor(setting: Setting) -> bool:
    """Whether it is a gradient or has filters."""
    return isinstance(setting, list | dict)


def filters_of(setting: Setting) -> list[str]:
    """The names that its filters ask for."""
    items = [setting] if isinstance(setting, dict) else setting if isinstance(setting, list) else []
    filters = [item.get("filter") for item in items if isinstance(item, dict)]
    return [text for text in filters if text is not None and text != "*"]


def is_number(value: Any) -> bool:
    """Finite, and neither a boolean nor too large for a float."""
    # compared, not math.isfinite(): that overflows on an integer of 400 digits
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def setting_problems(path: str, setting: Any, option: Option) -> Iterator[str]:
    """What is wrong with one setting, of any type, each with its path."""
    if isinstance(setting, Mapping):
        yield from _filter_problems(path, setting, option)
    elif not isinstance(setting, list | tuple):
        yield from _scalar_problems(path, setting, option, alone=True)
    elif any(isinstance(item, Mapping) for item in setting):
        for i, item in enumerate(setting):
            if isinstance(item, Mapping):
                yield from _filter_problems(f"{path}[{i}]", item, option)
            else:
                yield (
                    f"{path}[{i}]: expected a mapping with `filter` and `value` like the list's "
                    f"others, got {shown(item)}. A list is either a gradient of numbers or filters."
                )
    else:
        yield from _gradient_problems(path, setting, option)


def _along(values: Sequence[Scalar], depth: float) -> Scalar | None:
    """A gradient's value at `depth`."""
    if not values:
        return None
    position = depth * (len(values) - 1)
    left = math.floor(position)
    if isinstance(values[0], bool):
        return values[left]
    right, share = min(left + 1, len(values) - 1), position - left
    return (1 - share) * values[left] + share * values[right]


def _fits(text: str | None, tensor: str) -> bool:
    return text is None or text == "*" or text in tensor


def _filter_problems(path: str, item: Mapping[Any, Any], option: Option) -> Iterator[str]:
    for key in item.keys() - {"filter", "value"}:
        hint = did_you_mean(str(key), ["filter", "value"])
        yield f"{path}.{key}: unknown key.{hint} Known: filter, value."
    if not isinstance(item.get("filter"), str | None):
        yield (
            f"{path}.filter: expected a part of a tensor's name, got {shown(item['filter'])}. "
            "YAML did not read it as text: quote it."
        )
    value = item.get("value")
    if "value" not in item:
        yield f"{path}.value: missing. What holds where the filter fits: a number or a gradient."
    elif isinstance(value, list | tuple):
        yield from _gradient_problems(f"{path}.value", value, option)
    else:
        yield from _scalar_problems(f"{path}.value", value, option, alone=False)


def _gradient_problems(path: str, values: Sequence[Any], option: Option) -> Iterator[str]:
    if option.kind is int:
        yield f"{path}: expected one integer, got {shown(list(values))}: it has no values between."
        return
    for i, value in enumerate(values):
        yield from _scalar_problems(f"{path}[{i}]", value, option, alone=False)


def _scalar_problems(path: str, value: Any, option: Option, *, alone: bool) -> Iterator[str]:
    """What is wrong with one value; `alone`: it holds for all tensors."""
    if option.kind is bool:
        if not isinstance(value, bool):
            yield f"{path}: expected true or false, got {shown(value)}."
    elif option.kind is int:
        if not is_number(value) or not isinstance(value, int):
            yield f"{path}: expected an integer, got {shown(value)}."
    elif not is_number(value):
        got = kind_of(value) if isinstance(value, Mapping | list | tuple) else shown(value)
        yield f"{path}: expected a finite number, got {got}."
    elif option.name == "density":
        if alone and not 0 < value <= 1:
            yield f"{path}: expected the fraction to keep, above 0 and at most 1, got {value!r}."
        elif not 0 <= value <= 1:
            yield f"{path}: expected the fraction to keep, between 0 and 1, got {value!r}."
    elif option.name in FRACTIONS and not 0 <= value <= 1:
        yield f"{path}: expected a fraction between 0 and 1, got {value!r}."
