"""Putting an artifact's factors and heads into a model.

Works by module type and parameter name: there is no list of architectures. A tensor of the
manifest is looked up under its own name, with the model's base prefix, and without it; every
module that holds that very parameter gets its factors (tied weights are thus served once each).
What cannot be run exactly with a weighting per row is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..artifact.codec import Quantised, Sparse, decode_quantised, decode_sparse
from ..artifact.format import (
    DELTA,
    HEAD,
    INDEX,
    MASK,
    SCALE,
    VALUES,
    A,
    B,
    Q,
    Share,
    TensorRecord,
)
from ..artifact.reader import Artifact, TensorMap
from ..errors import CorruptArtifact, UnsupportedModel
from .experts import Stack, TwinExperts, TwinGate, in_rows
from .heads import HeadSwitch
from .layers import (
    Mixing,
    Patch,
    TwinAny,
    TwinBatchNorm,
    TwinConv,
    TwinConv1D,
    TwinElementwise,
    TwinLayerNorm,
    TwinLinear,
    Whole,
)
from .lookup import TwinEmbedding, TwinLookup
from .names import Index, Place
from .parts import Factors, Packed, Part, Scattered, stacked
from .per_row import NotRowWise
from .reading import read_mixed

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


COUNTER = "num_batches_tracked"
"""Of a BatchNorm: not used in evaluation, so heads are stored without it."""


@dataclass
class _Site:
    """One module that gets patches: by attribute name."""

    module: nn.Module
    patches: dict[str, Patch] = field(default_factory=dict)
    blocks: dict[str, list[tuple[Index, Patch]]] = field(default_factory=dict)
    """Of parameters that several tensors of a file fill: the parts of each of these."""


def attach_factors(model: nn.Module, artifact: Artifact, names: dict[str, Place]) -> None:
    """Replace the modules whose weights differ between experts by layers that mix them.

    `names` says where the base's tensors live in the model. Raises `UnsupportedModel` for one that
    has no place.
    """
    changed = [record for record in artifact.manifest.tensors if differs(record)]
    patches = read_patches(artifact, changed)
    tensors = dict(named_tensors(model))
    holders: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for attribute, tensor in _own_tensors(module):
            holders.setdefault(id(tensor), []).append((path, attribute))
    modules = dict(model.named_modules())
    sites: dict[str, _Site] = {}
    for record in changed:
        if record.name not in names:
            raise UnsupportedModel(
                f"{record.name}: the experts differ in it, but {type(model).__name__} has no such "
                "parameter. Its part of the experts would be lost."
            )
        place = names[record.name]
        tensor = tensors[place.parameter]
        for path, attribute in holders[id(tensor)]:
            site = sites.setdefault(path, _Site(modules[path]))
            patch, dtype = patches[record.name], tensor.dtype
            if isinstance(patch, Whole):
                patch = Whole(patch.delta.to(dtype))
            else:  # integers stay as they are
                patch = tuple(part.to(dtype) for part in patch)
            if attribute in site.patches:
                raise UnsupportedModel(
                    f"{record.name}: another tensor of the checkpoint fills {place.parameter} too, "
                    "so one of the two would be lost. Save base and experts from one model class."
                )
            if place.index:
                site.blocks.setdefault(attribute, []).append((place.index, patch))
            else:
                site.patches[attribute] = patch
    mixtures = _fused(model, {path: site for path, site in sites.items() if site.blocks})
    for path, site in sites.items():
        if not site.blocks:
            _replace(model, path, site, mixtures)
    for path in mixtures:
        for module in model.get_submodule(path).modules():
            if isinstance(module, Mixing):
                module.flattened = True


def _fused(model: nn.Module, sites: dict[str, _Site]) -> set[str]:
    """Replace fused experts of mixtures; the blocks in which tokens come row by row."""
    mixtures: set[str] = set()
    for path, site in sites.items():
        parent, _, attribute = path.rpartition(".")
        block, experts = model.get_submodule(parent), cast(Any, site.module)
        try:
            if site.patches or not in_rows(block, experts, experts.down_proj.shape[1]):
                raise NotRowWise(f"{path}: its tokens do not come row by row")
            new = TwinExperts(site.module, site.blocks, path)
        except (NotRowWise, AttributeError):
            stacks = {name: Stack(blocks) for name, blocks in site.blocks.items()}
            read_mixed(site.module, {**site.patches, **stacks}, path)
            continue
        setattr(block, attribute, new.train(site.module.training))
        mixtures.add(parent)
    return mixtures


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and float buffers of a model."""
    yield from model.named_parameters(remove_duplicate=False)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if buffer.is_floating_point():
            yield name, buffer


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def differs(record: TensorRecord) -> bool:
    """Whether experts have something of their own in this tensor (heads apart)."""
    return record.kind in ("matrix", "vector") and any(
        not share.empty for share in record.experts.values()
    )


