"""One weighting for all inputs, merged densely: an ordinary transformers model.

`W* = W_s + Σ_t w_t D_t`, factors multiplied out, quantised and sparse parts decoded. Exact for that
weighting, and what the factored forward is checked and timed against.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..artifact.reader import Artifact
from ..errors import InputError, did_you_mean
from .arguments import highest
from .attach import differs, named_tensors, read_patches
from .heads import HeadSwitch
from .layers import Whole
from .load import body_places, load_shared, task_config
from .model import TwinModel


class DenseMerge:
    """Merges an artifact's experts into one plain model, again and again with other weights.

    Holds one plain model, a copy of the shared values of the tensors in which the experts differ,
    and their factors. Each call to `at` overwrites the model that the last one returned.
    """

    def __init__(self, twin: TwinModel) -> None:
        artifact = Artifact(twin.folder, check=False)
        records = [record for record in artifact.manifest.tensors if differs(record)]
        self.twin = twin
        attention = getattr(twin.model.config, "_attn_implementation", None)
        model = load_shared(artifact, twin.dtype, attention)
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        nn.Module.to(self.model, twin.device)
        names = body_places(self.model, artifact.manifest)
        parameters = dict(named_tensors(self.model))
        self.targets = {
            record.name: parameters[names[record.name].parameter][names[record.name].index]
            for record in records
        }
        self.shared = {name: target.clone() for name, target in self.targets.items()}
        self._patches = read_patches(artifact, records)
        for patch in self._patches.values():
            for part in () if isinstance(patch, Whole) else patch:
                part.to(twin.device)
        self._switches = {
            path: module
            for path, module in twin.model.named_modules()
            if isinstance(module, HeadSwitch)
        }

    @torch.no_grad()
    def at(self, weights: Float[Tensor, " expert"], head: str | None = None) -> PreTrainedModel:
        """The model at these weights, with the head of `head` (default: of the highest weight).

        Raises `InputError` for an unknown head, or if all weights are zero and no head is given.
        """
        for name, target in self.targets.items():
            patch, work = self._patches[name], self.shared[name]
            if isinstance(patch, Whole):
                updates = [torch.tensordot(weights.to(work), patch.delta.to(work), dims=1)]
            else:
                updates = [part.dense(weights[None].to(work), work.dtype) for part in patch]
            for update in updates:
                work = torch.add(work, update.view(work.shape), out=target)
        return self.with_head(weights, head)

    def with_head(
        self, weights: Float[Tensor, " expert"], head: str | None = None
    ) -> PreTrainedModel:
        """The model as its weights are, with the head of `head` or of the highest weight."""
        for path, switch in self._switches.items():
            parent, _, attribute = path.rpartition(".")
            index = self._head(weights, head)
            # A head of its own: what is done to the model must not reach the other.
            head_module = copy.deepcopy(switch.heads[index])
            setattr(self.model.get_submodule(parent), attribute, head_module)
            own = task_config(self.twin.folder, self.twin.manifest.experts[index])
            for key in ("id2label", "label2id", "problem_type"):
                setattr(self.model.config, key, getattr(own, key))
        return self.model

    def _head(self, weights: Tensor, head: str | None) -> int:
        experts = list(self.twin.experts)
        if head is None:
            if not bool(weights.any()):
                raise InputError(
                    f"all weights are zero: say whose head to use, head= one of {experts}."
                )
            return int(highest(weights[None])[0])
        if head not in experts:
            hint = did_you_mean(head, experts)
            raise InputError(f"head={head!r}: no such expert.{hint} Known: {', '.join(experts)}.")
        return experts.index(head)
