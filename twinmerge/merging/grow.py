"""One expert more, or less, in an artifact that is there already.

What a new expert keeps is `D = W_t - W_s` against the shared expert as it is stored, cut as the
artifact's own recipe says. The shared expert and the other experts' files are not touched: the new
expert has no part in the shared expert, and one that goes leaves its part there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact.format import (
    HEAD,
    ExpertRecord,
    FileRecord,
    Manifest,
    Share,
    TensorRecord,
    expert_file,
)
from ..artifact.reader import Artifact
from ..artifact.tensorfile import HashedFile
from ..artifact.writer import check_space
from ..checkpoint import UNCHANGED, Checkpoint, same_bits
from ..errors import ArtifactError, CheckpointError, MissingTensor, RecipeError, ShapeMismatch
from ..recipe import Recipe
from ..recipe.references import is_same, resolved
from ..recipe.sections import Exclusive, Expert
from ..weightfiles import some
from .blocks import merge_blocks
from .budget import Key
from .build import Progress, check_sources, one_thread_each
from .copies import tokenizer_warnings
from .join import Finished, Pieces, choose_entries, drift_of, spend_budget, write_expert
from .journal import Line, Spool
from .plan import Plan, kind_of, make_plan
from .planned import Planned
from .stream import UNRELATED_DRIFT, Step, drift_warnings
from .work import Done, Kept, Worker, cast

UNBUILDABLE = "the recipe cannot be built as it stands: "
"""How the warning begins that says why."""


@dataclass(frozen=True)
class NewExpert:
    """An expert whose file is written, not yet in any manifest."""

    record: ExpertRecord
    file: FileRecord
    entry: dict[str, Any]
    """As it stands in a recipe's `models`."""
    shares: dict[str, Share]
    """By the tensor's key: its name, or name + HEAD."""
    heads: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Shapes and dtypes as stored, by key."""
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.record.name


def cut_expert(
    artifact: Artifact,
    expert: Expert,
    path: Path,
    *,
    base: str | None = None,
    instead: str | None = None,
    progress: Progress | None = None,
) -> NewExpert:
    """Write what `expert` keeps beyond the artifact's shared expert to the file `path`.

    base:    where the base is, instead of the recipe's `base_model`; needed for adapters, whose
             weights are the base's and something more, and to see how far the expert moved
    instead: the expert whose place it takes

    Reads every tensor of base, expert and shared expert once. Raises what a build raises for models
    that do not fit (`CheckpointError` and its kinds), `ArtifactError` for an artifact that holds
    nothing of its experts (`rank: none`), `RecipeError` for a name that is taken.
    """
    manifest = artifact.manifest
    _check_name(manifest, expert.name, instead)
    recipe = _recipe(manifest, expert, base)
    try:
        plan = make_plan(recipe)
    except CheckpointError as problem:
        if base is None and recipe.base_model in str(problem):
            raise type(problem)(
                f"{problem}\n  The base that this artifact was built from is needed: say where it "
                "is (--base, base=)."
            ) from problem
        raise
    try:
        return _cut(artifact, plan, expert, path, instead, progress)
    finally:
        plan.close()


def _check_name(manifest: Manifest, name: str, instead: str | None) -> None:
    for taken in manifest.names:
        if taken != instead and taken.casefold() == name.casefold():
            raise RecipeError(
                f"expert '{name}': the name is taken by '{taken}' (case does not count). Give "
                "another (--name), or replace that one."
            )


def _recipe(manifest: Manifest, expert: Expert, base: str | None) -> Recipe:
    """The artifact's recipe with this expert alone: nothing is merged, so the method is any."""
    told = manifest.recipe
    if Exclusive.model_validate(told.get("exclusive", {})).rank == "none":
        raise ArtifactError(
            f"{manifest.base}: this artifact was built with exclusive: {{rank: none}}, so it holds "
            "nothing of single experts but their heads, and none can be added. Build it again."
        )
    kept = {key: told[key] for key in ("exclusive", "dtype", "out_dtype", "seed") if key in told}
    model = expert.model_copy(update={"parameters": {}})
    return Recipe.model_validate({"base_model": base or manifest.base, "models": [model]} | kept)


