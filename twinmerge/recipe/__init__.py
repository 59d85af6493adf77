"""The recipe: what to merge and how.

    model        the frozen model: Recipe
    sections     its parts: Expert, Exclusive, Router
    settings     mergekit's parameter settings: scalars, gradients over depth, filters by name
    depth        how deep in the model a tensor lies, which gradients run over
    sizes        budgets: "6%", "50MB"
    references   what a recipe calls a model: a folder, a hub id, base+adapter
    problems     every message about a recipe that is wrong
    words        values in YAML's words
    yamltext     YAML without its traps

A mergekit config of one of our methods is a recipe, as long as it names a `base_model`. Unknown
keys are errors, and `RecipeError` lists every problem at once, one line each with its path:

    2 problems in the recipe:
      merge_method: no method 'tise'. Did you mean 'ties'? Known: dare_linear, ...
      models[1].parameters.wieght: unknown key. Did you mean 'weight'? Known: density, weight.

Past this package nothing sees a config object: functions take plain typed arguments.
"""

from .depth import Depths
from .model import Recipe, load_recipe
from .problems import REFUSED
from .references import default_name
from .sections import Exclusive, Expert, Router

__all__ = [
    "REFUSED",
    "Depths",
    "Exclusive",
    "Expert",
    "Recipe",
    "Router",
    "default_name",
    "load_recipe",
]
