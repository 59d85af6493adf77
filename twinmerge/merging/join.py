"""The parts of a build put together: files of the shared expert, experts' files, manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .. import __version__
from ..artifact.card import model_card
from ..artifact.format import (
    FORMAT_VERSION,
    MANIFEST,
    RECIPE,
    B,
    BudgetRecord,
    ExpertRecord,
    FileRecord,
    Manifest,
    Share,
    TensorRecord,
    expert_file,
)
from ..artifact.tensorfile import (
    Entry,
    HashedFile,
    TensorFileWriter,
    layout,
    size_of,
)
from ..recipe import Recipe
from .budget import Key, spend, spend_evenly
from .copies import copy_files, tokenizer_warnings
from .journal import Line, Piece, Spool, Workspace, read_spool
from .plan import Plan
from .segments import Segment, shared_layout
from .shared.blocks import blocks, largest
from .sparse import count_of, select
from .stream import drift_warnings, pairs, refuse_twins
from .work import DENSE, check_part


@dataclass
class Finished:
    """One part that is done: its folder and its lines."""

    folder: Path
    lines: list[Line]


@dataclass
class Pieces:
    """One expert's part of one tensor, and where it lies."""

    spool: BinaryIO
    pieces: tuple[Piece, ...]
    share: Share
    rank: int | None = None
    """Cut to this rank on reading, where a budget says so."""

    def entries(self, tensor: str) -> list[tuple[Entry, Piece]]:
        out = []
        for piece in self.pieces:
            shape = piece.shape
            if self.rank is not None:
                by_column = piece.suffix == B
                shape = (shape[0], self.rank) if by_column else (self.rank, *shape[1:])
            out.append(((tensor + piece.suffix, getattr(torch, piece.dtype), shape), piece))
        return out

    def read(self, piece: Piece) -> Tensor:
        tensor = read_spool(self.spool, piece)
        if self.rank is None:
            return tensor
        return tensor[:, : self.rank].contiguous() if piece.suffix == B else tensor[: self.rank]


