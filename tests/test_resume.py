"""A build that was stopped, at whatever moment and by whatever, goes on to the same bytes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import randn
from safetensors.torch import load_file, save_file
from test_conformance import assert_same_files
from tiny import FAMILIES, Made, adapter, made, merge, opened, recipe, save

from twinmerge import cli
from twinmerge.artifact.tensorfile import HashedFile
from twinmerge.errors import CheckpointError, CorruptCheckpoint, NotFinite, OutputError
from twinmerge.merging import build as building
from twinmerge.merging import work
from twinmerge.merging.journal import Part, Workspace
from twinmerge.merging.work import Worker

WAYS: dict[str, dict[str, Any]] = {
    "rank": dict(exclusive={"rank": 3}),
    "budget": dict(
        merge_method="dare_ties",
        parameters={"density": 0.5},
        exclusive={"budget": "60%", "dtype": "int8"},
    ),
    "entries": dict(exclusive={"form": "magnitude", "density": 0.2, "scope": "all"}),
}
SHARDS = 3000
"""Bytes of a shard: the 14 kB become five."""


class Stopped(Exception):
    """What a test stops a build by."""


class Saboteur:
    """Counts what a build writes and, at the `at`-th write, does something else.

    With `half`, half of the data is written first (what cannot be halved is done).
    """

    def __init__(self, at: int, act: Callable[[], object], *, half: bool = False) -> None:
        self.at, self.act, self.half, self.count = at, act, half, 0

    def install(self, put: Callable[..., object] = setattr, *, links: bool = True) -> Saboteur:
        """put: `setattr`, for a process that will end, or `monkeypatch.setattr`"""
        write, append, text = HashedFile.write, Part.append, Path.write_text
        link, rename, copy = os.link, os.rename, shutil.copyfile

        def half_a_line(part: Part, line: Any) -> None:
            data = line.model_dump_json(exclude_defaults=True).encode()
            part._journal.write(data[: len(data) // 2])

        put(HashedFile, "write", lambda file, data: self._hit(
            lambda: write(file, data),
            lambda: write(file, memoryview(data)[: memoryview(data).nbytes // 2]),
        ))  # fmt: skip
        put(Part, "append", lambda part, line: self._hit(
            lambda: append(part, line), lambda: half_a_line(part, line)
        ))  # fmt: skip
        put(Path, "write_text", lambda path, words, **more: self._hit(
            lambda: text(path, words, **more), lambda: text(path, words[: len(words) // 2], **more)
        ))  # fmt: skip
        put(shutil, "copyfile", lambda one, two: self._hit(lambda: copy(one, two)))
        if links:
            put(os, "link", lambda one, two: self._hit(lambda: link(one, two)))
            put(os, "rename", lambda one, two: self._hit(lambda: rename(one, two)))
        return self

    def _hit(self, whole: Callable[[], Any], part: Callable[[], Any] | None = None) -> Any:
        self.count += 1
        if self.count == self.at:
            if self.half:
                (part or whole)()
            self.act()
        return whole()


def forked(work: Callable[[], object]) -> int:
    """Runs `work` in a child process: its exit code, or minus the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that forking a process with threads may hang it
        child = os.fork()
    if child == 0:
        code = 99
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 98
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def noted(out: Path) -> int:
    """Tensors that are done, says the journal."""
    path = Workspace(out).part(0, 1) / "journal.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Made:
    """Of one block and with heads: these tests build some hundred times."""
    family = FAMILIES["llama classifier"]
    family = dataclasses.replace(family, sizes=family.sizes | {"num_hidden_layers": 1})
    return made(family, tmp_path_factory.mktemp("llama"), ("math", "code"))


@pytest.fixture(scope="module")
def undisturbed(llama, tmp_path_factory) -> Callable[[str], tuple[Path, int]]:
    """Way -> the artifact of one build in one go, and the number of its writes."""
    done: dict[str, tuple[Path, int]] = {}

    def get(way: str) -> tuple[Path, int]:
        if way not in done:
            out = tmp_path_factory.mktemp("whole") / "out"
            with pytest.MonkeyPatch.context() as patch:
                counter = Saboteur(0, killed).install(patch.setattr)
                merged(llama, out, way)
            done[way] = out, counter.count
        return done[way]

    return get


