"""Quantised and sparse parts run exactly, on the architectures of `tiny.FAMILIES`.

Artifacts are built with each storage, and one is written again by hand with several side by side.
What each part stands for is read from the files alone; the runtime is compared with transformers
on the densely merged sum.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randn
from safetensors.torch import load_file, save_file
from test_conformance import assert_close, seen, weights_of
from tiny import (
    EXPERTS,
    FAMILIES,
    Zoo,
    batch_of,
    exclusive,
    expert_tensors,
    merge,
    opened,
    row,
    shared_tensors,
)

from twinmerge.artifact.codec import (
    Quantised,
    Sparse,
    decode_sparse,
    dequantise,
    encode_sparse,
    quantise,
)
from twinmerge.errors import CorruptArtifact
from twinmerge.runtime.load import load
from twinmerge.runtime.parts import Factors, Packed, Scattered, TableFactors

BUILT: dict[str, dict[str, Any]] = {
    "int8": {"rank": 3, "dtype": "int8"},
    "int4": {"rank": 3, "dtype": "int4"},
    "mask": {"form": "dropout", "density": 0.3},
    "index": {"form": "magnitude", "density": 0.02},
}
"""Storage -> the recipe's `exclusive` that gives it to every matrix."""
SEVERAL = ("int8", "mask", "factors", "int4", "index")
"""By hand: expert number i stores tensor number n in the way i + n; vectors sparse or whole."""
LAYERS = ["bert", "gemma", "gpt2", "vit"]
"""Families that have every kind of layer between them."""


@dataclass(frozen=True)
class Stored:
    """An artifact, and what its parts stand for."""

    folder: Path

    @cached_property
    def parts(self) -> dict[str, dict[str, torch.Tensor]]:
        """Expert -> tensor -> values, as the manifest and the files have them."""
        manifest = json.loads((self.folder / "manifest.json").read_text())
        found: dict[str, dict[str, torch.Tensor]] = {expert: {} for expert in EXPERTS}
        for expert in EXPERTS:
            tensors = expert_tensors(self.folder, expert)
            for record in manifest["tensors"]:
                share = record["experts"].get(expert)
                if share is not None and record["kind"] != "head":
                    found[expert][record["name"]] = decoded(tensors, record, share)
        return found

    def plain(self, made: Any, weights: list[float], head: str, folder: Path) -> Any:
        """W_s + Σ_t w_t D_t with one expert's head, opened by transformers alone."""
        state = {name: tensor.double() for name, tensor in shared_tensors(self.folder).items()}
        for weight, expert in zip(weights, EXPERTS, strict=True):
            for name, part in self.parts[expert].items():
                state[name] = state[name] + weight * part.double().view(state[name].shape)
        state = {name: tensor.float().contiguous() for name, tensor in state.items()}
        for name, tensor in expert_tensors(self.folder, head).items():
            if name.endswith(".head"):
                state[name.removesuffix(".head")] = tensor
        folder.mkdir(parents=True)
        shutil.copy(Path(made.experts[head], "config.json"), folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return opened(made.family.task, folder)


def decoded(
    tensors: dict[str, torch.Tensor], record: dict[str, Any], share: dict[str, Any]
) -> torch.Tensor:
    """What one expert's file says of one tensor."""
    name, storage, shape = record["name"], share["storage"], tuple(record["shape"])
    if storage in ("factors", "whole"):
        return exclusive(tensors, name, torch.empty(shape))
    if storage.startswith("int"):
        bits, (out, in_) = int(storage.removeprefix("int")), record["matrix"]
        a, b = (
            Quantised(tensors[f"{name}.{side}.q"], tensors[f"{name}.{side}.scale"], bits, n)
            for side, n in (("a", in_), ("b", out))
        )
        return dequantise(b, torch.float64).T @ dequantise(a, torch.float64)
    kept = {key: tensors[f"{name}.{key}"] for key in ("values", storage)}
    return decode_sparse(kept, shape).dense()


def rewrite(source: Path, folder: Path) -> None:
    """Copy an artifact of float factors, storing its parts in `SEVERAL` ways."""
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for number, expert in enumerate(EXPERTS):
        floats, stored = expert_tensors(folder, expert), {}
        for count, record in enumerate(manifest["tensors"]):
            name, share = record["name"], record["experts"].get(expert)
            if share is None:
                continue
            if record["kind"] == "head":
                stored[f"{name}.head"] = floats[f"{name}.head"]
                continue
            storage = SEVERAL[(number + count) % len(SEVERAL)]
            if record["kind"] == "vector" and storage not in ("mask", "index"):
                storage = "whole"
            encoded = store(floats, name, torch.empty(record["shape"]), storage)
            stored |= {f"{name}.{key}": tensor for key, tensor in encoded.items()}
            share |= {"bytes": sum(t.nbytes for t in encoded.values()), "storage": storage}
            if "values" in encoded:
                share |= {"rank": None, "entries": len(encoded["values"])}
                share["storage"] = "mask" if "mask" in encoded else "index"
        path = folder / "experts" / f"{expert}.safetensors"
        save_file({name: t.contiguous() for name, t in stored.items()}, path)
    write_manifest(folder, manifest)


def store(
    floats: dict[str, torch.Tensor], name: str, like: torch.Tensor, storage: str
) -> dict[str, torch.Tensor]:
    """One part as `storage` keeps it."""
    if storage in ("factors", "whole"):
        suffixes = ("a", "b") if storage == "factors" else ("delta",)
        return {s: floats[f"{name}.{s}"] for s in suffixes}
    if storage.startswith("int"):
        bits = int(storage.removeprefix("int"))
        a, b = quantise(floats[f"{name}.a"], bits), quantise(floats[f"{name}.b"].T, bits)
        return {"a.q": a.q, "a.scale": a.scale, "b.q": b.q, "b.scale": b.scale}
    whole = exclusive(floats, name, like).float()
    kept = whole.numel() // 2 if storage == "mask" else max(1, whole.numel() // 40)
    index = whole.abs().flatten().topk(kept).indices.sort().values
    return encode_sparse(Sparse(whole.flatten()[index], index, tuple(whole.shape)))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    for name, record in manifest["files"].items():
        data = (folder / name).read_bytes()
        record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def stores(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory):
    """(family, way) -> its artifact, and it loaded; made when first asked for."""
    known: dict[tuple[str, str], tuple[Stored, Any]] = {}

    def get(name: str, way: str) -> tuple[Stored, Any]:
        if (name, way) not in known:
            folder, made = tmp_path_factory.mktemp("stored") / "artifact", zoo.made(name)
            if way == "several":
                rewrite(zoo.artifact(name, 3), folder)
            else:
                merge(made.base, made.experts, folder, exclusive=BUILT[way])
            known[name, way] = Stored(folder), load(folder)
        return known[name, way]

    return get


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, "several") for name in sorted(FAMILIES)]
    + [("bert", way) for way in BUILT]
    + [("gemma", "int8"), ("gemma", "mask"), ("gpt2", "int4"), ("vit", "int8"), ("vit", "index")],
)
def test_a_mixed_batch_is_its_rows_one_by_one_and_the_densely_merged_model(
    name, way, zoo, stores, tmp_path
):
    made, (stored, twin) = zoo.made(name), stores(name, way)
    weights, heads = weights_of(3), [EXPERTS[index] for index in (1, 0, 2)]
    inputs = batch_of(made.family, rows=3)
    output = twin(weights=weights, head=heads, **inputs)
    for index, head in enumerate(heads[1:], start=1):
        one = row(inputs, index)
        plain = stored.plain(made, weights[index].tolist(), head, tmp_path / str(index))
        want = seen(plain(**one).logits, one, 0)
        alone = twin(weights=weights[index], head=head, **one).logits
        assert_close(seen(alone, one, 0), want)
        assert_close(seen(output.logits, inputs, index)[..., : want.shape[-1]], want)


