"""Every message about a recipe that is wrong, one line each with its path.

pydantic finds wrong types and unknown keys, and `said` puts its errors in our words. What only the
whole recipe shows, and all of `parameters`, is found here: `semantic_problems`.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from ..errors import RecipeError, did_you_mean
from ..merging.shared.registry import (
    METHODS,
    NEGLIGIBLE_WEIGHT,
    Option,
    SharedMethod,
    Value,
    get,
)
from .references import canonical, default_name, is_same
from .settings import setting_problems
from .words import kind_of, shown

REFUSED = {
    "slices": "twinmerge merges whole models: give `models`, and no layer ranges.",
    "modules": "twinmerge merges whole models: give `models`, for all modules alike.",
    "tokenizer": "twinmerge copies the base's tokenizer and config. Leave this key out, and resize "
    "the base and the experts to one vocabulary first if they differ.",
    "chat_template": "twinmerge copies the base's tokenizer with its chat template. Leave this "
    "key out, and set the template in the base's folder if you want another.",
}
"""Keys of mergekit that we do not have, and what we do instead."""

SHORTHANDS = {
    "magnitude": "{form: magnitude, density: 0.1}",
    "dropout": "{form: dropout, density: 0.1}",
    "svd": "{rank: 16}",
    "int8": "{dtype: int8}",
    "int4": "{dtype: int4}",
}
"""What is written after `exclusive:` by mistake, and what was meant."""


def listed(problems: list[str]) -> str:
    """One message of all problems; of equal ones the first."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join([f"{len(problems)} problems in the recipe:", *problems])


# What a whole recipe shows ------------------------------------------------------------------


def semantic_problems(data: Mapping[Any, Any]) -> list[str]:
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
        own, where = model.get("parameters"), f"models[{i}]"
        own = {} if own is None else own
        if is_same(model.get("model"), data.get("base_model")):
            problems += _base_problems(where, model["model"], own, options, name)
        else:
            problems += _parameter_problems(f"{where}.parameters", own, options, method, own=True)
            experts.append((i, model))
    if all(isinstance(model, Mapping) for model in models):
        problems += _count_problems(method, [model for _, model in experts])
    problems += _repetitions(experts)
    return problems


def _parameter_problems(
    path: str, values: Any, options: dict[str, Option], method: SharedMethod | None, *, own: bool
) -> Iterator[str]:
    """What is wrong with one `parameters` mapping: the recipe's, or an expert's `own`."""
    if not isinstance(values, Mapping):
        yield f"{path}: expected a mapping of names to numbers, got {kind_of(values)}."
        return
    here = sorted(name for name, option in options.items() if option.per_expert or not own)
    suffix = f" for {method.name}" if method else ""
    for key, value in values.items():
        option = options.get(key)
        if option is None:
            known = f"Known: {', '.join(here)}." if here else "It has none."
            hint = did_you_mean(str(key), here)
            yield f"{path}.{key}: unknown key{'' if own else suffix}.{hint} {known}"
        elif own and not option.per_expert:
            yield f"{path}.{key}: one value for the whole merge. Move it to the top `parameters`."
        else:
            yield from setting_problems(f"{path}.{key}", value, option)


def _base_problems(
    path: str, base: str, own: Any, options: dict[str, Option], method: Any
) -> Iterator[str]:
    """The base among the models: mergekit ignores there what only experts have, and so do we."""
    ignored = {name for name, option in options.items() if option.per_expert}
    if method == "linear":
        yield (
            f"{path}.model: {base!r} is the base, and the base is no expert: linear does not "
            "average it in as mergekit does. Leave this entry out."
        )
    elif not isinstance(own, Mapping) or not own.keys() <= ignored:
        yield (
            f"{path}.model: {base!r} is the base, and the base is no expert: it takes no "
            "parameters. Leave this entry out."
        )


def _count_problems(method: SharedMethod | None, experts: list[Mapping[Any, Any]]) -> Iterator[str]:
    """Too few experts, or too many, for the method."""
    if not experts:
        yield "models: expected at least one expert, got none."
        return
    least, most = method.experts if method else (1, None)
    if method is None or (least <= len(experts) and (most is None or len(experts) <= most)):
        return
    if most is None:
        span = f"at least {least} experts"
    elif least == most:
        span = f"exactly {least} experts"
    else:
        span = f"{least} {'or' if most == least + 1 else 'to'} {most} experts"
    names = [_name_of(expert) for expert in experts]
    yield (
        f"merge_method: {method.name} takes {span} beside the base, got {len(experts)}: "
        f"{', '.join(names)}. {'Add' if len(experts) < least else 'Leave out'} experts, or choose "
        "another method."
    )


