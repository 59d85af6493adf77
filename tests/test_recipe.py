"""The recipe: what is accepted, and every message for what is not."""

import json
import re
from pathlib import Path

import pytest
import yaml

from twinmerge.errors import RecipeError
from twinmerge.merging.shared import METHODS, get
from twinmerge.recipe import Exclusive, Expert, Recipe, default_name, load_recipe

FULL = """
base_model: ./base
models:
  - {model: ./cola, parameters: {weight: 0.3, density: 0.5}}
  - {model: "./base+./adapters/sst2", name: sentiment}
merge_method: dare_ties
parameters: {weight: 0.4, normalize: true, lambda: 2}
dtype: float64
out_dtype: bfloat16
seed: 3
exclusive: {rank: 10%}
router: {layer: 4, rows_per_task: 10, hidden: 8, epochs: 2, learning_rate: 5e-4}
tokenizer_source: base
"""

MERGEKIT = {
    "linear": """
        models:
          - model: ./cola
            parameters:
              weight: 0.7
          - model: ./sst2
            parameters:
              weight: 0.3
        merge_method: linear
        base_model: ./base
        parameters:
          normalize: true
        dtype: bfloat16
        """,
    "task_arithmetic": """
        models:
          - model: ./base
          - model: ./cola
            parameters: {weight: 0.35}
          - model: ./sst2
            parameters: {weight: 0.6}
        base_model: ./base
        merge_method: task_arithmetic
        parameters: {normalize: false, int8_mask: true, lambda: 1.5}
        dtype: bfloat16
        tokenizer_source: base
        """,
    "ties": """
        models:
          - model: ./base
            # no parameters necessary for base model
          - model: ./cola
            parameters:
              density: 0.5
              weight: 0.5
          - model: ./sst2
            parameters:
              density: 0.5
              weight: 0.3
        merge_method: ties
        base_model: ./base
        parameters:
          normalize: true
          int8_mask: true
        dtype: bfloat16
        """,
    "dare_linear": """
        models:
          - {model: ./cola, parameters: {density: 0.5, weight: 0.5}}
          - {model: ./sst2, parameters: {density: 0.3, weight: 1}}
        merge_method: dare_linear
        base_model: ./base
        parameters: {rescale: false, int8_mask: true, normalize: false}
        dtype: bfloat16
        """,
    "dare_ties": """
        models:
          - model: ./base
          - {model: ./cola, parameters: {density: 0.53, weight: 0.4}}
          - {model: ./sst2, parameters: {density: 0.53, weight: 0.3}}
        merge_method: dare_ties
        base_model: ./base
        parameters: {int8_mask: true}
        dtype: bfloat16
        """,
    "breadcrumbs": """
        models:
          - {model: ./cola, parameters: {weight: 0.5, density: 0.9}}
          - {model: ./sst2, parameters: {weight: [0.1, 0.9], density: 0.9, gamma: 0.02}}
        base_model: ./base
        merge_method: breadcrumbs
        parameters: {gamma: 0.01, normalize: false, lambda: 1.0}
        """,
    "breadcrumbs_ties": """
        models:
          - {model: ./base, parameters: {weight: 1, density: 0}}
          - {model: ./cola, parameters: {weight: 0.5}}
          - {model: ./sst2, parameters: {weight: 0.5}}
        base_model: ./base
        merge_method: breadcrumbs_ties
        parameters: {density: 0.9, gamma: 0.01}
        """,
    "della": """
        models:
          - {model: ./cola, parameters: {weight: 0.5, density: 0.5, epsilon: 0.1}}
          - {model: ./sst2, parameters: {weight: 0.5, density: 0.5}}
        base_model: ./base
        merge_method: della
        parameters: {epsilon: 0.2, lambda: 1.1, int8_mask: true}
        """,
    "della_linear": """
        models:
          - {model: ./cola, parameters: {weight: 0.5, density: [0.3, 0.7]}}
          - {model: ./sst2, parameters: {weight: 0.5, density: 0.5}}
        base_model: ./base
        merge_method: della_linear
        parameters: {epsilon: 0.1, rescale: false}
        """,
    "slerp": """
        models:
          - model: ./base
          - model: ./cola
        merge_method: slerp
        base_model: ./base
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5
        dtype: bfloat16
        """,
    "model_stock": """
        models: [{model: ./cola}, {model: ./sst2}]
        base_model: ./base
        merge_method: model_stock
        parameters: {filter_wise: true}
        """,
    "sce": """
        models: [{model: ./cola}, {model: ./sst2}]
        base_model: ./base
        merge_method: sce
        parameters: {select_topk: 0.1, int8_mask: true}
        """,
}
OURS = {"tsv_m", "iso_c", "iso_cts"}
"""Methods that mergekit 0.1.5 does not have."""


