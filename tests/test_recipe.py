"""The recipe: what is accepted, and every message for what is not."""

import json

import pytest
import yaml

from twinmerge.errors import RecipeError
from twinmerge.merging.plan import cut_of
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
}


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
    assert small.weight_parameters() == {"weight": 1.0, "normalize": True}


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
    assert [e.name for e in ours.models] == ["cola", "sst2"]
    assert set(ours.weight_parameters()) == set(get(method).options)
    assert len(ours.weight_parameters()["weight"]) == 2  # pyright: ignore


def test_every_method_is_covered_by_a_mergekit_config():
    assert set(MERGEKIT) == set(METHODS)


def test_half_precision_as_dtype_is_how_the_result_is_stored_not_what_the_maths_runs_in():
    ours = Recipe.from_yaml(MERGEKIT["ties"])
    assert (ours.dtype, ours.out_dtype) == ("float32", "bfloat16")
    both = Recipe.from_yaml(yaml.safe_dump(recipe(dtype="float16", out_dtype="float32")))
    assert (both.dtype, both.out_dtype) == ("float32", "float32")


def test_an_experts_own_parameter_wins_over_the_recipes_and_that_over_the_default():
    values = Recipe.from_yaml(FULL).weight_parameters()
    assert values == {
        "weight": [0.3, 0.4],
        "density": [0.5, 1.0],
        "normalize": True,
        "rescale": True,
        "lambda": 2.0,
        "int8_mask": False,
    }
    assert Recipe.from_yaml(FULL).weight_parameters("ties")["rescale"] is False


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
    assert cut_of(exclusive).limit(*shape) == rank


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
            recipe(parameters={"weight": [0, 1]}),
            "parameters.weight: one number per model for now; mergekit's gradients and filters "
            "are not supported, got [0, 1].",
        ),
        (
            recipe(parameters={"weight": [{"filter": "mlp", "value": 0.5}]}),
            "parameters.weight: one number per model for now",
        ),
        (recipe(parameters={"weight": "x"}), "parameters.weight: expected a finite number, got "),
        (recipe(parameters={"weight": None}), "parameters.weight: expected a finite number, got n"),
        (recipe(parameters={"weight": float("inf")}), "parameters.weight: expected a finite"),
        (recipe(parameters={"weight": 10**400}), "parameters.weight: expected a finite number"),
        (recipe(parameters={"weight": True}), "parameters.weight: expected a finite number, got t"),
        (recipe(parameters={"normalize": 1}), "parameters.normalize: expected true or false, got"),
        (recipe(parameters={"density": 1.5}), "parameters.density: expected the fraction to keep"),
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
            recipe(models=[{"model": "a"}, {"model": "base", "parameters": {"weight": 1}}]),
            "models[1].model: 'base' is the base, and the base is no expert",
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
        (recipe(router={"layer": "last"}), "router.layer: expected auto or an integer of at least"),
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


@pytest.mark.parametrize(("written", "hint"), [("'10%'", "'10%'"), ("full", "'full'"), ("8", "8")])
def test_a_bare_rank_is_told_where_it_goes(written, hint):
    with pytest.raises(RecipeError, match=rf"exclusive: .* Write exclusive: {{rank: {hint}}}"):
        Recipe.from_yaml(f"base_model: b\nmodels: [{{model: a}}]\nexclusive: {written}\n")