@pytest.mark.parametrize("name", LAYERS)
def test_a_dense_merge_of_them_is_what_the_parts_stand_for(name, zoo, stores, tmp_path):
    made, (stored, twin) = zoo.made(name), stores(name, "several")
    weights = [0.7, -0.4, 1.1]
    want = stored.plain(made, weights, "code", tmp_path / "plain").state_dict()
    got = twin.merged(weights, head="code").state_dict()
    assert set(got) == set(want)
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["int4", "several"])
def test_all_weight_on_one_expert_and_none_at_all(way, zoo, stores, tmp_path):
    made, (stored, twin) = zoo.made("bert"), stores("bert", way)
    inputs = batch_of(made.family)
    for index, expert in enumerate(EXPERTS):
        one_hot = [float(i == index) for i in range(3)]
        plain = stored.plain(made, one_hot, expert, tmp_path / expert)
        assert_close(twin(task=expert, **inputs).logits, plain(**inputs).logits)
    shared = stored.plain(made, [0.0] * 3, "math", tmp_path / "shared")
    got = twin(weights=torch.zeros(4, 3), head="math", **inputs).logits
    assert torch.equal(got, shared(**inputs).logits)


@pytest.mark.parametrize(
    ("name", "way"), [("gpt2", "int4"), ("gemma", "mask"), ("llama tied", "several")]
)
def test_greedy_tokens_are_those_of_the_densely_merged_model(name, way, zoo, stores, tmp_path):
    made, (stored, twin) = zoo.made(name), stores(name, way)
    inputs, weights = batch_of(made.family, rows=2, pad="left", seed=5), weights_of(2)
    calls = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    got = twin.generate(weights=weights, **inputs, **calls)
    for index in range(2):
        plain = stored.plain(made, weights[index].tolist(), "math", tmp_path / str(index))
        want = plain.generate(**row(inputs, index), **calls)
        assert torch.equal(got[index : index + 1], want)


