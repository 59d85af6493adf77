"""Many fine-tuned models of one base in one folder that picks, per input, what it needs.

    import twinmerge

    recipe = twinmerge.load_recipe("recipe.yaml")
    twinmerge.build(recipe, "my-merge")                     # offline: checkpoints in, a folder out
    twinmerge.fit_router("my-merge", {"cola": [...], ...})  # a few dozen texts per expert
    model = twinmerge.load("my-merge")                      # online: routes and answers

Method: Lu et al., Twin-Merging, arXiv:2406.15479. Names load what they need when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifact.format import Manifest as Manifest
    from .artifact.reader import Artifact as Artifact
    from .errors import TwinMergeError as TwinMergeError
    from .evaluation.score import evaluate as evaluate
    from .merging.build import build as build
    from .recipe import Recipe as Recipe
    from .recipe import load_recipe as load_recipe
    from .runtime.load import load as load
    from .runtime.model import TwinModel as TwinModel
    from .runtime.output import Answer as Answer
    from .runtime.output import TwinOutput as TwinOutput
    from .runtime.router.fit import fit_router as fit_router

__version__ = "0.1.0"

_HOME = {
    "Answer": "runtime.output",
    "Artifact": "artifact.reader",
    "Manifest": "artifact.format",
    "Recipe": "recipe",
    "TwinMergeError": "errors",
    "TwinModel": "runtime.model",
    "TwinOutput": "runtime.output",
    "build": "merging.build",
    "evaluate": "evaluation.score",
    "fit_router": "runtime.router.fit",
    "load": "runtime.load",
    "load_recipe": "recipe",
}

__all__ = [
    "Answer",
    "Artifact",
    "Manifest",
    "Recipe",
    "TwinMergeError",
    "TwinModel",
    "TwinOutput",
    "__version__",
    "build",
    "evaluate",
    "fit_router",
    "load",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'twinmerge' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
