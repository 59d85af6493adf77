"""The recipe: what to merge and how, as YAML and as a frozen model.

A mergekit config of one of our methods is a recipe, as long as it names a `base_model`. Unknown
keys are errors, and `RecipeError` lists every problem at once, one line each with its path:

    2 problems in the recipe:
      merge_method: no method 'tise'. Did you mean 'ties'? Known: dare_linear, ...
      models[1].parameters.wieght: unknown key. Did you mean 'weight'? Known: density, weight.

Past this module nothing sees a config object: functions take plain typed arguments.
"""

import math
import os
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from .errors import RecipeError, did_you_mean
from .merging.shared.registry import METHODS, NEGLIGIBLE_WEIGHT, Option, SharedMethod, get

DEFAULT_RANK = 16
"""Exclusive factors of rank 16 add 4 % to a 768 × 768 matrix, and to larger ones less."""

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What an expert may be called: its name becomes a file name in the artifact."""

LARGEST_SEED = 2**63 - 1

REFUSED = {
    "slices": "twinmerge merges whole models: give `models`, and no layer ranges.",
    "modules": "twinmerge merges whole models: give `models`, for all modules alike.",
    "tokenizer": "twinmerge copies the base's tokenizer and config. Leave this key out, and resize "
    "the base and the experts to one vocabulary first if they differ.",
    "chat_template": "twinmerge copies the base's tokenizer with its chat template. Leave this "
    "key out, and set the template in the base's folder if you want another.",
}
"""Keys of mergekit that we do not have, and what we do instead."""


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


def _layer(value: Any) -> Any:
    """Accept auto or a layer's number."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError(
        f"expected auto or an integer of at least 0 (0 is the embeddings), got {value!r}."
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


def _tokenizer_source(value: Any) -> Any:
    if value == "base":
        return value
    raise ValueError(
        f"only 'base' is possible, got {value!r}: twinmerge copies the base's tokenizer. Resize "
        "the base and the experts to one vocabulary first if they differ."
    )


