"""Putting an artifact's factors and heads into a model.

Works by module type and parameter name: there is no list of architectures. A tensor of the
manifest is looked up under its own name, with the model's base prefix, and without it; every
module that holds that very parameter gets its factors (tied weights are thus served once each).
What cannot be run exactly with a weighting per row is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
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
from .heads import HeadSwitch
from .layers import (
    Patch,
    TwinConv,
    TwinConv1D,
    TwinElementwise,
    TwinEmbedding,
    TwinLayerNorm,
    TwinLinear,
    TwinLookup,
    TwinParameter,
    Whole,
)
from .parts import Factors, Packed, Part, Scattered, stacked

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class _Site:
    """One module that gets patches: by attribute name."""

    module: nn.Module
    patches: dict[str, Patch] = field(default_factory=dict)


def parameter_names(model: nn.Module, prefix: str, names: list[str]) -> dict[str, str]:
    """Base tensor name -> parameter name in `model`. Names that the model lacks are left out."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    renamed = _renaming(model, prefix)
    found = {}
    for name in names:
        shorter = name.removeprefix(f"{prefix}.")
        candidates = (name, f"{prefix}.{name}", shorter, renamed(name))
        match = next((candidate for candidate in candidates if candidate in known), None)
        if match is not None:
            found[name] = match
    return found


def _renaming(model: nn.Module, prefix: str) -> Callable[[str], str]:
    """transformers' own way from a name in a file to a name in a live model.

    Files keep names that models have left behind (ViT's `encoder.layer.0.attention.attention.key`
    is `layers.0.attention.k_proj`); `from_pretrained` translates, and so must we. peft calls the
    same functions. A tensor that is split or fused on the way stays without a name, which is an
    error if the experts differ in it.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # a release that translates nothing
        return lambda name: name
    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    state = model.state_dict()
    return lambda name: rename_source_key(name, renamings, [], prefix, state)[0]


def attach_factors(model: nn.Module, artifact: Artifact, names: dict[str, str]) -> None:
    """Replace the modules whose weights differ between experts by layers that mix them.

    `names` maps base tensor names to parameter names. Raises `UnsupportedModel` by name.
    """
    changed = [record for record in artifact.manifest.tensors if differs(record)]
    patches = read_patches(artifact, changed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    holders: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append((path, attribute))
    modules = dict(model.named_modules())
    sites: dict[str, _Site] = {}
    for record in changed:
        if record.name not in names:
            raise UnsupportedModel(
                f"{record.name}: the experts differ in it, but {type(model).__name__} has no such "
                "parameter. Its part of the experts would be lost."
            )
        parameter = parameters[names[record.name]]
        for path, attribute in holders[id(parameter)]:
            site = sites.setdefault(path, _Site(modules[path]))
            patch, dtype = patches[record.name], parameter.dtype
            if isinstance(patch, Whole):
                patch = Whole(patch.delta.to(dtype))
            else:  # integers stay as they are
                patch = tuple(part.to(dtype) for part in patch)
            site.patches[attribute] = patch
    for path, site in sites.items():
        _replace(model, path, site)


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
                    part = _read_part(stored, record.matrix, share, index)
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


def _read_part(stored: _Stored, matrix: tuple[int, int], share: Share, expert: int) -> Part:
    out, in_ = matrix
    if share.storage in ("mask", "index"):
        return Scattered(stored.sparse(share.storage, matrix), expert)
    if share.rank is None or share.storage == "whole":
        raise stored.refuse("matrix", share)
    owner = torch.full((share.rank,), expert)
    if share.storage == "factors":
        return Factors(stored[A], stored[B], owner)
    bits = {"int8": 8, "int4": 4}[share.storage]
    a, b = (stored.quantised(side, share.rank, n, bits) for side, n in ((A, in_), (B, out)))
    return Packed(a, b, owner)


def _replace(model: nn.Module, path: str, site: _Site) -> None:
    module = site.module
    patches = {name: _in_parts(patch, module) for name, patch in site.patches.items()}
    weight, bias = patches.get("weight"), patches.get("bias")
    kind = type(module)
    known = set(patches) <= {"weight", "bias"}
    new: nn.Module
    if type(module) is nn.Linear and known and not isinstance(weight, Whole):
        new = TwinLinear(module, weight or (), _whole(bias), path)
    elif type(module) is Conv1D and known and not isinstance(weight, Whole):
        new = TwinConv1D(module, weight or (), _whole(bias), path)
    elif _is_table(module) and kind is nn.Embedding and isinstance(weight, tuple):
        new = TwinEmbedding(module, weight, path)
    elif _is_table(module) and isinstance(weight, tuple) and len(patches) == 1:
        new = TwinLookup(module, weight, path)
    elif type(module) is nn.LayerNorm and known and len(module.normalized_shape) == 1:
        new = TwinLayerNorm(module, _whole(weight), _whole(bias), path)
    elif isinstance(module, _CONVOLUTIONS) and known and not isinstance(weight, Whole):
        new = TwinConv(module, weight or (), _whole(bias), path)
    elif _is_elementwise(module, patches):
        new = TwinElementwise(
            module, {k: v for k, v in patches.items() if isinstance(v, Whole)}, path
        )
    else:
        for attribute, patch in patches.items():
            where = f"{path}.{attribute}" if path else attribute
            original = getattr(module, attribute)
            if kind.__module__.startswith("torch.nn"):
                raise UnsupportedModel(
                    f"{where}: a {kind.__name__} cannot be run with a weighting per row yet. "
                    "Leave its weights out of the experts, or use a static merge."
                )
            mix = TwinParameter(original.shape, patch, where)
            parametrize.register_parametrization(module, attribute, mix)
        return
    new.train(module.training)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def _in_parts(patch: Patch, module: nn.Module) -> Patch:
    """A weight of one row or one column, which is kept whole, as the rank-1 matrix that it is."""
    layers = (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS)
    if isinstance(patch, tuple) or patch.delta.ndim < 3 or not isinstance(module, layers):
        return patch
    delta = patch.delta.flatten(2)  # expert, out, rest
    experts, out, _ = delta.shape
    owner = torch.arange(experts)
    if out == 1:
        return (Factors(delta[:, 0], delta.new_ones(1, experts), owner),)
    return (Factors(delta.new_ones(experts, 1), delta[:, :, 0].T, owner),)


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
            if missing or unexpected:
                raise UnsupportedModel(
                    f"{root}: the head of expert '{expert}' does not fit "
                    f"{type(head).__name__}: missing {missing}, not used {unexpected}."
                )
            heads[expert] = head.to(template.dtype)
        parent, _, attribute = root.rpartition(".")
        setattr(model.get_submodule(parent), attribute, HeadSwitch(heads, root))
