"""Our shared experts against mergekit's own, tensor by tensor, on tiny Llamas.

First every method with every parameter, function against `run_merge`. Then whole configs: one YAML
text goes to mergekit and, unchanged, into a build of ours.
"""

import hashlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from twinmerge.merging.shared import METHODS, dare, get, merge

pytest.importorskip("mergekit")

# libraries that mergekit imports still look into numpy.core
pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")

EXPERTS = ("cola", "sst2", "mnli")
OURS_ALONE = {"tsv_m", "iso_c", "iso_cts"}
"""What mergekit does not have."""

SETTINGS: list[tuple[str, dict[str, object]]] = [
    ("linear", {"weight": [0.2, 0.5, 0.9]}),
    ("linear", {"weight": [0.2, 0.5, 0.9], "normalize": False}),
    ("linear", {"weight": [1.0, -0.5, 2.0]}),
    ("task_arithmetic", {"weight": 0.3}),
    ("task_arithmetic", {"weight": [0.2, 0.5, 0.9], "normalize": True}),
    ("task_arithmetic", {"weight": [0.2, -0.5, 0.9], "lambda": 0.7, "int8_mask": True}),
    ("ties", {"weight": 1.0, "density": 1.0}),
    ("ties", {"weight": [0.2, 0.5, 0.9], "density": [0.1, 0.37, 0.8]}),
    ("ties", {"weight": [0.2, 0.5, 0.9], "density": 0.5, "normalize": False, "lambda": 0.7}),
    ("ties", {"weight": [0.7, 0.5, 0.9], "density": 0.3, "rescale": True, "int8_mask": True}),
    ("ties", {"weight": [0.7, -0.5, 0.9], "density": 0.3}),
    ("ties", {"weight": 0.4, "density": [0.0, 0.001, 1.0]}),
    ("dare_linear", {"weight": [0.2, 0.5, 0.9], "density": [0.2, 0.5, 0.8]}),
    ("dare_linear", {"weight": [0.2, 0.5, 0.9], "density": [0.2, 0.5, 0.8], "rescale": False}),
    ("dare_linear", {"weight": 0.4, "density": [0.3, 0.5, 1.0], "normalize": True, "lambda": 2.0}),
    ("dare_linear", {"weight": 0.4, "density": [0.3, 0.5, 1.0], "int8_mask": True}),
    ("dare_ties", {"weight": [0.2, 0.5, 0.9], "density": [0.2, 0.5, 0.8]}),
    ("dare_ties", {"weight": [0.2, 0.5, 0.9], "density": [0.2, 0.5, 0.8], "rescale": False}),
    ("dare_ties", {"weight": 0.6, "density": [0.3, 0.0, 1.0], "normalize": True, "lambda": 1.5}),
    ("dare_ties", {"weight": 0.6, "density": 0.3, "int8_mask": True}),
    ("breadcrumbs", {"weight": [0.2, 0.5, 0.9]}),
    ("breadcrumbs", {"weight": [0.2, 0.5, 0.9], "density": [0.9, 0.5, 0.3], "lambda": 0.7}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.7, "gamma": [0.0, 0.1, 0.4], "rescale": True}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.0, "gamma": 0.1, "normalize": True}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.29, "normalize": True, "int8_mask": True}),
    ("breadcrumbs_ties", {"weight": [0.2, 0.5, 0.9]}),
    ("breadcrumbs_ties", {"weight": 0.3, "density": [0.9, 0.5, 0.3], "gamma": [0.2, 0.1, 0.0]}),
    ("breadcrumbs_ties", {"weight": [0.3, 0.5, -0.1], "density": 0.6, "rescale": True}),
    (
        "breadcrumbs_ties",
        {"weight": 0.3, "density": 0.6, "normalize": True, "lambda": 0.4, "int8_mask": True},
    ),
    ("della", {"weight": [0.2, 0.5, 0.9], "density": [0.3, 0.5, 0.8]}),
    ("della", {"weight": [0.2, 0.5, 0.9], "density": 0.5, "epsilon": [0.05, 0.2, 0.4]}),
    ("della", {"weight": 0.6, "density": [0.3, 0.0, 1.0], "normalize": False, "rescale": False}),
    ("della", {"weight": 0.6, "density": 0.7, "epsilon": 0.1, "lambda": 0.3, "int8_mask": True}),
    ("della_linear", {"weight": [0.2, 0.5, 0.9], "density": [0.3, 0.5, 0.8]}),
    ("della_linear", {"weight": 0.4, "density": 0.5, "epsilon": [0.05, 0.2, 0.4], "lambda": 2.0}),
    ("della_linear", {"weight": 0.4, "density": 0.3, "rescale": False, "normalize": True}),
    ("della_linear", {"weight": 0.4, "density": [1.0, 0.0, 0.6], "int8_mask": True}),
    ("slerp", {"t": 0.3}),
    ("slerp", {"t": 1.0}),
    ("slerp", {"t": 0.0}),
    ("slerp", {"t": -0.4}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("sce", {}),
    ("sce", {"select_topk": 0.3}),
    ("sce", {"select_topk": 0.85, "int8_mask": True}),
    ("sce", {"select_topk": 0.0}),
]
NOTHING_CHANGES = [("slerp", {"t": 0.0}), ("sce", {"select_topk": 0.0})]
NOTHING_CHANGES += [
    ("breadcrumbs", {"weight": 0.5, "density": 0.0, "gamma": 0.1, "normalize": True})
]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> SimpleNamespace:
    """A base and three experts on disk, and their tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llamas")
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config)
    tensors = {}
    for name in ("base", *EXPERTS):
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise if name == "base" else parameter + 0.1 * noise)
        model.save_pretrained(folder / name)
        tensors[name] = load_file(folder / name / "model.safetensors")
    return SimpleNamespace(folder=folder, tensors=tensors)


def mergekit_config(method: str, settings: dict[str, object], folder: Path) -> dict[str, object]:
    """The same request in mergekit's words."""
    own = {key: value for key, value in settings.items() if isinstance(value, list)}
    models = [
        {"model": str(folder / name), "parameters": {key: own[key][i] for key in own}}
        for i, name in enumerate(experts_of(method))
    ]
    config = {
        "models": models,
        "merge_method": method,
        "parameters": {key: settings[key] for key in settings if key not in own},
        "dtype": "float32",
    }
    # With a base_model, mergekit's linear averages the base in as one more model.
    return config if method == "linear" else {**config, "base_model": str(folder / "base")}


