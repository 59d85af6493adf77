"""Task heads that differ between experts: each row goes through the head that was chosen for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError, UnsupportedModel
from .routing import current


class HeadSwitch(nn.Module):
    """Stands where the experts' head modules stand: one copy each, every row through its own.

    Heads may differ in their number of outputs. The result is as wide as the widest; outputs that a
    row's head does not have are -inf, so that argmax and softmax never choose them.
    """

    def __init__(self, heads: dict[str, nn.Module], where: str) -> None:
        super().__init__()
        self.names = list(heads)
        self.heads = nn.ModuleList(heads.values())
        self.where = where

    def forward(self, *args, **kwargs) -> Tensor:
        routing = current()
        if routing is None or routing.head is None:
            raise InputError(
                f"{self.where}: no head was chosen. Call the TwinModel, not the model inside it, "
                "or say which expert's head to use (head= or task=)."
            )
        head = routing.head
        if torch.compiler.is_compiling():
            return self._all(head, args, kwargs)
        chosen = head.unique().tolist()
        if len(chosen) == 1:
            return self._one(chosen[0], args, kwargs)
        parts = {}
        for index in chosen:
            rows = (head == index).nonzero()[:, 0]
            pick = _Rows(rows, len(head), self.where)
            picked = {key: pick(value) for key, value in kwargs.items()}
            parts[index] = rows, self._one(index, [pick(value) for value in args], picked)
        width = max(part.shape[-1] for _, part in parts.values())
        first = next(iter(parts.values()))[1]
        out = first.new_full((len(head), *first.shape[1:-1], width), float("-inf"))
        for rows, part in parts.values():
            rows = rows.to(out.device)
            out[rows, ..., : part.shape[-1]] = part
        return out

    def _all(self, head: Tensor, args, kwargs) -> Tensor:
        """Every head on all rows, then each row's own: which are few is not known to a compiler."""
        parts = [self._one(index, args, kwargs) for index in range(len(self.heads))]
        width = max(part.shape[-1] for part in parts)
        padded = [F.pad(p, (0, width - p.shape[-1]), value=float("-inf")) for p in parts]
        all_heads = torch.stack(padded)
        head = head.to(all_heads.device)
        return all_heads[head, torch.arange(len(head), device=head.device)]

    def _one(self, index: int, args, kwargs) -> Tensor:
        out = self.heads[index](*args, **kwargs)
        if not isinstance(out, Tensor):
            raise UnsupportedModel(
                f"{self.where}: a head must return one tensor, {type(self.heads[index]).__name__} "
                f"returned {type(out).__name__}. Route batches of one task at a time (task=)."
            )
        return out


class _Rows:
    """Picks the rows of one expert from every tensor whose first axis is the batch."""

    def __init__(self, rows: Tensor, batch: int, where: str) -> None:
        self.rows, self.batch, self.where = rows, batch, where

    def __call__(self, value):
        if not isinstance(value, Tensor):
            return value
        if value.shape[:1] != (self.batch,):
            raise UnsupportedModel(
                f"{self.where}: the head was given {tuple(value.shape)}; its first axis is not the "
                f"batch of {self.batch}. Route batches of one task at a time (task=)."
            )
        return value.index_select(0, self.rows.to(value.device))


def head_roots(heads: list[str], body: set[str]) -> dict[str, list[str]]:
    """The modules that hold only head tensors: path of the topmost one -> its tensors.

    `heads` and `body` are parameter names in the task model. `classifier.dense.weight` belongs to
    `classifier` if no body tensor stands below `classifier.`.
    """
    inside = {
        ".".join(parts[:end])
        for parts in (name.split(".") for name in body)
        for end in range(1, len(parts))
    }
    roots: dict[str, list[str]] = {}
    for name in heads:
        parts = name.split(".")
        depth = next(
            (end for end in range(1, len(parts)) if ".".join(parts[:end]) not in inside), None
        )
        if depth is None:
            raise UnsupportedModel(
                f"{name}: a head tensor that stands in a module of the shared body, so rows cannot "
                "choose between experts. Only whole modules can be heads."
            )
        roots.setdefault(".".join(parts[:depth]), []).append(name)
    return roots