def read_patches(artifact: Artifact, records: list[TensorRecord]) -> dict[str, Patch]:
    """What all experts keep of these tensors; one expert's file is open at a time.

    Raises `CorruptArtifact` for what is not as the manifest says.
    """
    experts = artifact.manifest.names
    parts: dict[str, list[Part]] = {record.name: [] for record in records}
    deltas: dict[str, dict[int, Tensor]] = {record.name: {} for record in records}
    for index, expert in enumerate(experts):
        with artifact.expert(expert) as tensors:
            for record in records:
                share = record.experts.get(expert)
                if share is None or share.empty:
                    continue
                stored = _Stored(tensors, record.name, f"experts/{expert}.safetensors")
                if record.matrix is None:
                    deltas[record.name][index] = _read_delta(stored, record, share)
                else:
                    part = _read_part(stored, record.matrix, share, index, len(experts))
                    parts[record.name].append(part)
    patches: dict[str, Patch] = {}
    for record in records:
        if record.matrix is None:
            found = deltas.pop(record.name)
            zeros = torch.zeros_like(next(iter(found.values())))
            patches[record.name] = Whole(
                torch.stack([found.get(i, zeros) for i in range(len(experts))])
            )
        else:
            patches[record.name] = stacked(parts.pop(record.name))
    return patches


@dataclass(frozen=True)
class _Stored:
    """What an expert's file holds under the name of one tensor."""

    tensors: TensorMap
    name: str
    file: str

    @property
    def where(self) -> str:
        return f"{self.file}: {self.name}"

    def __getitem__(self, suffix: str) -> Tensor:
        name = self.name + suffix
        if name not in self.tensors:
            raise CorruptArtifact(
                f"{self.file}: expected the tensor {name}, which the manifest lists. Copy the "
                "folder again, or rebuild."
            )
        return self.tensors[name]

    def quantised(self, side: str, rank: int, n: int, bits: int) -> Quantised:
        parts = {"q": self[side + Q], "scale": self[side + SCALE]}
        return decode_quantised(parts, rank, n, bits, self.where + side)

    def sparse(self, storage: str, shape: tuple[int, ...]) -> Sparse:
        positions = self[MASK if storage == "mask" else INDEX]
        return decode_sparse({"values": self[VALUES], storage: positions}, shape, self.where)

    def refuse(self, kind: str, share: Share) -> CorruptArtifact:
        return CorruptArtifact(
            f"{self.where} is a {kind}, so its part cannot be stored as '{share.storage}' with "
            f"rank {share.rank}. The manifest was changed by hand; build the artifact again."
        )


def _read_delta(stored: _Stored, record: TensorRecord, share: Share) -> Tensor:
    if share.storage == "whole":
        return stored[DELTA]
    if share.storage in ("mask", "index"):
        return stored.sparse(share.storage, record.shape).dense()
    raise stored.refuse("vector", share)


def _read_part(
    stored: _Stored, matrix: tuple[int, int], share: Share, expert: int, experts: int
) -> Part:
    out, in_ = matrix
    if share.storage in ("mask", "index"):
        return Scattered(stored.sparse(share.storage, matrix), expert, experts)
    if share.rank is None or share.storage == "whole":
        raise stored.refuse("matrix", share)
    ranks = [share.rank if t == expert else 0 for t in range(experts)]
    if share.storage == "factors":
        return Factors(stored[A], stored[B], ranks)
    bits = {"int8": 8, "int4": 4}[share.storage]
    a, b = (stored.quantised(side, share.rank, n, bits) for side, n in ((A, in_), (B, out)))
    return Packed(a, b, ranks)


