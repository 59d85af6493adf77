"""Modules that read parameters of their own, without calling a layer: class tokens, scales.

Such an attribute gets a property that mixes it under a routing (`layers.Reads`). The module keeps
its parameters, children and code; its class becomes a subclass made for it, which pickles as the
original class and the names of the attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from .layers import Patch, Reads, mixer


def read_mixed(module: nn.Module, patches: Mapping[str, Patch | nn.Module], where: str) -> None:
    """From now on these attributes of `module` are read mixed, by patches or their own mixers."""
    module.twin_mixers = nn.ModuleDict({name: mixer(patch) for name, patch in patches.items()})
    module.where = where  # type: ignore[assignment]
    module.__class__ = reading_class(type(module), tuple(sorted(patches)))


@cache
def reading_class(cls: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `cls` in which these attributes are `Reads`."""

    def reduce(self: nn.Module, protocol: Any) -> tuple:
        return _again, (cls, attributes), self.__dict__

    members: dict[str, Any] = {name: Reads(name) for name in attributes}
    members |= {"__module__": cls.__module__, "__reduce_ex__": reduce}
    # What it reads is no plain tensor, so torch.compile leaves it, and what it calls, as they are.
    members["forward"] = torch.compiler.disable(cls.forward)
    return type(cls.__name__, (cls,), members)


def _again(cls: type[nn.Module], attributes: Iterable[str]) -> nn.Module:
    made = reading_class(cls, tuple(attributes))
    return made.__new__(made)