def recipe(**changes: object) -> dict[str, object]:
    """A small valid recipe as a mapping, with some keys changed."""
    models = [{"model": "./cola"}, {"model": "./sst2"}]
    return {"base_model": "./base", "models": models, "merge_method": "ties", **changes}


def complaint(text_or_data: str | dict[str, object]) -> str:
    """What RecipeError says about it."""
    text = text_or_data if isinstance(text_or_data, str) else yaml.safe_dump(text_or_data)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    return str(caught.value)


def test_a_recipe_survives_yaml_and_json():
    full = Recipe.from_yaml(FULL)
    assert Recipe.from_yaml(full.to_yaml()) == full
    assert Recipe.model_validate(json.loads(full.model_dump_json())) == full
    by_energy = Recipe.from_yaml(yaml.safe_dump(recipe(exclusive={"energy": 0.9})))
    assert Recipe.from_yaml(by_energy.to_yaml()) == by_energy
    assert Recipe.model_validate(json.loads(by_energy.model_dump_json())) == by_energy


def test_what_the_user_wrote_is_what_the_model_holds():
    full = Recipe.from_yaml(FULL)
    assert [e.name for e in full.models] == ["cola", "sentiment"]
    assert full.models[1].model == "./base+./adapters/sst2"
    assert full.exclusive.rank == "10%"
    assert full.router.learning_rate == 0.0005
    assert (full.dtype, full.out_dtype, full.seed) == ("float64", "bfloat16", 3)


def test_a_base_and_one_expert_are_a_recipe_and_the_rest_has_defaults():
    small = Recipe.from_yaml("{base_model: b, models: [{model: org/cola}]}")
    assert small.merge_method == "linear" and small.dtype == "float32" and small.out_dtype is None
    assert small.exclusive.rank == 16 and small.router.layer == "auto"
    assert small.parameters_at("any", 0.0) == {"weight": 1.0, "normalize": True}


def test_a_recipe_from_python_is_the_recipe_from_yaml():
    python = Recipe(
        base_model="b", models=(Expert(model="c", name="c"),), exclusive=Exclusive(energy=0.5)
    )
    assert python == Recipe.from_yaml(
        "{base_model: b, models: [{model: c}], exclusive: {energy: 0.5}}"
    )
    with pytest.raises(RecipeError, match="models: expected at least one expert"):
        Recipe(base_model="b", models=())


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe.from_yaml(FULL).seed = 1  # pyright: ignore


@pytest.mark.parametrize("method", sorted(MERGEKIT))
def test_a_mergekit_config_is_accepted_unchanged(method):
    ours = Recipe.from_yaml(MERGEKIT[method])
    assert ours.merge_method == method
    assert [e.name for e in ours.models] == ["cola", "sst2"][: 1 if method == "slerp" else 2]
    assert set(ours.parameters_at("mlp", 0.5)) == set(get(method).options)
    assert Recipe.from_yaml(ours.to_yaml()) == ours


def test_every_method_is_covered_by_a_mergekit_config():
    assert set(MERGEKIT) == set(METHODS) - OURS


def test_half_precision_as_dtype_is_how_the_result_is_stored_not_what_the_maths_runs_in():
    ours = Recipe.from_yaml(MERGEKIT["ties"])
    assert (ours.dtype, ours.out_dtype) == ("float32", "bfloat16")
    both = Recipe.from_yaml(yaml.safe_dump(recipe(dtype="float16", out_dtype="float32")))
    assert (both.dtype, both.out_dtype) == ("float32", "float32")