Reference = Annotated[str, AfterValidator(_reference)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Positive = Annotated[int, Field(ge=1)]


class _Model(BaseModel):
    """Frozen, strict, and no key that we do not know."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Expert(_Model):
    """One fine-tuned model."""

    model: Reference
    """A folder or hub id: a full checkpoint, an adapter, or `base+adapter` as in mergekit."""

    name: Annotated[str, AfterValidator(_name)]
    """Unique; default: the last part of `model`'s path."""

    parameters: dict[str, float | bool] = Field(default_factory=dict)
    """This expert's own values of the method's parameters; they win over the recipe's."""

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
        return _without_nulls(filled, "parameters")


class Exclusive(_Model):
    """What is kept of `W_t - W_s`."""

    rank: Annotated[int | str | None, BeforeValidator(_rank)] = DEFAULT_RANK
    """A number of directions, a share of min(out, in) such as "10%", full, or none."""

    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Instead of a rank: the share of `‖W_t - W_s‖²` to keep, matrix by matrix, in (0, 1]."""

    @model_validator(mode="before")
    @classmethod
    def _one_dial(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if data.get("energy") is None or "rank" not in data:
            return data
        if data["rank"] is not None:
            raise ValueError("give `rank` or `energy`, not both.")
        return _without_nulls(data, "rank")

    def model_post_init(self, context: Any, /) -> None:
        """With `energy`, no rank is set; the default must not look as if it counted."""
        if self.energy is not None:
            object.__setattr__(self, "rank", None)


class Router(_Model):
    """How `fit-router` trains."""

    layer: Annotated[int | str, BeforeValidator(_layer)] = "auto"
    """Whose output the router reads: auto (chosen on held-out rows) or a number, 0 = embeddings."""

    rows_per_task: Positive = 1000
    """Rows taken of each task, at most."""

    hidden: Positive | None = None
    """Width of the two hidden layers; default: as wide as the features."""

    epochs: Positive = 30

    learning_rate: Annotated[float, Field(gt=0)] = 5e-4

    batch_size: Annotated[int, Field(ge=2)] = 64
    """At least 2: BatchNorm has no variance of one row."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the rows that choose epoch and layer and are not trained on."""

    seed: Seed = 0


class Recipe(_Model):
    """What to merge and how. Raises `RecipeError`, with all problems, when made of wrong parts."""

    base_model: Reference
    """The checkpoint that every expert was fine-tuned from."""

    models: Annotated[tuple[Expert, ...], Field(strict=False)]
    """The experts. The base itself may be listed without parameters, as mergekit's examples do
    for all methods but linear; it is no expert, and the entry goes."""

    merge_method: str = "linear"
    """How the shared expert is made; mergekit's names."""

    parameters: dict[str, float | bool] = Field(default_factory=dict)
    """The method's parameters, for all experts; an expert's own value wins."""

    dtype: Literal["float32", "float64"] = "float32"
    """What the maths runs in. `bfloat16` and `float16`, as mergekit's configs have it, are read as
    `dtype: float32` with that as `out_dtype` (unless one is given): a merge computed in half
    precision loses what small task vectors say."""

    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """How the result is stored; default: each tensor as the base stores it."""

    seed: Seed = 0
    """For the methods that draw random numbers."""

    exclusive: Exclusive = Field(default_factory=Exclusive)
    router: Router = Field(default_factory=Router)

    tokenizer_source: Annotated[Literal["base"], BeforeValidator(_tokenizer_source)] = "base"
    """Whose tokenizer the artifact gets. mergekit's key; only the base's is possible."""

    @model_validator(mode="wrap")
    @classmethod
    def _report_everything(cls, data: Any, handler: Any) -> Any:
        """One `RecipeError` for what pydantic finds and for what only the whole recipe shows."""
        if isinstance(data, Recipe):
            return data
        if not isinstance(data, Mapping):
            raise RecipeError(f"a recipe is a mapping of keys to values, got {_kind(data)}.")
        data = _as_twinmerge_says_it({key: _plain(value) for key, value in data.items()})
        problems, recipe = [], None
        try:
            recipe = handler(data)
        except ValidationError as error:
            problems = [_said(detail) for detail in error.errors() if not _is_parameter(detail)]
        problems += _semantic_problems(data)
        if problems:
            raise RecipeError(_listed(problems))
        assert recipe is not None, "what pydantic finds in parameters, _parameter_problems finds"
        # Only now, so that `models[i]` in a message counts as the user does.
        experts = tuple(e for e in recipe.models if not _is_same(e.model, recipe.base_model))
        object.__setattr__(recipe, "models", experts)
        return recipe

    @classmethod
    def from_yaml(cls, text: str) -> "Recipe":
        """Read a recipe; `RecipeError` lists every problem, or says where the YAML breaks."""
        data = _read_yaml(text)
        if data is None:
            raise RecipeError("the recipe is empty. It needs at least `base_model` and `models`.")
        return cls.model_validate(data)

    def to_yaml(self) -> str:
        """YAML that reads back as this very recipe, defaults spelled out."""
        data = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

    def resolved(self, folder: str | Path) -> "Recipe":
        """A copy in which relative paths that exist under `folder` are absolute.

        Anything else (a hub id, an absolute path) stays as written. A reference of several parts,
        `base+adapter`, is resolved part by part.
        """

        def resolve(reference: str) -> str:
            if Path(reference).is_absolute() or not reference:
                return reference
            path = Path(folder, reference)
            if path.exists():
                return os.path.abspath(path)  # not resolve(): a link keeps its own name
            if "+" in reference:
                return "+".join(resolve(part) for part in reference.split("+"))
            return reference

        experts = tuple(e.model_copy(update={"model": resolve(e.model)}) for e in self.models)
        return self.model_copy(update={"base_model": resolve(self.base_model), "models": experts})

    def weight_parameters(
        self, method: SharedMethod | str | None = None
    ) -> dict[str, float | bool | list[float]]:
        """Every option of the method (default: the recipe's) with the value that holds.

        An expert's own value, else the recipe's, else the default: a list with one number for
        each expert where any of them has its own, a scalar otherwise.
        """
        if not isinstance(method, SharedMethod):
            method = get(method or self.merge_method)
        values: dict[str, float | bool | list[float]] = {}
        for name, option in method.options.items():
            shared = self.parameters.get(name, option.default)
            if option.per_expert and any(name in expert.parameters for expert in self.models):
                values[name] = [expert.parameters.get(name, shared) for expert in self.models]
            else:
                values[name] = shared
        return values


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; messages name the file.

    Paths stay as the user wrote them: `recipe.resolved(path.parent)` looks beside the file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path}: cannot read the recipe: {reason}.") from error
    try:
        return Recipe.from_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def default_name(model: str) -> str:
    """The last part of a path or hub id; of `base+adapter` the adapter's, without `@revision`."""
    last = model.split("+")[-1].split("@")[0]
    return re.split(r"[/\\]", last.rstrip("/\\"))[-1]


# What a whole recipe shows ------------------------------------------------------------------