def experts_of(method: str) -> tuple[str, ...]:
    """mergekit's slerp takes the base and one more."""
    return EXPERTS[:1] if method == "slerp" else EXPERTS


def stand_in_uniform(count: int) -> Tensor:
    """What both sides draw in these tests: random, but decided by the number of entries alone, so
    that neither side's order of tensors or experts counts."""
    digest = hashlib.sha256(str(count).encode()).digest()
    return torch.rand(count, generator=torch.Generator().manual_seed(digest[0] << 8 | digest[1]))


@pytest.fixture
def draws(monkeypatch) -> Counter:
    """Makes both sides draw the same, and counts who did."""
    asked: Counter = Counter()

    def mergekits(probability: Tensor) -> Tensor:
        asked["mergekit"] += 1
        drawn = stand_in_uniform(probability.numel()).view(probability.shape)
        return (drawn < probability).to(probability.dtype)

    def ours(count: int, generator: torch.Generator) -> Tensor:
        asked["ours"] += 1
        return stand_in_uniform(count)

    monkeypatch.setattr(torch, "bernoulli", mergekits)
    monkeypatch.setattr(dare, "uniform", ours)
    return asked


def run_mergekit(config: dict[str, object], out: Path) -> dict[str, Tensor]:
    """mergekit's merge of this config, in its own dtype."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    tensors: dict[str, Tensor] = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_our_shared_expert_is_mergekits(method, settings, llamas, draws, tmp_path):
    theirs = run_mergekit(mergekit_config(method, settings, llamas.folder), tmp_path)
    base = llamas.tensors["base"]
    assert theirs.keys() == base.keys()
    experts = experts_of(method)
    generators = [torch.Generator() for _ in experts] if get(method).random else None
    for name in base:
        stacked = torch.stack([llamas.tensors[expert][name] for expert in experts])
        ours = merge(method, base[name], stacked, settings, generators)
        torch.testing.assert_close(ours, theirs[name], rtol=1e-6, atol=1e-6, msg=name)
        assert torch.equal(ours, base[name]) == ((method, settings) in NOTHING_CHANGES)
    # the stand-in was really asked, on both sides
    assert bool(draws["ours"]) == bool(draws["mergekit"]) == get(method).random


def test_every_method_and_every_parameter_is_compared():
    assert {method for method, _ in SETTINGS} == set(METHODS) - OURS_ALONE
    for name in set(METHODS) - OURS_ALONE:
        given = {key for method, settings in SETTINGS if method == name for key in settings}
        assert given == set(get(name).options), name


@pytest.mark.parametrize("name", sorted(set(METHODS) - OURS_ALONE))
def test_parameters_and_defaults_are_mergekits(name):
    from mergekit.merge_methods.registry import get as mergekits

    theirs = {p.name: p for p in mergekits(name).spec.parameters}
    for option in get(name).options.values():
        if theirs[option.name].required:  # the defaults of our own
            assert option.default == {"weight": 1.0, "t": 0.5}[option.name]
        else:
            assert option.default == theirs[option.name].default
        assert option.kind is theirs[option.name].value_type
        assert option.per_expert == (theirs[option.name].scope.value != "shared")
    # what mergekit accepts here and ignores
    ignored = {"density", "rescale"} if name == "task_arithmetic" else set()
    assert theirs.keys() - get(name).options.keys() == ignored


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_number_of_experts_is_mergekits(name):
    from mergekit.merge_methods.registry import registered_methods

    specs = {method.spec.name: method.spec for method in registered_methods()}
    assert (name in OURS_ALONE) == (name not in specs)
    if name in specs:
        contract, (least, most) = specs[name].contract, get(name).experts
        base = int(contract.base.value == "required")
        assert least == max(1, contract.min_inputs - base)
        if name == "slerp":  # ours also goes from one expert to another, with the base left out
            assert contract.max_inputs == 2 and most == 2
        else:
            assert contract.max_inputs is most is None


# ------------------------------------------------------------------- whole configs, end to end

CONFIGS = {
    "weights of models": """
