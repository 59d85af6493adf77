"""`save_pretrained`, `from_pretrained`, `push_to_hub`: an artifact elsewhere, the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import router_by_hand
from huggingface_hub import errors as hub_errors
from test_conformance import assert_same_files

import twinmerge
from twinmerge.artifact.format import MANIFEST, ROUTER
from twinmerge.artifact.reader import Artifact
from twinmerge.errors import (
    ArtifactError,
    CorruptArtifact,
    InputError,
    OutputError,
)
from twinmerge.runtime import saving
from twinmerge.runtime.load import load
from twinmerge.runtime.model import TwinModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copied(bench, tmp_path) -> Path:
    """A copy of the routed artifact, to be broken."""
    return Path(shutil.copytree(bench.routed, tmp_path / "source"))


def inputs_of(twin: TwinModel) -> Any:
    return twin.tokenizer(["math1 the2", "code3 code4 the1"], return_tensors="pt", padding=True)


def prefer_code(twin: TwinModel) -> None:
    """Change the router so that every row is given to code, whatever it is."""
    network = router_by_hand(layer=1)
    with torch.no_grad():
        network.scorer.layers[-1].bias.copy_(torch.tensor([0.0, 1000.0, 0.0]))
    twin.router = network


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------------------------- to a folder


def test_a_saved_model_is_the_same_files_and_the_same_outputs(bench, tmp_path):
    twin = bench.model
    out = twin.save_pretrained(tmp_path / "deep" / "copy")
    assert out == tmp_path / "deep" / "copy"
    assert_same_files(bench.routed, out)
    again = TwinModel.from_pretrained(out)
    want, got = twin(**inputs_of(twin)), again(**inputs_of(again))
    assert torch.equal(got.logits, want.logits) and torch.equal(got.weights, want.weights)
    assert not leftovers(tmp_path / "deep")


def test_files_are_copies_that_share_nothing_with_their_source(bench, tmp_path):
    out = bench.model.save_pretrained(tmp_path / "copy")
    for path in out.rglob("*"):
        source = bench.routed / path.relative_to(out)
        assert path.is_dir() or (not path.is_symlink() and not path.samefile(source))


def test_without_a_router_too(bench, tmp_path):
    out = load(bench.plain).save_pretrained(tmp_path / "copy")
    assert_same_files(bench.plain, out)


def test_what_is_stored_does_not_depend_on_the_dtype_that_it_runs_in(bench, tmp_path):
    out = load(bench.routed, dtype="bfloat16").half().save_pretrained(tmp_path / "copy")
    assert_same_files(bench.routed, out)


def test_the_router_is_written_as_it_is_in_memory(copied, tmp_path):
    twin = load(copied)
    prefer_code(twin)
    out = twin.save_pretrained(tmp_path / "copy")
    again = load(out)  # all digests are right
    assert again(**inputs_of(again)).expert.tolist() == [1, 1]
    (one, other) = (Artifact(folder).manifest for folder in (copied, out))
    assert one.files[ROUTER] != other.files[ROUTER]
    assert {k: v for k, v in one.files.items() if k != ROUTER} == {
        k: v for k, v in other.files.items() if k != ROUTER
    }


def test_a_router_fitted_after_loading_is_not_the_models(bench, copied, tmp_path):
    without = shutil.copytree(bench.plain, tmp_path / "without")
    twin = load(without)
    for name in (MANIFEST, ROUTER, "README.md"):
        shutil.copyfile(bench.routed / name, without / name)  # what fit_router would write
    assert_same_files(twin.save_pretrained(tmp_path / "copy"), bench.plain)


def test_a_router_of_another_kind_is_recorded_as_such(copied, tmp_path):
    twin = load(copied)
    assert (twin.router.kind, twin.manifest.router.hidden) == ("prototype", None)
    twin.router = router_by_hand(layer=1)
    twin.router.temperature, twin.router.sharpness = 2.0, "top"
    again = load(twin.save_pretrained(tmp_path / "copy"))
    entry = again.manifest.router
    assert (entry.kind, entry.layers, entry.hidden) == ("mlp", (1,), 8)
    assert again.router.scorer.hidden == 8 and again.router.layers == (1,)
    assert (again.router.temperature, again.router.sharpness) == (2.0, "top")
    assert torch.equal(again.route(**inputs_of(again)), twin.route(**inputs_of(twin)))


def test_what_is_new_is_saved_as_it_is_in_memory(bench, tmp_path):
    twin = load(bench.watchful)
    twin.router.novelty.threshold = -1e9  # now everything is
    again = load(twin.save_pretrained(tmp_path / "everything"))
    assert again.routing(**inputs_of(again)).new.all()
    assert again.manifest.router.novelty.threshold == -1e9
    twin.router.novelty = None
    again = load(twin.save_pretrained(tmp_path / "nothing"))
    assert again.router.novelty is None and not again.routing(**inputs_of(again)).new.any()


def test_a_router_without_a_record_is_refused(bench, tmp_path):
    twin = load(bench.plain)
    twin.router = router_by_hand(layer=0)
    with pytest.raises(OutputError, match="a router that no fit-router made.*fit_router"):
        twin.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_notes_in_the_model_card_are_kept(copied, tmp_path):
    (copied / "README.md").write_text("ours\n")
    assert (load(copied).save_pretrained(tmp_path / "copy") / "README.md").read_text() == "ours\n"


def test_to_its_own_folder_nothing_is_written_but_it_is_checked(copied, monkeypatch):
    twin = load(copied)
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    monkeypatch.chdir(copied.parent)
    assert twin.save_pretrained("source") == copied
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before
    path = copied / "experts" / "law.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CorruptArtifact, match="a byte was changed"):
        twin.save_pretrained(copied)


def test_another_router_is_not_written_into_its_own_folder(copied):
    twin = load(copied)
    twin.router.scorer.means.add_(1.0)
    with pytest.raises(OutputError, match="its router is another now. Save to a new folder"):
        twin.save_pretrained(copied)
    load(copied)


def test_what_is_there_is_never_overwritten_unless_it_is_an_artifact(bench, tmp_path):
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("work of a year")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="mine: expected a new or empty folder .*not empty"):
            bench.model.save_pretrained(other, overwrite=overwrite)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    with pytest.raises(OutputError, match="notes.txt: .* is a file"):
        bench.model.save_pretrained(other / "notes.txt")
    (other / MANIFEST).write_text('{"format_version": 1}')  # of something else
    with pytest.raises(CorruptArtifact):
        bench.model.save_pretrained(other, overwrite=True)
    assert (other / "notes.txt").read_text() == "work of a year"


def test_an_artifact_is_replaced_only_when_asked(bench, tmp_path):
    out = load(bench.plain).save_pretrained(tmp_path / "copy")
    with pytest.raises(OutputError, match="copy: .* an artifact is there.*overwrite=True"):
        bench.model.save_pretrained(out)
    assert_same_files(bench.plain, out)
    assert_same_files(bench.model.save_pretrained(out, overwrite=True), bench.routed)
    assert not leftovers(tmp_path)


def test_an_empty_folder_may_be_there(bench, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_same_files(bench.model.save_pretrained(tmp_path / "empty"), bench.routed)


def test_a_source_that_changed_since_leaves_nothing_behind(copied, tmp_path):
    twin = load(copied)
    path = copied / "experts" / "law.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CorruptArtifact, match="law.safetensors: its SHA-256 differs"):
        twin.save_pretrained(tmp_path / "copy")
    path.unlink()
    with pytest.raises(CorruptArtifact, match="law.safetensors: .* is missing now"):
        twin.save_pretrained(tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_full_disk_leaves_what_was_there(bench, tmp_path, monkeypatch):
    out = load(bench.plain).save_pretrained(tmp_path / "copy")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "_copy", full)
        with pytest.raises(OutputError, match="the disk is full"):
            bench.model.save_pretrained(out, overwrite=True)
    rename = os.rename

    def second_fails(source: Any, target: Any) -> None:
        if str(source).endswith(".saving"):
            full()
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "rename", second_fails)
        with pytest.raises(OutputError, match="the disk is full"):
            bench.model.save_pretrained(out, overwrite=True)
    assert_same_files(bench.plain, out)
    assert not leftovers(tmp_path)


# ---------------------------------------------------------------------------------- from the hub


@pytest.fixture
def cache(bench, tmp_path) -> Path:
    """A hub cache that holds the artifact as `us/merge`, as the hub's library lays it out."""
    root = tmp_path / "cache" / "models--us--merge"
    shutil.copytree(bench.routed, root / "snapshots" / COMMIT)
    for name in ("main", "tuesday"):
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / name).write_text(COMMIT)
    return tmp_path / "cache"


