"""The sections of a recipe: an expert, what is kept of it exclusively, how the router trains."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from .references import default_name
from .settings import Setting
from .sizes import checked_size, size_of
from .words import either

DEFAULT_RANK = 16
"""Exclusive factors of rank 16 add 4 % to a 768 × 768 matrix, and to larger ones less."""

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What an expert may be called: its name becomes a file name in the artifact."""

LARGEST_SEED = 2**63 - 1


def _rank(value: Any) -> Any:
    """Accept 16, "10%", "full" or "none"."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, str) and (value in ("full", "none") or 0 < _percent(value) <= 100):
        return value
    raise ValueError(f"expected an integer of at least 1, '10%', full or none, got {value!r}.")


def _percent(text: str) -> float:
    """10.0 for "10%"; NaN for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text)
    return float(match[1]) if match else math.nan


ROUTERS = ("none", "projection", "prompts", "prototype", "linear", "mlp")
"""Kinds of routers, from those that need nothing to those that need rows."""


def _kind(value: Any) -> Any:
    if value in (*ROUTERS, "auto"):
        return value
    raise ValueError(f"expected {either((*ROUTERS, 'auto'))}, got {value!r}.")


def _temperature(value: Any) -> Any:
    if value == "auto" or (_is_number(value) and 0 < value < math.inf):
        return value
    raise ValueError(f"expected auto or a number above 0, got {value!r}.")


def _sharpness(value: Any) -> Any:
    if value in ("auto", "top") or (_is_number(value) and 1 <= value < math.inf):
        return value
    raise ValueError(f"expected auto, top or a number of at least 1, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _layer(value: Any) -> Any:
    """Accept auto, a layer's number, or several numbers."""
    numbers = value if isinstance(value, list | tuple) and value else [value]
    if value == "auto" or all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers
    ):
        if len(set(numbers)) == len(numbers):
            return list(value) if isinstance(value, tuple) else value
    raise ValueError(
        f"expected auto, an integer of at least 0 (0 is the embeddings) or several different ones "
        f"in a list, got {value!r}."
    )


def _name(value: str) -> str:
    if re.fullmatch(NAME_PATTERN, value):
        return value
    raise ValueError(
        f"{value!r} cannot be a file's name. Give a `name` of letters, digits, '.', '_' and '-' "
        "that starts with a letter or digit."
    )


def _reference(value: str) -> str:
    if value.strip():
        return value
    raise ValueError("expected a folder or a hub id, got an empty string.")


