"""The conductor: a recipe in, an artifact out.

One pass over the tensors: each is read once, merged, cut, written and forgotten, so that memory
does not grow with the model. The next tensors are read ahead and the last one is written while this
one is computed. What is done is noted in a journal beside the target; a build that was killed goes
on from there, and a build that is divided over machines is put together from several, to the same
bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from .. import __version__
from ..artifact.format import FORMAT_VERSION, Manifest
from ..artifact.tensorfile import HashedFile, raw
from ..artifact.writer import check_space, check_target, explained
from ..errors import CorruptCheckpoint, OutputError, RecipeError, TwinMergeError
from ..recipe import Recipe
from .blocks import SMALL
from .join import Finished, join, unfinished
from .journal import Line, Part, Workspace
from .plan import Plan, make_plan
from .planned import Planned
from .segments import Segment, divide, shards_of, shared_layout
from .stream import pairs
from .threads import one_thread
from .work import Done, Worker

DEFAULT_SHARD_BYTES = 5_000_000_000
READ_AHEAD = 3
"""Tensors of which the kernel is told that they will be needed."""

Progress = Callable[[int, int, str], None]
"""Called with tensors done, tensors in all, and the name of the next."""


def build(
    recipe: Recipe,
    out: Path | str,
    *,
    written: Recipe | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    restart: bool = False,
) -> Manifest:
    """Merge as `recipe` says and write the artifact to the new folder `out`.

    `written` is the recipe as the user wrote it (before relative paths were resolved); it is what
    the artifact records. Shards of the shared expert hold at most `shard_bytes` of tensors, or one
    tensor. The folder appears only when complete. An unfinished build of the same recipe beside it
    is gone on with, or with `restart` thrown away.

    Raises `OutputError` if `out` is taken, the disk is full, or something else is being built
    there, `CheckpointError` and its kinds for what is wrong with a model; warnings of the manifest
    say what looks odd but was done.
    """
    with _prepared(recipe, out) as (plan, workspace):
        shards = shards_of(plan, shard_bytes)
        with _part(plan, workspace, 0, 1, shard_bytes, restart) as part:
            _work_through(plan, divide(plan, shards, 1)[0], part, progress)
            return _join(plan, workspace, shards, [part], written or recipe)


def build_part(
    recipe: Recipe,
    out: Path | str,
    index: int,
    count: int,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    restart: bool = False,
) -> None:
    """Do part `index` (from 0) of a build that is divided into `count` parts.

    Parts may run one after another, at once, or on machines that share the disk of `out`; when all
    are done, `join_parts` puts the artifact together. Raises what `build` raises.
    """
    with _prepared(recipe, out) as (plan, workspace):
        with _part(plan, workspace, index, count, shard_bytes, restart) as part:
            segments = divide(plan, shards_of(plan, shard_bytes), count)[index]
            _work_through(plan, segments, part, progress)


def join_parts(
    recipe: Recipe,
    out: Path | str,
    count: int,
    *,
    written: Recipe | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Manifest:
    """Put the `count` finished parts of a build together: the same bytes as `build` in one go.

    Raises `OutputError` if a part is missing, unfinished, or of another build.
    """
    with _prepared(recipe, out) as (plan, workspace), ExitStack() as stack:
        parts = []
        for index in range(count):
            folder = workspace.part(index, count)
            if not (folder / "build.json").is_file():
                raise OutputError(
                    f"{workspace.target}: part {index} of {count} was not built yet (there is no "
                    f"{folder}). Run it with --num-shards {count} --shard-index {index}, with the "
                    "same output folder."
                )
            parts.append(
                stack.enter_context(_part(plan, workspace, index, count, shard_bytes, False))
            )
        return _join(plan, workspace, shards_of(plan, shard_bytes), parts, written or recipe)


# ------------------------------------------------------------------------------------ one part


@contextmanager
def _prepared(recipe: Recipe, out: Path | str) -> Iterator[tuple[Plan, Workspace]]:
    """Everything that can be known to go wrong before the work."""
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"expected a Recipe, got {recipe!r:.80}. Read a file with twinmerge.load_recipe(path)."
        )
    out = Path(out)
    workspace = Workspace(out)
    workspace.tidy()
    check_target(out)
    plan = make_plan(recipe)
    try:
        with explained(workspace.target, kept=workspace.folder):
            if workspace.target.is_mount():
                raise OutputError(
                    f"{workspace.target}: a mount point, which a finished artifact cannot take the "
                    "place of. Name a folder inside of it."
                )
            done = workspace.bytes() if workspace.folder.is_dir() else 0
            check_space(workspace.target, plan.work_bytes() - done)
            yield plan, workspace
    finally:
        plan.close()


@contextmanager
def _part(
    plan: Plan, workspace: Workspace, index: int, count: int, shard_bytes: int, restart: bool
) -> Iterator[Part]:
    """A part's folder, held while the block runs; gone after an error that makes it useless."""
    folder, identity = workspace.part(index, count), _identity(plan, count, shard_bytes)
    part = Part(folder, identity, restart=restart)
    try:
        yield part
    except BaseException as problem:
        # What a broken model had us do is of no use. Anything else may be put right: the disk, a
        # file that was away or could not be read; or it is the user who stopped us.
        useless = (
            isinstance(problem, TwinMergeError)
            and not isinstance(problem, CorruptCheckpoint | OutputError)
            and not isinstance(problem.__cause__, OSError)
        )
        if useless or (count == 1 and not part.lines):
            part.discard()
        raise
    finally:
        part.close()