def test_parts_are_held_as_they_are_stored(stores):
    for way, kind in (("int8", Packed), ("mask", Scattered)):
        parts = parts_of(stores("gemma", way)[1])  # no biases: those ride along in floats
        assert {type(part) for part in parts} == {kind}
    kinds = {type(part) for part in parts_of(stores("bert", "several")[1])}
    assert kinds == {Factors, TableFactors, Packed, Scattered}


def parts_of(twin: Any) -> list[Any]:
    return [m for m in twin.modules() if isinstance(m, Factors | Packed | Scattered)]


def test_a_table_that_two_layers_share_is_held_once(stores):
    model = stores("llama tied", "several")[1].model
    held, shared = (m.twin_mixers["weight"] for m in (model.lm_head, model.model.embed_tokens))
    assert len(held) > 1 and all(
        one is other for one, other in zip(held[1:], shared[1:], strict=True)
    )
    # Of float factors, B lies in two ways: row by row for the lookup.
    assert held[0].a.data_ptr() == shared[0].a.data_ptr()


@pytest.mark.parametrize("way", ["int8", "several"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_model_runs_in_other_types(way, dtype, zoo, stores):
    stored, twin = stores("bert", way)
    inputs, weights = batch_of(FAMILIES["bert"]), weights_of(4)
    want = twin(weights=weights, head="code", **inputs).logits
    other = load(stored.folder, dtype=dtype)
    got = other(weights=weights, head="code", **inputs).logits
    assert got.dtype == dtype
    assert_close(got.float(), want, 0.05 if dtype == torch.bfloat16 else 1e-5)
    weights = randn(3, seed=0)
    merged = other.merged(weights, head="code")(**inputs).logits
    got = other(weights=weights, head="code", **inputs).logits
    assert_close(merged, got, 0.05 if dtype == torch.bfloat16 else 1e-6)


def test_loading_twice_gives_equal_bits(stores):
    stored, twin = stores("bert", "several")
    calls = dict(weights=weights_of(4), head="code", **batch_of(FAMILIES["bert"]))
    assert torch.equal(twin(**calls).logits, load(stored.folder)(**calls).logits)


# --------------------------------------------------------------------------------- bad parts

NAME = "encoder.layer.0.attention.self.query.weight"


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **share: Any) -> None:
    path = folder / "experts" / "math.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    record = next(record for record in manifest["tensors"] if record["name"] == NAME)
    record["experts"]["math"] |= share
    write_manifest(folder, manifest)


def put(suffix: str, value: Callable[[torch.Tensor], torch.Tensor]):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME + suffix] = value(tensors[NAME + suffix])

    return change


@pytest.mark.parametrize(
    ("storage", "change", "share", "message"),
    [
        ("int8", lambda t: t.pop(NAME + ".a.scale"), {}, rf"expected the tensor {NAME}.a.scale"),
        ("int8", put(".b.q", lambda q: q[:, 1:].contiguous()), {}, rf"{NAME}.b.q: .* \(3, 15\)"),
        ("int4", put(".a.q", lambda q: q[:2].clone()), {}, rf"{NAME}.a.q: expected torch.uint8"),
        ("int4", put(".a.scale", lambda s: s * torch.inf), {}, rf"{NAME}.a.scale: expected finite"),
        ("int8", lambda t: None, {"rank": 2}, rf"{NAME}.a.q: expected torch.int8 \(2, 16\)"),
        ("int8", lambda t: None, {"storage": "int4"}, rf"{NAME}.a.q: expected torch.uint8"),
        ("int8", lambda t: None, {"storage": "mask"}, rf"expected the tensor {NAME}.mask"),
        ("int8", lambda t: None, {"storage": "whole"}, rf"{NAME} is a matrix, so .* as 'whole'"),
        ("mask", put(".mask", lambda m: m & 15), {}, rf"{NAME}: expected as many values as pos"),
        ("mask", put(".values", lambda v: v[1:].clone()), {}, r"\d+ positions"),
        ("mask", lambda t: t.pop(NAME + ".values"), {}, rf"expected the tensor {NAME}.values"),
        ("index", put(".index", lambda i: i.flip(0)), {}, rf"{NAME}.index: expected ascending"),
        ("index", put(".index", lambda i: i + 256), {}, rf"{NAME}: expected positions in 0..255"),
    ],
)
def test_parts_that_are_not_as_the_manifest_says_are_named(
    storage, change, share, message, stores, tmp_path
):
    shutil.copytree(stores("bert", storage)[0].folder, tmp_path / "bad")
    damage(tmp_path / "bad", change, **share)
    with pytest.raises(CorruptArtifact, match=rf"experts/math.safetensors: .*{message}"):
        load(tmp_path / "bad")


def test_an_expert_of_which_nothing_was_kept_adds_nothing(stores, tmp_path):
    shutil.copytree(stores("bert", "index")[0].folder, tmp_path / "none")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in (".values", ".index"):
            tensors[NAME + suffix] = tensors[NAME + suffix][:0].clone()

    damage(tmp_path / "none", drop, entries=0)
    layer = load(tmp_path / "none").model.bert.encoder.layer[0].attention.self.query
    assert [p.expert for p in layer.parts if isinstance(p, Scattered)] == [1, 2]