def _replace(model: nn.Module, path: str, site: _Site, mixtures: set[str]) -> None:
    module = site.module
    patches = {name: _in_parts(patch, module) for name, patch in site.patches.items()}
    new = _layer(module, patches, path)
    if new is None and path.rpartition(".")[0] in mixtures and not list(module.children()):
        new = TwinGate(module, patches, path)
    if new is None:
        read_mixed(module, patches, path)
        return
    new.train(module.training)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def _layer(module: nn.Module, patches: dict[str, Patch], path: str) -> nn.Module | None:
    """The layer to put in its place; None for a module that reads bare parameters of its own."""
    weight, bias = patches.get("weight"), patches.get("bias")
    vectors = {name: each for name, each in patches.items() if isinstance(each, Whole)}
    known = set(patches) <= {"weight", "bias"}
    try:
        if type(module) is nn.Linear and known and not isinstance(weight, Whole):
            return TwinLinear(module, weight or (), _whole(bias), path)
        if type(module) is Conv1D and known and not isinstance(weight, Whole):
            return TwinConv1D(module, weight or (), _whole(bias), path)
        if _is_table(module) and isinstance(weight, tuple) and len(patches) == 1:
            if type(module) is nn.Embedding:
                return TwinEmbedding(module, weight, path)
            return TwinLookup(module, weight, path)
        if type(module) is nn.LayerNorm and known and len(module.normalized_shape) == 1:
            return TwinLayerNorm(module, _whole(weight), _whole(bias), path)
        if _runs_as(module, *_CONVOLUTIONS) and known and not isinstance(weight, Whole):
            return TwinConv(module, weight or (), _whole(bias), path)  # type: ignore[arg-type]
        if _runs_as(module, *_BATCH_NORMS) and len(vectors) == len(patches):
            return TwinBatchNorm(module, vectors, path)
        if _is_elementwise(module, patches):
            return TwinElementwise(module, vectors, path)
    except NotRowWise:
        pass  # of such a kind, but not row by row
    own = len(list(_own_tensors(module)))
    if own and not any(True for _ in module.children()):
        return None if _reads_bare(module) else TwinAny(module, patches, path)
    return None


def _runs_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these kinds and runs as it does: no forward of its own."""
    own = type(module)
    methods = ("forward", "_conv_forward")
    return any(
        issubclass(own, kind) and all(getattr(own, m, 0) is getattr(kind, m, 0) for m in methods)
        for kind in kinds
    )


def _reads_bare(module: nn.Module) -> bool:
    """Whether a leaf holds bare parameters that rows may read: not a layer of torch's own."""
    return not type(module).__module__.startswith("torch.")


def _in_parts(patch: Patch, module: nn.Module) -> Patch:
    """A weight of one row or one column, which is kept whole, as the rank-1 matrix that it is."""
    layers = (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS)
    if isinstance(patch, tuple) or patch.delta.ndim < 3 or not isinstance(module, layers):
        return patch
    delta = patch.delta.flatten(2)  # expert, out, rest
    experts, out, _ = delta.shape
    one_each = [1] * experts
    if out == 1:
        return (Factors(delta[:, 0], delta.new_ones(1, experts), one_each),)
    return (Factors(delta.new_ones(experts, 1), delta[:, :, 0].T, one_each),)


def _whole(patch: Patch | None) -> Whole | None:
    assert not isinstance(patch, tuple), "vectors are kept whole"
    return patch


def _is_table(module: nn.Module) -> TypeGuard[nn.Embedding]:
    # max_norm shortens rows of the table while it looks them up, which is not linear.
    return isinstance(module, nn.Embedding) and module.max_norm is None


def _is_elementwise(module: nn.Module, patches: dict[str, Patch]) -> bool:
    """Whether a module owns nothing but vectors of one length, as norms and scales do."""
    own = dict(module.named_parameters(recurse=False))
    children = any(True for _ in module.children())
    vectors = all(p.ndim == 1 for p in own.values()) and len({p.shape for p in own.values()}) == 1
    return not children and vectors and all(isinstance(p, Whole) for p in patches.values())


def attach_heads(
    model: nn.Module,
    skeletons: dict[str, nn.Module],
    artifact: Artifact,
    roots: dict[str, list[str]],
) -> None:
    """Put a `HeadSwitch` at every root, filled with each expert's own head.

    `skeletons` maps an expert to a model (on the meta device) of its configuration, from which the
    empty head modules are taken.
    """
    experts = artifact.manifest.names
    for root, tensors in roots.items():
        heads: dict[str, nn.Module] = {}
        template = next(model.get_submodule(root).parameters())
        for expert in experts:
            head = skeletons[expert].get_submodule(root).to_empty(device="cpu")
            with artifact.expert(expert) as stored:
                state = {
                    name.removeprefix(f"{root}."): stored[name + HEAD]
                    for name in tensors
                    if name + HEAD in stored
                }
            missing, unexpected = head.load_state_dict(state, strict=False, assign=True)
            missing = [name for name in missing if not name.endswith(COUNTER)]
            for name, buffer in head.named_buffers():
                if name.endswith(COUNTER):
                    buffer.zero_()
            if missing or unexpected:
                raise UnsupportedModel(
                    f"{root}: the head of expert '{expert}' does not fit "
                    f"{type(head).__name__}: missing {missing}, not used {unexpected}."
                )
            heads[expert] = head.to(template.dtype)
        parent, _, attribute = root.rpartition(".")
        setattr(model.get_submodule(parent), attribute, HeadSwitch(heads, root))