models:
  - {{model: {folder}/cola, parameters: {{weight: 0.7}}}}
  - {{model: {folder}/sst2, parameters: {{weight: 0.2}}}}
  - {{model: {folder}/mnli, parameters: {{weight: 0.4}}}}
merge_method: task_arithmetic
base_model: {folder}/base
parameters: {{normalize: true, lambda: 0.8}}
dtype: float32
""",
    "the base among the models": """
models:
  - model: {folder}/base
  - {{model: {folder}/cola, parameters: {{weight: 0.7, density: 0.3}}}}
  - {{model: {folder}/mnli, parameters: {{weight: 0.4, density: 0.6}}}}
merge_method: ties
base_model: {folder}/base
parameters: {{normalize: true, int8_mask: true}}
dtype: float32
""",
    "gradient of a weight": """
models:
  - {{model: {folder}/cola, parameters: {{weight: [0.1, 0.9, 0.4]}}}}
  - {{model: {folder}/sst2, parameters: {{weight: [0, 1]}}}}
  - {{model: {folder}/mnli, parameters: {{weight: 0.5}}}}
merge_method: task_arithmetic
base_model: {folder}/base
dtype: float32
""",
    "gradient of a density": """
models:
  - {{model: {folder}/cola, parameters: {{weight: 0.6, density: [1, 0.7, 0.1]}}}}
  - {{model: {folder}/sst2, parameters: {{weight: 0.3}}}}