def test_an_experts_own_parameter_wins_over_the_recipes_and_that_over_the_default():
    values = Recipe.from_yaml(FULL).parameters_at("any", 0.0)
    assert values == {
        "weight": [0.3, 0.4],
        "density": [0.5, 1.0],
        "normalize": True,
        "rescale": True,
        "lambda": 2.0,
        "int8_mask": False,
    }
    assert Recipe.from_yaml(FULL).parameters_at("any", 0.0, "ties")["rescale"] is False


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("./cola/", "cola"),
        ("org/cola", "cola"),
        ("org/cola@main", "cola"),
        ("./base+./adapters/cola", "cola"),
        (r"C:\models\cola", "cola"),
    ],
)
def test_an_expert_is_called_after_the_last_part_of_its_path(model, name):
    assert default_name(model) == name


def test_paths_are_looked_up_beside_the_recipe_only_where_they_exist(tmp_path):
    for folder in ("base", "cola", "with+plus"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "{base_model: ./base, models: [{model: cola}, {model: org/sst2}, {model: ./base+org/lora}, "
        "{model: with+plus, name: p}, {model: /no/such}]}"
    )
    written = load_recipe(file)
    assert written.base_model == "./base"
    resolved = written.resolved(tmp_path)
    assert resolved.base_model == str(tmp_path / "base")
    assert [e.model for e in resolved.models] == [
        str(tmp_path / "cola"),
        "org/sst2",
        f"{tmp_path / 'base'}+org/lora",
        str(tmp_path / "with+plus"),
        "/no/such",
    ]
    assert [e.name for e in resolved.models] == ["cola", "sst2", "lora", "p", "such"]


