"""The conductor: a recipe in, an artifact out.

One pass over the tensors. For each: read, merge to the shared expert, write it, take every expert's
difference, cut it to factors, write those. Nothing is kept but the tensor at hand, so memory does
not grow with the model.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..artifact.card import model_card
from ..artifact.format import (
    DELTA,
    FORMAT_VERSION,
    HEAD,
    MANIFEST,
    RECIPE,
    A,
    B,
    ExpertRecord,
    FileRecord,
    Manifest,
    Share,
    TensorRecord,
    expert_file,
)
from ..artifact.tensorfile import TensorFileWriter, header_room, record
from ..artifact.writer import check_space, check_target, whole_folder
from ..errors import CheckpointError, NotFinite
from ..recipe import Recipe
from .exclusive import Factors, factorize, factorize_svd
from .linalg import ProductSVD
from .plan import Plan, Planned, make_plan
from .shared import coefficients, get, merge
from .stream import Drift, Step, read_heads, read_step

DEFAULT_SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "bpe.codes",
    "vocab.bpe",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)

Progress = Callable[[int, int, str], None]
"""Called with tensors done, tensors in all, and the name of the next."""


def build(
    recipe: Recipe,
    out: Path | str,
    *,
    written: Recipe | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Merge as `recipe` says and write the artifact to the new folder `out`.

    `written` is the recipe as the user wrote it (before relative paths were resolved); it is what
    the artifact records. Shards of the shared expert hold at most `shard_bytes` of tensors, or one
    tensor. The folder appears only when complete.

    Raises `OutputError` if `out` is taken or the disk is full, `CheckpointError` and its kinds for
    what is wrong with a model; warnings of the manifest say what looks odd but was done.
    """
    out = Path(out)
    check_target(out)
    plan = make_plan(recipe)
    try:
        check_space(out, plan.disk_bytes())
        with whole_folder(out) as folder, _one_thread_each(len(plan.experts)) as pool:
            return _Build(plan, folder, shard_bytes, progress, pool).run(written or recipe)
    finally:
        plan.close()


