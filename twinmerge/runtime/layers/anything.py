"""Layers of every other kind: one weighting at a time."""

from __future__ import annotations

from torch import nn

from ..per_row import NotRowWise
from ..routing import asked
from .mixing import (
    Patch,
    Wrapping,
)


class TwinAny(Wrapping):
    """Any module at all: exact for one weighting, by mixing its tensors densely."""

    def __init__(self, inner: nn.Module, patches: dict[str, Patch], where: str):
        super().__init__()
        self.inner, self.where = inner, where
        self._put_mixers(patches)

    def forward(self, *args, **kwargs):
        routing = asked()
        if routing is None or routing.mix is None:
            return self.inner(*args, **kwargs)
        if not routing.mix.one:
            raise NotRowWise(f"{self.where}: a {type(self.inner).__name__} has no row-wise form")
        return self._merged(routing.mix, args, kwargs)