Reference = Annotated[str, AfterValidator(_reference)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


def without_nulls(data: Mapping[Any, Any], *keys: str) -> dict[Any, Any]:
    """A copy without these keys where they are null: `parameters:` with nothing below it."""
    return {key: value for key, value in data.items() if value is not None or key not in keys}


class Section(BaseModel):
    """Frozen, strict, and no key that we do not know."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Expert(Section):
    """One fine-tuned model."""

    model: Reference
    """A folder or hub id: a full checkpoint, an adapter, or `base+adapter` as in mergekit."""

    name: Annotated[str, AfterValidator(_name)]
    """Unique; default: the last part of `model`'s path."""

    parameters: dict[str, Setting] = Field(default_factory=dict)
    """This expert's own settings of the method's parameters; they win over the recipe's."""

    labels: Annotated[tuple[str, ...] | None, Field(strict=False)] = None
    """Names of its classes, in order. Full checkpoints bring their own; adapters have none."""

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        filled = {key: value for key, value in data.items() if (key, value) != ("name", None)}
        if isinstance(data.get("model"), str) and data["model"].strip():
            filled.setdefault("name", default_name(data["model"]))
        elif "name" not in filled:
            filled["name"] = "unnamed"  # `model` itself is the problem to report
        return without_nulls(filled, "parameters")


class Exclusive(Section):
    """What is kept of `W_t - W_s`, and how it is stored."""

    form: Literal["svd", "magnitude", "dropout"] = "svd"
    """Low-rank factors; the largest entries; or random entries, rescaled (the paper's D.5)."""

    rank: Annotated[int | str | None, BeforeValidator(_rank)] = DEFAULT_RANK
    """A number of directions, a share of min(out, in) such as "10%", full, or none."""

    energy: Share | None = None
    """Instead of a rank: the share of `‖W_t - W_s‖²` to keep, matrix by matrix, in (0, 1]."""

    budget: Annotated[int | str, BeforeValidator(checked_size)] | None = None
    """Instead of a rank: the bytes of each expert, spent where they lower the error most. "6%" of
    the shared expert's bytes, "50MB", "50MiB", or a number of bytes."""

    density: Share | None = None
    """For magnitude and dropout: the share of the entries to keep, in (0, 1]."""

    scope: Literal["tensor", "all"] | None = None
    """For magnitude: the largest entries of each tensor (the default), or of all tensors."""

    dtype: Literal["float32", "float16", "bfloat16", "int8", "int4"] | None = None
    """How it is stored; default: as the shared expert stores the tensor. int8 and int4 are for
    factors."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_not_given(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = without_nulls(data, "form", "energy", "budget", "density", "scope", "dtype")
        # `rank: null` alone may mean `rank: none`: that is for its validator to say
        instead = {"energy", "budget", "density"} & data.keys() or data.get("form", "svd") != "svd"
        return without_nulls(data, "rank") if instead else data

    @model_validator(mode="after")
    def _fits_together(self) -> "Exclusive":
        problems = [
            InitErrorDetails(
                type=PydanticCustomError("told", "{message}", {"message": message}),
                loc=(key,) if key else (),
                input=None,
            )
            for key, message in self._conflicts().items()
        ]
        if problems:
            raise ValidationError.from_exception_data("Exclusive", problems)
        # no default that does not count may look as if it did
        if self.form != "svd" or self.energy is not None or self.budget is not None:
            object.__setattr__(self, "rank", None)
        if self.form == "magnitude" and self.scope is None:
            object.__setattr__(self, "scope", "tensor")
        return self

    def _conflicts(self) -> dict[str, str]:
        """What does not go together, by the key to change ("" for several)."""
        found = {}
        dials = [key for key in ("rank", "energy", "budget") if key in self.model_fields_set]
        if self.form == "svd":
            if self.rank == "none" and len(dials) > 1:
                found[""] = (
                    f"`rank: none` keeps nothing, so `{dials[1]}` says nothing. Leave one out."
                )
            elif len(dials) > 1:
                several = "both" if len(dials) == 2 else "all three"
                found[""] = f"give {either(f'`{key}`' for key in dials)}, not {several}."
            if self.density is not None:
                found["density"] = (
                    "svd keeps directions, not entries. Add `form: magnitude` or `form: dropout`, "
                    "or give `rank`, `energy` or `budget` instead."
                )
        else:
            for key in dials:
                found[key] = f"only for `form: svd`. {self.form} keeps entries: give `density`."
            if self.density is None:
                found["density"] = (
                    f"missing. {self.form} keeps this share of the entries: give a number in "
                    "(0, 1], such as 0.1."
                )
            if self.dtype in ("int8", "int4"):
                found["dtype"] = (
                    f"{self.dtype} is for the factors of `form: svd`. {self.form} stores float32, "
                    "float16 or bfloat16."
                )
        if self.form != "magnitude" and self.scope is not None:
            found["scope"] = (
                f"only for `form: magnitude`, and the form is {self.form}. Leave it out."
            )
        return found

    def budget_bytes(self, shared_bytes: int) -> int | None:
        """Bytes of each expert, or None without a budget; "6%" is a share of `shared_bytes`."""
        return None if self.budget is None else size_of(self.budget, shared_bytes)


class Router(Section):
    """How `fit-router` works."""

    kind: Annotated[str, BeforeValidator(_kind)] = "prototype"
    """none, projection, prompts, prototype, linear, mlp; or auto: the three that learn from rows
    are compared."""

    layer: Annotated[int | str | list[int], BeforeValidator(_layer)] = "auto"
    """What the router reads: auto (chosen on held-out rows), a layer's number (0: embeddings) or
    several, side by side."""

    pooling: Literal["mean", "first", "last"] = "mean"
    """What is taken over the tokens of a layer."""

    encoder: str | None = None
    """Folder or hub id of an encoder that the router reads instead of the shared expert."""

    weights: dict[str, float] | None = None
    """Kind none: the weighting of every input; default even."""

    rows_per_task: Positive = 1000
    """Rows taken of each task, at most."""

    calibration: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the rows that set temperature and threshold and are not trained on before."""

    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the rows that choose between routers and are neither trained nor calibrated on."""

    refit: bool = True
    """Whether the chosen router learns from the held-out rows, too, in the end."""

    temperature: Annotated[float | Literal["auto"], BeforeValidator(_temperature)] = "auto"
    """Probabilities are softmax(logits / temperature); auto: fitted on the calibration rows."""

    sharpness: Annotated[float | Literal["auto", "top"], BeforeValidator(_sharpness)] = "auto"
    """Power that makes weights of probabilities; top: all weight on the best; auto: what brings
    held-out rows nearest to their own expert's answers."""

    coverage: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the calibration rows that are not taken for new; 1: nothing ever is."""

    examples: Annotated[int, Field(ge=0)] = 0
    """Texts of each expert that are kept in the artifact, for `explain` to show the nearest."""

    hidden: Positive | None = None
    """Of an mlp: width of its two hidden layers; default: as wide as the features."""

    epochs: Positive = 30

    learning_rate: Annotated[float, Field(gt=0)] = 5e-4

    batch_size: Annotated[int, Field(ge=2)] = 64
    """At least 2: BatchNorm has no variance of one row."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    strength: Annotated[float, Field(gt=0)] = 30.0
    """Of a linear router's ridge, in units of rows."""

    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _of_mlp(cls, data: Any) -> Any:
        """Without a kind, what only an mlp has says that one is meant.

        Recipes were written so before there were other kinds.
        """
        if not isinstance(data, dict) or data.get("kind") is not None:
            return data
        own = ("hidden", "epochs", "learning_rate", "batch_size", "dropout")
        given = {name: data[name] for name in own if data.get(name) is not None}
        if any(value != cls.model_fields[name].default for name, value in given.items()):
            return {**data, "kind": "mlp"}
        return data

    @model_validator(mode="after")
    def _parts(self) -> "Router":
        if self.encoder is not None and self.layer != "auto":
            raise ValueError(
                f"layer: an encoder of the router's own is read at its end alone; leave layer out, "
                f"got {self.layer!r}."
            )
        if self.calibration + self.held_out >= 1:
            raise ValueError(
                f"calibration and held_out: expected less than 1 together, so that rows are left "
                f"to fit on, got {self.calibration:g} and {self.held_out:g}."
            )
        return self
