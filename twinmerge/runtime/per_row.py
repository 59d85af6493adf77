"""A value that differs from row to row of a batch and has no batch axis yet.

Models read bare parameters, tables of relative positions and now and then a layer's weight before
anything of the batch has touched them: a class token (1, 1, width) that is expanded over the batch,
a scale (channel,) that multiplies (batch, height, width, channel). Under a routing, these are
another tensor for every row. `PerRow` stands for all of them at once: it looks like the tensor of
one row, and what a model does to it is done to each row's (`torch.vmap`). Where it meets a tensor
that has the batch as its first axis, each row's meets its own row, and the result is an ordinary
tensor again:

    model's code                                  with values v_1 .. v_n
    token.expand(batch, -1, -1)                   row i is v_i
    scale * x            x: (batch, ..., channel) row i is v_i * x_i
    bias.permute(2, 0, 1).unsqueeze(0) + scores   row i is v_i.permute(2, 0, 1) + scores_i

That is the model's program for a batch of one, row by row, so it is exact. What cannot be told
apart (a matrix whose first axis is as long as the batch by chance) or cannot be done row by row
raises `NotRowWise`, and the batch is run one weighting at a time instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import UnsupportedModel


class NotRowWise(UnsupportedModel):
    """A step of a model cannot be done row by row: run the batch one weighting at a time."""


class Ambiguous(NotRowWise):
    """Which axis of a tensor is the batch cannot be told, maybe by a coincidence of its size.

    It says nothing of the next batch.
    """


LIMIT = 1 << 29
"""Most bytes of all rows' values of one tensor: half a gigabyte."""


class PerRow(Tensor):
    """Looks like the tensor of one row; made by `per_row`."""

    _like: Tensor
    _make: Callable[[], Tensor] | None
    _rows: Tensor | None
    _where: str
    _leads = False
    """Whether its first axis of 1 is known to stand for the batch, also before a matrix."""

    @staticmethod
    def __new__(cls, like: Tensor, make: Callable[[], Tensor], where: str) -> PerRow:
        self = torch.Tensor._make_subclass(cls, like.detach(), False)
        self._like, self._make, self._rows, self._where = like.detach(), make, None, where
        return self

    def __init__(self, like: Tensor, make: Callable[[], Tensor], where: str) -> None:
        pass

    @property
    def per_row(self) -> Tensor:
        """The values of all rows: (row, *shape). One row: the same for the whole batch."""
        if self._rows is None:
            assert self._make is not None
            self._rows = self._make()
            self._make = None
        return self._rows

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _ASKING:
            plain = tree_map(lambda v: v._like if isinstance(v, PerRow) else v, (args, kwargs))
            return func(*plain[0], **plain[1])
        try:
            return _run(func, args, kwargs)
        except NotRowWise:
            raise
        except Exception as problem:  # any function at all may be called
            where = next(v._where for v in tree_flatten((args, kwargs))[0] if isinstance(v, PerRow))
            raise NotRowWise(f"{where}: {_name(func)} cannot be done row by row: {problem}") from (
                problem
            )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # What never asked `__torch_function__`, as torch.tensor(), would take one row's for all.
        where = next(v._where for v in tree_flatten((args, kwargs))[0] if isinstance(v, PerRow))
        raise NotRowWise(f"{where}: {func} reads a value that every row has its own of")


def per_row(rows: Tensor, where: str, *, leads: bool = False) -> Tensor:
    """Values (row, *shape) as one tensor of `shape`. A single row is that very tensor.

    leads: the first axis of `shape` is 1 and stands for the batch, whatever it meets
    """
    if rows.shape[0] == 1:
        return rows[0]
    made = PerRow(rows[0], lambda: rows, where)
    made._leads = leads
    return made


