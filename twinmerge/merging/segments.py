"""Who writes what: tensors to files of the shared expert, and files to the parts of a build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..artifact.tensorfile import Layout, layout
from .plan import Plan
from .planned import Planned


@dataclass(frozen=True)
class Segment:
    """Consecutive tensors of one file that one part of a build writes."""

    shard: str
    """The file's name in the artifact."""
    tensors: tuple[Planned, ...]
    complete: bool
    """Whether these are all of the file's tensors: then it is written as it will be, header and
    all. Else it is data only, to be put together later."""

    @property
    def file(self) -> str:
        """Its name in the part's folder."""
        return self.shard if self.complete else f"{self.shard}.segment"


def shards_of(plan: Plan, limit: int) -> dict[str, list[Planned]]:
    """File name -> tensors in order of writing, at most `limit` bytes of them, or one tensor.

    Heads and tied tensors go along without bytes.
    """
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in plan.tensors:
        if size and tensor.bytes and size + tensor.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, 1)}


def divide(plan: Plan, shards: dict[str, list[Planned]], count: int) -> list[list[Segment]]:
    """The segments of each of `count` parts: consecutive tensors, about as many entries each.

    A part may be empty, if there are fewer tensors than parts.
    """
    sizes = [prod(tensor.shape) + 1 for tensor in plan.tensors]
    total, done, owner = sum(sizes), 0, {}
    for tensor, size in zip(plan.tensors, sizes, strict=True):
        owner[tensor.key] = min(count - 1, (2 * done + size) * count // (2 * total))
        done += size
    parts: list[list[Segment]] = [[] for _ in range(count)]
    for shard, tensors in shards.items():
        owners = sorted({owner[tensor.key] for tensor in tensors})
        for index in owners:
            mine = tuple(tensor for tensor in tensors if owner[tensor.key] == index)
            parts[index].append(Segment(shard, mine, complete=len(owners) == 1))
    return parts


def shared_layout(tensors: Sequence[Planned]) -> Layout:
    """The layout of a file of the shared expert with these tensors."""
    present = (tensor for tensor in tensors if tensor.kind not in ("head", "tied"))
    return layout((tensor.name, tensor.dtype, tensor.shape) for tensor in present)