def merged(made: Made, out: Path, way: str = "rank", **more: Any):
    """Builds; keywords are those of `build`, and of the recipe."""
    options = {"shard_bytes": SHARDS}
    options |= {key: more.pop(key) for key in ("shard_bytes", "progress", "restart") if key in more}
    return building.build(recipe(made.base, made.experts, **(WAYS[way] | more)), out, **options)


def resumed(made: Made, out: Path, way: str, monkeypatch, **more: Any) -> int:
    """Goes on with a build; how many tensors it did not do again."""
    seen, did, do = [], [], Worker.do
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "do", lambda self, tensor: did.append(tensor.key) or do(self, tensor))
        manifest = merged(made, out, way, progress=lambda *step: seen.append(step[0]), **more)
    before = len(manifest.tensors) - len(did)
    assert seen == list(range(before, len(manifest.tensors) + 1))
    assert len(set(did)) == len(did)
    return before


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------- killed


def moments(writes: int, count: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(1, writes + 1), count))


@pytest.mark.parametrize("half", [False, True], ids=["before a write", "inside of a write"])
@pytest.mark.parametrize("way", WAYS)
def test_a_build_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(
    way, half, llama, undisturbed, tmp_path, monkeypatch
):
    whole, writes = undisturbed(way)
    # 9 of each, 54 in all; the very last write is the move to the target.
    for at in {*moments(writes - 1, 8, seed=half), writes}:
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()

        def work(at=at, out=out):
            Saboteur(at, killed, half=half).install()
            merged(llama, out, way)

        assert forked(work) == -signal.SIGKILL
        if out.exists():
            assert (at, half) == (writes, True)  # killed right behind the move
            assert_same_files(out, whole)
            with pytest.raises(OutputError, match="it is not empty"):
                merged(llama, out, way)  # as ever, but what was left of the work goes
        else:
            assert left(out.parent) == [".out.building"]
            done = noted(out)
            assert resumed(llama, out, way, monkeypatch) == done
            assert_same_files(out, whole)
        assert left(out.parent) == ["out"]
        shutil.rmtree(out.parent)


