"""The registry of shared-expert methods: a function, a name and a paper each.

Options and their defaults are read from each function's signature, so the recipe, `--help` and
the docs cannot disagree. A method that takes `generators` is random: the caller seeds one
generator for each expert, so that neither the order of experts nor the number of workers
changes what is drawn.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import RecipeError, did_you_mean

PerExpert: TypeAlias = Float[Tensor, " expert"] | float
"""One number for every expert, or one that all of them share."""

Value: TypeAlias = int | float | bool | Sequence[int | float]
"""What a recipe gives for an option: a scalar, or a list with one number for each expert."""

KINDS = (float, bool, int)
"""Annotations of options that all experts share; any other is one number for each."""

NEGLIGIBLE_WEIGHT = 1e-8
"""Weights whose sum is nearer to 0 than this cannot be normalised (mergekit's limit too)."""


@dataclass(frozen=True)
class Option:
    """One parameter of a method, as a recipe spells it (`lambda`, not `lambda_`)."""

    name: str
    default: float | bool | int
    per_expert: bool
    kind: type[float] | type[bool] | type[int]


@dataclass(frozen=True)
class SharedMethod:
    """A way to make the shared expert.

    `fn(base, experts, **options)` takes the base's tensor and the experts' stacked; `random`
    methods also take `generators`. `coefficients(weight, **options)` gives the `c_t` of
    `W_s = W_0 + Σ_t c_t (W_t - W_0)`, or None for options under which there are none; the field
    is None for a method that is never affine in the task vectors.
    """

    name: str
    fn: Callable[..., Tensor]
    paper: str
    random: bool
    coefficients: Callable[..., Tensor | None] | None = None

    experts: tuple[int, int | None] = (1, None)
    """The least and the most experts that it takes; None: any number."""

    blockwise: bool = False
    """Every entry of the result depends on the same entry of base and experts alone: the function
    may be run on flat blocks of any size."""

    ordered: bool = False
    """The first expert has another part than the second."""

    @property
    def options(self) -> dict[str, Option]:
        """The method's parameters by their recipe names, in the order of the signature."""
        return {
            name: Option(
                name=name,
                default=parameter.default,
                per_expert=parameter.annotation not in KINDS,
                kind=parameter.annotation if parameter.annotation in KINDS else float,
            )
            for name, parameter in _keywords(self.fn).items()
            if name != "generators"
        }


METHODS: dict[str, SharedMethod] = {}


def shared_expert(
    name: str,
    *,
    paper: str,
    coefficients: Callable[..., Tensor | None] | None = None,
    experts: tuple[int, int | None] = (1, None),
    blockwise: bool = False,
    ordered: bool = False,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as the method `name`; the function itself is returned unchanged.

    The keywords are the fields of `SharedMethod`.
    """

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        random = "generators" in _keywords(fn)
        METHODS[name] = SharedMethod(
            name, fn, paper, random, coefficients, experts, blockwise, ordered
        )
        return fn

    return register


def get(name: str) -> SharedMethod:
    """The method called `name`; raises `RecipeError` with the known names."""
    if name not in METHODS:
        known = sorted(METHODS)
        raise RecipeError(
            f"merge_method: no method {name!r}.{did_you_mean(name, known)} "
            f"Known: {', '.join(known)}."
        )
    return METHODS[name]


@torch.no_grad()
def merge(
    name: str,
    base: Float[Tensor, " *shape"],
    experts: Float[Tensor, " expert *shape"],
    parameters: Mapping[str, Value] | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Float[Tensor, " *shape"]:
    """Run the method `name` with parameters as a recipe gives them.

    Raises `RecipeError` for an unknown method or parameter, for a list that has not one number
    for each expert and for too few or too many experts; `ValueError` when a random method comes
    without `generators`.
    """
    method = get(name)
    least, most = method.experts
    if not least <= len(experts) <= (most or len(experts)):
        wanted = f"{least} or more" if most is None else f"{least} to {most}"
        raise RecipeError(
            f"merge_method: {name} takes {wanted} experts, got {len(experts)}. Give as many, or "
            "choose another method."
        )
    options: dict[str, Any] = _typed(method, parameters or {}, len(experts))
    if method.random:
        if generators is None or len(generators) != len(experts):
            given = "none" if generators is None else len(generators)
            raise ValueError(
                f"{name} is random: it needs one torch.Generator for each of the "
                f"{len(experts)} experts, got {given}."
            )
        options["generators"] = generators
    return method.fn(base, experts, **options)


def coefficients(
    name: str, parameters: Mapping[str, Value], experts: int
) -> Float[Tensor, " expert"] | None:
    """The `c_t` of `W_s = W_0 + Σ_t c_t (W_t - W_0)` in float64, or None if there are none."""
    method = get(name)
    if method.coefficients is None:
        return None
    options = _typed(method, parameters, experts)
    weight = options.pop("weight", method.options["weight"].default)
    weight = torch.as_tensor(weight, dtype=torch.float64).expand(experts)
    return method.coefficients(weight, **options)


def spread(value: PerExpert, experts: Float[Tensor, " expert *shape"]) -> Float[Tensor, " expert"]:
    """One number for each expert, in the dtype and on the device of `experts`."""
    value = torch.as_tensor(value, dtype=experts.dtype, device=experts.device)
    return value.expand(len(experts))


def fractions(value: PerExpert, experts: int) -> list[float]:
    """One Python float for each expert.

    Give a tensor in float64 where the exact fraction counts: 0.9 in float32 is a little less
    than 0.9, and of ten entries one fewer would be kept. `merge` does so.
    """
    return value.expand(experts).tolist() if isinstance(value, Tensor) else [value] * experts


def weighted_sum(
    weights: Float[Tensor, " expert"], tensors: Sequence[Tensor] | Float[Tensor, " expert *shape"]
) -> Tensor:
    """`Σ_t w_t X_t`, one expert after the other.

    Not a matrix product: an elementwise sum gives the same bits for any number of threads.
    """
    total = torch.zeros_like(tensors[0])
    for weight, tensor in zip(weights, tensors, strict=True):
        total += weight * tensor
    return total


@functools.cache  # asked for every tensor
def _keywords(fn: Callable[..., Tensor]) -> dict[str, inspect.Parameter]:
    """Keyword-only parameters by their recipe names."""
    return {
        name.rstrip("_"): parameter
        for name, parameter in inspect.signature(fn).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _typed(method: SharedMethod, parameters: Mapping[str, Value], experts: int) -> dict[str, Any]:
    """Recipe names and numbers as the keyword arguments that the function wants."""
    options, typed = method.options, {}
    for name, value in parameters.items():
        if name not in options:
            raise RecipeError(
                f"parameters.{name}: unknown key for {method.name}."
                f"{did_you_mean(name, list(options))} Known: {', '.join(sorted(options))}."
            )
        keyword = _keywords(method.fn)[name].name
        if options[name].kind is bool:
            typed[keyword] = bool(value)
        elif not isinstance(value, Sequence):
            typed[keyword] = options[name].kind(value)
        elif not options[name].per_expert:
            raise RecipeError(f"parameters.{name}: one number for all experts, got a list.")
        elif len(value) != experts:
            raise RecipeError(
                f"parameters.{name}: one number for each of the {experts} experts, "
                f"got {len(value)}."
            )
        else:
            # float64: see `fractions`
            typed[keyword] = torch.tensor(value, dtype=torch.float64)
    return typed