def join(
    plan: Plan,
    workspace: Workspace,
    parts: Sequence[Finished],
    shards: dict[str, list[Segment]],
    written: Recipe,
) -> Manifest:
    """Put the artifact together from finished parts and move it to its place.

    Raises `CheckpointError` if two experts are one and the same.
    """
    lines = {line.tensor: (part, line) for part in parts for line in part.lines}
    names = [expert.name for expert in plan.experts]
    alike = pairs(len(names))
    for _, line in lines.values():
        alike -= set(line.unlike)
    refuse_twins(names, alike)
    whole = workspace.whole
    workspace.moving.unlink(missing_ok=True)
    shutil.rmtree(whole, ignore_errors=True)
    (whole / "experts").mkdir(parents=True)
    spools: dict[int, BinaryIO] = {
        id(part): open(part.folder / "experts.spool", "rb") for part in parts
    }
    try:
        kept: dict[Key, Pieces] = {}
        for tensor in plan.tensors:
            part, line = lines[tensor.key]
            for name, share in line.shares.items():
                pieces = Pieces(spools[id(part)], line.pieces.get(name, ()), share)
                kept[tensor.key, name] = pieces
        if plan.keep.scope_all:
            chosen = workspace.folder / "chosen.spool"
            with HashedFile(chosen) as file:
                spools[0] = open(chosen, "rb")
                choose_entries(plan, kept, Spool(file), spools[0])
        budget = spend_budget(plan, lines, kept) if plan.keep.budget is not None else None
        files = {
            expert_file(name): write_expert(plan, name, kept, whole / expert_file(name))
            for name in names
        }
        if budget is not None:
            # Until now with headers as long as they may get.
            used = sum(file.bytes for file in files.values())
            budget = budget.model_copy(update={"spent": used})
    finally:
        for spool in spools.values():
            spool.close()
    for file, segments in shards.items():
        files[file] = _join_shard(whole / file, segments, lines)
    files |= copy_files(plan, whole, {file: [t for s in each for t in s.tensors]
                                      for file, each in shards.items()})  # fmt: skip
    drift = drift_of(plan, [line for _, line in lines.values()])
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
                drift=drift[entry.name],
                bytes=files[expert_file(entry.name)].bytes,
            )
            for expert, entry in zip(plan.experts, written.models, strict=True)
        ),
        tensors=tuple(
            TensorRecord(
                name=tensor.name,
                kind=tensor.kind,
                shape=tensor.shape,
                dtype=str(tensor.dtype).removeprefix("torch."),
                bytes=tensor.bytes,
                matrix=tensor.matrix,
                tied_to=tensor.tied_to,
                experts={
                    name: kept[tensor.key, name].share
                    for name in names
                    if (tensor.key, name) in kept
                },
            )
            for tensor in sorted(plan.tensors, key=lambda t: t.name)
        ),
        files=files,
        budget=budget,
        warnings=(*plan.warnings, *drift_warnings(drift), *tokenizer_warnings(plan)),
        versions={
            "twinmerge": __version__,
            "torch": torch.__version__,
            "safetensors": version("safetensors"),
        },
    )
    (whole / RECIPE).write_text(written.to_yaml(), encoding="utf-8")
    (whole / "README.md").write_text(model_card(manifest), encoding="utf-8")
    (whole / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    workspace.finish(part.folder for part in parts)
    return manifest


def drift_of(plan: Plan, lines: Sequence[Line]) -> dict[str, float]:
    """‖W_t - W_0‖ / ‖W_0‖ over all matrices, by expert."""
    # Added up in one order, whoever built which part: the same bits.
    ordered = sorted(lines, key=lambda line: line.tensor)
    base = sum(line.base_square for line in ordered)
    out = {}
    for index, expert in enumerate(plan.experts):
        moved = sum(line.moved[index] for line in ordered if line.moved)
        out[expert.name] = (moved / base) ** 0.5 if base else 0.0
    return out


# ---------------------------------------------------------------------------- the shared expert


def _join_shard(
    path: Path, segments: Sequence[Segment], lines: dict[str, tuple[Finished, Line]]
) -> FileRecord:
    """One file of the shared expert: the one that a part wrote whole, or put together."""
    if len(segments) == 1:
        part, line = lines[segments[0].tensors[-1].key]
        source = part.folder / segments[0].file
        try:
            os.link(source, path)  # not moved: should we be killed now, the part is still whole
        except OSError:
            shutil.copyfile(source, path)
        return FileRecord(bytes=line.end, sha256=line.sha256)
    with HashedFile(path) as file:
        file.write(shared_layout([t for segment in segments for t in segment.tensors]).header)
        for segment in segments:
            part, _ = lines[segment.tensors[-1].key]
            with open(part.folder / segment.file, "rb") as source:
                while chunk := source.read(1 << 22):
                    file.write(chunk)
        return file.close()


# ------------------------------------------------------------------------------ experts' files


def write_expert(plan: Plan, name: str, kept: dict[Key, Pieces], path: Path) -> FileRecord:
    """One expert's file: parts in the order of the tensors, the widest dtypes first."""
    found = []
    for tensor in plan.tensors:
        pieces = kept.get((tensor.key, name))
        if pieces is not None and not pieces.share.empty:
            found += [(entry, pieces, piece) for entry, piece in pieces.entries(tensor.name)]
    found.sort(key=lambda item: -item[0][1].itemsize)
    with TensorFileWriter(path, layout(entry for entry, _, _ in found)) as writer:
        for entry, pieces, piece in found:
            writer.add(entry[0], pieces.read(piece))
        return writer.close()


def spend_budget(
    plan: Plan, lines: dict[str, tuple[Finished, Line]], kept: dict[Key, Pieces]
) -> BudgetRecord:
    """Set the ranks in `kept` to what the budget buys; says what was bought and what it gained."""
    assert plan.keep.budget is not None
    candidates = {
        (tensor, name): candidate
        for tensor, (_, line) in lines.items()
        for name, candidate in line.candidates.items()
    }
    matrices = {t.key: t.matrix for t in plan.tensors if t.kind == "matrix" and t.matrix}
    costs = {t.key: plan.keep.component_bytes(t) for t in plan.tensors if t.kind == "matrix"}
    fixed = _fixed_bytes(plan, kept, candidates)
    left = max(0, plan.keep.budget - fixed)
    spent, even = spend(candidates, costs, left), spend_evenly(candidates, costs, left)
    reached = 0
    for key, candidate in candidates.items():
        rank, square = spent.ranks[key], candidate.squares[0]
        shape = matrices[key[0]]
        reached += rank == plan.keep.cut.limit(*shape) < min(shape)
        if rank == len(candidate.squares) - 1:
            continue  # all of it: its errors were measured better than as differences of squares

        def share(part: float, whole: float = square) -> float:
            return (max(part, 0.0) / whole) ** 0.5 if whole else 0.0

        error = share(candidate.squares[rank])
        kept[key].rank = rank
        kept[key].share = kept[key].share.model_copy(
            update={
                "rank": rank,
                "bytes": rank * costs[key[0]],
                "error": error,
                "truncation": min(error, share(square - candidate.captured[rank])),
                "bound": min(error, share(square - candidate.captured[rank] - candidate.missed)),
            }
        )
    total = sum(candidate.squares[0] for candidate in candidates.values())
    return BudgetRecord(
        bytes=plan.keep.budget,
        spent=fixed + spent.bytes,
        error=(spent.square / total) ** 0.5 if total else 0.0,
        even_error=(even.square / total) ** 0.5 if total else 0.0,
        even_rank=_typical(even.ranks.values()),
        at_reach=reached,
    )


def _typical(ranks) -> int:
    ordered = sorted(ranks)
    return ordered[len(ordered) // 2] if ordered else 0


def _fixed_bytes(plan: Plan, kept: dict[Key, Pieces], candidates: dict) -> int:
    """What experts' files take without factors: vectors, heads, and the longest headers."""
    total = 0
    for name in (expert.name for expert in plan.experts):
        entries: list[Entry] = []
        for tensor in plan.tensors:
            pieces = kept.get((tensor.key, name))
            if pieces is not None:
                entries += [entry for entry, _ in pieces.entries(tensor.name)]
                if (tensor.key, name) not in candidates:
                    total += sum(size_of(entry) for entry, _ in pieces.entries(tensor.name))
        entries.sort(key=lambda entry: -entry[1].itemsize)
        total += len(layout(entries).header)
    return total


def choose_entries(plan: Plan, kept: dict[Key, Pieces], spool: Spool, reader: BinaryIO) -> None:
    """Replace whole differences in `kept` by the largest entries of all matrices of each expert.

    These go to `spool`, which `reader` reads.
    """
    for name in (expert.name for expert in plan.experts):
        mine = [
            (tensor, kept[tensor.key, name])
            for tensor in plan.tensors
            if (tensor.key, name) in kept
            and [piece.suffix for piece in kept[tensor.key, name].pieces] == [DENSE]
        ]
        total = sum(torch.Size(tensor.shape).numel() for tensor, _ in mine)
        row = _Row([pieces for _, pieces in mine])
        where, start = largest(row, total, count_of(total, plan.keep.density)), 0
        for tensor, pieces in mine:
            delta = pieces.read(pieces.pieces[0])
            entries = select(delta, where, start, plan.keep.dtype_of(tensor))
            start += delta.numel()
            check_part(entries.stored, entries.error, tensor, name)
            stored = entries.stored if entries.count else {}
            kept[tensor.key, name] = Pieces(
                reader,
                tuple(spool.add(suffix, part) for suffix, part in stored.items()),
                Share(
                    storage=entries.storage,
                    entries=entries.count,
                    bytes=sum(part.nbytes for part in stored.values()),
                    error=entries.error,
                ),
            )


@dataclass(frozen=True)
class _Row:
    """Many tensors of a spool as one row of entries, in blocks, as often as asked."""

    tensors: Sequence[Pieces]

    def __iter__(self) -> Iterator[Tensor]:
        found = [(pieces, pieces.pieces[0]) for pieces in self.tensors]
        wide = any(piece.dtype == "float64" for _, piece in found)
        for pieces, piece in found:
            tensor = pieces.read(piece)
            yield from blocks(tensor.double() if wide else tensor)


def unfinished(parts: Sequence[Finished], segments: Sequence[Sequence[Segment]]) -> list[int]:
    """Indices of parts that have not done all their tensors."""
    out = []
    for index, (part, mine) in enumerate(zip(parts, segments, strict=True)):
        due = [tensor.key for segment in mine for tensor in segment.tensors]
        if [line.tensor for line in part.lines] != due:
            out.append(index)
    return out