@pytest.mark.parametrize(
    ("exclusive", "shape", "rank"),
    [
        (Exclusive(), (768, 768), 16),
        (Exclusive(rank=16), (8, 768), 8),
        (Exclusive(rank="10%"), (768, 3072), 76),
        (Exclusive(rank="29%"), (100, 100), 29),
        (Exclusive(rank="0.1%"), (64, 64), 1),
        (Exclusive(rank="full"), (5, 7), 5),
        (Exclusive(rank="none"), (5, 7), 0),
        (Exclusive(energy=0.5), (5, 7), 5),  # at most: the energy decides
    ],
)
def test_a_rank_is_a_number_of_directions_of_the_matrix(exclusive, shape, rank):
    from twinmerge.merging.keep import keep_of

    keep = keep_of(exclusive, [], 1, shared_bytes=0, whole_bytes=0)
    assert keep.cut.limit(*shape) == rank


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            recipe(merge_method="task_aritmetic"),
            "merge_method: no method 'task_aritmetic'. Did you mean 'task_arithmetic'? Known: ",
        ),
        (
            recipe(models=[{"model": "a"}, {"model": "c", "parameters": {"wieght": 1}}]),
            "models[1].parameters.wieght: unknown key. Did you mean 'weight'? "
            "Known: density, weight.",
        ),
        (
            recipe(merge_method="linear", parameters={"density": 0.5}),
            "parameters.density: unknown key for linear. Known: normalize, weight.",
        ),
        (
            recipe(models=[{"model": "a", "parameters": {"lambda": 1.0}}]),
            "models[0].parameters.lambda: one value for the whole merge. "
            "Move it to the top `parameters`.",
        ),
        (
            recipe(models=[{"model": "a"}, {"model": "c", "parameters": {"weight": [0, "x"]}}]),
            "models[1].parameters.weight[1]: expected a finite number, got 'x'.",
        ),
        (
            recipe(parameters={"weight": [{"filter": "mlp", "value": [0, 1, float("nan")]}]}),
            "parameters.weight[0].value[2]: expected a finite number, got nan.",
        ),
        (recipe(parameters={"weight": "x"}), "parameters.weight: expected a finite number, got "),
        (recipe(parameters={"weight": None}), "parameters.weight: expected a finite number, got n"),
        (recipe(parameters={"weight": float("inf")}), "parameters.weight: expected a finite"),
        (recipe(parameters={"weight": 10**400}), "parameters.weight: expected a finite number"),
        (recipe(parameters={"weight": True}), "parameters.weight: expected a finite number, got t"),
        (recipe(parameters={"normalize": 1}), "parameters.normalize: expected true or false, got"),
        (recipe(parameters={"density": 1.5}), "parameters.density: expected the fraction to keep"),
        (
            recipe(parameters={"density": 0}),
            "parameters.density: expected the fraction to keep, above 0 and at most 1, got 0.",
        ),
        (recipe(parameters=[1]), "parameters: expected a mapping of names to numbers, got a list."),
        (
            recipe(parameters={"weight": 0, "normalize": True}),
            "parameters.weight: the weights [0, 0] sum to 0, so they cannot be normalised.",
        ),
        (recipe(models=[]), "models: expected at least one expert, got none."),
        (recipe(models=[{"model": "base"}]), "models: expected at least one expert, got none."),
        (
            recipe(models=[{"model": "a"}, {"model": "base"}], merge_method="linear"),
            "models[1].model: 'base' is the base, and the base is no expert",
        ),
        (
            recipe(models=[{"model": "a"}, {"model": "base", "parameters": {"normalize": True}}]),
            "models[1].model: 'base' is the base, and the base is no expert: it takes no param",
        ),
        (
            recipe(models=[{"model": "a"}, {"model": "base", "parameters": []}]),
            "models[1].model: 'base' is the base, and the base is no expert: it takes no param",
        ),
        (
            recipe(models=[{"model": "x/a"}, {"model": "y/A"}]),
            "models[1].name: 'A' is taken by models[0] (case does not count). "
            "Give each expert a `name` of its own.",
        ),
        (
            recipe(models=[{"model": "./a"}, {"model": "a/", "name": "b"}]),
            "models[1].model: the same expert twice: 'a/' is models[0] too.",
        ),
        (recipe(models=[{"model": "a", "name": "a/b"}]), "models[0].name: 'a/b' cannot be a file"),
        (recipe(models=[{"model": ".."}]), "models[0].name: '..' cannot be a file's name."),
        (recipe(models=[{"model": " "}]), "models[0].model: expected a folder or a hub id"),
        (recipe(models=[{"name": "a"}]), "models[0].model: missing. A folder or hub id"),
        (recipe(models=3), "models: expected a list, got 3."),
        (recipe(models=["a"]), "models[0]: expected a mapping of keys to values, got text."),
        ({"models": [{"model": "a"}]}, "base_model: missing. The checkpoint that every expert"),
        (recipe(paramters={}), "paramters: unknown key. Did you mean 'parameters'? Known: base_mo"),
        (recipe(models=[{"model": "a", "nam": "a"}]), "models[0].nam: unknown key. Did you mean"),
        (recipe(exclusive={"rnk": 3}), "exclusive.rnk: unknown key. Did you mean 'rank'?"),
        (recipe(router={"parameters": 1}), "router.parameters: unknown key. Known: batch_size"),
        (recipe(exclusive={"rank": 0}), "exclusive.rank: expected an integer of at least 1, '10%'"),
        (recipe(exclusive={"rank": None}), "exclusive.rank: expected an integer of at least 1"),
        (recipe(exclusive={"rank": "110%"}), "exclusive.rank: expected an integer of at least 1"),
        (recipe(exclusive={"energy": 0}), "exclusive.energy: expected greater than 0, got 0."),
        (
            recipe(exclusive={"rank": 4, "energy": 0.5}),
            "exclusive: give `rank` or `energy`, not both.",
        ),
        (
            recipe(exclusive={"rank": 4, "budget": "6%", "energy": 0.5}),
            "exclusive: give `rank`, `energy` or `budget`, not all three.",
        ),
        (
            recipe(exclusive={"rank": "none", "budget": "6%"}),
            "exclusive: `rank: none` keeps nothing, so `budget` says nothing. Leave one out.",
        ),
        (
            recipe(exclusive={"density": 0.1}),
            "exclusive.density: svd keeps directions, not entries. Add `form: magnitude` or",
        ),
        (
            recipe(exclusive={"form": "magnitude"}),
            "exclusive.density: missing. magnitude keeps this share of the entries: give a number",
        ),
        (
            recipe(exclusive={"form": "dropout", "density": 0.1, "rank": 8}),
            "exclusive.rank: only for `form: svd`. dropout keeps entries: give `density`.",
        ),
        (
            recipe(exclusive={"scope": "all"}),
            "exclusive.scope: only for `form: magnitude`, and the form is svd. Leave it out.",
        ),
        (
            recipe(exclusive={"form": "dropout", "density": 0.1, "scope": "tensor"}),
            "exclusive.scope: only for `form: magnitude`, and the form is dropout.",
        ),
        (
            recipe(exclusive={"form": "magnitude", "density": 0.1, "dtype": "int4"}),
            "exclusive.dtype: int4 is for the factors of `form: svd`. magnitude stores float32, ",
        ),
        (
            recipe(exclusive={"form": "magnitude", "density": 0}),
            "exclusive.density: expected greater than 0, got 0.",
        ),
        (
            recipe(exclusive={"form": "magnitude", "density": 1.5}),
            "exclusive.density: expected less than or equal to 1, got 1.5.",
        ),
        (recipe(exclusive={"form": "SVD"}), "exclusive.form: expected 'svd', 'magnitude' or 'dro"),
        (recipe(exclusive={"dtype": "fp16"}), "exclusive.dtype: expected 'float32', 'float16', "),
        (recipe(router={"layer": "last"}), "router.layer: expected auto, an integer of at least 0"),
        (recipe(router={"layer": [1, 1]}), "several different ones in a list, got [1, 1]."),
        (recipe(router={"layer": [0, -1]}), "several different ones in a list, got [0, -1]."),
        (recipe(router={"dropout": 1}), "router.dropout: expected less than 1, got 1."),
        (recipe(seed=True), "seed: expected a valid integer, got true."),
        (recipe(seed=2**63), "seed: expected less than or equal to "),
        (recipe(dtype="int8"), "dtype: expected 'float32' or 'float64', got 'int8'."),
        (
            recipe(tokenizer_source="union"),
            "tokenizer_source: only 'base' is possible, got 'union'",
        ),
        (recipe(slices=[]), "slices: not supported. twinmerge merges whole models"),
        (recipe(modules={}), "modules: not supported. twinmerge merges whole models"),
        (recipe(tokenizer={}), "tokenizer: not supported. twinmerge copies the base's tokenizer"),
        (recipe(chat_template="auto"), "chat_template: not supported. twinmerge copies the base's"),
    ],
)
def test_a_problem_is_told_with_its_path_and_a_way_out(data, message):
    told = complaint(data)
    assert message in told
    assert data.get("models") == [{"model": "base"}] or "\n" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty."),
        ("# nothing", "the recipe is empty."),
        ("- a", "a recipe is a mapping of keys to values, got a list."),
        ("a: [", "line 1, column 5: not valid YAML: "),
        ("seed: 1\nseed: 2", "line 2, column 1: not valid YAML: the key 'seed' is given twice."),
        ("router: {seed: 1, seed: 2}", "the key 'seed' is given twice."),
        ("on: 1", "line 1, column 1: not valid YAML: the key 'on' is not text: quote it."),
        ("seed: 2024-13-45", "not valid YAML: month must be in 1..12."),
        ("seed: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "line 2, column 1: not valid YAML: but found another document."),
        ("models: [{model: a, name: no}]", "models[0].name: expected text, got false. YAML did"),
        ("models: [{model: a, name: 1}]", "models[0].name: expected text, got 1. YAML did not"),
        ("models: [{model: 2024-01-01}]", "read it as text: quote it."),
        ("router: {learning_rate: '5e-4'}", "router.learning_rate: expected a valid number"),
    ],
)
def test_yaml_that_breaks_or_says_something_else_than_it_seems_is_told(text, message):
    assert message in complaint(text)


