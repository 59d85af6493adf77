"""The public surface: small, lazy, and the two halves meet in the artifact alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import twinmerge

ROOT = Path(__file__).parents[1]
PACKAGE = Path(twinmerge.__file__).parent
MODULES = {
    ".".join(("twinmerge", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
EXTRAS = ("peft", "matplotlib", "mergekit", "accelerate")
BLOCK = f"""
import importlib.util, sys

BLOCKED = {EXTRAS!r}
find_spec = importlib.util.find_spec

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

# transformers asks here whether a package is there, before it imports it
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in BLOCKED else find_spec(name, package)
)
sys.meta_path.insert(0, Blocker())
"""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------ importing


@pytest.mark.parametrize("module", ["twinmerge", "twinmerge.cli", "twinmerge.errors"])
def test_importing_does_nothing_and_loads_no_heavy_library(module):
    loaded = python(
        f"import os, sys; before = dict(os.environ); import {module}; "
        "assert dict(os.environ) == before; print(*sys.modules)"
    ).split()
    assert module in loaded
    assert not {"torch", "transformers", "numpy", "safetensors"} & set(loaded)


def test_every_public_name_resolves_and_is_listed():
    assert len(set(twinmerge.__all__)) == len(twinmerge.__all__) <= 15
    for name in twinmerge.__all__:
        assert getattr(twinmerge, name) is not None
    assert dir(twinmerge) == sorted(twinmerge.__all__)
    namespace: dict = {}
    exec("from twinmerge import *", namespace)
    assert set(twinmerge.__all__) <= set(namespace)


def test_every_public_name_is_documented():
    for name in set(twinmerge.__all__) - {"__version__"}:
        assert (getattr(twinmerge, name).__doc__ or "").strip(), name


def test_names_for_type_checkers_are_the_names_that_resolve():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == twinmerge._HOME


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'twinmerge' has no attribute 'biuld'"):
        _ = twinmerge.biuld


def test_the_version_is_that_of_the_project():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    assert f'version = "{twinmerge.__version__}"' in lines


# ------------------------------------------------------------------------------- the two halves


def imports_of(module: str) -> set[str]:
    """Absolute names of all modules that a module's code names in imports, lazy ones too."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*up, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def test_relative_imports_are_read_as_what_they_name():
    assert "twinmerge.artifact.format" in imports_of("twinmerge.runtime.router.fit")
    assert "twinmerge.errors.InputError" in imports_of("twinmerge.runtime.router.fit")
    assert "twinmerge.merging.build" in imports_of("twinmerge")


@pytest.mark.parametrize(
    ("half", "others"),
    [
        ("merging", ["runtime", "evaluation", "cli"]),
        ("runtime", ["merging", "evaluation", "cli", "checkpoint", "adapter"]),
        ("artifact", ["merging", "runtime", "evaluation", "cli", "checkpoint", "adapter"]),
    ],
)
def test_the_halves_never_import_each_other_and_the_seam_neither(half, others):
    files = [module for module in MODULES if within(module, f"twinmerge.{half}")]
    assert len(files) > 3
    for module in files:
        for name in imports_of(module):
            assert not any(within(name, f"twinmerge.{other}") for other in others), (module, name)


def test_the_offline_half_has_no_model_classes():
    for module in MODULES:
        if within(module, "twinmerge.merging"):
            assert not any(within(name, "transformers") for name in imports_of(module)), module


@pytest.mark.slow
def test_loading_the_online_half_leaves_the_building_of_artifacts_out():
    loaded = python("import twinmerge; twinmerge.load; import sys; print(*sys.modules)").split()
    assert "twinmerge.runtime.load" in loaded
    assert "twinmerge.merging.build" not in loaded and "twinmerge.checkpoint" not in loaded


# ------------------------------------------------------------------------------------- extras


def test_every_module_imports_without_the_extras():
    names = ", ".join(MODULES)
    out = python(
        f"{BLOCK}\nimport {names}\n"
        "import twinmerge; [getattr(twinmerge, name) for name in twinmerge.__all__]\n"
        "print(*[name for name in sys.modules if name.split('.')[0] in BLOCKED])"
    )
    assert out.strip() == ""
