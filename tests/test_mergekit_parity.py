"""Our shared experts against mergekit's own, tensor by tensor, on tiny Llamas."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from twinmerge.merging.shared import METHODS, dare, get, merge

pytest.importorskip("mergekit")

# libraries that mergekit imports still look into numpy.core
pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")

EXPERTS = ("cola", "sst2", "mnli")

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
    ("ties", {"weight": 0.4, "density": [0.0, 0.001, 1.0]}),
    ("dare_linear", {"weight": [0.2, 0.5, 0.9], "density": [0.2, 0.5, 0.8]}),
    ("dare_linear", {"weight": [0.2, 0.5, 0.9], "density": [0.2, 0.5, 0.8], "rescale": False}),
    ("dare_linear", {"weight": 0.4, "density": [0.3, 0.5, 1.0], "normalize": True, "lambda": 2.0}),
    ("dare_ties", {"weight": [0.2, 0.5, 0.9], "density": [0.2, 0.5, 0.8]}),
    ("dare_ties", {"weight": [0.2, 0.5, 0.9], "density": [0.2, 0.5, 0.8], "rescale": False}),
    (
        "dare_ties",
        {"weight": 0.6, "density": [0.3, 0.0, 1.0], "normalize": True, "int8_mask": True},
    ),
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> SimpleNamespace:
    """A base and three experts on disk, and their tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("zoo")
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
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
        for i, name in enumerate(EXPERTS)
    ]
    config = {
        "models": models,
        "merge_method": method,
        "parameters": {key: settings[key] for key in settings if key not in own},
        "dtype": "float32",
    }
    # With a base_model, mergekit's linear averages the base in as one more model.
    return config if method == "linear" else {**config, "base_model": str(folder / "base")}


def stand_in_draw(shape: torch.Size, density: float) -> Tensor:
    """What both sides keep in these tests: random, but decided by shape and density alone.

    So neither side's order of tensors or experts counts. Experts of different density get
    masks of their own, which is why no setting above gives two experts the same one below 1.
    """
    digest = hashlib.sha256(f"{tuple(shape)} {density:.6f}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.rand(shape, generator=generator) < density


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_our_shared_expert_is_mergekits(method, settings, zoo, tmp_path, monkeypatch):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    draws = {"mergekit": 0, "ours": 0}

    def mergekits_draw(probability: Tensor) -> Tensor:
        draws["mergekit"] += 1
        density = probability.flatten()[0].item()
        return stand_in_draw(probability.shape, density).to(probability.dtype)

    def our_draw(shape: torch.Size, density: float, generator: torch.Generator) -> Tensor:
        draws["ours"] += 1
        return stand_in_draw(shape, density)

    monkeypatch.setattr(torch, "bernoulli", mergekits_draw)
    monkeypatch.setattr(dare, "keep_mask", our_draw)

    config = MergeConfiguration.model_validate(mergekit_config(method, settings, zoo.folder))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(config, str(tmp_path), options)
    theirs = {}
    for file in tmp_path.glob("*.safetensors"):
        theirs |= load_file(file)

    base = zoo.tensors["base"]
    assert theirs.keys() == base.keys()
    generators = [torch.Generator() for _ in EXPERTS] if get(method).random else None
    for name in base:
        experts = torch.stack([zoo.tensors[expert][name] for expert in EXPERTS])
        ours = merge(method, base[name], experts, settings, generators)
        torch.testing.assert_close(ours, theirs[name], rtol=1e-6, atol=1e-6, msg=name)
        assert not torch.equal(ours, base[name])
    # the stand-in was really asked, on both sides, as often
    assert draws["ours"] == draws["mergekit"] and bool(draws["ours"]) == get(method).random


def test_every_method_is_compared():
    assert {method for method, _ in SETTINGS} == set(METHODS)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_parameters_and_defaults_are_mergekits(name):
    from mergekit.merge_methods.registry import get as mergekits

    theirs = {p.name: p for p in mergekits(name).spec.parameters}
    for option in get(name).options.values():
        if option.name == "weight":  # the one default of our own: mergekit requires a weight
            assert theirs["weight"].required and option.default == 1.0
        else:
            assert option.default == theirs[option.name].default
        assert option.kind is theirs[option.name].value_type
        assert option.per_expert == (theirs[option.name].scope != "shared")
    # what mergekit accepts here and ignores
    ignored = {"density", "rescale"} if name == "task_arithmetic" else set()
    assert theirs.keys() - get(name).options.keys() == ignored
