"""Shared by every test: no network, and a seeded tensor maker."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

# The same examples in every run: what fails here fails for whoever looks.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")
# Models here are tiny: threads inside an operation only wait for each other.
torch.set_num_threads(1)


SLOW = {
    "test_artifact.py",
    "test_bad_input.py",
    "test_batch_norm.py",
    "test_big_sources.py",
    "test_budget.py",
    "test_build.py",
    "test_compile.py",
    "test_conformance_plans.py",
    "test_devices.py",
    "test_divide.py",
    "test_doctor.py",
    "test_evaluation.py",
    "test_explain.py",
    "test_exclusive_forms.py",
    "test_generation.py",
    "test_grouped.py",
    "test_grow.py",
    "test_half_precision.py",
    "test_mergekit_parity.py",
    "test_method_docs.py",
    "test_pipelines.py",
    "test_resume.py",
    "test_router_bad_input.py",
    "test_saving.py",
    "test_settings.py",
    "test_shared.py",
    "test_storage_conformance.py",
}
"""Files of builds or models by the dozen, or of hundreds of cases: minutes together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)
        # One worker makes the models of a family, and has all that asks for them.
        family = getattr(getattr(item, "callspec", None), "params", {}).get("name")
        if isinstance(family, str) and "zoo" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(family))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def router_by_hand(layer: int, width: int = 16, experts: int = 3):
    """A small random router that tells rows apart. No data is needed to test what routing does."""
    # Not at the top: this file is read before the hook that checks shapes is there.
    from twinmerge.runtime.router.mlp import RouterMLP
    from twinmerge.runtime.router.router import Router

    torch.manual_seed(0)
    mlp = RouterMLP(width, 8, experts)
    with torch.no_grad():
        mlp.layers[-1].weight.mul_(20)
    return Router(mlp, (layer,)).eval()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory):
    """Tiny models of every family we test, see `tiny.Zoo`."""
    from tiny import Zoo

    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory):
    """A tiny text classifier with tokenizer, data and router, see `texts.TextBench`."""
    from texts import BERT_TEXT, TextBench

    return TextBench(tmp_path_factory.mktemp("bench"), BERT_TEXT)


@pytest.fixture(scope="session")
def causal_bench(tmp_path_factory: pytest.TempPathFactory):
    """A tiny language model with tokenizer and router, see `texts.TextBench`."""
    from texts import LLAMA_TEXT, TextBench

    return TextBench(tmp_path_factory.mktemp("causal"), LLAMA_TEXT)
