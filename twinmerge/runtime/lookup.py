"""Embedding tables whose rows differ between experts: rows of B_t, scaled, then A_t."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .layers import Mixing, Parts, Reads, Wrapping, stored
from .parts import Factors, Part, PartList, TableFactors
from .per_row import NotRowWise, PerRow, per_row
from .routing import Mix, asked


class TwinEmbedding(Mixing, nn.Embedding):
    """`nn.Embedding`: rows of the stacked B, scaled, then A. ids: (batch, ...) or (1, ...).

    Ids without the batch as their first axis (a table of relative positions, read once for all
    rows) give a value per row, see `per_row`.
    """

    shared_ids = False
    """Whether such ids were seen, at the latest in the dry run. From then on no first axis is taken
    for the batch because it happens to be as long."""

    weight: Any = Reads("weight")

    def __init__(self, inner: nn.Embedding, weight: Parts, where: str):
        nn.Module.__init__(self)
        for name in (
            "num_embeddings",
            "embedding_dim",
            "padding_idx",
            "max_norm",
            "norm_type",
            "scale_grad_by_freq",
            "sparse",
        ):
            setattr(self, name, getattr(inner, name))
        self.where = where
        self.register_parameter("weight", inner._parameters["weight"])
        table = (TableFactors(p) if isinstance(p, Factors) else p for p in weight)
        self._put_mixers({"weight": tuple(table)})

    def forward(self, input: Tensor) -> Tensor:
        routing, table = asked(), self._parameters["weight"]
        assert table is not None
        y = F.embedding(input, table, self.padding_idx)
        if routing is None:
            return y
        mix = routing.sized(len(input)) if input.ndim >= 2 else None
        if mix is None and input.ndim >= 2 and len(input) != 1:
            self.shared_ids = True
        if mix is not None and not mix.one and self.shared_ids:
            mix = None
        if mix is None or (mix.one and mix.store is not None):
            assert routing.mix is not None
            return self._unbatched(input, y, routing.mix, table)
        for part in self._parts().wanted(mix):
            y = part.lookup(y, input, mix)
        return y

    def _unbatched(self, ids: Tensor, y: Tensor, mix: Mix, table: Tensor) -> Tensor:
        """Where the first axis of `ids` is not the batch."""
        if mix.one and mix.store is not None:
            merged = stored(table, self.twin_mixers["weight"], mix, self, "weight")
            return F.embedding(ids, merged, None if mix.weights.requires_grad else self.padding_idx)
        rows = y.expand(mix.rows, *y.shape)
        every = ids.expand(mix.rows, *ids.shape)
        for part in self._parts().wanted(mix):
            rows = part.lookup(rows, every, mix)
        if ids.ndim >= 2 and len(ids) == 1 and not self.shared_ids:
            return rows.squeeze(1)  # (batch, ...): what a row of ids for all is expanded to
        return per_row(rows, self.where)

    def _parts(self) -> PartList:
        parts = self.twin_mixers["weight"]
        assert isinstance(parts, PartList)
        return parts


class TwinLookup(Wrapping):
    """An `nn.Embedding` of another class, such as Gemma's, which scales what it looks up.

    The same lookup is done in the stacked B by a copy of the module, with whatever else it is
    called with (BART's position tables take offsets). Quantised and sparse parts have no such
    table: there the module itself runs, and the rows that it asks its table for come from the
    part. `__init__` checks that it is called with one tensor, and on random tables that it is
    linear in its table; else it raises `NotRowWise`.
    """

    def __init__(self, inner: nn.Embedding, weight: Parts, where: str):
        super().__init__()
        self.inner, self.where = inner, where
        self.takes = self._first(inner)
        first, *rest = weight
        self.lookup = None
        if isinstance(first, Factors):
            first = TableFactors(first)
            self.lookup = _looking_up(inner, first.b)
            first.b = self.lookup.weight.data  # the table is not held twice
        self._put_mixers({"weight": (first, *rest)})
        self._probe(inner, answered=self.lookup is None or bool(rest))

    def forward(self, *args, **kwargs) -> Tensor:
        ids = args[0] if args else kwargs[self.takes]
        mix = self._mix(ids)
        if mix is None:
            return self.inner(*args, **kwargs)
        if mix.one and mix.store is not None:
            return self._merged(mix, args, kwargs)
        if isinstance(ids, PerRow) or ids.ndim < 2:
            raise NotRowWise(f"{self.where}: whose rows ids {tuple(ids.shape)} are cannot be told")
        y = self.inner(*args, **kwargs)
        parts = self.twin_mixers["weight"]
        assert isinstance(parts, PartList)
        for part in parts.wanted(mix):
            z = self._look(part, y.dtype, args, kwargs)
            if z.ndim != ids.ndim + 1 or z.shape[0] not in (1, mix.rows, len(ids)):
                raise NotRowWise(
                    f"{self.where}: {type(self.inner).__name__} gives {tuple(y.shape)} for ids "
                    f"{tuple(ids.shape)}"
                )
            y = part.back(y, z, mix)
        return y

    def _first(self, inner: nn.Embedding) -> str:
        """The name of the one argument that `inner` needs."""
        parameters = inspect.signature(inner.forward).parameters.values()
        rest = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        needed = [p for p in parameters if p.default is Parameter.empty and p.kind not in rest]
        if len(needed) != 1 or needed[0].kind is Parameter.KEYWORD_ONLY:
            raise NotRowWise(
                f"{self.where}: {type(inner).__name__}.forward takes "
                f"({', '.join(map(str, parameters))}), not one tensor"
            )
        return needed[0].name

    def _look(self, part: Part, dtype: torch.dtype, args: tuple, kwargs: dict) -> Tensor:
        if isinstance(part, Factors):
            assert self.lookup is not None
            return self.lookup(*args, **kwargs)
        with _Answering(self._own("weight"), lambda ids: part.look(ids, dtype)):
            return self.inner(*args, **kwargs)

    @torch.no_grad()
    def _probe(self, inner: nn.Embedding, answered: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        rows, width = inner.weight.shape
        b, a = torch.randn(rows, 3, generator=draw), torch.randn(3, width, generator=draw)
        ids = torch.arange(min(rows, 8)).expand(2, -1)
        try:
            whole = _looking_up(inner, b @ a)
            want, ways = whole(ids), [_looking_up(inner, b)(ids)]
            if answered:
                with _Answering(whole.weight, lambda ids: F.embedding(ids, b)):
                    ways.append(whole(ids))
            exact = all(torch.allclose(z @ a, want, atol=1e-4, rtol=1e-4) for z in ways)
        except Exception:  # any module at all may stand here, so any error at all may come
            exact = False
        if not exact:
            raise NotRowWise(f"{self.where}: {type(inner).__name__} is not linear in its table")


class _Answering(TorchFunctionMode):
    """Within it, a lookup in `table` finds what `rows` gives for the ids."""

    def __init__(self, table: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.rows = table, rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.embedding and args[1] is self.table:
            return self.rows(args[0])
        return func(*args, **(kwargs or {}))


def _looking_up(module: nn.Embedding, table: Tensor) -> nn.Embedding:
    """A copy of `module` with another table."""
    # Shallow, so that the table that is replaced is not copied first.
    new = copy.copy(module)
    new._parameters = {"weight": nn.Parameter(table.contiguous(), requires_grad=False)}
    new._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    new.embedding_dim = table.shape[1]
    return new