def _cut(
    artifact: Artifact,
    plan: Plan,
    expert: Expert,
    path: Path,
    instead: str | None,
    progress: Progress | None,
) -> NewExpert:
    manifest = artifact.manifest
    check_fits(manifest, plan)
    plan = replace(plan, tensors=_with_head_dtypes(manifest, plan.tensors))
    check_space(artifact.folder, plan.expert_bytes() + plan.spool_bytes())
    shared = Checkpoint.open(str(artifact.folder))
    spool_path = path.with_suffix(".spool")
    pieces: dict[Key, Pieces] = {}
    lines: list[Line] = []
    name = expert.name
    try:
        with HashedFile(spool_path) as file, open(spool_path, "rb") as reader:
            spool = Spool(file)
            with one_thread_each() as pool:
                worker = _Against(plan, pool, shared, manifest, instead)
                for index, tensor in enumerate(plan.tensors):
                    if progress:
                        progress(index, len(plan.tensors), tensor.name)
                    done = worker.do(tensor)
                    check_sources(plan, tensor)
                    lines.append(_line(done))
                    if name in done.kept:
                        kept = done.kept[name]
                        parts = tuple(spool.add(s, part) for s, part in kept.tensors.items())
                        pieces[tensor.key, name] = Pieces(reader, parts, kept.share)
                odd = worker.warnings()
            if plan.keep.scope_all:
                choose_entries(plan, pieces, spool, reader)
            if plan.keep.budget is not None:
                made = Finished(path.parent, lines)
                spend_budget(plan, {line.tensor: (made, line) for line in lines}, pieces)
            record = write_expert(plan, name, pieces, path)
    finally:
        spool_path.unlink(missing_ok=True)
        shared.close()
    if progress:
        progress(len(plan.tensors), len(plan.tensors), "")
    _refuse_twin(manifest, expert, record, instead)
    drift = drift_of(plan, lines)
    source = plan.experts[0]
    reference = resolved(expert.model, Path.cwd())
    entry = expert.model_copy(update={"model": reference})
    return NewExpert(
        record=ExpertRecord(
            name=name,
            reference=reference,
            adapter=source.is_adapter,
            config=plan.configs[name],
            outputs=plan.outputs[name],
            drift=drift[name],
            bytes=record.bytes,
        ),
        file=record,
        entry=entry.model_dump(mode="json", exclude_none=True),
        shares={key: each.share for (key, _), each in pieces.items()},
        heads={
            t.key: (source.info(t.name).shape, t.dtype) for t in plan.tensors if t.kind == "head"
        },
        warnings=(*plan.warnings, *odd, *drift_warnings(drift), *tokenizer_warnings(plan)),
    )


def _line(done: Done) -> Line:
    """What of a finished tensor counts in the end; where it lies is kept elsewhere."""
    return Line(
        tensor=done.tensor.key,
        file="",
        end=0,
        sha256="",
        spool_end=0,
        spool_sha256="",
        pieces={},
        shares={},
        candidates={name: k.candidate for name, k in done.kept.items() if k.candidate},
        base_square=done.base_square,
        moved=done.moved,
        unlike=(),
    )