@contextmanager
def _one_thread_each(experts: int) -> Iterator[ThreadPoolExecutor]:
    """Workers for one expert's matrix each, and one thread inside every operation.

    Sums inside an operation then add up in one order, so the bytes of an artifact do not depend on
    the number of cores; and small matrices gain nothing from threads of their own.
    """
    before = torch.get_num_threads()
    workers = min(experts, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


@dataclass
class _Build:
    plan: Plan
    folder: Path
    shard_bytes: int
    progress: Progress | None
    _pool: ThreadPoolExecutor
    records: list[TensorRecord] = field(default_factory=list)

    def run(self, written: Recipe) -> Manifest:
        plan, recipe = self.plan, self.plan.recipe
        self._parameters = recipe.weight_parameters()
        self._method = get(recipe.merge_method)
        affine = coefficients(self._method.name, self._parameters, len(plan.experts))
        self._coefficients = affine
        names = [expert.name for expert in plan.experts]
        drift = Drift(names)
        (self.folder / "experts").mkdir()
        shards = _shards(plan, self.shard_bytes)
        room = header_room(plan.expert_entries(), plan.expert_bytes())
        self._experts = {
            name: TensorFileWriter(self.folder / expert_file(name), room) for name in names
        }
        self._keeps_base = self._fixes_unchanged()
        files: dict[str, FileRecord] = {}
        done = 0
        shared: TensorFileWriter | None = None
        try:
            for shard, tensors in shards.items():
                shared = TensorFileWriter(self.folder / shard, _shared_room(tensors))
                for tensor in tensors:
                    if self.progress:
                        self.progress(done, len(plan.tensors), tensor.name)
                    self._one(tensor, shared, drift)
                    done += 1
                files[shard] = shared.close()
            for name, writer in self._experts.items():
                files[expert_file(name)] = writer.close()
        finally:
            for writer in [*self._experts.values(), *([shared] if shared else [])]:
                writer.abandon()
        warnings = [*plan.warnings, *drift.check()]
        files |= self._copies(shards)
        warnings += self._tokenizer_warnings()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            recipe=written.model_dump(mode="json", exclude_none=True),
            base=written.base_model,
            model_class=plan.model_class,
            experts=tuple(
                ExpertRecord(
                    name=entry.name,
                    reference=entry.model,
                    adapter=expert.is_adapter,
                    config=plan.configs[entry.name],
                    outputs=plan.outputs[entry.name],
                    drift=drift.relative(entry.name),
                    bytes=files[expert_file(entry.name)].bytes,
                )
                for expert, entry in zip(plan.experts, written.models, strict=True)
            ),
            tensors=tuple(sorted(self.records, key=lambda record: record.name)),
            files=files,
            warnings=tuple(warnings),
            versions={
                "twinmerge": __version__,
                "torch": torch.__version__,
                "safetensors": version("safetensors"),
            },
        )
        (self.folder / RECIPE).write_text(written.to_yaml(), encoding="utf-8")
        (self.folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
        (self.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if self.progress:
            self.progress(done, done, "")
        return manifest

    # ------------------------------------------------------------------ one tensor

    def _one(self, tensor: Planned, shared: TensorFileWriter, drift: Drift) -> None:
        shares: dict[str, Share] = {}
        if tensor.kind == "head":
            heads = read_heads(self.plan, tensor)
            drift.see_heads(heads)
            for name, head in zip(self._experts, heads, strict=True):
                own = _cast(head, tensor.dtype, tensor.name)
                size = self._experts[name].add(tensor.name + HEAD, own)
                shares[name] = Share(bytes=size, error=0.0)
        elif tensor.kind in ("buffer", "base_only"):
            value = self.plan.base.read(tensor.name)
            self._check_buffer(tensor, value)
            shared.add(tensor.name, _cast(value, tensor.dtype, tensor.name))
        elif tensor.kind in ("matrix", "vector"):
            work = getattr(torch, self.plan.recipe.dtype)
            if self.plan.base.info(tensor.name).dtype == torch.float64:
                work = torch.float64  # a base of higher precision is not rounded on the way
            step = read_step(self.plan, tensor, work, affine=self._coefficients is not None)
            drift.see(step)
            shares = self._merge(step, shared)
        self.records.append(
            TensorRecord(
                name=tensor.name,
                kind=tensor.kind,
                shape=tensor.shape,
                dtype=str(tensor.dtype).removeprefix("torch."),
                bytes=tensor.bytes,
                matrix=tensor.matrix,
                tied_to=tensor.tied_to,
                experts=shares,
            )
        )

    def _merge(self, step: Step, shared: TensorFileWriter) -> dict[str, Share]:
        """Write the shared expert's tensor and every expert's part; says what was kept."""
        tensor = step.tensor
        if step.vectors is not None:
            return self._merge_factored(step, shared)
        if step.experts is None and self._keeps_base:
            shared.add(tensor.name, _cast(step.base, tensor.dtype, tensor.name))
            return {}
        experts = step.experts
        if experts is None:
            experts = step.base.expand(len(self._experts), *step.base.shape)
        merged = merge(
            self._method.name, step.base, experts, self._parameters, self._generators(tensor.name)
        )
        stored = _cast(merged, tensor.dtype, tensor.name)
        shared.add(tensor.name, stored)
        shares = {}
        if self.plan.cut.none:
            return shares
        # Against what was stored, rounding included: full rank gives the expert back.
        stored = stored.to(step.base.dtype)
        if tensor.matrix is None:
            for own, (name, writer) in zip(experts, self._experts.items(), strict=True):
                delta = own - stored
                kept = _cast(delta, tensor.dtype, tensor.name)
                size = writer.add(tensor.name + DELTA, kept)
                norm = float(delta.norm())
                error = float((delta - kept.to(delta.dtype)).norm()) / norm if norm else 0.0
                shares[name] = Share(bytes=size, error=error)
            return shares

        view = tensor.matrix

        def cut(own: Tensor) -> Factors:
            delta = (own - stored).reshape(*view)
            return factorize(delta, self.plan.cut, tensor.dtype)

        factors = self._pool.map(cut, experts)
        for found, (name, writer) in zip(factors, self._experts.items(), strict=True):
            shares[name] = _write(writer, tensor.name, found)
        return shares

    def _merge_factored(self, step: Step, shared: TensorFileWriter) -> dict[str, Share]:
        """The same for task vectors known in factors, and a shared expert affine in them.

        With c the coefficients, `W_t - W_s = Σ_j (δ_tj - c_j) B_j A_j`: the SVDs of all of these
        follow from one QR of the stacked factors, and no dense difference is formed.
        """
        assert step.vectors is not None and self._coefficients is not None
        tensor, c, view = step.tensor, self._coefficients, step.tensor.matrix
        assert view is not None
        held = [(index, v) for index, v in enumerate(step.vectors) if v is not None]
        owner = torch.cat([torch.full((v.a.shape[0],), index) for index, v in held])
        a = torch.cat([v.a for _, v in held])
        b = torch.cat([v.b for _, v in held], dim=1)
        dtype = step.base.dtype
        update = (b.to(dtype) * c[owner].to(dtype)) @ a.to(dtype)
        merged = step.base + update.view(step.base.shape)
        shared.add(tensor.name, _cast(merged, tensor.dtype, tensor.name))
        if self.plan.cut.none:
            return {}
        product = ProductSVD(b, a)
        shares = {}
        for index, (name, writer) in enumerate(self._experts.items()):
            mine = product.svd((owner == index).double() - c[owner])
            factors = factorize_svd(mine, self.plan.cut, view, tensor.dtype)
            shares[name] = _write(writer, tensor.name, factors)
        return shares

    def _generators(self, tensor: str) -> list[torch.Generator] | None:
        """One per expert, seeded by seed, tensor and expert: the order of neither matters."""
        if not self._method.random:
            return None
        out = []
        for name in self._experts:
            key = f"{self.plan.recipe.seed}/{tensor}/{name}".encode()
            seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
            out.append(torch.Generator().manual_seed(seed))
        return out

    def _fixes_unchanged(self) -> bool:
        """Whether a tensor that no expert changed stays the base's (not if weights do not sum to 1
        in an unnormalised average)."""
        one = torch.ones(1, dtype=torch.float64)
        experts = one.expand(len(self.plan.experts), 1)
        out = merge(self._method.name, one, experts, self._parameters, self._generators("one"))
        return bool((out == 1).all())

    def _check_buffer(self, tensor: Planned, value: Tensor) -> None:
        if tensor.kind != "buffer":
            return
        for expert in self.plan.experts:
            if tensor.name in expert.missing():
                continue  # constants that newer transformers no longer store
            if not torch.equal(expert.read(tensor.name), value):
                raise CheckpointError(
                    f"{tensor.name}: a {value.dtype} tensor, which cannot be merged and must be "
                    f"equal everywhere, but expert '{expert.name}' ({expert.reference}) has other "
                    "values than the base.\n  Leave the expert out, or give it the base's values."
                )

    # ------------------------------------------------------------------ other files

    def _copies(self, shards: dict[str, list[Planned]]) -> dict[str, FileRecord]:
        """Configuration, tokenizer and the shards' index, copied or written."""
        out: dict[str, FileRecord] = {}
        source = self.plan.base.folder
        for name in ("config.json", *TOKENIZER_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, self.folder / name)
                if name == "config.json" and self.plan.recipe.out_dtype:
                    _store_dtype(self.folder / name, self.plan.recipe.out_dtype)
                out[name] = record(self.folder / name)
        if len(shards) > 1:
            import json

            index = {
                "metadata": {"total_size": self.plan.shared_bytes()},
                "weight_map": {
                    tensor.name: shard
                    for shard, tensors in shards.items()
                    for tensor in sorted(tensors, key=lambda t: t.name)
                    if tensor.kind not in ("head", "tied")
                },
            }
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
            out[path.name] = record(path)
        return out

    def _tokenizer_warnings(self) -> list[str]:
        """Experts whose tokenizer has another vocabulary than the base's."""
        ours = _vocabulary(self.plan.base.folder)
        warnings = []
        for expert in self.plan.experts:
            theirs = _vocabulary(expert.folder) if ours is not None else None
            if theirs is not None and theirs != ours:
                warnings.append(
                    f"expert '{expert.name}': its tokenizer has another vocabulary than the "
                    "base's; the artifact has the base's."
                )
        return warnings


def _store_dtype(path: Path, dtype: str) -> None:
    """Make a config.json name this dtype: `from_pretrained` believes it before the weights."""
    import json

    def named(config: dict) -> dict:
        kept = {key: value for key, value in config.items() if key != "torch_dtype"}
        kept = {key: named(v) if isinstance(v, dict) else v for key, v in kept.items()}
        return kept | {"dtype": dtype} if {"dtype", "torch_dtype"} & set(config) else kept

    config = {"dtype": None, **json.loads(path.read_text(encoding="utf-8"))}
    path.write_text(json.dumps(named(config), indent=2) + "\n", encoding="utf-8")


def _vocabulary(folder: Path) -> object:
    """What a tokenizer.json maps to what; None without one."""
    import json

    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["model"]["vocab"], content["model"].get("merges")
    except (ValueError, KeyError, TypeError):
        return None


def _shared_room(tensors: list[Planned]) -> int:
    entries = [(t.name, t.shape) for t in tensors if t.kind not in ("head", "tied")]
    return header_room(entries, sum(tensor.bytes for tensor in tensors))


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` as `dtype`. Raises `NotFinite` where a finite number becomes infinite by it."""
    out = tensor.to(dtype)
    if dtype == torch.float16 and out is not tensor and not torch.isfinite(out).all():
        if torch.isfinite(tensor).all():
            largest = float(tensor.abs().max())
            raise NotFinite(
                f"{name}: holds {largest:g}, which float16 cannot (its largest number is 65504).\n"
                "  Set out_dtype to bfloat16 or float32."
            )
    return out


def _write(writer: TensorFileWriter, name: str, factors: Factors) -> Share:
    size = 0
    if factors.rank:
        size = writer.add(name + A, factors.a) + writer.add(name + B, factors.b)
    return Share(rank=factors.rank, bytes=size, error=factors.error)


def _shards(plan: Plan, limit: int) -> dict[str, list[Planned]]:
    """File name -> tensors in order of writing. Heads and tied tensors go along without bytes."""
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in plan.tensors:
        if size and size + tensor.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, 1)}