def test_a_hub_id_is_loaded_from_the_cache_without_a_network(cache, bench):
    twin = twinmerge.load("us/merge", cache_dir=cache, local_files_only=True)
    assert twin.folder == cache / "models--us--merge" / "snapshots" / COMMIT
    want = bench.model(**inputs_of(bench.model))
    assert torch.equal(twin(**inputs_of(twin)).logits, want.logits)
    for reference, options in [
        ("us/merge@tuesday", {}),
        ("us/merge", {"revision": "tuesday"}),
        ("us/merge@tuesday", {"revision": "tuesday"}),
    ]:
        again = TwinModel.from_pretrained(reference, cache_dir=cache, **options)
        assert again.folder == twin.folder


def test_a_model_from_the_hub_is_saved_as_files_of_its_own(cache, bench, tmp_path):
    snapshot = cache / "models--us--merge" / "snapshots" / COMMIT
    for path in [p for p in snapshot.rglob("*") if p.is_file()]:
        blob = cache / "models--us--merge" / "blobs" / f"{len(path.parts)}-{path.name}"
        blob.parent.mkdir(exist_ok=True)
        shutil.move(path, blob)
        path.symlink_to(blob)
    out = load("us/merge", cache_dir=cache).save_pretrained(tmp_path / "copy")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert_same_files(bench.routed, out)