def test_all_problems_are_told_at_once_one_line_each():
    lines = complaint(
        recipe(
            base_modle="./base",
            models=[{"model": "a", "parameters": {"wieght": 1}}, {"model": "b", "name": "x y"}],
            merge_method="tise",
            exclusive={"rank": -1},
        )
    ).splitlines()
    assert lines[0] == "5 problems in the recipe:"
    starts = [
        "base_modle: ",
        "exclusive.rank: ",
        "merge_method: no method 'tise'. Did you mean 'ties'?",
        "models[0].parameters.wieght: unknown key. Did you mean 'weight'?",
        "models[1].name: 'x y'",
    ]
    assert all(
        line.strip().startswith(start)
        for line, start in zip(sorted(lines[1:]), starts, strict=True)
    )


def test_numbers_in_scientific_notation_are_numbers():
    for text, value in {"5e-4": 5e-4, "1E-3": 1e-3, ".5e-3": 5e-4, "1.5e-3": 1.5e-3}.items():
        data = "{base_model: b, models: [{model: a}], router: {learning_rate: " + text + "}}"
        assert Recipe.from_yaml(data).router.learning_rate == value


def test_a_name_like_a_number_is_fine_in_quotes():
    data = "{base_model: b, models: [{model: a, name: '1'}, {model: c, name: 'no'}, {model: 5e}]}"
    assert [e.name for e in Recipe.from_yaml(data).models] == ["1", "no", "5e"]