def _as_twinmerge_says_it(data: Mapping[Any, Any]) -> dict[Any, Any]:
    """mergekit's spellings of what we say otherwise; see the fields' docstrings."""
    data = _without_nulls(
        data, "parameters", "exclusive", "router", "dtype", "tokenizer_source", *REFUSED
    )
    if data.get("dtype") in ("bfloat16", "float16"):
        half = data["dtype"]
        data["dtype"] = "float32"
        if data.get("out_dtype") is None:
            data["out_dtype"] = half
    return data


def _semantic_problems(data: dict[Any, Any]) -> list[str]:
    """What is wrong beyond single fields. Takes any data: pydantic reports wrong types."""
    problems = []
    name = data.get("merge_method", "linear")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None and isinstance(name, str):
        try:
            get(name)
        except RecipeError as error:
            problems.append(str(error))
    # an unknown method must not hide what else is wrong: then any method's parameter will do
    methods = [method] if method else list(METHODS.values())
    options = {key: option for m in methods for key, option in m.options.items()}

    shared = data.get("parameters", {})
    problems += _parameter_problems("parameters", shared, options, method, own=False)
    models = data.get("models")
    if not isinstance(models, list | tuple):
        return problems
    experts = []
    for i, model in enumerate(models):
        if not isinstance(model, Mapping):
            continue
        own = model.get("parameters")
        if not _is_same(model.get("model"), data.get("base_model")):
            own, where = {} if own is None else own, f"models[{i}].parameters"
            problems += _parameter_problems(where, own, options, method, own=True)
            experts.append((i, model))
        elif own or name == "linear":
            problems.append(
                f"models[{i}].model: {model['model']!r} is the base, and the base is no expert: it "
                "takes no parameters, and linear does not average it in as mergekit does. Leave "
                "this entry out."
            )
    if len(experts) == 0 and all(isinstance(model, Mapping) for model in models):
        problems.append("models: expected at least one expert, got none.")
    problems += _repetitions(experts)
    if method is not None and isinstance(shared, Mapping):
        problems += _sum_problems(method, shared, [model for _, model in experts])
    return problems


def _parameter_problems(
    path: str, values: Any, options: dict[str, Option], method: SharedMethod | None, *, own: bool
) -> Iterator[str]:
    """What is wrong with one `parameters` mapping: the recipe's, or an expert's `own`."""
    if not isinstance(values, Mapping):
        yield f"{path}: expected a mapping of names to numbers, got {_kind(values)}."
        return
    here = [name for name, option in options.items() if option.per_expert or not own]
    suffix = f" for {method.name}" if method else ""
    for key, value in values.items():
        option = options.get(key)
        if option is None:
            yield (
                f"{path}.{key}: unknown key{'' if own else suffix}.{did_you_mean(str(key), here)} "
                f"Known: {', '.join(sorted(here))}."
            )
        elif own and not option.per_expert:
            yield f"{path}.{key}: one value for the whole merge. Move it to the top `parameters`."
        elif isinstance(value, list | tuple | Mapping):
            yield (
                f"{path}.{key}: one number per model for now; mergekit's gradients and filters "
                f"are not supported, got {value!r}."
            )
        elif option.kind is bool and not isinstance(value, bool):
            yield f"{path}.{key}: expected true or false, got {_shown(value)}."
        elif option.kind is float and not _is_number(value):
            yield f"{path}.{key}: expected a finite number, got {_shown(value)}."
        elif key == "density" and not 0 <= value <= 1:
            yield f"{path}.{key}: expected the fraction to keep, between 0 and 1, got {value!r}."


def _repetitions(experts: list[tuple[int, Mapping[Any, Any]]]) -> Iterator[str]:
    """Experts that share a name, or a checkpoint."""
    names: dict[str, int] = {}
    seen: dict[str, int] = {}
    for i, expert in experts:
        model, name = expert.get("model"), expert.get("name")
        if isinstance(model, str):
            first = seen.setdefault(_canonical(model), i)
            if first != i:
                yield f"models[{i}].model: the same expert twice: {model!r} is models[{first}] too."
                continue
            name = default_name(model) if name is None else name
        if isinstance(name, str):
            # names become files, and some file systems do not tell 'Cola' from 'cola'
            first = names.setdefault(name.casefold(), i)
            if first != i:
                yield (
                    f"models[{i}].name: {name!r} is taken by models[{first}] (case does not "
                    "count). Give each expert a `name` of its own."
                )