def test_two_revisions_are_one_too_many(cache):
    with pytest.raises(InputError, match="expected one revision, got revision='main' as well"):
        load("us/merge@tuesday", revision="main", cache_dir=cache)


def test_only_the_artifacts_own_files_are_fetched_all_of_one_commit(cache, bench, monkeypatch):
    asked: dict[str, Any] = {}
    snapshot = cache / "models--us--merge" / "snapshots" / COMMIT

    def download(repo: str, name: str, **options: Any) -> str:
        asked["first"] = repo, name, options
        return str(snapshot / name)

    def download_all(repo: str, **options: Any) -> str:
        asked["rest"] = repo, options
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_all)
    load("us/merge", revision="main", token="secret")
    common = {"cache_dir": None, "token": "secret", "local_files_only": False}
    assert asked["first"] == ("us/merge", MANIFEST, {"revision": "main"} | common)
    repo, options = asked["rest"]
    wanted = set(options.pop("allow_patterns"))
    assert repo == "us/merge" and options == {"revision": COMMIT} | common
    there = {str(p.relative_to(bench.routed)) for p in bench.routed.rglob("*") if p.is_file()}
    assert wanted == there


def test_a_folder_that_is_there_wins_and_a_path_is_no_hub_id(cache, bench, tmp_path, monkeypatch):
    (tmp_path / "us").mkdir()
    shutil.copytree(bench.plain, tmp_path / "us" / "merge")
    monkeypatch.chdir(tmp_path)
    assert load("us/merge", cache_dir=cache).folder == tmp_path / "us" / "merge"
    for lost in (Path("us/other"), "./us/other", "other", "a/b/c", str(tmp_path / "x")):
        with pytest.raises(ArtifactError, match="but it has no manifest.json. Check the path"):
            load(lost, cache_dir=cache)


def refusing(error: Exception):
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


def http_error(kind: Any, status: int, message: str) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(message, response=response)


HttpError = hub_errors.HfHubHTTPError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub_errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set: unset it, or give"),
        (hub_errors.LocalEntryNotFoundError("not in cache"), "only what was downloaded before"),
        (
            http_error(hub_errors.RepositoryNotFoundError, 401, "no such repository"),
            "Check the spelling; for a private or gated repository: Log in with `hf auth login`",
        ),
        (http_error(hub_errors.GatedRepoError, 403, "gated"), "ask for access"),
        (http_error(hub_errors.RevisionNotFoundError, 404, "no revision"), "Check the revision"),
        (
            http_error(hub_errors.RemoteEntryNotFoundError, 404, "no file"),
            "the repository has no manifest.json: .* for the recipe of 'twinmerge merge'",
        ),
        (OSError("the line is cut"), "Check the spelling and the network"),
    ],
)
def test_what_the_hub_refuses_is_told_with_what_to_do(error, said, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refusing(error))
    with pytest.raises(ArtifactError, match=f"(?s)'us/bert': .*{said}"):
        load("us/bert")