merge_method: ties
base_model: {folder}/base
parameters: {{density: [0.2, 0.8], lambda: [1, 0.5]}}
dtype: float32
""",
    "filters": """
models:
  - model: {folder}/cola
    parameters:
      weight:
        - {{filter: self_attn, value: 0.8}}
        - {{filter: mlp, value: 0.3}}
        - value: 0.5
  - model: {folder}/sst2
    parameters:
      weight:
        - {{filter: layers.1., value: 0.1}}
        - {{filter: "*", value: 0.6}}
merge_method: breadcrumbs
base_model: {folder}/base
parameters:
  density: 0.6
  gamma:
    - {{filter: mlp.down_proj, value: 0.2}}
    - {{value: 0.05}}
dtype: float32
""",
    "filters with gradients": """
models:
  - model: {folder}/cola
    parameters:
      density:
        - {{filter: mlp, value: [0.3, 0.5, 0.9]}}
        - {{value: [0.9, 0.4]}}
      weight: 0.7
  - model: {folder}/mnli
    parameters:
      weight: {{filter: self_attn, value: [0.2, 0.9]}}
merge_method: ties
base_model: {folder}/base
parameters:
  weight: 0.25
  density: {{value: 0.5}}
dtype: float32
""",
    "slerp": """
models:
  - model: {folder}/base
  - model: {folder}/cola
merge_method: slerp
base_model: {folder}/base
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
    - {{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}}
    - value: 0.5
dtype: float32
""",
    "della": """
models:
  - {{model: {folder}/cola, parameters: {{weight: 0.7, density: 0.4, epsilon: 0.1}}}}
  - {{model: {folder}/sst2, parameters: {{weight: [0.3, 0.6], density: [0.3, 0.7]}}}}
merge_method: della
base_model: {folder}/base
parameters: {{lambda: 1.1, int8_mask: true}}
dtype: float32
""",
    "dare": """
models:
  - {{model: {folder}/cola, parameters: {{weight: 0.7, density: 0.4}}}}
  - {{model: {folder}/sst2, parameters: {{weight: 0.4, density: 0.8}}}}
merge_method: dare_linear
base_model: {folder}/base
parameters:
  rescale: {{filter: mlp, value: false}}
  normalize: [true, false]
dtype: float32
""",
    "model stock": """
models:
  - model: {folder}/cola
  - model: {folder}/sst2
  - model: {folder}/mnli
merge_method: model_stock
base_model: {folder}/base
parameters: {{filter_wise: [{{filter: mlp, value: true}}]}}
dtype: float32
""",
    "sce, stored in 16 bits": """
models:
  - model: {folder}/cola
  - model: {folder}/sst2
  - model: {folder}/mnli
merge_method: sce
base_model: {folder}/base
parameters: {{select_topk: [0.9, 0.2]}}
dtype: float32
out_dtype: bfloat16
""",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unchanged_mergekit_yaml_gives_mergekits_model(name, llamas, draws, tmp_path):
    from tiny import shared_tensors

    from twinmerge.merging.build import build
    from twinmerge.recipe import Recipe

    text = CONFIGS[name].format(folder=llamas.folder)
    theirs = run_mergekit(yaml.safe_load(text), tmp_path / "theirs")
    recipe = Recipe.from_yaml(text + "exclusive: {rank: none}\n")
    build(recipe, tmp_path / "ours")
    ours = shared_tensors(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    changed = 0
    for tensor, merged in ours.items():
        near = 1e-6 if merged.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(merged, theirs[tensor], rtol=near, atol=near, msg=tensor)
        changed += not torch.equal(merged, llamas.tensors["base"][tensor].to(merged))
    assert changed > len(ours) / 2
    assert bool(draws["ours"]) == bool(draws["mergekit"]) == get(recipe.merge_method).random