def _sum_problems(
    method: SharedMethod, shared: Mapping[str, Any], experts: list[Mapping[Any, Any]]
) -> Iterator[str]:
    """Weights that cannot be normalised."""
    options = method.options
    if not {"weight", "normalize"} <= set(options):
        return
    default = shared.get("weight", options["weight"].default)
    weights: list[float] = []
    for expert in experts:
        own = expert.get("parameters") or {}
        weight = own.get("weight", default) if isinstance(own, Mapping) else None
        if weight is None or not _is_number(weight):
            return  # reported already
        weights.append(weight)
    if shared.get("normalize", options["normalize"].default) is not True:
        return
    if weights and abs(sum(weights)) < NEGLIGIBLE_WEIGHT:
        yield (
            f"parameters.weight: the weights {weights} sum to 0, so they cannot be normalised. "
            "Give other weights, or `normalize: false`."
        )


# Messages -----------------------------------------------------------------------------------


def _listed(problems: list[str]) -> str:
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join([f"{len(problems)} problems in the recipe:", *problems])


def _is_parameter(detail: ErrorDetails) -> bool:
    """Problems of `parameters` are reported by `_parameter_problems`, in better words."""
    loc = detail["loc"]
    return loc[:1] == ("parameters",) or (loc[:1] == ("models",) and loc[2:3] == ("parameters",))


def _said(detail: ErrorDetails) -> str:
    """One of pydantic's errors as a line of ours."""
    *parents, last = detail["loc"] or ("recipe",)
    path, kind, got = _path(detail["loc"]), detail["type"], detail["input"]
    if kind == "extra_forbidden":
        if not parents and last in REFUSED:
            return f"{path}: not supported. {REFUSED[str(last)]}"
        section = _section(parents)
        known = sorted(section.model_fields)
        return f"{path}: unknown key.{did_you_mean(str(last), known)} Known: {', '.join(known)}."
    if kind == "missing":
        about = _section(parents).model_fields[str(last)].description or ""
        return f"{path}: missing. {' '.join(about.split())}".rstrip()
    if kind == "value_error":
        return f"{path}: {detail['ctx']['error'] if 'ctx' in detail else detail['msg']}"
    if kind == "string_type":
        hint = ""
        if isinstance(got, Hashable) and not isinstance(got, tuple) and got is not None:
            hint = " YAML did not read it as text: quote it."
        return f"{path}: expected text, got {_shown(got)}.{hint}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        hint = f" Write exclusive: {{rank: {_shown(got)}}}." if path == "exclusive" else ""
        return f"{path}: expected a mapping of keys to values, got {_kind(got)}.{hint}"
    if kind == "tuple_type":
        return f"{path}: expected a list, got {_kind(got)}."
    expected = detail["msg"].replace("Input should be ", "expected ")
    return f"{path}: {expected}, got {_shown(got)}."


def _path(loc: tuple[int | str, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.lstrip(".") or "recipe"


def _section(parents: list[int | str]) -> type[_Model]:
    """The model that the keys below `parents` belong to."""
    sections: dict[Any, type[_Model]] = {
        "models": Expert, "exclusive": Exclusive, "router": Router
    }  # fmt: skip
    return sections[parents[0]] if parents else Recipe


def _kind(value: Any) -> str:
    """A value's kind in YAML's words."""
    kinds = {dict: "a mapping", list: "a list", tuple: "a list", str: "text", type(None): "nothing"}
    kind = kinds.get(type(value))
    return f"{kind}" if kind else _shown(value)


def _shown(value: Any) -> str:
    """A value as YAML spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str | int | float) else str(value)


# Values -------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    # compared, not math.isfinite(): that overflows on an integer of 400 digits
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _canonical(reference: str) -> str:
    """One spelling for './cola', 'cola' and 'cola/'."""
    return "+".join(os.path.normpath(part) for part in reference.split("+"))


def _is_same(one: Any, other: Any) -> bool:
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    return _canonical(one) == _canonical(other)


def _without_nulls(data: Mapping[Any, Any], *keys: str) -> dict[Any, Any]:
    """A copy without these keys where they are null: `parameters:` with nothing below it."""
    return {key: value for key, value in data.items() if value is not None or key not in keys}


def _plain(value: Any) -> Any:
    """A part given from Python, as the mapping that it stands for."""
    if isinstance(value, list | tuple):
        return [_plain(item) if isinstance(item, BaseModel) else item for item in value]
    return value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value


# YAML ---------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without two of its traps: see the methods and the resolver below."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """PyYAML silently keeps the last of two equal keys, and reads the key `on` as true."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key_node.value!r} is not text: quote it",
                    problem_mark=key_node.start_mark,
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 wants a dot and a sign, so that PyYAML reads 5e-4 as text. YAML 1.2 does not.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a subclass of SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{where}not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: a date such as 2024-13-45; RecursionError: brackets nested without end
        raise RecipeError(f"not valid YAML: {error}.") from error
