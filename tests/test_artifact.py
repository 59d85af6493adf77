"""The artifact: the same bytes every time, opened by others, and never trusted when damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers
from conftest import randn, router_by_hand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_conformance import assert_same_files
from tiny import EXPERTS, FAMILIES, batch_of, densely_merged, merge, opened, shared_tensors

from twinmerge.artifact import writer
from twinmerge.artifact.format import MANIFEST, ROUTER, Manifest, RouterRecord, Tried
from twinmerge.artifact.reader import Artifact
from twinmerge.artifact.tensorfile import HashedFile, TensorFileWriter, layout, record
from twinmerge.artifact.writer import check_space, explained, replace_text
from twinmerge.errors import (
    ArtifactError,
    CorruptArtifact,
    OutputError,
    RouterError,
    UnsupportedFormat,
)
from twinmerge.merging import join as joining
from twinmerge.runtime.load import load
from twinmerge.runtime.router.features import keys

# ------------------------------------------------------------------- one file, tensor by tensor

DTYPES = [
    torch.float64,
    torch.int64,
    torch.float32,
    torch.int32,
    torch.bfloat16,
    torch.float16,
    torch.int16,
    torch.uint8,
    torch.int8,
    torch.bool,
]


def drawn(shape: list[int], seed: int) -> torch.Tensor:
    return 100 * randn(torch.Size(shape).numel(), seed=seed).view(shape)


def write(path: Path, tensors: dict[str, torch.Tensor]):
    laid = layout((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    file = TensorFileWriter(path, laid)
    for name, tensor in tensors.items():
        file.add(name, tensor)
    written = file.close()
    assert written.bytes == laid.bytes
    return written


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    entries=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)), max_size=8
    )
)
def test_a_file_reads_back_with_the_safetensors_library(entries, tmp_path):
    entries.sort(key=lambda entry: -entry[0].itemsize)
    tensors = {
        f'layer.{i}.gewicht-ä"{"x" * 60}': drawn(shape, i).to(dtype)
        for i, (dtype, shape) in enumerate(entries)
    }
    path = tmp_path / "x.safetensors"
    written = write(path, tensors)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)
    content = path.read_bytes()
    assert written.bytes == len(content)
    assert written.sha256 == hashlib.sha256(content).hexdigest() == record(path).sha256
    (length,) = struct.unpack("<Q", content[:8])
    assert (8 + length) % 8 == 0
    assert len(content) == 8 + length + sum(tensor.nbytes for tensor in tensors.values())


def test_a_view_is_written_as_it_looks(tmp_path):
    whole = randn(6, 4, seed=0)
    views = {
        "turned": whole.T,
        "strided": whole[::2],
        "part": whole[1:3],
        "spread": whole[:1].expand(3, 4),
    }
    write(tmp_path / "x.safetensors", views)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], view) for name, view in views.items())


def test_a_file_of_no_tensors_is_a_file(tmp_path):
    write(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {}
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_out_of_order_or_given_twice_are_refused(tmp_path):
    a, b = ("a", torch.bfloat16, (2,)), ("b", torch.float32, (2,))
    with pytest.raises(ValueError, match="b: tensors must come in descending order of item size"):
        layout([a, b])
    with pytest.raises(ValueError, match="a: given twice"):
        layout([a, a])
    file = TensorFileWriter(tmp_path / "x.safetensors", layout([b, a]))
    with pytest.raises(ValueError, match=r"expected \('b', torch.float32, \(2,\)\), got \('a'"):
        file.add("a", torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="expected .*, got .*float64"):
        file.add("b", torch.ones(2, dtype=torch.float64))
    file.add("b", torch.ones(2))
    with pytest.raises(ValueError, match="x.safetensors: a did not come"):
        file.close()


def test_a_file_that_grows_knows_its_digest_and_goes_on_after_a_cut(tmp_path):
    path = tmp_path / "x"
    file = HashedFile(path)
    file.write(b"abc")
    length, digest = file.length, file.sha256()
    file.write(b"lost in the crash")
    file.close()
    again = HashedFile(path, length)
    assert again.sha256() == digest == hashlib.sha256(b"abc").hexdigest()
    again.write(memoryview(b"def"))
    written = again.close()
    assert path.read_bytes() == b"abcdef" and written == record(path)
    short = HashedFile(path, 100)  # shorter than it should be: seen by its length
    assert short.close().bytes == 6 == path.stat().st_size


# ---------------------------------------------------------------------- what others see of it

SMALL_SHARDS = dict(shard_bytes=2_000, exclusive={"rank": 3})


@pytest.fixture(scope="module")
def sharded(zoo, tmp_path_factory) -> Path:
    made = zoo.made("bert")
    out = tmp_path_factory.mktemp("sharded") / "out"
    merge(made.base, made.experts, out, **SMALL_SHARDS)
    return out


@pytest.mark.parametrize("name", ["bert", "llama", "llama tied", "vit", "gpt2"])
def test_plain_transformers_opens_the_folder_as_the_average_of_the_experts(name, zoo):
    made, folder = zoo.made(name), zoo.artifact(name, 3)
    automatic = getattr(transformers, "AutoModelForCausalLM" if made.family.causal else "AutoModel")
    shared = opened(automatic, folder)
    base = opened(made.family.base, made.base)
    experts = [made.expert(expert) for expert in EXPERTS]
    bodies = [e if made.family.causal else e.base_model for e in experts]
    for key, _ in bodies[0].named_parameters():
        average = sum(dict(body.named_parameters())[key] for body in bodies) / 3
        torch.testing.assert_close(dict(shared.named_parameters())[key], average)
    for key, value in shared.named_parameters():
        if key not in dict(bodies[0].named_parameters()):  # the experts have no such layer
            assert torch.equal(value, dict(base.named_parameters())[key])


def test_shards_with_their_index_open_in_plain_transformers(sharded, zoo):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    total = sum(t.numel() * t.element_size() for t in shared_tensors(sharded).values())
    assert index["metadata"]["total_size"] == total
    whole = opened(transformers.AutoModel, zoo.artifact("bert", 3))
    for key, value in opened(transformers.AutoModel, sharded).named_parameters():
        assert torch.equal(value, dict(whole.named_parameters())[key])


def test_another_shard_size_changes_no_tensor_and_no_experts_file(sharded, zoo):
    whole = zoo.artifact("bert", 3)
    one, other = shared_tensors(whole), shared_tensors(sharded)
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    for expert in EXPERTS:
        name = f"experts/{expert}.safetensors"
        assert (whole / name).read_bytes() == (sharded / name).read_bytes()
    inputs = batch_of(FAMILIES["bert"])
    got = load(sharded)(task="code", **inputs).logits
    assert torch.equal(got, zoo.twin("bert", 3)(task="code", **inputs).logits)


def test_shards_hold_at_most_what_was_asked_or_one_tensor(sharded):
    for file in sharded.glob("model-*.safetensors"):
        sizes = [t.numel() * t.element_size() for t in load_file(file).values()]
        assert sum(sizes) <= 2_000 or len(sizes) == 1


def test_building_twice_gives_the_same_bytes_whatever_the_number_of_threads(sharded, zoo, tmp_path):
    made, before = zoo.made("bert"), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.manual_seed(123)
        merge(made.base, made.experts, tmp_path / "out", **SMALL_SHARDS)
    finally:
        torch.set_num_threads(before)
    assert_same_files(sharded, tmp_path / "out")


def test_nothing_in_the_folder_is_pickled(sharded):
    ends = {path.suffix for path in sharded.rglob("*") if path.is_file()}
    assert ends == {".json", ".md", ".safetensors", ".yaml"}


# ------------------------------------------------------------------------------ the manifest

GOLDEN = """{
 "format_version": 3,
 "recipe": {
  "base_model": "base",
  "models": [
   {
    "model": "one",
    "name": "one",
    "parameters": {}
   },
   {
    "model": "two",
    "name": "two",
    "parameters": {}
   }
  ],
  "merge_method": "linear",
  "parameters": {},
  "dtype": "float32",
  "seed": 0,
  "exclusive": {
   "form": "svd",
   "rank": 1
  },
  "router": {
   "kind": "prototype",
   "layer": "auto",
   "pooling": "mean",
   "rows_per_task": 1000,
   "calibration": 0.2,
   "held_out": 0.2,
   "refit": true,
   "temperature": "auto",
   "sharpness": "auto",
   "coverage": 0.99,
   "examples": 0,
   "epochs": 30,
   "learning_rate": 0.0005,
   "batch_size": 64,
   "dropout": 0.5,
   "strength": 30.0,
   "seed": 0
  },
  "tokenizer_source": "base"
 },
 "base": "base",
 "model_class": "BertForSequenceClassification",
 "experts": [
  {
   "name": "one",
   "reference": "one",
   "adapter": false,
   "config": {},
   "outputs": 2,
   "drift": 0.25,
   "bytes": BYTES
  },
  {
   "name": "two",
   "reference": "two",
   "adapter": false,
   "config": {},
   "outputs": 1,
   "drift": 0.25,
   "bytes": BYTES
  }
 ],
 "tensors": [
  {
   "name": "classifier.weight",
   "kind": "head",
   "shape": [
    2,
    2
   ],
   "dtype": "float32",
   "bytes": 0,
   "matrix": null,
   "tied_to": null,
   "experts": {
    "one": {
     "rank": null,
     "storage": "whole",
     "entries": null,
     "bytes": 16,
     "error": 0.0,
     "truncation": null,
     "bound": null
    },
    "two": {
     "rank": null,
     "storage": "whole",
     "entries": null,
     "bytes": 8,
     "error": 0.0,
     "truncation": null,
     "bound": null
    }
   }
  },
  {
   "name": "encoder.bias",
   "kind": "vector",
   "shape": [
    2
   ],
   "dtype": "float32",
   "bytes": 8,
   "matrix": null,
   "tied_to": null,
   "experts": {
    "one": {
     "rank": null,
     "storage": "whole",
     "entries": null,
     "bytes": 8,
     "error": 0.0,
     "truncation": null,
     "bound": null
    },
    "two": {
     "rank": null,
     "storage": "whole",
     "entries": null,
     "bytes": 8,
     "error": 0.0,
     "truncation": null,
     "bound": null
    }
   }
  },
  {
   "name": "encoder.same",
   "kind": "vector",
   "shape": [
    3
   ],
   "dtype": "float32",
   "bytes": 12,
   "matrix": null,
   "tied_to": null,
   "experts": {}
  },
  {
   "name": "encoder.weight",
   "kind": "matrix",
   "shape": [
    2,
    2
   ],
   "dtype": "float32",
   "bytes": 16,
   "matrix": [
    2,
    2
   ],
   "tied_to": null,
   "experts": {
    "one": {
     "rank": 1,
     "storage": "factors",
     "entries": null,
     "bytes": 16,
     "error": 0.0,
     "truncation": 0.0,
     "bound": 0.0
    },
    "two": {
     "rank": 1,
     "storage": "factors",
     "entries": null,
     "bytes": 16,
     "error": 0.0,
     "truncation": 0.0,
     "bound": 0.0
    }
   }
  }
 ],
 "files": {
  "experts/one.safetensors": RECORD,
  "experts/two.safetensors": RECORD,
  "model.safetensors": RECORD,
  "config.json": RECORD
 },
 "budget": null,
 "router": null,
 "warnings": [],
 "versions": {
  "twinmerge": "VERSION",
  "torch": "VERSION",
  "safetensors": "VERSION"
 }
}
"""
"""Of the models that `by_hand` writes. Changing it is changing the format: see docs/format.md."""


def by_hand(folder: Path) -> None:
    """Two experts in numbers so plain that every field of the manifest can be told."""
    for name, entry, outputs in [("base", 1.0, 0), ("one", 1.25, 2), ("two", 0.75, 1)]:
        weight = torch.tensor([[entry, 0.0], [0.0, 0.0]])  # moved by a quarter of the base's norm
        bias = torch.tensor([1.0, 1.0]) * (0 if name == "base" else outputs)
        tensors = {"encoder.weight": weight, "encoder.bias": bias, "encoder.same": torch.ones(3)}
        if outputs:
            tensors["classifier.weight"] = torch.ones(outputs, 2)
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        head = "ForSequenceClassification" if outputs else "Model"
        config = {"model_type": "bert", "architectures": [f"Bert{head}"]}
        (folder / name / "config.json").write_text(json.dumps(config))


def test_the_manifest_is_byte_for_byte_what_the_format_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_hand(tmp_path)
    merge("base", {"one": "one", "two": "two"}, tmp_path / "out", exclusive={"rank": 1})
    text = (tmp_path / "out" / MANIFEST).read_text()
    data = json.loads(text)
    want = GOLDEN
    for name, version in data["versions"].items():
        want = want.replace(f'"{name}": "VERSION"', f'"{name}": "{version}"')
    for name, file in data["files"].items():
        assert file == record(tmp_path / "out" / name).model_dump()
        shown = f'{{\n   "bytes": {file["bytes"]},\n   "sha256": "{file["sha256"]}"\n  }}'
        want = want.replace(f'"{name}": RECORD', f'"{name}": {shown}')
        if name.startswith("experts/"):
            want = want.replace("BYTES", str(file["bytes"]), 1)
    # Two numbers that come from floating point may differ in their last digits.
    assert [expert["drift"] for expert in data["experts"]] == pytest.approx([0.25, 0.25])
    assert all(e["error"] < 1e-6 for t in data["tensors"] for e in t["experts"].values())
    text = re.sub(r'"drift": [^,\n]+', '"drift": 0.25', text)
    text = re.sub(r'"error": [^,\n]+', '"error": 0.0', text)
    assert text == want


def test_a_manifest_reads_back_as_it_was(zoo):
    manifest = zoo.twin("bert", 3).manifest
    assert Manifest.model_validate_json(manifest.to_json()) == manifest
    assert Artifact(zoo.artifact("bert", 3)).manifest == manifest


# ------------------------------------------------------------------------- damaged artifacts


@pytest.fixture
def damaged(zoo, tmp_path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(zoo.artifact("bert", 3), tmp_path / "artifact"))


def edit(folder: Path, **changes) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_an_unknown_format_version_says_which_one_this_release_reads(version, damaged):
    edit(damaged, format_version=version)
    with pytest.raises(
        UnsupportedFormat, match=rf"version {version!r}; this .* reads versions 1 to 3. Up"
    ):
        Artifact(damaged)


def test_a_changed_byte_in_any_file_is_found(damaged):
    names = list(Artifact(damaged).manifest.files)
    assert {"model.safetensors", "config.json", "experts/law.safetensors"} <= set(names)
    for name in names:
        path = damaged / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            CorruptArtifact, match=f"{name}: its SHA-256 differs .* byte was changed"
        ):
            load(damaged)
        content[-1] ^= 1
        path.write_bytes(content)
    load(damaged)


def test_a_changed_byte_can_be_looked_over_on_request(damaged):
    path = damaged / "experts/law.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    load(damaged, check=False)


def test_a_file_that_is_missing_or_cut_short_is_named(damaged):
    names = list(Artifact(damaged).manifest.files)
    for name in names:
        path = damaged / name
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        for check in (True, False):
            with pytest.raises(CorruptArtifact, match=rf"{name}: expected [\d,]+ bytes, found"):
                Artifact(damaged, check=check)
        path.unlink()
        with pytest.raises(CorruptArtifact, match=f"{name}: listed in manifest.json but missing"):
            Artifact(damaged, check=False)
        path.write_bytes(content)


def test_a_folder_without_a_manifest_is_no_artifact(damaged, zoo):
    (damaged / MANIFEST).unlink()
    for folder in (damaged, Path(zoo.made("bert").base), damaged / "nowhere"):
        with pytest.raises(ArtifactError, match="expected a folder written by 'twinmerge merge'"):
            load(folder)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", CorruptArtifact, "expected JSON, but"),
        (b'{"format_version": 1, "recipe"', CorruptArtifact, "expected JSON, but"),
        (b"\xff\xfe\x00", CorruptArtifact, "not a text file"),
        (b"[]", UnsupportedFormat, "format version None"),
        (b'{"format_version": 1}', CorruptArtifact, "recipe: Field required"),
    ],
)
def test_a_broken_manifest_says_what_is_wrong(content, error, message, damaged):
    (damaged / MANIFEST).write_bytes(content)
    with pytest.raises(error, match=f"manifest.json: {message}"):
        load(damaged)


def test_an_unknown_or_wrong_field_of_the_manifest_is_named(damaged):
    edit(damaged, extra=1)
    with pytest.raises(CorruptArtifact, match="manifest.json: extra: Extra inputs are not"):
        load(damaged)
    experts = json.loads((damaged / MANIFEST).read_text())["experts"]
    experts[0]["drift"] = "far"
    edit(damaged, experts=experts)
    with pytest.raises(CorruptArtifact, match="manifest.json: experts.0.drift: "):
        load(damaged)


def test_an_experts_file_that_lacks_a_tensor_is_named_even_unchecked(damaged):
    path = damaged / "experts/law.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith(".b"))
    size = path.stat().st_size
    save_file({name: t for name, t in tensors.items() if name != gone}, path)
    files = json.loads((damaged / MANIFEST).read_text())["files"]
    assert path.stat().st_size < size
    files["experts/law.safetensors"] = record(path).model_dump()
    edit(damaged, files=files)
    with pytest.raises(CorruptArtifact, match=f"law.safetensors: expected the tensor {gone}"):
        load(damaged)


# ------------------------------------------------------------------------------ its router


def test_an_experts_file_that_cannot_be_read_is_corrupt_even_unchecked(damaged):
    path = next((damaged / "experts").glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(b"\xff" * 16 + content[16:])
    with pytest.raises(CorruptArtifact, match=f"{path.name}: expected a safetensors file"):
        load(damaged, check=False)


def test_a_router_file_that_cannot_be_read_is_corrupt_even_unchecked(damaged):
    with_router(damaged)
    path = damaged / ROUTER
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])
    with pytest.raises(CorruptArtifact, match=f"{ROUTER}: expected a safetensors file"):
        Artifact(damaged, check=False).router()


def with_router(folder: Path, **changes) -> None:
    """A router fitted by hand, recorded as `fit-router` records one."""
    router = router_by_hand(layer=1)
    save_file(router.tensors(), folder / ROUTER)
    manifest = Artifact(folder, check=False).manifest
    fitted = RouterRecord(
        **router.as_recorded()
        | dict(
            experts=manifest.names,
            shared_sha256=manifest.shared_files(),
            rows=dict.fromkeys(EXPERTS, 10),
            held_out_rows=6,
            held_out_accuracy=1.0,
            tried=(Tried(kind="mlp", layers=(0,), accuracy=0.5),),
            confusion={name: {name: 2} for name in EXPERTS},
            epoch=3,
            seed=0,
            max_tokens=64,
            bytes=(folder / ROUTER).stat().st_size,
        )
        | changes
    )
    files = {**manifest.files, ROUTER: record(folder / ROUTER)}
    manifest = manifest.model_copy(update={"router": fitted, "files": files})
    (folder / MANIFEST).write_text(manifest.to_json())


def test_a_fitted_router_routes(damaged):
    with_router(damaged)
    twin, inputs = load(damaged), batch_of(FAMILIES["bert"])
    weights = twin.route(**inputs)
    assert torch.equal(twin(**inputs).weights, weights) and weights.shape == (4, 3)
    features = twin.features.read(inputs, keys([1]))[1, "mean"]
    want = router_by_hand(layer=1).scorer(features).softmax(dim=-1)
    assert torch.equal(weights, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(width=8), "not those of a router of kind mlp and width 8 .*fit-router' again"),
        (dict(hidden=5), "not those of a router of kind mlp and width 16"),
        (dict(kind="linear"), "not those of a router of kind linear"),
    ],
)
def test_a_router_whose_record_and_tensors_differ_is_not_used(changes, message, damaged):
    with_router(damaged, **changes)
    with pytest.raises(RouterError, match=f"{ROUTER}: its tensors are {message}"):
        load(damaged)(**batch_of(FAMILIES["bert"]))
    load(damaged)(task="math", **batch_of(FAMILIES["bert"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(experts=("math", "law", "code")), "fitted for the experts .* Run 'twinmerge fit-r"),
        (dict(experts=("math", "code")), r"for the experts \['math', 'code'\], the artifact holds"),
        (dict(shared_sha256={"model.safetensors": "0" * 64}), "fitted on another shared expert"),
    ],
)
def test_a_router_of_another_merge_is_not_used(changes, message, damaged):
    with_router(damaged, **changes)
    with pytest.raises(RouterError, match=message):
        Artifact(damaged).router()
    twin, inputs = load(damaged), batch_of(FAMILIES["bert"])
    with pytest.raises(RouterError, match=message):
        twin(**inputs)
    twin(task="math", **inputs)  # needs no router


# ---------------------------------------------------------------------- whole or not at all


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_taken_output_is_refused_before_anything_is_read(tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("x")
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for target, message in [(full, "it is not empty"), (file, "it is a file"), (link, "a file")]:
        with pytest.raises(OutputError, match=f"expected a new or empty folder .*{message}"):
            merge("./no-base", {"a": "./no-a", "b": "./no-b"}, target)
    assert left(full) == ["precious"] and file.read_text() == "x"


def test_an_empty_folder_and_missing_parents_are_fine(zoo, tmp_path):
    made = zoo.made("bert")
    (tmp_path / "empty").mkdir()
    merge(made.base, made.experts, tmp_path / "empty")
    merge(made.base, made.experts, tmp_path / "a" / "b" / "c")
    assert left(tmp_path / "a" / "b") == ["c"]
    assert (tmp_path / "empty").stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777
    load(tmp_path / "a" / "b" / "c")


def test_a_full_disk_leaves_nothing_at_the_target_and_the_same_command_goes_on(
    zoo, tmp_path, monkeypatch
):
    made, write, count = zoo.made("bert"), HashedFile.write, []

    def fills_up(self, data):
        count.append(self.path.name)
        if len(count) == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(HashedFile, "write", fills_up)
    kept = r"out: the disk is full; nothing was left there. Free.* kept in .*\.out\.building\."
    with pytest.raises(OutputError, match=f"(?s){kept}"):
        merge(made.base, made.experts, tmp_path / "out", exclusive={"rank": 3})
    assert left(tmp_path) == [".out.building"]
    monkeypatch.undo()
    merge(made.base, made.experts, tmp_path / "out", exclusive={"rank": 3})
    assert left(tmp_path) == ["out"]
    assert_same_files(tmp_path / "out", zoo.artifact("bert", 3))


@pytest.mark.parametrize("where", ["model_card", "copy_files"])
def test_a_disk_that_fills_up_at_the_end_is_no_different(where, zoo, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    made = zoo.made("bert")
    monkeypatch.setattr(joining, where, full)
    with pytest.raises(OutputError, match="the disk is full"):
        merge(made.base, made.experts, tmp_path / "out", exclusive={"rank": 3})
    monkeypatch.undo()
    seen = []
    merge(made.base, made.experts, tmp_path / "out", exclusive={"rank": 3},
          progress=lambda *at: seen.append(at))  # fmt: skip
    assert len(seen) == 1 and left(tmp_path) == ["out"]  # nothing but the end was left to do
    assert_same_files(tmp_path / "out", zoo.artifact("bert", 3))


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_leaves_the_target_as_it_was_and_the_work_beside_it(problem, zoo, tmp_path):
    made = zoo.made("bert")
    (tmp_path / "out").mkdir()

    def progress(done, total, name):
        if done == 7:
            assert left(tmp_path) == [".out.building", "out"]
            raise problem

    with pytest.raises(problem):
        merge(made.base, made.experts, tmp_path / "out", progress=progress)
    assert left(tmp_path) == [".out.building", "out"] and left(tmp_path / "out") == []
    merge(made.base, made.experts, tmp_path / "out")
    assert left(tmp_path) == ["out"]


def test_too_little_space_is_told_before_the_work(tmp_path, zoo, monkeypatch):
    with pytest.raises(OutputError, match=r"needs about 1,000,000,000,000,000,000 bytes, the disk"):
        check_space(tmp_path / "not" / "there", 10**18)
    made = zoo.made("bert")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(
        OutputError, match=r"out: the artifact needs about [\d,]+ bytes, the disk has 1"
    ):
        merge(made.base, made.experts, tmp_path / "out")
    assert left(tmp_path) == []


def test_a_place_where_one_may_not_write_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        with explained(tmp_path / "file" / "out"):
            (tmp_path / "file" / "out").mkdir()

    with pytest.raises(OutputError, match="cannot be written .*Permission denied.*you may write"):
        with explained(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied")


def test_other_system_errors_are_not_dressed_up(tmp_path):
    with pytest.raises(OSError, match="Input/output"):
        with explained(tmp_path / "out"):
            raise OSError(errno.EIO, "Input/output error")


def test_a_text_file_is_replaced_in_one_step_or_left(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    replace_text(path, "old")
    replace_text(path, "new")
    assert path.read_text() == "new"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.os, "replace", full)
    with pytest.raises(OutputError, match="disk is full"):
        replace_text(path, "newer")
    assert path.read_text() == "new" and left(tmp_path) == ["x.json"]


def test_the_card_says_what_went_in_and_what_it_weighs(zoo):
    folder, manifest = zoo.artifact("bert", 3), zoo.twin("bert", 3).manifest
    card = (folder / "README.md").read_text()
    for expert in manifest.experts:
        assert f"| {expert.name} | `{expert.reference}` | full | {expert.bytes:,} |" in card
    assert "No router was fitted yet" in card and "merge_method: linear" in card
    assert set(densely_merged(folder, [0, 0, 0])) == {
        t.name for t in manifest.tensors if t.kind not in ("head", "tied")
    }


def test_the_current_folder_is_a_target_like_any_other(zoo, tmp_path, monkeypatch):
    made = zoo.made("bert")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    merge(made.base, made.experts, Path("."))
    assert Artifact(here).manifest.names == tuple(made.experts)
    assert left(tmp_path) == ["here"]


def test_a_mount_point_is_refused_before_the_work(zoo, tmp_path, monkeypatch):
    def no_work(*_):
        raise AssertionError("no work is done")

    made = zoo.made("bert")
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "volume")
    with pytest.raises(OutputError, match="volume: a mount point, .* Name a folder inside of it"):
        merge(made.base, made.experts, tmp_path / "volume", progress=no_work)
    assert left(tmp_path) == ["volume"]


def test_a_link_to_an_empty_folder_is_filled_there(zoo, tmp_path):
    made = zoo.made("bert")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    merge(made.base, made.experts, tmp_path / "out")
    assert left(tmp_path) == ["disk", "out"] and (tmp_path / "disk" / MANIFEST).is_file()
    load(tmp_path / "out")