@pytest.mark.parametrize("way", WAYS)
def test_a_build_that_is_killed_again_and_again_goes_on_every_time(
    way, llama, undisturbed, tmp_path, monkeypatch
):
    out, (whole, writes) = tmp_path / "out", undisturbed(way)
    draw, before = random.Random(way), 0
    for _ in range(12):

        def work():
            at, half = draw.randint(2, writes // 3), draw.random() < 0.5
            Saboteur(at, killed, half=half).install()
            merged(llama, out, way)

        assert forked(work) == -signal.SIGKILL
        draw.random()  # the child drew from a copy
        assert before <= noted(out) and left(tmp_path) == [".out.building"]
        before = noted(out)
    assert resumed(llama, out, way, monkeypatch) == before > 0
    assert_same_files(out, whole)
    assert left(tmp_path) == ["out"]


def test_an_empty_folder_that_was_there_stays_empty_until_the_end(
    llama, undisturbed, tmp_path, monkeypatch
):
    out, (whole, writes) = tmp_path / "out", undisturbed("rank")
    for at in (writes // 2, writes):
        out.mkdir()
        assert forked(lambda at=at: (Saboteur(at, killed).install(), merged(llama, out))) == -9
        assert left(out) == []
        resumed(llama, out, "rank", monkeypatch)
        assert_same_files(out, whole)
        shutil.rmtree(out)


# ------------------------------------------------------------------------- interrupted, disk full


@pytest.fixture
def started(llama, tmp_path) -> Callable[..., Path]:
    """Begins a build of `tmp_path/out` and stops it before tensor `at`."""

    def start(at: int = 8, made: Made = llama, way: str = "rank", **more: Any) -> Path:
        def progress(done: int, total: int, name: str) -> None:
            if done == at:
                raise Stopped

        with pytest.raises(Stopped):
            merged(made, tmp_path / "out", way, progress=progress, **more)
        assert left(tmp_path) == [".out.building"]
        return tmp_path / "out"

    return start


@pytest.mark.parametrize("at", [1, 25, 50])
def test_control_c_says_that_the_same_command_goes_on_and_it_does(at, llama, undisturbed, tmp_path):
    models = [{"model": folder, "name": name} for name, folder in llama.experts.items()]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": llama.base, "models": models} | WAYS["rank"]))
    words = ["merge", str(recipe), str(tmp_path / "out"), "--max-shard-bytes", str(SHARDS), "-q"]

    def work(sabotaged: bool) -> None:
        sys.argv = ["twinmerge", *words]
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        if sabotaged:  # a real signal, while the writer writes
            signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
            Saboteur(at, lambda: os.kill(os.getpid(), signal.SIGINT)).install()
        try:
            cli.main()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    assert forked(lambda: work(True)) == 130
    message = "stopped; the same command goes on where it was\n"
    assert (tmp_path / "stderr").read_text() == message
    assert (tmp_path / "stdout").read_text() == "" and not (tmp_path / "out").exists()
    assert forked(lambda: work(False)) == 0
    assert "math" in (tmp_path / "stdout").read_text()
    assert_same_files(tmp_path / "out", undisturbed("rank")[0])
    assert ".out.building" not in left(tmp_path)


@pytest.mark.parametrize("half", [False, True])
def test_a_disk_that_is_full_at_any_write_loses_nothing(
    half, llama, undisturbed, tmp_path, monkeypatch
):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    whole, writes = undisturbed("rank")
    out = tmp_path / "out"
    for at in range(1 + half, writes - 8, 15):  # links, which need no space, are not counted here
        with monkeypatch.context() as patch, pytest.raises(OutputError) as caught:
            Saboteur(at, full, half=half).install(patch.setattr, links=False)
            merged(llama, out)
        assert f"{out}: the disk is full; nothing was left there." in str(caught.value)
        assert not out.exists()
        done = noted(out)
        assert (f"kept in {tmp_path / '.out.building'}" in str(caught.value)) == (done > 0)
        assert resumed(llama, out, "rank", monkeypatch) == done
        assert_same_files(out, whole)
        assert left(tmp_path) == ["out"]
        shutil.rmtree(out)


def test_a_disk_that_stays_full_is_told_every_time_and_what_is_done_is_not_lost(
    llama, undisturbed, tmp_path, monkeypatch
):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = 0
    for at in (30, 8, 1, 30):
        with monkeypatch.context() as patch, pytest.raises(OutputError, match="disk is full"):
            Saboteur(at, full, half=True).install(patch.setattr, links=False)
            merged(llama, tmp_path / "out")
        assert noted(tmp_path / "out") >= before > (-1 if at == 30 else 0)
        before = noted(tmp_path / "out")
    assert resumed(llama, tmp_path / "out", "rank", monkeypatch) == before
    assert_same_files(tmp_path / "out", undisturbed("rank")[0])


# ----------------------------------------------------------------------- what a crash may leave


@pytest.mark.parametrize("cut", [1, 2, 40, 10**9])
def test_a_torn_last_line_is_done_again(cut, llama, undisturbed, started, monkeypatch):
    out = started()
    path = Workspace(out).part(0, 1) / "journal.jsonl"
    content, done = path.read_bytes(), noted(out)
    last = len(content.splitlines(keepends=True)[-1])
    path.write_bytes(content[: -min(cut, last - 1)])
    assert resumed(llama, out, "rank", monkeypatch) == done - 1
    assert_same_files(out, undisturbed("rank")[0])


@pytest.mark.parametrize("tail", [b"\0" * 512, b"\0" * 511 + b"\n", b'{"tensor": "x"}\n'])
def test_lines_that_are_none_are_cut_off(tail, llama, undisturbed, started, monkeypatch):
    # A file system that lost its last blocks leaves zeros.
    out = started()
    done = noted(out)
    with open(Workspace(out).part(0, 1) / "journal.jsonl", "ab") as file:
        file.write(tail)
    assert resumed(llama, out, "rank", monkeypatch) == done
    assert_same_files(out, undisturbed("rank")[0])


@pytest.mark.parametrize("number", [0, 3])
def test_a_flipped_digit_in_the_journal_is_seen_and_its_tensors_done_again(
    number, llama, undisturbed, started, monkeypatch
):
    out = started()
    path = Workspace(out).part(0, 1) / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    digit = lines[number].index(b'"spool_end":') + len(b'"spool_end":')
    changed = b"8" if lines[number][digit : digit + 1] != b"8" else b"9"
    lines[number] = lines[number][:digit] + changed + lines[number][digit + 1 :]
    path.write_bytes(b"".join(lines))
    assert resumed(llama, out, "rank", monkeypatch) == number
    assert_same_files(out, undisturbed("rank")[0])


def test_bytes_behind_the_last_line_are_cut_off(llama, undisturbed, started, monkeypatch):
    out = started()
    folder, done = Workspace(out).part(0, 1), noted(out)
    newest = max(folder.glob("model*"), key=lambda path: path.name)
    for path in (newest, folder / "experts.spool"):
        with open(path, "ab") as file:
            file.write(b"half a tensor")
    assert resumed(llama, out, "rank", monkeypatch) == done
    assert_same_files(out, undisturbed("rank")[0])


def test_a_file_of_the_next_shard_that_no_line_tells_of_is_written_anew(
    llama, undisturbed, started, monkeypatch
):
    out = started()
    folder = Workspace(out).part(0, 1)
    begun = sorted(path.name for path in folder.glob("model*"))
    unborn = begun[-1].replace(f"{len(begun):05}-of", f"{len(begun) + 1:05}-of")
    (folder / unborn).write_bytes(b"x" * 10_000)
    resumed(llama, out, "rank", monkeypatch)
    assert_same_files(out, undisturbed("rank")[0])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "way"),
    [("last byte", way) for way in WAYS]
    + [(damage, "rank") for damage in ("first byte", "cut", "gone", "emptied")],
)
def test_what_was_damaged_is_named_and_begun_anew_on_request(
    damage, way, llama, undisturbed, started, monkeypatch
):
    out = started(9, way=way)
    folder, done = Workspace(out).part(0, 1), noted(out)
    journal = (folder / "journal.jsonl").read_bytes().splitlines()
    lines = [json.loads(line.partition(b" ")[2]) for line in journal]
    ends = {line["file"]: line["end"] for line in lines}
    ends["experts.spool"] = lines[-1]["spool_end"]
    assert len(ends) > 2
    for name, end in ends.items():
        path = folder / name
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        elif damage == "cut":
            os.truncate(path, end - 1)
        elif damage == "emptied":
            os.truncate(path, 0)
        else:
            flip(path, 0 if damage == "first byte" else end - 1)
        with pytest.raises(OutputError) as caught:
            merged(llama, out, way)
        assert str(path) in str(caught.value) and "--restart" in str(caught.value)
        assert ("is gone" in str(caught.value)) == (damage == "gone")
        assert not out.exists() and noted(out) == done
        path.write_bytes(content)
    flip(path, 0)
    assert resumed(llama, out, way, monkeypatch, restart=True) == 0
    assert_same_files(out, undisturbed(way)[0])
    assert left(out.parent) == ["out"]


