"""The recipe as a frozen model, made of YAML or of Python."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from ..errors import RecipeError
from ..merging.shared.registry import Option, SharedMethod, Value, get
from .depth import Depths
from .problems import (
    REFUSED,
    is_parameter,
    listed,
    said,
    semantic_problems,
    value_problems,
)
from .references import is_same, resolved
from .sections import Exclusive, Expert, Reference, Router, Section, Seed, without_nulls
from .settings import Scalar, Setting, depends_on_tensor, filters_of, value_at
from .words import kind_of
from .yamltext import read_yaml


def _tokenizer_source(value: Any) -> Any:
    if value == "base":
        return value
    raise ValueError(
        f"only 'base' is possible, got {value!r}: twinmerge copies the base's tokenizer. Resize "
        "the base and the experts to one vocabulary first if they differ."
    )


class Recipe(Section):
    """What to merge and how. Raises `RecipeError`, with all problems, when made of wrong parts."""

    _folder: Path | None = PrivateAttr(default=None)
    """Of the file that it was read from."""

    base_model: Reference
    """The checkpoint that every expert was fine-tuned from."""

    models: Annotated[tuple[Expert, ...], Field(strict=False)]
    """The experts. The base itself may be listed, as mergekit's examples do for all methods but
    linear; it is no expert, and the entry goes, with parameters that mergekit ignores there too."""

    merge_method: str = "linear"
    """How the shared expert is made; mergekit's names."""

    parameters: dict[str, Setting] = Field(default_factory=dict)
    """The method's parameters, for all experts; an expert's own setting wins."""

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
            raise RecipeError(f"a recipe is a mapping of keys to values, got {kind_of(data)}.")
        data = _as_twinmerge_says_it({key: _plain(value) for key, value in data.items()})
        problems, recipe = [], None
        try:
            recipe = handler(_without_base_parameters(data))
        except ValidationError as error:
            problems = [said(e, SECTIONS) for e in error.errors() if not is_parameter(e)]
        problems += semantic_problems(data)
        if problems:
            raise RecipeError(listed(problems))
        assert recipe is not None, "what pydantic finds in parameters, semantic_problems finds"
        # Only now, so that `models[i]` in a message counts as the user does.
        experts = tuple(e for e in recipe.models if not is_same(e.model, recipe.base_model))
        object.__setattr__(recipe, "models", experts)
        if not recipe.varies:
            problems += value_problems(recipe.parameters_at("", 0.0), len(experts))
        if problems:
            raise RecipeError(listed(problems))
        return recipe

    @classmethod
    def from_yaml(cls, text: str) -> "Recipe":
        """Read a recipe; `RecipeError` lists every problem, or says where the YAML breaks."""
        data = read_yaml(text)
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
        experts = tuple(
            e.model_copy(update={"model": resolved(e.model, folder)}) for e in self.models
        )
        base = resolved(self.base_model, folder)
        found = self.model_copy(update={"base_model": base, "models": experts})
        found._folder = None
        return found

    def __eq__(self, other: object) -> bool:
        """Whether they say the same, wherever they were read."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def located(self) -> "Recipe":
        """`resolved` beside the file that `load_recipe` read; what was made otherwise, as it is."""
        return self if self._folder is None else self.resolved(self._folder)

    @property
    def varies(self) -> bool:
        """Whether any parameter is a gradient or has filters, so that tensors differ in it."""
        return any(depends_on_tensor(setting) for setting in self._settings())

    def parameters_at(
        self, tensor: str, depth: float, method: SharedMethod | str | None = None
    ) -> dict[str, Value]:
        """Every option of the method (default: the recipe's) with the value that holds at a tensor.

        `tensor` is the base's name of it, `depth` in [0, 1] where it lies: see `Depths`. An
        expert's own setting, else the recipe's, else the default: a list with one number for each
        expert where any of them has its own, a scalar otherwise.
        """
        if not isinstance(method, SharedMethod):
            method = get(method or self.merge_method)
        values: dict[str, Value] = {}
        for name, option in method.options.items():
            scopes = [self.parameters]
            if option.per_expert and any(name in expert.parameters for expert in self.models):
                own = ([expert.parameters, *scopes] for expert in self.models)
                values[name] = [_held(option, all_, tensor, depth) for all_ in own]
            else:
                values[name] = _held(option, scopes, tensor, depth)
        return values

    def check_tensors(self, tensors: Iterable[str], depths: Depths) -> None:
        """Raise `RecipeError` where gradients and filters come to values that do not go together.

        Such as weights that sum to 0 at one tensor, and cannot be normalised. `tensors` are those
        to be merged. Of plain numbers the same is found when the recipe is read.
        """
        if not self.varies:
            return
        for tensor in tensors:
            values = self.parameters_at(tensor, depths.of(tensor))
            if problems := list(value_problems(values, len(self.models), tensor)):
                raise RecipeError(listed(problems))

    def idle_filters(self, tensors: Iterable[str]) -> list[str]:
        """Filters that are part of no tensor's name, in the order of the recipe."""
        asked = [text for setting in self._settings() for text in filters_of(setting)]
        names = list(tensors) if asked else []
        return [
            text for text in dict.fromkeys(asked) if not any(text in tensor for tensor in names)
        ]

    def _settings(self) -> Iterator[Setting]:
        yield from self.parameters.values()
        for expert in self.models:
            yield from expert.parameters.values()


SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe, "models": Expert, "exclusive": Exclusive, "router": Router
}  # fmt: skip
"""The models of the recipe's keys; its own is under ""."""


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; messages name the file.

    Paths stay as the user wrote them. Whatever opens models looks beside the file (`located`).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path}: cannot read the recipe: {reason}.") from error
    try:
        recipe = Recipe.from_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    recipe._folder = path.parent
    return recipe


def _held(
    option: Option, scopes: Sequence[Mapping[str, Setting]], tensor: str, depth: float
) -> Scalar:
    """An option's value at one tensor: of the first scope that has one there, or the default."""
    for scope in scopes:
        if option.name in scope:
            value = value_at(scope[option.name], tensor, depth)
            if value is not None:
                return option.kind(value)
    return option.default


def _as_twinmerge_says_it(data: Mapping[Any, Any]) -> dict[Any, Any]:
    """mergekit's spellings of what we say otherwise; see the fields' docstrings."""
    data = without_nulls(
        data, "parameters", "exclusive", "router", "dtype", "tokenizer_source", *REFUSED
    )
    if data.get("dtype") in ("bfloat16", "float16"):
        half = data["dtype"]
        data["dtype"] = "float32"
        if data.get("out_dtype") is None:
            data["out_dtype"] = half
    return data


def _without_base_parameters(data: dict[Any, Any]) -> dict[Any, Any]:
    """A copy in which the base, where it is listed, has no parameters; they are ignored there."""
    models = data.get("models")
    if not isinstance(models, list):
        return data
    base = data.get("base_model")
    plain = [
        {key: value for key, value in model.items() if key != "parameters"}
        if isinstance(model, Mapping) and is_same(model.get("model"), base)
        else model
        for model in models
    ]
    return {**data, "models": plain}


def _plain(value: Any) -> Any:
    """A part given from Python, as the mapping that it stands for."""
    if isinstance(value, list | tuple):
        return [_plain(item) if isinstance(item, BaseModel) else item for item in value]
    return value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value
