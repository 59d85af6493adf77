"""The pretrained model and the experts' changes to it, as tensors of plain models."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from twinmerge.artifact.format import HEAD
from twinmerge.artifact.reader import Artifact
from twinmerge.merging.linalg import SVD, svd
from twinmerge.runtime.attach import named_tensors
from twinmerge.runtime.export import DenseMerge

from ..lab import Lab, bytes_of
from .packed import Packed, Shapes, Vector


class Sources:
    """Read when first asked for, so that a study that has all its records reads nothing.

    most: shape of a matrix -> how many of its singular triplets are asked for at most
    """

    def __init__(self, lab: Lab, most: Callable[[tuple[int, ...]], int]) -> None:
        self.lab, self.most = lab, most

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """The pretrained tensors that an expert changed, by their name in a plain model."""
        pretrained = dict(named_tensors(DenseMerge(self.lab.plain).model))
        return {name: pretrained[name].clone() for name in self.shapes}

    @cached_property
    def vectors(self) -> dict[str, Vector]:
        """Task -> task vector."""
        pretrained = dict(named_tensors(DenseMerge(self.lab.plain).model))
        found: dict[str, Vector] = {}
        for task in self.lab.names:
            body = self._body(self.lab.expert(task), task)
            changes = {name: (x - pretrained[name]).float() for name, x in body.items()}
            found[task] = {name: x for name, x in changes.items() if x.any()}
        changed = {name: x for vector in found.values() for name, x in vector.items()}
        return {
            task: {name: vector.get(name, torch.zeros_like(x)) for name, x in changed.items()}
            for task, vector in found.items()
        }

    @cached_property
    def shapes(self) -> Shapes:
        return {name: x.shape for name, x in self.vectors[self.lab.names[0]].items()}

    @cached_property
    def factors(self) -> dict[str, dict[str, SVD]]:
        """Task -> matrix of its vector -> the leading triplets."""
        return {
            task: {
                name: svd(x).cut(self.most(x.shape)) for name, x in vector.items() if x.ndim == 2
            }
            for task, vector in self.vectors.items()
        }

    @cached_property
    def base_float16(self) -> int:
        """Bytes of the pretrained model in float16."""
        return bytes_of(Artifact(self.lab.plain.folder, check=False))["base_float16"]

    @cached_property
    def heads(self) -> dict[str, Packed]:
        """Task -> its head as an expert's file of an artifact has it: names, and its own dtype."""
        artifact = Artifact(self.lab.plain.folder, check=False)
        found: dict[str, Packed] = {}
        for task in self.lab.names:
            with artifact.expert(task) as tensors:
                names = [name for name in tensors.names() if name.endswith(HEAD)]
                found[task] = {name: tensors[name] for name in names}
        return found

    @cached_property
    def layers(self) -> list[str]:
        """Paths of the linear layers that an expert changed."""
        return linear_layers(self.lab.expert(self.lab.names[0]), self.shapes)

    @torch.no_grad()
    def model(self, task: str, vector: Vector) -> PreTrainedModel:
        """A new plain model: the pretrained one plus `vector`, with one expert's head."""
        plain = self.lab.expert(task)
        own = dict(named_tensors(plain))
        for name, x in self.base.items():
            own[name].copy_(x + vector[name] if name in vector else x)
        return plain

    def _body(self, plain: nn.Module, task: str) -> dict[str, Tensor]:
        """All but the head; of tied tensors, the first name."""
        heads = self._heads(task)
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, x in named_tensors(plain):
            if name not in heads and id(x) not in seen:
                found[name] = x.detach()
                seen.add(id(x))
        return found

    def _heads(self, task: str) -> list[str]:
        records = self.lab.plain.manifest.tensors
        return [r.name for r in records if r.kind == "head" and task in r.experts]


def linear_layers(model: nn.Module, changed: Collection[str]) -> list[str]:
    """Paths of the linear layers whose weight is among `changed`."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{path}.weight" in changed
    ]