class _Against(Worker):
    """Cuts one expert's differences from a shared expert that is there already."""

    def __init__(
        self, plan: Plan, pool: Any, shared: Checkpoint, manifest: Manifest, instead: str | None
    ) -> None:
        super().__init__(plan, pool)
        self.shared = shared
        self.settled = {
            record.name for record in manifest.tensors if not set(record.experts) - {instead}
        }
        """Tensors in which no other expert has anything of its own."""
        self.untouched = {record.name for record in manifest.tensors if not record.experts}
        """Those in which none of those merged differed from the base."""
        self._squares = [0.0, 0.0]

    def warnings(self) -> list[str]:
        """Whether the shared expert was merged from the base that was given, as far as seen."""
        base, apart = self._squares
        moved = (apart / base) ** 0.5 if base else 0.0
        if moved <= UNRELATED_DRIFT:
            return []
        return [
            f"the shared expert is {moved:.2f} of the base's norm away from the base given "
            f"({self.plan.base.reference}). Is it the one that the artifact was built from?"
        ]

    def _do(self, tensor: Planned) -> Done:
        if tensor.kind == "head":
            return self._head(tensor)
        if tensor.kind == "tied":
            return Done(tensor)
        base, stored = self.plan.base.read(tensor.name), self.shared.read(tensor.name)
        if tensor.kind in ("buffer", "base_only"):
            self._check_buffer(tensor, base)
            self._check_base(tensor, base, stored)
            return Done(tensor)
        if tensor.name in self.untouched:
            self._check_base(tensor, base, stored)
        return self._difference(tensor, base, stored)

    def _difference(self, tensor: Planned, base: Tensor, stored: Tensor) -> Done:
        expert, work = self.plan.experts[0], self._work(base)
        own = base
        if expert.task_vector(tensor.name) is not UNCHANGED:
            own = expert.read(tensor.name)
        both = [own, stored]
        moved, _ = merge_blocks(base, both, None, work=work, store=work, pool=self.pool)
        self._check(Step(tensor, base, experts=[own]), moved, work)
        done = Done(tensor)
        if tensor.matrix is not None:
            done.base_square, done.moved = moved.base, (moved.experts[0],)
            self._squares[0] += moved.base
            self._squares[1] += moved.experts[1]
        kept = self._keep_difference(tensor, stored.to(work), (expert.name, own))
        if tensor.name not in self.settled or not _nothing(kept):
            done.kept[expert.name] = kept
        return done

    def _check_base(self, tensor: Planned, base: Tensor, stored: Tensor) -> None:
        """Raise `CheckpointError` where the shared expert should be the base's, and is not."""
        if not same_bits(cast(base, tensor.dtype, tensor.name), stored):
            raise CheckpointError(
                f"{tensor.name}: expected the base's values, as the artifact has them, but the "
                f"base given ({self.plan.base.reference}) has others.\n  It is not the base that "
                "the artifact was built from: say where that one is (--base, base=)."
            )


def _nothing(kept: Kept) -> bool:
    """Whether a difference is exactly zero."""
    floats = [part for part in kept.tensors.values() if part.dtype.is_floating_point]
    return kept.share.error == 0 and not any(bool(part.any()) for part in floats)


def _refuse_twin(manifest: Manifest, expert: Expert, file: FileRecord, instead: str | None) -> None:
    for other in manifest.experts:
        if other.name == instead:
            continue
        same = manifest.files[expert_file(other.name)] == file
        if same or is_same(resolved(expert.model, Path.cwd()), other.reference):
            raise CheckpointError(
                f"experts '{other.name}' and '{expert.name}': expected two different models, but "
                "they are one and the same. The artifact holds this expert already."
            )


# ------------------------------------------------------------------------- whether it fits


def check_fits(manifest: Manifest, plan: Plan) -> None:
    """Raise `CheckpointError` or its kinds unless base and expert fit what the artifact holds."""
    expert, own = plan.experts[0], (plan.base.config.get("architectures") or ["AutoModel"])[0]
    here, came = kind_of(manifest.model_class, own), kind_of(plan.model_class, own)
    if here and came and here != came:
        raise CheckpointError(
            f"expert '{expert.name}' ({expert.reference}) is a {plan.model_class}, the artifact's "
            f"experts are {manifest.model_class}.\n  One artifact holds one kind of task model; "
            "build one for each."
        )
    ours = {_key(record): record for record in manifest.tensors}
    heads = sorted(record.name for record in ours.values() if record.kind == "head")
    for tensor in plan.tensors:
        _check_tensor(tensor, ours.pop(tensor.key, None), plan, heads)
    for record in ours.values():
        if record.kind == "head":
            raise MissingTensor(
                f"{record.name}: a head tensor of the artifact's experts that expert "
                f"'{expert.name}' ({expert.reference}) does not have; its heads: "
                f"{some(expert.head_names())}.\n  All experts of one artifact need the same kind "
                "of head (classes may differ). For an adapter, save the head with modules_to_save."
            )
        raise _other_base(plan, record.name, "the artifact has it, this base does not")