def _repetitions(experts: list[tuple[int, Mapping[Any, Any]]]) -> Iterator[str]:
    """Experts that share a name, or a checkpoint."""
    names: dict[str, int] = {}
    seen: dict[str, int] = {}
    for i, expert in experts:
        model, name = expert.get("model"), expert.get("name")
        if isinstance(model, str):
            first = seen.setdefault(canonical(model), i)
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


def _name_of(expert: Mapping[Any, Any]) -> str:
    model = expert.get("model")
    return str(expert.get("name") or (default_name(model) if isinstance(model, str) else model))


def value_problems(values: Mapping[str, Value], experts: int, where: str = "") -> Iterator[str]:
    """What does not go together among the values that `Recipe.parameters_at` has for a tensor."""

    def each(name: str) -> list[float]:
        value = values[name]
        return (
            [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * experts
        )

    at = f"at {where}, " if where else ""
    if {"weight", "normalize"} <= values.keys() and values["normalize"]:
        weights = each("weight")
        if abs(sum(weights)) < NEGLIGIBLE_WEIGHT:
            yield (
                f"parameters.weight: {at}the weights [{', '.join(f'{w:g}' for w in weights)}] sum "
                "to 0, so they cannot be normalised. Give other weights, or `normalize: false`."
            )
    if {"density", "epsilon"} <= values.keys():
        for density, epsilon in zip(each("density"), each("epsilon"), strict=True):
            if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                yield (
                    f"parameters.epsilon: {at}density {density:g} ± epsilon {epsilon:g} is not "
                    "within (0, 1), and entries are kept with these probabilities. Give a smaller "
                    "`epsilon`."
                )
                return


# What pydantic finds ------------------------------------------------------------------------


def is_parameter(detail: ErrorDetails) -> bool:
    """Problems of `parameters` are reported by `semantic_problems`, in better words."""
    loc = detail["loc"]
    return loc[:1] == ("parameters",) or (loc[:1] == ("models",) and loc[2:3] == ("parameters",))


def said(detail: ErrorDetails, sections: Mapping[str, type[BaseModel]]) -> str:
    """One of pydantic's errors as a line of ours.

    `sections` are the models below the recipe's keys; the recipe's own is under "".
    """
    *parents, last = detail["loc"] or ("recipe",)
    path, kind, got = _path(detail["loc"]), detail["type"], detail["input"]
    section = sections[str(parents[0]) if parents else ""]
    if kind == "extra_forbidden":
        if not parents and last in REFUSED:
            return f"{path}: not supported. {REFUSED[str(last)]}"
        known = sorted(section.model_fields)
        return f"{path}: unknown key.{did_you_mean(str(last), known)} Known: {', '.join(known)}."
    if kind == "missing":
        about = section.model_fields[str(last)].description or ""
        return f"{path}: missing. {' '.join(about.split())}".rstrip()
    if kind == "told":
        return f"{path}: {detail['msg']}"
    if kind == "value_error":
        return f"{path}: {detail['ctx']['error'] if 'ctx' in detail else detail['msg']}"
    if kind == "string_type":
        hint = ""
        if isinstance(got, Hashable) and not isinstance(got, tuple) and got is not None:
            hint = " YAML did not read it as text: quote it."
        return f"{path}: expected text, got {shown(got)}.{hint}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        hint = f" Write exclusive: {_meant(got)}." if path == "exclusive" else ""
        return f"{path}: expected a mapping of keys to values, got {kind_of(got)}.{hint}"
    if kind == "tuple_type":
        return f"{path}: expected a list, got {kind_of(got)}."
    expected = detail["msg"].replace("Input should be ", "expected ")
    return f"{path}: {expected}, got {shown(got)}."


def _meant(got: Any) -> str:
    """What someone meant who wrote a bare value after `exclusive:`."""
    if isinstance(got, str) and got in SHORTHANDS:
        return SHORTHANDS[got]
    if isinstance(got, float) and 0 < got < 1:
        return f"{{energy: {got}}}"
    if isinstance(got, str) and got[-1:] in "bB" and got[:1].isdigit():
        return f"{{budget: {shown(got)}}}"
    if isinstance(got, str) and got.endswith("%"):
        return f"{{rank: {shown(got)}}}, of each matrix, or {{budget: {shown(got)}}}, of all bytes"
    is_rank = got in ("full", "none") or (isinstance(got, int) and not isinstance(got, bool))
    return f"{{rank: {shown(got) if is_rank else 16}}}"


def _path(loc: tuple[int | str, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.lstrip(".") or "recipe"