def test_messages_name_the_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"recipe.yaml: cannot read the recipe: No such file"):
        load_recipe(file)
    with pytest.raises(RecipeError, match="cannot read the recipe: Is a directory"):
        load_recipe(tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="it is not UTF-8 text"):
        load_recipe(file)
    file.write_text("base_model: b")
    with pytest.raises(RecipeError, match=r"recipe.yaml: models: missing. The experts."):
        load_recipe(file)


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("'10%'", "{rank: '10%'}, of each matrix, or {budget: '10%'}, of all bytes"),
        ("full", "{rank: 'full'}"),
        ("8", "{rank: 8}"),
        ("50MB", "{budget: '50MB'}"),
        ("0.95", "{energy: 0.95}"),
        ("magnitude", "{form: magnitude, density: 0.1}"),
        ("int4", "{dtype: int4}"),
        ("[8]", "{rank: 16}"),
        ("yes", "{rank: 16}"),
    ],
)
def test_a_bare_value_of_exclusive_is_told_where_it_goes(written, hint):
    told = complaint(f"base_model: b\nmodels: [{{model: a}}]\nexclusive: {written}\n")
    assert told.startswith("exclusive: expected a mapping of keys to values, got ")
    assert told.endswith(f"Write exclusive: {hint}.")


def test_all_that_does_not_fit_together_in_exclusive_is_told_at_once():
    told = complaint(recipe(exclusive={"form": "magnitude", "rank": 8, "dtype": "int8"}))
    paths = [line.split(":")[0].strip() for line in told.splitlines()]
    assert paths[1:] == ["exclusive.rank", "exclusive.density", "exclusive.dtype"]