def _identity(plan: Plan, count: int, shard_bytes: int) -> dict[str, Any]:
    """What must not change while a build is under way: it decides every byte."""
    sources: dict[str, list[int]] = {}
    for model in (plan.base, *plan.experts):
        for name, identity in model.identity().items():
            sources[f"{model.folder / name}"] = list(identity)
    return {
        "twinmerge": __version__,
        "torch": torch.__version__,
        "format": FORMAT_VERSION,
        "parts": count,
        "shard_bytes": shard_bytes,
        "recipe": plan.recipe.model_dump(mode="json", exclude_none=True, exclude={"router"}),
        "sources": sources,
    }


def _work_through(
    plan: Plan,
    segments: Sequence[Segment],
    part: Part,
    progress: Progress | None,
) -> None:
    """Do what is not done yet."""
    alike = pairs(len(plan.experts))
    for line in part.lines:
        alike -= set(line.unlike)
    due = [tensor for segment in segments for tensor in segment.tensors]
    finished = told = len(part.lines)
    writer = _Writer(part, segments)
    try:
        with one_thread_each() as pool:
            worker = Worker(plan, pool, alike)
            for done, tensor in enumerate(due[finished:], finished):
                if progress:
                    progress(done, len(due), tensor.name)
                for ahead in due[told : done + READ_AHEAD]:
                    _prefetch(plan, ahead)
                told = max(told, done + READ_AHEAD)
                made = worker.do(tensor)
                check_sources(plan, tensor)
                writer.put(made)
        writer.finish()
    finally:
        writer.stop()
    if progress:
        progress(len(due), len(due), "")


def check_sources(plan: Plan, tensor: Planned) -> None:
    """Raise `CorruptCheckpoint` if a source of the tensor was written to while it was in work.

    Large tensors are the file itself: what they held when they were opened says nothing of now. A
    tensor must not be noted as done before this.
    """
    if tensor.kind != "head":
        plan.base.check(tensor.name)
    for expert in plan.experts if tensor.kind not in ("base_only", "tied") else ():
        if tensor.name not in expert.missing():
            expert.check(tensor.name)


def _prefetch(plan: Plan, tensor: Planned) -> None:
    if tensor.kind != "head":
        plan.base.prefetch(tensor.name)
    for expert in plan.experts if tensor.kind not in ("base_only", "tied") else ():
        if tensor.name not in expert.missing():
            expert.prefetch(tensor.name)


@contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Workers for one expert's matrix each, and one thread inside every operation.

    Sums inside an operation then add up in one order, so the bytes of an artifact do not depend on
    the number of cores; and small matrices gain nothing from threads of their own.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
    each = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with one_thread(), each as pool:
        yield pool


class _Writer:
    """Writes finished tensors in their order, in a thread of its own, and notes them as done."""

    def __init__(self, part: Part, segments: Sequence[Segment]) -> None:
        self._part = part
        self._due = [(segment, tensor) for segment in segments for tensor in segment.tensors]
        self._due = self._due[len(part.lines) :]
        self._open: tuple[Segment, HashedFile] | None = None
        self._problem: BaseException | None = None
        self._queue: Queue[Done | None] = Queue(maxsize=32)
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def put(self, done: Done) -> None:
        """Hand over the next tensor. Raises what went wrong with an earlier one."""
        # One is written while one is made: more would only hold memory. Small ones may queue, for
        # they are made faster than what is before them is written.
        if done.bytes >= SMALL:
            self._queue.join()
        self._queue.put(done)
        if self._problem is not None:
            raise self._problem

    def finish(self) -> None:
        """Wait until everything is written. Raises what went wrong."""
        self._queue.put(None)
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        assert not self._due, "every tensor was handed over"

    def stop(self) -> None:
        """End the thread, after an error too; files stay as they are."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _loop(self) -> None:
        while (done := self._queue.get()) is not None:
            if self._problem is None:
                try:
                    self._write(done)
                except BaseException as problem:  # told to the thread that hands over
                    self._problem = problem
            del done  # not to hold it while waiting for the next
            self._queue.task_done()

    def _write(self, done: Done) -> None:
        (segment, tensor), self._due = self._due[0], self._due[1:]
        assert tensor is done.tensor, "tensors come in their order"
        file = self._file(segment)
        if done.shared is not None:
            file.write(raw(done.shared))
        spool = self._part.spool
        pieces = {
            name: tuple(spool.add(suffix, part) for suffix, part in kept.tensors.items())
            for name, kept in done.kept.items()
        }
        self._part.append(
            Line(
                tensor=tensor.key,
                file=segment.file,
                end=file.length,
                sha256=file.sha256(),
                spool_end=spool.file.length,
                spool_sha256=spool.file.sha256(),
                pieces=pieces,
                shares={name: kept.share for name, kept in done.kept.items()},
                candidates={n: k.candidate for n, k in done.kept.items() if k.candidate},
                base_square=done.base_square,
                moved=done.moved,
                unlike=done.unlike,
            )
        )

    def _file(self, segment: Segment) -> HashedFile:
        if self._open is not None:
            if self._open[0] is segment:
                return self._open[1]
            self._open[1].close()
        begun = self._part.shared_file(segment.file)
        file = begun or HashedFile(self._part.folder / segment.file)
        self._open = segment, file
        if segment.complete and begun is None:
            file.write(shared_layout(segment.tensors).header)
        return file


# --------------------------------------------------------------------------------- all of them


def _join(
    plan: Plan,
    workspace: Workspace,
    shards: dict[str, list[Planned]],
    parts: Sequence[Part],
    written: Recipe,
) -> Manifest:
    divided = divide(plan, shards, len(parts))
    finished = [Finished(part.folder, part.lines) for part in parts]
    if missing := unfinished(finished, divided):
        raise OutputError(
            f"{workspace.target}: part {missing[0]} of {len(parts)} is not finished. Run it again "
            f"with --num-shards {len(parts)} --shard-index {missing[0]}: it goes on where it was."
        )
    segments: dict[str, list[Segment]] = {shard: [] for shard in shards}
    for segment in (segment for mine in divided for segment in mine):
        segments[segment.shard].append(segment)
    return join(plan, workspace, finished, segments, written)


__all__ = ["DEFAULT_SHARD_BYTES", "Progress", "build", "build_part", "join_parts"]