def test_a_build_that_has_just_begun_may_be_restarted_too(
    llama, undisturbed, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    folder = Workspace(out).part(0, 1)
    folder.mkdir(parents=True)
    for text in ("", '{"twinmerge": "0.'):  # killed while build.json was written
        (folder / "build.json").write_text(text)
        assert resumed(llama, out, "rank", monkeypatch, restart=bool(text)) == 0
        assert_same_files(out, undisturbed("rank")[0])
        shutil.rmtree(out)
        folder.mkdir(parents=True)


# --------------------------------------------------------------------------- another build


OTHERS = [
    (dict(exclusive={"rank": 4}), "recipe.exclusive.rank was 3 and is now 4"),
    (dict(exclusive={"energy": 0.5}), "recipe.exclusive"),
    (dict(seed=5), "recipe.seed was 0 and is now 5"),
    (dict(out_dtype="bfloat16"), "recipe.out_dtype was None and is now 'bfloat16'"),
    (dict(merge_method="task_arithmetic"), "recipe.merge_method was 'linear' and is now"),
    (dict(shard_bytes=7000), "shard_bytes was 3000 and is now 7000"),
]


def test_another_build_does_not_go_on_with_this_one(llama, undisturbed, started, monkeypatch):
    out = started()
    done = noted(out)
    for changes, words in OTHERS:
        with pytest.raises(OutputError) as caught:
            merged(llama, out, **changes)
        message = str(caught.value)
        assert "holds an unfinished build, but" in message and words in message
        assert str(out.parent / ".out.building") in message and "--restart" in message
        assert noted(out) == done
    assert resumed(llama, out, "rank", monkeypatch) == done  # the same one does
    assert_same_files(out, undisturbed("rank")[0])


def test_restart_begins_another_build_in_its_place(llama, started, tmp_path, monkeypatch):
    out = started()
    merged(llama, out, exclusive={"rank": 4}, restart=True)
    merged(llama, tmp_path / "plain", exclusive={"rank": 4})
    assert_same_files(out, tmp_path / "plain")


@pytest.mark.parametrize("library", ["twinmerge", "torch"])
def test_another_version_does_not_go_on_with_this_one(
    library, llama, undisturbed, started, monkeypatch
):
    out = started()
    with monkeypatch.context() as patch:
        if library == "twinmerge":
            patch.setattr(building, "__version__", "99.0")
        else:
            patch.setattr(torch, "__version__", "99.0")
        with pytest.raises(OutputError, match=rf"{library} was '.*' and is now '99.0'"):
            merged(llama, out)
    resumed(llama, out, "rank", monkeypatch)
    assert_same_files(out, undisturbed("rank")[0])


def test_what_the_artifact_does_not_depend_on_may_change(llama, started, monkeypatch):
    out = started()
    done = noted(out)
    assert resumed(llama, out, "rank", monkeypatch, router={"seed": 7}) == done


def test_an_unfinished_build_of_another_division_is_left_alone(llama, undisturbed, tmp_path):
    out = tmp_path / "out"
    asked = recipe(llama.base, llama.experts, **WAYS["rank"])
    building.build_part(asked, out, 1, 3, shard_bytes=SHARDS)
    kept = sorted(Workspace(out).part(1, 3).iterdir())
    assert len(kept) > 3

    def stop(*_):
        raise Stopped

    with pytest.raises(Stopped):
        merged(llama, out, progress=stop)  # somebody forgot --num-shards and stopped at once
    assert sorted(Workspace(out).part(1, 3).iterdir()) == kept
    for index in (0, 2):
        building.build_part(asked, out, index, 3, shard_bytes=SHARDS)
    building.join_parts(asked, out, 3, shard_bytes=SHARDS)
    assert_same_files(out, undisturbed("rank")[0])
    assert left(tmp_path) == ["out"]


# ------------------------------------------------------------------------------ two at once


def test_two_processes_do_not_build_the_same_at_once(llama, undisturbed, tmp_path):
    out, refused = tmp_path / "out", []

    def progress(done: int, total: int, name: str) -> None:
        if done in (0, 6, total):
            with pytest.raises(OutputError, match="another process is building here right now"):
                merged(llama, out)
            with pytest.raises(OutputError, match="another process is building here right now"):
                merged(llama, out, restart=True)

            def other() -> None:
                try:
                    merged(llama, out)
                except OutputError:
                    raise SystemExit(17) from None

            refused.append(forked(other))

    merged(llama, out, progress=progress)
    assert refused == [17] * 3
    assert_same_files(out, undisturbed("rank")[0])
    assert left(tmp_path) == ["out"]


def test_the_lock_goes_with_the_process_that_held_it(llama, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert forked(lambda: (Saboteur(30, killed).install(), merged(llama, out))) == -9
    resumed(llama, out, "rank", monkeypatch)
    assert_same_files(out, undisturbed("rank")[0])


# ------------------------------------------------------------------------ sources that change


@pytest.fixture
def own(llama, tmp_path) -> Made:
    """The family in a folder of this test's own; the base in shards."""
    folder = tmp_path / "models"
    experts = {
        name: shutil.copytree(path, folder / name, copy_function=shutil.copy2)
        for name, path in llama.experts.items()
    }
    base = save(opened(llama.family.base, llama.base), folder / "base", max_shard_size="3KB")
    assert len(list(Path(base).glob("*.safetensors"))) > 2
    return Made(llama.family, base, {name: str(path) for name, path in experts.items()})


@pytest.fixture
def begun(own, tmp_path) -> Path:
    def progress(done: int, total: int, name: str) -> None:
        if done == 8:
            raise Stopped

    with pytest.raises(Stopped):
        merged(own, tmp_path / "out", progress=progress)
    return tmp_path / "out"


def resave(path: Path, change: Callable[[dict], object], **metadata: str) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"} | metadata)


def doubled(tensors: dict) -> None:
    name = min(tensors)
    tensors[name] = 2 * tensors[name]


CHANGES: dict[str, Callable[[Path], object]] = {
    "touched": lambda path: os.utime(path),
    "another size": lambda path: resave(path, lambda tensors: None, more="metadata" * 8),
    "replaced": lambda path: resave(path, doubled),  # the same size
}


@pytest.mark.parametrize("whose", ["math", "base"])
def test_a_source_that_changed_since_is_named(whose, own, begun, tmp_path, monkeypatch):
    folder = own.base if whose == "base" else own.experts[whose]
    path = max(Path(folder).glob("*.safetensors"))
    shutil.copy2(path, tmp_path / "before")
    done = noted(begun)
    for change in CHANGES.values():
        change(path)
        with pytest.raises(OutputError) as caught:
            merged(own, begun)
        assert f"the source {path} was changed since" in str(caught.value)
        assert "--restart" in str(caught.value) and noted(begun) == done
        shutil.copy2(tmp_path / "before", path)  # put back, time and all
    assert resumed(own, begun, "rank", monkeypatch) == done
    merged(own, tmp_path / "plain")
    assert_same_files(begun, tmp_path / "plain")


def test_restart_takes_a_changed_source_as_it_is_now(own, begun, tmp_path):
    resave(Path(own.experts["code"], "model.safetensors"), doubled)
    merged(own, begun, restart=True)
    merged(own, tmp_path / "plain")
    assert_same_files(begun, tmp_path / "plain")


def test_a_config_that_changed_is_a_source_too(own, begun):
    path = Path(own.experts["code"], "config.json")
    path.write_text(path.read_text() + "\n")
    with pytest.raises(OutputError, match=rf"the source {path} was changed since"):
        merged(own, begun)


def test_an_adapter_that_changed_is_named(tmp_path, zoo):
    import transformers as tf

    llama = zoo.made("llama")
    options = dict(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", lora_alpha=4)
    experts = {
        name: adapter(opened(tf.LlamaForCausalLM, llama.base), tmp_path / name, name, **options)
        for name in ("one", "two")
    }
    made = Made(llama.family, llama.base, experts)

    def progress(done: int, total: int, name: str) -> None:
        if done == 20:
            raise Stopped

    with pytest.raises(Stopped):
        merged(made, tmp_path / "out", progress=progress)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = Path(experts["two"], name)
        before = path.stat()
        os.utime(path)
        with pytest.raises(OutputError, match=rf"the source {path} was changed since"):
            merged(made, tmp_path / "out")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    merged(made, tmp_path / "out")
    merged(made, tmp_path / "plain")
    assert_same_files(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize(
    ("at", "whose"), [(0, "code"), (5, "code"), (12, "code"), (0, "base"), (5, "base")]
)
def test_a_shard_that_vanishes_half_way_may_come_back(at, whose, own, tmp_path, monkeypatch):
    out = tmp_path / "out"
    folder = own.base if whose == "base" else own.experts[whose]
    path = max(Path(folder).glob("*.safetensors"))

    def progress(done: int, total: int, name: str) -> None:
        if done == at:
            path.rename(tmp_path / "away")

    with pytest.raises(CorruptCheckpoint) as caught:
        merged(own, out, progress=progress)
    assert str(path) in str(caught.value) and not out.exists()
    done = noted(out)
    assert at == 0 or done >= at - 2  # the last two may be under way
    with pytest.raises(CheckpointError, match=path.name):
        merged(own, out)  # still away: still told, nothing lost
    assert noted(out) == done
    (tmp_path / "away").rename(path)
    assert resumed(own, out, "rank", monkeypatch) == done
    merged(own, tmp_path / "plain")
    assert_same_files(out, tmp_path / "plain")
    assert left(tmp_path) == ["models", "out", "plain"]


@pytest.mark.parametrize("at", [5, 12])
def test_a_shard_that_is_written_to_half_way_is_told(at, own, tmp_path):
    path = Path(own.experts["code"], "model.safetensors")

    def progress(done: int, total: int, name: str) -> None:
        if done == at:
            resave(path, doubled)

    with pytest.raises(CorruptCheckpoint, match=str(path)):
        merged(own, tmp_path / "out", progress=progress)
    with pytest.raises(OutputError, match=rf"(?s)the source {path} was changed since.*--restart"):
        merged(own, tmp_path / "out")
    merged(own, tmp_path / "out", restart=True)
    merged(own, tmp_path / "plain")
    assert_same_files(tmp_path / "out", tmp_path / "plain")


# ------------------------------------------------------------------------- what is of no use


@pytest.mark.parametrize(
    ("bad", "whose"), [(float("inf"), "code"), (float("-inf"), "base"), (float("nan"), "code")]
)
def test_a_checkpoint_that_is_not_finite_leaves_nothing_behind(bad, whose, own, tmp_path):
    folder = own.base if whose == "base" else own.experts[whose]
    name = "model.layers.0.self_attn.v_proj.weight"
    path = next(p for p in Path(folder).glob("*.safetensors") if name in load_file(p))
    resave(path, lambda tensors: tensors[name].view(-1)[3:4].fill_(bad))
    before = left(tmp_path)
    who = "the base" if whose == "base" else "expert 'code'"
    with pytest.raises(NotFinite, match=rf"v_proj.weight: .*{who} .* 1 NaN or inf"):
        merged(own, tmp_path / "out")
    assert left(tmp_path) == before


def test_a_tensor_that_was_overwritten_while_it_was_in_work_is_never_noted_as_done(
    tmp_path, monkeypatch
):
    # Large tensors are the file itself: what was checked when it was opened may change under it.
    models = tmp_path / "models"
    weights = {f"layer.{i}.weight": randn(600, 600, seed=i) for i in range(3)}
    for name, scale in {"base": 0.0, "math": 0.01, "code": 0.02}.items():
        (models / name).mkdir(parents=True)
        own = {key: w + scale * randn(600, 600, seed=9) for key, w in weights.items()}
        save_file(own, models / name / "model.safetensors")
        config = {"model_type": "bert", "architectures": ["BertModel"]}
        (models / name / "config.json").write_text(json.dumps(config))
    experts = {name: str(models / name) for name in ("math", "code")}
    merge(str(models / "base"), experts, tmp_path / "plain", exclusive={"rank": 2})
    path = models / "math" / "model.safetensors"
    content, before, read, count = path.read_bytes(), path.stat(), work.read_step, []

    def read_step(plan, tensor, **options):
        step = read(plan, tensor, **options)
        count.append(tensor.name)
        if len(count) == 2:
            with open(path, "r+b") as file:
                file.seek(len(content) // 8)
                file.write(bytes(len(content) // 2))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        return step

    monkeypatch.setattr(work, "read_step", read_step)
    out = tmp_path / "out"
    with pytest.raises(CorruptCheckpoint, match="written to since"):
        merge(str(models / "base"), experts, out, exclusive={"rank": 2})
    assert noted(out) == 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    merge(str(models / "base"), experts, out, exclusive={"rank": 2})
    assert_same_files(out, tmp_path / "plain")


def test_what_could_not_be_read_does_not_cost_what_was_done(own, tmp_path, monkeypatch):
    out, read, count = tmp_path / "out", work.read_step, []

    def stale(plan, tensor, **options):
        count.append(tensor.name)
        if len(count) == 6:
            raise CheckpointError("a file that can be read, got Stale file handle") from OSError()
        return read(plan, tensor, **options)

    monkeypatch.setattr(work, "read_step", stale)
    with pytest.raises(CheckpointError, match="Stale"):
        merged(own, out)
    assert noted(out) >= 5