@pytest.mark.parametrize(
    "exclusive",
    [
        {"energy": 0.9, "dtype": "int8"},
        {"budget": "6%", "rank": None},
        {"budget": 5_000_000, "dtype": "int4"},
        {"form": "magnitude", "density": 0.1},
        {"form": "magnitude", "density": 0.1, "scope": "all", "dtype": "bfloat16"},
        {"form": "dropout", "density": 1.0},
        {"rank": "none"},
    ],
)
def test_what_is_kept_survives_yaml_and_says_nothing_that_does_not_count(exclusive):
    ours = Recipe.from_yaml(yaml.safe_dump(recipe(exclusive=exclusive)))
    assert Recipe.from_yaml(ours.to_yaml()) == ours
    assert Exclusive.model_validate_json(ours.exclusive.model_dump_json()) == ours.exclusive
    assert (ours.exclusive.rank is None) == (exclusive.get("rank") is None)
    scope = exclusive.get("scope", "tensor" if exclusive.get("form") == "magnitude" else None)
    assert ours.exclusive.scope == scope


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        ("6%", 60),
        ("0.29%", 2),
        ("29 %", 290),
        ("250%", 2500),
        ("50MB", 50_000_000),
        ("50 mb", 50_000_000),
        ("1.5GB", 1_500_000_000),
        ("50MiB", 50 * 2**20),
        ("64KiB", 65_536),
        ("6B", 6),
        (123_456, 123_456),
    ],
)
def test_a_budget_is_a_share_of_the_shared_expert_or_a_size(budget, size):
    assert Exclusive(budget=budget).budget_bytes(1000) == size
    assert Exclusive(rank=4).budget_bytes(1000) is None


WAYS = 'Write a share of the shared expert such as "6%", or a size such as "50MB" or "50MiB".'


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0, "got 0, and nothing can be kept in no bytes. Write `rank: none` instead for a static"),
        ("0%", "got '0%', and nothing can be kept in no bytes."),
        (
            6,
            '6 of what? Write "6%" for a share of the shared expert\'s bytes, or a size such as '
            '"6MB".',
        ),
        (0.06, '0.06 of what? Write "6%" for a share of the shared expert\'s bytes, or a size'),
        ("6 percent", f"expected a size, got '6 percent'. {WAYS}"),
        ("6", f"expected a size, got '6'. {WAYS}"),
        ("50M", f"expected a size, got '50M'. {WAYS}"),
        ("1,5GB", f"expected a size, got '1,5GB'. {WAYS}"),
        (-6, f"expected a size, got -6. {WAYS}"),
        (True, f"expected a size, got true. {WAYS}"),
        ([6], f"expected a size, got [6]. {WAYS}"),
        (5e6, "expected a whole number of bytes, got 5000000.0: write 5000000."),
        ("0.1B", "'0.1B' is less than one byte."),
    ],
)
def test_a_budget_that_is_none_is_told_what_to_write(budget, message):
    assert f"exclusive.budget: {message}" in complaint(recipe(exclusive={"budget": budget}))


@pytest.mark.parametrize(
    ("method", "experts", "message"),
    [
        (
            "slerp",
            "abc",
            "merge_method: slerp takes 1 or 2 experts beside the base, got 3: a, b, c. "
            "Leave out experts, or choose another method.",
        ),
        (
            "model_stock",
            "a",
            "merge_method: model_stock takes at least 2 experts beside the base, got 1: a. "
            "Add experts, or choose another method.",
        ),
    ],
)
def test_a_method_says_how_many_experts_it_takes(method, experts, message):
    models = [{"model": "base"}, *({"model": name} for name in experts)]
    assert complaint(recipe(merge_method=method, models=models)) == message


def test_what_mergekit_ignores_at_the_base_is_ignored():
    models = [{"model": "base", "parameters": {"weight": "x", "density": 0}}, {"model": "a"}]
    ours = Recipe.from_yaml(yaml.safe_dump(recipe(models=models)))
    assert [e.name for e in ours.models] == ["a"]


def test_every_example_of_the_docs_is_a_recipe():
    page = (Path(__file__).parent.parent / "docs" / "recipe.md").read_text()
    examples = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    parts = [part for example in examples for part in yaml.safe_load_all(example)]
    for part in parts:
        Recipe.model_validate(recipe(merge_method="dare_ties") | part)
    shown = {key for part in parts for key in part.get("exclusive", {})}
    assert shown == set(Exclusive.model_fields)


def test_probabilities_of_della_stay_within_0_and_1():
    told = complaint(recipe(merge_method="della", parameters={"density": 0.9, "epsilon": 0.2}))
    assert told.startswith("parameters.epsilon: density 0.9 ± epsilon 0.2 is not within (0, 1)")
    Recipe.from_yaml(yaml.safe_dump(recipe(merge_method="della")))