def _check_tensor(
    tensor: Planned, record: TensorRecord | None, plan: Plan, heads: Sequence[str]
) -> None:
    """One tensor of base and expert beside what the artifact has under its name."""
    expert, whose = plan.experts[0], f"expert '{plan.experts[0].name}'"
    if record is None:
        if tensor.kind != "head":
            raise _other_base(plan, tensor.name, "this base has it, the artifact does not")
        raise MissingTensor(
            f"{tensor.name}: a head tensor of {whose} ({expert.reference}) that the artifact's "
            f"experts do not have; their heads: {some(heads)}.\n  All experts of one artifact need "
            "the same kind of head (classes may differ)."
        )
    if tensor.kind == "head":
        return
    if record.shape != tensor.shape:
        raise ShapeMismatch(
            str(_other_base(plan, tensor.name, f"{record.shape} here, {tensor.shape} in this base"))
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    if record.dtype != dtype:
        raise _other_base(plan, tensor.name, f"stored as {record.dtype}, of this base as {dtype}")
    if record.kind == tensor.kind:
        return
    if tensor.kind == "base_only":
        raise MissingTensor(
            f"{tensor.name}: the artifact's experts have it, {whose} ({expert.reference}) does not."
            f"\n  Save '{expert.name}' again with all its weights, or leave it out."
        )
    if record.kind == "base_only":
        raise MissingTensor(
            f"{tensor.name}: {whose} ({expert.reference}) has it, the artifact's experts do not: "
            f"they have the base's.\n  Save '{expert.name}' without it, or build again with all."
        )
    raise _other_base(plan, tensor.name, f"a {record.kind} here, a {tensor.kind} in this base")


def _other_base(plan: Plan, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {what} ({plan.base.reference}).\n  It is not the base that the artifact was "
        "built from: say where that one is (--base, base=)."
    )


def _with_head_dtypes(manifest: Manifest, tensors: Sequence[Planned]) -> list[Planned]:
    """Heads stored in no narrower dtype than the others' are."""
    held = {_key(r): getattr(torch, r.dtype) for r in manifest.tensors if r.kind == "head"}
    return [
        replace(t, dtype=torch.promote_types(t.dtype, held[t.key])) if t.kind == "head" else t
        for t in tensors
    ]


def _key(record: TensorRecord) -> str:
    return record.name + HEAD if record.kind == "head" else record.name


# ------------------------------------------------------------------------- the manifest


def without_expert(artifact: Artifact, name: str) -> Manifest:
    """The manifest without an expert and without a router.

    Raises `RecipeError` if there is no such expert, or no other.
    """
    manifest = artifact.manifest
    if name not in manifest.names:
        known = ", ".join(manifest.names)
        raise RecipeError(f"'{name}': no such expert. Known: {known}.")
    if len(manifest.names) == 1:
        raise RecipeError(
            f"'{name}': the only expert; without it nothing would be left to choose. Remove the "
            "folder instead, or add another expert first."
        )
    left = tuple(each for each in manifest.experts if each.name != name)
    added = _added(manifest, name)
    warnings = [w for w in _lasting(manifest) if not w.startswith(f"expert '{name}':")]
    if not added:
        warnings.append(_removed(name, manifest.files[expert_file(name)]))
    return _settled(
        manifest.model_copy(
            update={
                "experts": left,
                "tensors": tuple(_without(artifact, r, name, left) for r in manifest.tensors),
                "files": {k: v for k, v in manifest.files.items() if k != expert_file(name)},
                "recipe": manifest.recipe
                | {"models": [m for m in manifest.recipe["models"] if m.get("name") != name]},
                "warnings": tuple(warnings),
            }
        )
    )


def with_expert(manifest: Manifest, new: NewExpert, place: int | None = None) -> Manifest:
    """The manifest with a new expert at `place` (default: the last), and without a router."""
    place = len(manifest.experts) if place is None else place
    experts = [*manifest.experts]
    experts.insert(place, new.record)
    names = [each.name for each in experts]
    models = [*manifest.recipe["models"]]
    models.insert(place, new.entry)
    merged = [n for n in manifest.names if not _added(manifest, n)]
    warnings = [*_lasting(manifest), *new.warnings]
    if (gone := _removed(new.name, new.file)) in warnings:
        warnings.remove(gone)  # it comes back
    else:
        warnings.append(
            f"expert '{new.name}': was added later and is no part of the shared expert "
            f"({manifest.recipe.get('merge_method')} of those merged, of which "
            f"{', '.join(merged) or 'none'} are here); a build of this recipe merges it too and "
            "gives another one."
        )
    files = manifest.files | {expert_file(new.name): new.file}
    return _settled(
        manifest.model_copy(
            update={
                "experts": tuple(experts),
                "tensors": tuple(_with(r, new, names) for r in manifest.tensors),
                "files": {expert_file(n): files[expert_file(n)] for n in names} | files,
                "recipe": manifest.recipe | {"models": models},
                "warnings": tuple(warnings),
            }
        )
    )


def _removed(name: str, file: FileRecord) -> str:
    """The warning that an expert went; the digest tells if the same one comes back."""
    return (
        f"'{name}' was removed (its file's SHA-256 began {file.sha256[:12]}); it is still part of "
        "the shared expert."
    )


def _added(manifest: Manifest, name: str) -> bool:
    """Whether an expert was added after the build."""
    return any(w.startswith(f"expert '{name}': was added later") for w in manifest.warnings)


def _lasting(manifest: Manifest) -> list[str]:
    return [w for w in manifest.warnings if not w.startswith(UNBUILDABLE)]


def _settled(manifest: Manifest) -> Manifest:
    """Without what is not known any more: the router, and how a budget was spent over all."""
    warnings = manifest.warnings
    try:
        Recipe.model_validate(dict(manifest.recipe))
    except RecipeError as problem:
        warnings = (*warnings, f"{UNBUILDABLE}{problem}")
    return manifest.model_copy(update={"router": None, "budget": None, "warnings": warnings})


def _with(record: TensorRecord, new: NewExpert, names: Sequence[str]) -> TensorRecord:
    key = _key(record)
    if key not in new.shares:
        return record
    shares = record.experts | {new.name: new.shares[key]}
    update: dict[str, Any] = {"experts": {n: shares[n] for n in names if n in shares}}
    if record.kind == "head":
        shape, dtype = new.heads[key]
        update["dtype"] = str(dtype).removeprefix("torch.")
        if names[0] == new.name:
            update["shape"] = shape
    return record.model_copy(update=update)


def _without(
    artifact: Artifact, record: TensorRecord, name: str, left: Sequence[ExpertRecord]
) -> TensorRecord:
    shares = {expert: share for expert, share in record.experts.items() if expert != name}
    update: dict[str, Any] = {"experts": shares}
    if record.kind == "head":  # told of the first, and in the dtype that holds all
        stored = [_stored_head(artifact, record.name, each.name) for each in left]
        widest = functools.reduce(torch.promote_types, (dtype for _, dtype in stored))
        update |= {"shape": stored[0][0], "dtype": str(widest).removeprefix("torch.")}
    return record.model_copy(update=update)


def _stored_head(
    artifact: Artifact, tensor: str, expert: str
) -> tuple[tuple[int, ...], torch.dtype]:
    with artifact.expert(expert) as tensors:
        head = tensors[tensor + HEAD]
        return tuple(head.shape), head.dtype


def summary(before: Manifest, after: Manifest, names: Mapping[str, str]) -> dict[str, Any]:
    """What changed in bytes, ranks and errors. names: {"added": NAME, "removed": NAME}, each or
    one of them."""
    result: dict[str, Any] = {
        "experts": list(after.names),
        "bytes_before": sum(file.bytes for file in before.files.values()),
        "bytes_after": sum(file.bytes for file in after.files.values()),
        "shared_unchanged": before.shared_files() == after.shared_files(),
    }
    if "removed" in names:
        gone = next(each for each in before.experts if each.name == names["removed"])
        result["removed"] = {"name": gone.name, "bytes": gone.bytes}
    if "added" in names:
        new = next(each for each in after.experts if each.name == names["added"])
        shares = [
            share
            for record in after.tensors
            if record.kind == "matrix" and (share := record.experts.get(new.name))
        ]
        ranks = [share.rank for share in shares if share.rank is not None]
        result["added"] = {
            "name": new.name,
            "reference": new.reference,
            "kind": "LoRA" if new.adapter else "full",
            "bytes": new.bytes,
            "least_rank": min(ranks, default=None),
            "most_rank": max(ranks, default=None),
            "mean_relative_error": (
                sum(share.error for share in shares) / len(shares) if shares else None
            ),
            "mean_relative_error_of_others": _others(after, new.name),
            "drift": new.drift,
        }
    result["warnings"] = [w for w in after.warnings if w not in before.warnings]
    return result


def _others(manifest: Manifest, name: str) -> float | None:
    """The mean error of the other experts' matrices: what to compare the new one's with."""
    errors = [
        share.error
        for record in manifest.tensors
        if record.kind == "matrix"
        for expert, share in record.experts.items()
        if expert != name
    ]
    return sum(errors) / len(errors) if errors else None