def test_offline_and_never_downloaded(tmp_path):
    with pytest.raises(ArtifactError, match="(?s)'us/merge': not a folder here, and the hub"):
        load("us/merge", cache_dir=tmp_path, local_files_only=True)


# ------------------------------------------------------------------------------------ to the hub


class Hub:
    """What `push` asks of `HfApi`, kept in a list."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls, self.files = error, [], {}

    def __call__(self, token: Any = None) -> Hub:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, **options: Any) -> Any:
        folder = Path(options.pop("folder_path"))
        allowed = list(huggingface_hub.utils.filter_repo_objects(
            [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()],
            allow_patterns=options.pop("allow_patterns"),
        ))  # fmt: skip
        self.files = {name: (folder / name).read_bytes() for name in allowed}
        self.calls.append(("upload_folder", options))
        pr = "https://hub/pr/1" if options["create_pr"] else None
        return SimpleNamespace(commit_url="https://hub/commit/1", pr_url=pr)

    def unpacked(self, folder: Path) -> Path:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


def test_what_is_pushed_is_the_artifact_in_one_commit(hub, copied, bench, tmp_path):
    (copied / "notes.txt").write_text("not for others")
    twin = load(copied)
    url = twin.push_to_hub("merge", private=True, token="secret", commit_message="Tuesday's")
    assert url == "https://hub/commit/1"
    token, repo, upload = hub.calls
    assert token == ("token", "secret")
    assert repo == ("create_repo", "merge", {"private": True, "exist_ok": True})
    assert upload[1] == {
        "repo_id": "me/merge",
        "commit_message": "Tuesday's",
        "revision": None,
        "create_pr": False,
        "delete_patterns": ["*.safetensors", "*.safetensors.index.json"],
    }
    assert_same_files(hub.unpacked(tmp_path / "there"), bench.routed)


def test_a_branch_is_made_and_a_pull_request_needs_none(hub, bench):
    bench.model.push_to_hub("us/merge", revision="tuesday")
    assert ("create_branch", "us/merge", {"branch": "tuesday", "exist_ok": True}) in hub.calls
    assert hub.calls[-1][1]["revision"] == "tuesday"
    assert hub.calls[-1][1]["commit_message"] == "Upload 3 experts"
    hub.calls.clear()
    assert bench.model.push_to_hub("us/merge", create_pr=True) == "https://hub/pr/1"
    assert [call[0] for call in hub.calls] == ["token", "create_repo", "upload_folder"]


def test_a_router_that_changed_in_memory_is_pushed(hub, copied, tmp_path):
    twin = load(copied)
    prefer_code(twin)
    twin.push_to_hub("us/merge")
    again = load(hub.unpacked(tmp_path / "there"))
    assert again(**inputs_of(again)).expert.tolist() == [1, 1]


def test_a_damaged_artifact_is_not_pushed(hub, copied):
    twin = load(copied)
    path = copied / "experts" / "law.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CorruptArtifact, match="a byte was changed"):
        twin.push_to_hub("us/merge")
    assert hub.calls == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub_errors.LocalTokenNotFoundError("no token"), "Log in with `hf auth login`, or give"),
        (http_error(HttpError, 401, "who are you"), "Log in with `hf auth login`, or give token="),
        (http_error(HttpError, 403, "not yours"), "The token may not do this"),
        (hub_errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (hub_errors.HFValidationError("bad name"), "Check the spelling and the network"),
    ],
)
def test_what_the_hub_refuses_to_take_is_told_with_what_to_do(error, said, bench, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(error))
    with pytest.raises(OutputError, match=f"(?s)'us/merge': the hub could not .*\n  {said}"):
        bench.model.push_to_hub("us/merge")