_VALUES = {"T", "H", "mT", "mH", "real", "imag", "data"}
_ASKING = {
    *(
        descriptor.__get__
        for kind in Tensor.__mro__
        for name, descriptor in vars(kind).items()
        if inspect.isgetsetdescriptor(descriptor) and name not in _VALUES
    ),
    *(getattr(Tensor, n) for n in "size dim numel nelement element_size stride".split()),
    *(getattr(Tensor, n) for n in "is_floating_point is_complex is_contiguous __len__".split()),
    *(getattr(Tensor, n) for n in "storage_offset __repr__ get_device ndimension".split()),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
"""What only asks for what all rows have in common."""
_LIKE = {Tensor.to, Tensor.type_as}
"""What asks that only of its second tensor."""


def _name(func: Any) -> str:
    return getattr(func, "__name__", repr(func))


def _run(func, args, kwargs):
    flat, spec = tree_flatten((args, kwargs))
    mine = [value for value in flat if isinstance(value, PerRow)]
    rows = {value.per_row.shape[0] for value in mine}
    if rows == {1}:  # the same for all rows: an ordinary tensor
        plain = [v.per_row[0] if isinstance(v, PerRow) else v for v in flat]
        args, kwargs = tree_unflatten(plain, spec)
        return func(*args, **kwargs)
    rows.discard(1)
    if len(rows) != 1:
        raise NotRowWise(f"{mine[0]._where}: values of {sorted(rows)} rows meet")
    (batch,) = rows
    if sum(value.per_row.nbytes for value in mine) > LIMIT:
        raise NotRowWise(f"{mine[0]._where}: its values for {batch} rows take too much memory")
    name = _name(func)
    if name in ("expand", "repeat", "tile", "expand_as", "broadcast_to"):
        spread = _spread(name, flat, batch)
        if spread is not None:
            return spread
    others = [v for v in flat if isinstance(v, Tensor) and not isinstance(v, PerRow)]
    where = mine[0]._where
    if func in _LIKE and others:  # of one tensor, only dtype and device are asked
        return flat[0].to(flat[1].device, flat[1].dtype)
    if func is F.scaled_dot_product_attention:
        # Biases (1, head, query, key) for queries (batch, ...): a kernel of its own, not for vmap.
        if any(v.ndim != 4 for v in (*mine, *others)) or any(len(v) != 1 for v in mine):
            raise NotRowWise(f"{where}: attention other than of (1, head, query, key)")
        batched = [v for v in others if _has_batch(v, mine, batch)]
        plain = [v.per_row.squeeze(1) if isinstance(v, PerRow) else v for v in flat]
        args, kwargs = tree_unflatten(plain, spec)
        out = func(*args, **kwargs)
        return out if batched else per_row(out.unsqueeze(1), where)
    batched = {id(v) for v in others if _has_batch(v, mine, batch)}
    if name.endswith("_") and not name.endswith("__") and not isinstance(flat[0], PerRow):
        if id(flat[0]) not in batched:
            raise NotRowWise(f"{mine[0]._where}: {name} writes into what all rows share")
    dims = [
        (0 if v.per_row.shape[0] == batch else None)
        if isinstance(v, PerRow)
        else (0 if id(v) in batched else None)
        if isinstance(v, Tensor)
        else None
        for v in flat
    ]
    values = [
        (v.per_row if v.per_row.shape[0] == batch else v.per_row[0])
        if isinstance(v, PerRow)
        else v.unsqueeze(1)
        if id(v) in batched
        else v
        for v in flat
    ]

    tensors = [i for i, dim in enumerate(dims) if dim is not None]

    def one(*given):
        full = list(values)
        for i, value in zip(tensors, given, strict=True):
            full[i] = value
        own, named = tree_unflatten(full, spec)
        return func(*own, **named)

    with torch._C.DisableTorchFunctionSubclass():
        out = torch.vmap(one, randomness="different")(*[values[i] for i in tensors])
    if not batched:
        return tree_map(lambda v: per_row(v, where) if isinstance(v, Tensor) else v, out)

    def joined(value):
        if not isinstance(value, Tensor):
            return value
        if value.ndim < 2 or value.shape[1] != 1:
            raise NotRowWise(f"{where}: after {name} the rows have no axis of their own")
        return value.squeeze(1)

    return tree_map(joined, out)


def _has_batch(other: Tensor, mine: list[PerRow], batch: int) -> bool:
    """Whether the first axis of `other` is the batch.

    Told by the number of axes; lengths only confirm it. So a program that runs with one batch size
    never takes another axis for the batch because it happens to be as long in the next.
    """
    if other.ndim == 0 or other.shape[0] == 1 or isinstance(other, torch.nn.Parameter):
        return False
    known = other.ndim >= 3 or all(value._leads for value in mine)
    rows_first = known and all(
        value.ndim < other.ndim or (value.ndim == other.ndim and value.shape[0] == 1)
        for value in mine
    )
    if rows_first != (other.shape[0] == batch):
        raise Ambiguous(
            f"{mine[0]._where}: cannot tell whether {tuple(other.shape)} has the batch as its "
            "first axis"
        )
    return rows_first


def _spread(name: str, flat: list[Any], batch: int) -> Tensor | None:
    """Expanded over, or repeated along, a first axis that becomes the batch; None if it does not.

    A first axis of 1 is what a model expands over its batch. Repeating a first axis of other
    length as often as there are rows puts the rows one after the other.
    """
    value = flat[0]
    if not isinstance(value, PerRow):
        return None
    if name == "expand_as":
        sizes = list(flat[1].shape)
    else:
        sizes = [
            int(s)
            for each in flat[1:]
            for s in (each if isinstance(each, tuple | list) else [each])
        ]
    rows, shape = value.per_row, value.shape
    new = len(sizes) - len(shape)
    if new < 0 or not sizes or sizes[0] == 1:
        return None
    if name in ("repeat", "tile"):
        _check_spread(value, sizes, batch)
        if new:
            rows = rows.view(rows.shape[0], *[1] * (new - 1), *shape)
            return rows.repeat(1, *sizes[1:])
        return rows.repeat(1, 1, *sizes[1:]).flatten(0, 1)
    if new == 0 and (sizes[0] == -1 or shape[0] != 1):
        return None
    _check_spread(value, sizes, batch)
    rows = rows.view(rows.shape[0], *[1] * (new - 1), *shape) if new else rows.squeeze(1)
    return rows.expand(*sizes)


def _check_spread(value: PerRow, sizes: list[int], batch: int) -> None:
    if sizes[0] != batch:
        raise Ambiguous(
            f"{value._where}: cannot tell whether the first axis of {tuple(sizes)}, over which it "
            "is spread, is the batch"
        )
