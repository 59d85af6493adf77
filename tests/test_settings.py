"""mergekit's gradients and filters: our values are its values, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from twinmerge.errors import RecipeError
from twinmerge.merging.shared import get
from twinmerge.merging.shared.registry import Option
from twinmerge.recipe import Depths, Recipe
from twinmerge.recipe.settings import setting_problems, value_at

EXPERTS = ("cola", "sst2")

TEXT = dict(vocab_size=40, hidden_size=16, num_attention_heads=2, intermediate_size=24)
GPT2 = dict(vocab_size=40, n_embd=16, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
T5 = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_heads=2)

MODELS: dict[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_hidden_layers=4)),
    "llama of one layer": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_hidden_layers=1)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, n_layer=3)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_hidden_layers=3)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**T5, num_layers=2, num_decoder_layers=3)
    ),
}

# merge method, top parameters, and those of each expert
SETTINGS: dict[str, tuple[str, dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "scalars": ("ties", {"weight": 0.5, "density": 0.3, "normalize": False}, ({}, {"weight": 0.1})),
    "a gradient": ("ties", {"weight": [0, 0.3, 1]}, ({}, {})),
    "a gradient of its own": ("ties", {"weight": 0.5}, ({"weight": [0.1, 0.2, 0.9, 0.4]}, {})),
    "a gradient of one": ("ties", {"weight": [0.7]}, ({}, {})),
    "an empty list": ("ties", {"weight": 0.5, "density": []}, ({"weight": []}, {})),
    "filters": (
        "ties",
        {"weight": [{"filter": "attn", "value": 0.2}, {"filter": "attention", "value": 0.3},
                    {"filter": "layer.1.", "value": 9}, {"value": 0.7}]},
        ({}, {}),
    ),
    "the first filter wins": (
        "ties",
        {"weight": [{"filter": "*", "value": 0.1}, {"filter": "mlp", "value": 0.2}]},
        ({"weight": [{"filter": "weight", "value": 0.4}, {"filter": "mlp", "value": 0.5}]}, {}),
    ),
    "a filter that fits nothing asks the next scope": (
        "ties",
        {"weight": 0.6, "density": [{"filter": "norm", "value": 0.2}]},
        (
            {"weight": [{"filter": "mlp", "value": 0.1}], "density": {"filter": "0", "value": 0.9}},
            {"weight": [{"filter": "wte", "value": []}, {"filter": None, "value": [0.2, 0.3]}]},
        ),
    ),
    "gradients in filters": (
        "dare_ties",
        {"density": [{"filter": "layers.2", "value": [0, 1]}, {"value": [0.2, 0.9, 0.4]}],
         "weight": 1, "lambda": [1, 2, 0.5]},
        ({"weight": {"filter": "q_proj", "value": [1, 3]}}, {"weight": [-1, 1]}),
    ),
    "booleans": (
        "ties",
        {"weight": 1, "normalize": [True, False], "rescale": [False, True, True],
         "int8_mask": [{"filter": "mlp", "value": True}, {"value": [True, False]}]},
        ({}, {}),
    ),
    "shared options": (
        "task_arithmetic",
        {"weight": 1, "lambda": [{"filter": "bias", "value": 2}, {"filter": "l", "value": [1, 3]}]},
        ({}, {}),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One checkpoint of every model; base and experts only differ in their folders' names."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, make in MODELS.items():
        made[name] = folder / name.replace(" ", "-")
        model = make()
        for part in ("base", *EXPERTS):
            model.save_pretrained(made[name] / part)
    return made


def config(folder: Path, settings: str) -> dict[str, Any]:
    method, top, own = SETTINGS[settings]
    models = [
        {"model": str(folder / name), "parameters": values}
        for name, values in zip(EXPERTS, own, strict=True)
    ]
    base = str(folder / "base")
    return {"base_model": base, "models": models, "merge_method": method, "parameters": top}


def mergekits_values(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What mergekit's plan gives each tensor: options of all, and lists of one per expert."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    parsed = MergeConfiguration.model_validate(config)
    options = MergeOptions()
    architecture = get_architecture_info(parsed, options)
    planner = MergePlanner(parsed, architecture, options, parsed.base_model.config())  # type: ignore
    planner._plan()
    values = {}
    for weight, task in planner._tensors:
        experts = [model for model in task.model_order if model != parsed.base_model]
        per_input = [dict(task.input_parameters[model].items()) for model in experts]
        values[weight.name] = dict(task.parameters.items()) | {
            name: [own[name] for own in per_input] for name in per_input[0]
        }
    return values


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_the_value_of_every_parameter_at_every_tensor_is_mergekits(model, settings, folders):
    pytest.importorskip("mergekit")
    asked = config(folders[model], settings)
    theirs = mergekits_values(asked)
    ours = Recipe.model_validate(asked)
    depths = Depths(theirs)
    assert len(theirs) > 10
    for tensor, wanted in theirs.items():
        values = ours.parameters_at(tensor, depths.of(tensor))
        for name, value in values.items():
            each = [value] * 2 if get(ours.merge_method).options[name].per_expert else value
            each = value if isinstance(value, list) else each
            assert each == wanted[name], (tensor, name)


def test_depth_runs_from_the_first_layer_to_the_last_and_is_0_outside():
    depths = Depths(
        [
            "model.embed_tokens.weight",
            *(f"model.layers.{i}.experts.{j}.w" for i in range(5) for j in range(2)),
            *(f"encoder.block.{i}.layer.{j}.q" for i in range(2) for j in range(2)),
            *(f"decoder.block.{i}.layer.{j}.q" for i in range(3) for j in range(3)),
            *(f"h.{i}.ln_1.bias" for i in range(12)),
            "only.layer.0.weight",
            "model.norm.weight",
        ]
    )
    told = {
        "model.embed_tokens.weight": 0,
        "model.norm.weight": 0,
        "model.layers.0.experts.1.w": 0,
        "model.layers.1.experts.0.w": 0.25,
        "model.layers.4.experts.0.w": 1,
        "encoder.block.1.layer.0.q": 1,
        "decoder.block.1.layer.2.q": 0.5,
        "h.3.ln_1.bias": 3 / 11,
        "only.layer.0.weight": 1,
        "head.7.weight": 0,
        "7.weight": 0,
    }
    assert {name: depths.of(name) for name in told} == told


@given(
    values=st.lists(st.floats(-10, 10), min_size=1, max_size=6), depth=st.floats(0, 1), n=st.data()
)
def test_a_gradient_has_its_numbers_at_even_steps_and_stays_between_them(values, depth, n):
    i = n.draw(st.integers(0, len(values) - 1))
    at = i / (len(values) - 1) if len(values) > 1 else depth
    assert value_at(values, "t", at) == pytest.approx(values[i], abs=1e-9)
    between = value_at(values, "t", depth)
    assert between is not None
    assert min(values) - 1e-9 <= between <= max(values) + 1e-9


FLOAT, BOOL, INT = (Option("x", kind(1), False, kind) for kind in (float, bool, int))
DENSITY = Option("density", 1.0, True, float)


@pytest.mark.parametrize(
    ("option", "setting", "problems"),
    [
        (FLOAT, 3, []),
        (FLOAT, {"filter": "mlp", "value": [0, 1]}, []),
        (FLOAT, [], []),
        (FLOAT, (0, 0.5), []),
        (FLOAT, [0, "1"], ["p[1]: expected a finite number, got '1'."]),
        (FLOAT, [[0, 1]], ["p[0]: expected a finite number, got a list."]),
        (FLOAT, [float("nan"), True], [
            "p[0]: expected a finite number, got nan.", "p[1]: expected a finite number, got true."
        ]),
        (FLOAT, {"filter": "a"}, [
            "p.value: missing. What holds where the filter fits: a number or a gradient."
        ]),
        (FLOAT, {"filter": "a", "valu": 1}, [
            "p.valu: unknown key. Did you mean 'value'? Known: filter, value.",
            "p.value: missing. What holds where the filter fits: a number or a gradient.",
        ]),
        (FLOAT, [{"value": 1}, {"filter": "a", "value": [1, 2, None]}], [
            "p[1].value[2]: expected a finite number, got null."
        ]),
        (FLOAT, [{"value": {"value": 1}}], [
            "p[0].value: expected a finite number, got a mapping."
        ]),
        (FLOAT, [{"filter": 3, "value": 1}], [
            "p[0].filter: expected a part of a tensor's name, got 3. YAML did not read it as text: "
            "quote it."
        ]),
        (FLOAT, [{"filter": "a", "value": 1}, 0.5], [
            "p[1]: expected a mapping with `filter` and `value` like the list's others, got 0.5. "
            "A list is either a gradient of numbers or filters."
        ]),
        (BOOL, [True, {"value": 1}], [
            "p[0]: expected a mapping with `filter` and `value` like the list's others, got true. "
            "A list is either a gradient of numbers or filters.",
            "p[1].value: expected true or false, got 1.",
        ]),
        (INT, 3, []),
        (INT, [{"filter": "a", "value": 3}, {"value": 4}], []),
        (INT, 3.0, ["p: expected an integer, got 3.0."]),
        (INT, True, ["p: expected an integer, got true."]),
        (INT, [1, 2], ["p: expected one integer, got [1, 2]: it has no values between."]),
        (DENSITY, 0, ["p: expected the fraction to keep, above 0 and at most 1, got 0."]),
        (DENSITY, 1.5, ["p: expected the fraction to keep, above 0 and at most 1, got 1.5."]),
        (DENSITY, [0, 1], []),
        (DENSITY, {"filter": "a", "value": 0}, []),
        (DENSITY, [0, -1], ["p[1]: expected the fraction to keep, between 0 and 1, got -1."]),
        (Option("gamma", 0.01, True, float), 2, [
            "p: expected a fraction between 0 and 1, got 2."
        ]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_setting_is_told_with_its_path(option, setting, problems):
    assert list(setting_problems("p", setting, option)) == problems


# --------------------------------------------------------------------------- the whole recipe


def recipe(method: str = "ties", *own: dict[str, Any], **top: Any) -> Recipe:
    models = [{"model": f"m{i}", "parameters": values} for i, values in enumerate(own or ({}, {}))]
    return Recipe.model_validate(
        {"base_model": "b", "models": models, "merge_method": method, "parameters": top}
    )


def test_a_recipe_with_gradients_and_filters_survives_yaml_and_json():
    ours = recipe(
        "ties",
        {"weight": [0, 0.5, 1], "density": {"filter": "mlp", "value": 0.5}},
        {"weight": [{"filter": "a", "value": [1, 2]}, {"value": 1}]},
        normalize=[True, False],
    )
    assert Recipe.from_yaml(ours.to_yaml()) == ours
    assert Recipe.model_validate_json(ours.model_dump_json()) == ours


def test_only_a_recipe_with_gradients_or_filters_varies_by_tensor():
    assert not recipe(weight=0.5).varies
    assert recipe(weight=[0.5]).varies and recipe("ties", {"weight": {"value": 1}}).varies


def test_weights_that_sum_to_0_at_some_tensor_are_told_with_its_name():
    tensors = [f"layers.{i}.mlp" for i in range(3)]
    ours = recipe("ties", {"weight": [1, 0, 1]}, {"weight": [{"filter": ".1.", "value": 0}]})
    with pytest.raises(RecipeError) as told:
        ours.check_tensors(tensors, Depths(tensors))
    assert str(told.value) == (
        "parameters.weight: at layers.1.mlp, the weights [0, 0] sum to 0, so they cannot be "
        "normalised. Give other weights, or `normalize: false`."
    )
    ours.check_tensors([tensors[0], tensors[2]], Depths(tensors))
    recipe("ties", {"weight": [1, -1]}, {"weight": [-1, 1]}, normalize=False).check_tensors(
        tensors, Depths(tensors)
    )


def test_filters_that_fit_no_tensor_are_listed():
    ours = recipe(
        "ties",
        {"weight": [{"filter": "mlp", "value": 1}, {"filter": "self_attn", "value": 1}]},
        {"weight": {"filter": "*", "value": 1}},
        density=[{"filter": "self_attn", "value": 1}, {"filter": "typo", "value": 1}],
    )
    assert ours.idle_filters(["layer.0.mlp.weight"]) == ["self_attn", "typo"]
    assert recipe(weight=1).idle_filters([]) == []


ODDITIES = st.sampled_from(
    [None, True, 0, 1, -3, 0.5, 1e308, 10**400, float("nan"), "", "mlp", "6%"]
)
KEYS = st.sampled_from(
    ["weight", "density", "normalize", "filter", "value", "form", "rank", "budget", "scope", "x"]
)
ANYTHING = st.recursive(
    ODDITIES, lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=3)
)


@given(top=ANYTHING, own=ANYTHING, base=ANYTHING, exclusive=ANYTHING)
def test_whatever_is_written_is_a_recipe_or_a_recipe_error(top, own, base, exclusive):
    models = [{"model": "b", "parameters": base}, {"model": "m", "parameters": own}]
    data = {"base_model": "b", "models": models, "parameters": top, "exclusive": exclusive}
    try:
        ours = Recipe.model_validate(data | {"merge_method": "ties"})
    except RecipeError:
        return
    values = ours.parameters_at("layers.0.mlp", 0.5)
    assert values.keys() == get("ties").options.keys()
    assert Recipe.from_yaml(ours.to_yaml()) == ours


@pytest.mark.parametrize("key", ["top", "own", "base"])
@given(setting=ANYTHING)
def test_whatever_a_setting_is_it_is_one_or_a_recipe_error(key, setting):
    values = {"top": {}, "own": {}, "base": {}} | {key: {"weight": setting, "density": setting}}
    models = [{"model": part, "parameters": values[part]} for part in ("base", "own")]
    data = {"base_model": "base", "models": models, "parameters": values["top"]}
    try:
        ours = Recipe.model_validate(data | {"merge_method": "ties"})
    except RecipeError:
        return
    assert ours.parameters_at("layers.0.mlp", 0.5).keys() == get("ties").options.keys()
