"""Casting, moving, copying, pickling a TwinModel, and spreading it over devices."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randn
from tiny import FAMILIES, batch_of
from torch.utils.data import DataLoader, Dataset

from twinmerge.errors import InputError, MissingExtra
from twinmerge.runtime import devices
from twinmerge.runtime.load import load

KINDS = ("bert", "vit", "llama")
"""Linear layers and norms; bare parameters and a convolution; a causal model."""

CPU = torch.device("cpu")


def mixed(rows: int = 4) -> torch.Tensor:
    return randn(rows, 3, seed=5).softmax(dim=-1)


def answer(twin: Any, name: str, **more: Any) -> torch.Tensor:
    """Logits of a batch in which every row has other weights."""
    inputs = batch_of(FAMILIES[name])
    inputs = {
        key: value.to(twin.dtype) if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    return twin(weights=mixed(), **inputs, **more).logits


# --------------------------------------------------------------------------- casting and moving


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_is_loading_it_in_that_dtype(name, dtype, zoo):
    folder = zoo.artifact(name, 3)
    loaded = load(folder, dtype=dtype)
    cast = load(folder).to(dtype)
    assert loaded.dtype == cast.dtype == dtype
    want, got = answer(loaded, name), answer(cast, name)
    assert want.dtype == got.dtype == dtype
    if name == "llama":  # a cast rounds rotary frequencies too, here and in transformers
        torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
    else:
        assert torch.equal(got, want)
    short = load(folder)
    short = short.bfloat16() if dtype == torch.bfloat16 else short.half()
    assert torch.equal(answer(short, name), got)


@pytest.mark.parametrize("written", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_named(written, zoo):
    assert load(zoo.artifact("bert", 3), dtype=written).dtype == torch.bfloat16


def test_auto_is_as_stored_and_what_is_no_float_is_refused(zoo):
    folder = zoo.artifact("bert", 3)
    assert load(folder, dtype="auto").dtype == load(folder).dtype == torch.float32
    for wrong in ("bf16", "int8", "load"):
        with pytest.raises(InputError, match=rf"dtype={wrong!r}: expected a float dtype or its"):
            load(folder, dtype=wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_stays_in_float32(dtype, bench):
    text = ["math1 the2 math3", "code2 code5", "law1 law3 the9"]
    want = load(bench.routed)
    inputs = want.tokenizer(text, return_tensors="pt", padding=True)
    for twin in (load(bench.routed).to(dtype), load(bench.routed, dtype=dtype)):
        held = [t for t in twin.router.state_dict().values() if t.is_floating_point()]
        assert {t.dtype for t in held} == {torch.float32}
        weights = twin.route(**inputs)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, want.route(**inputs), atol=0.05, rtol=0)
    state = twin.float().router.state_dict()
    assert all(torch.equal(state[key], value) for key, value in want.router.state_dict().items())


def test_training_mode_and_back_changes_nothing(zoo):
    twin = load(zoo.artifact("bert", 3))
    want = answer(twin, "bert")
    assert not twin.training and not any(p.requires_grad for p in twin.parameters())
    assert twin.train().training and twin.model.training
    assert torch.equal(answer(twin.eval(), "bert"), want)


def test_moving_goes_through_the_whole_model(zoo):
    twin = load(zoo.artifact("vit", 3))
    assert twin.device == CPU
    moved = twin.to("meta")
    tensors = [*moved.parameters(), *moved.buffers()]
    assert moved.device.type == "meta" and {t.device.type for t in tensors} == {"meta"}


# -------------------------------------------------------------------------- copies and pickles


def by_pickle(twin: Any) -> Any:
    return pickle.loads(pickle.dumps(twin))


def by_torch(twin: Any) -> Any:
    file = BytesIO()
    torch.save(twin, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_cloudpickle(twin: Any) -> Any:
    cloudpickle = pytest.importorskip("cloudpickle")  # what Ray sends
    return cloudpickle.loads(cloudpickle.dumps(twin))


@pytest.mark.parametrize("way", [by_pickle, by_torch, by_cloudpickle, copy.deepcopy])
@pytest.mark.parametrize("name", KINDS)
def test_a_copy_answers_bit_for_bit(name, way, zoo):
    twin = load(zoo.artifact(name, 3))
    want = answer(twin, name)  # caches are full now
    assert twin.features  # and hooks are in place
    again = way(twin)
    assert torch.equal(answer(again, name), want)
    assert again.experts == twin.experts and again.folder == twin.folder
    assert not again.training
    for p in again.model.parameters():
        p.zero_()
    assert torch.equal(answer(twin, name), want)  # nothing is shared


@pytest.mark.parametrize("way", [by_pickle, copy.deepcopy])
def test_a_copy_routes_by_itself(way, bench):
    twin = load(bench.routed)
    inputs = twin.tokenizer(["math1 the2", "law1 law3 the9"], return_tensors="pt", padding=True)
    want = twin(**inputs)
    again = way(twin)
    del twin
    got = again(**inputs)
    assert torch.equal(got.weights, want.weights) and torch.equal(got.logits, want.logits)
    other = again.tokenizer(["code1"], return_tensors="pt")
    alone = load(bench.routed)
    torch.testing.assert_close(again.route(**other), alone.route(**other), atol=0, rtol=0)


def test_hooks_added_in_another_process_do_not_replace_ours(bench, tmp_path):
    """Hooks have numbers, which a new process gives out from 0 again."""
    twin = load(bench.routed)
    inputs = twin.tokenizer(["math1 the2"], return_tensors="pt")
    want = twin.route(**inputs)
    torch.save((twin, dict(inputs)), tmp_path / "twin.pt")
    code = (
        "import sys, torch\n"
        "twin, inputs = torch.load(sys.argv[1], weights_only=False)\n"
        "blocks, quiet = twin.features.blocks, lambda *_: None\n"
        "for _ in range(max(blocks[-1]._forward_hooks) + 1):\n"
        "    for block in blocks:\n"
        "        block.register_forward_pre_hook(quiet)\n"
        "    blocks[-1].register_forward_hook(quiet)\n"
        "torch.save(twin.route(**inputs), sys.argv[2])\n"
    )
    out = tmp_path / "weights.pt"
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, tmp_path / "twin.pt", out], check=True, cwd=root)
    assert torch.equal(torch.load(out), want)


class Answers(Dataset):
    """Twins that a worker runs: the logits of each."""

    def __init__(self, twins: dict[str, Any]) -> None:
        self.twins = twins

    def __len__(self) -> int:
        return len(self.twins)

    def __getitem__(self, index: int) -> torch.Tensor:
        name = list(self.twins)[index]
        return answer(self.twins[name], name)


def test_workers_that_are_started_anew_answer_bit_for_bit(zoo):
    twins = {name: load(zoo.artifact(name, 3)) for name in KINDS}
    want = [answer(twin, name) for name, twin in twins.items()]
    loader = DataLoader(
        Answers(twins), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    got = list(loader)
    assert len(got) == 3 and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# ------------------------------------------------------------------------------ several devices


def spread(zoo: Any, name: str, device_map: Any, tmp_path: Path, **more: Any) -> Any:
    pytest.importorskip("accelerate")
    folder = zoo.artifact(name, 3)
    return load(folder, device_map=device_map, offload_folder=tmp_path / "disk", **more)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto", "sequential", "balanced"])
def test_all_in_one_place_is_the_same_model(name, device_map, zoo, tmp_path):
    twin = spread(zoo, name, device_map, tmp_path)
    assert torch.equal(answer(twin, name), answer(zoo.twin(name, 3), name))
    assert set(twin.hf_device_map.values()) == {"cpu"} and twin.device == CPU


@pytest.mark.parametrize("name", KINDS)
def test_modules_on_disk_give_the_same_outputs(name, zoo, tmp_path):
    inside = "model" if name == "llama" else name
    layers = "layers" if name in ("llama", "vit") else "encoder.layer"
    with_head = spread(zoo, name, {"": "cpu", f"{inside}.{layers}.1": "disk"}, tmp_path)
    assert torch.equal(answer(with_head, name), answer(zoo.twin(name, 3), name))
    on_disk = [p for p in with_head.model.parameters() if p.device.type == "meta"]
    assert on_disk and with_head.device == CPU and with_head.dtype == torch.float32
    for weighting in (dict(task="law"), dict(weights=[0.0, 0.0, 0.0], head="law")):
        inputs = batch_of(FAMILIES[name])
        want = zoo.twin(name, 3)(**inputs, **weighting).logits
        torch.testing.assert_close(with_head(**inputs, **weighting).logits, want)


def test_everything_on_disk(zoo, tmp_path):
    twin = spread(zoo, "llama", {"": "disk"}, tmp_path)
    assert all(p.device.type == "meta" for p in twin.model.parameters())
    assert torch.equal(answer(twin, "llama"), answer(zoo.twin("llama", 3), "llama"))


def test_what_memory_does_not_hold_goes_to_disk_block_by_block(zoo, tmp_path):
    whole = sum(t.nbytes for t in zoo.twin("llama", 3).model.state_dict().values())
    twin = spread(zoo, "llama", "auto", tmp_path, max_memory={"cpu": int(1.2 * whole)})
    assert set(twin.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(answer(twin, "llama"), answer(zoo.twin("llama", 3), "llama"))


def test_what_was_put_on_disk_goes_with_the_model(zoo, tmp_path):
    twins = [spread(zoo, "llama", {"": "disk"}, tmp_path) for _ in range(2)]
    assert len(list((tmp_path / "disk").iterdir())) == 2  # none takes the other's
    del twins
    import gc

    gc.collect()
    assert not list((tmp_path / "disk").iterdir())


def test_a_spread_model_routes_and_generates(causal_bench, tmp_path):
    pytest.importorskip("accelerate")
    twin = load(
        causal_bench.routed,
        device_map={"": "cpu", "model.layers.0": "disk"},
        offload_folder=tmp_path,
    )
    inputs = twin.tokenizer(["math1 the2", "code3"], return_tensors="pt", padding=True)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    plain = causal_bench.model
    assert torch.equal(twin.route(**inputs), plain.route(**inputs))
    made = twin.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, plain.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_a_spread_model_is_not_moved_cast_or_pickled(zoo, tmp_path):
    twin = spread(zoo, "llama", {"": "disk"}, tmp_path)
    for call in (twin.half, twin.float, lambda: twin.to("cpu")):
        with pytest.raises(InputError, match="loaded with device_map=, so it cannot be moved"):
            call()
    for call in (pickle.dumps, copy.deepcopy):
        with pytest.raises(InputError, match="device_map=, so it cannot be pickled or copied"):
            call(twin)
    assert torch.equal(answer(twin, "llama"), answer(zoo.twin("llama", 3), "llama"))


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ({"": "cpu", "model.layer.0": "disk"}, "has no module 'model.layer.0'. Its parts: model"),
        ({"model.layers.0": "cpu"}, "The device_map provided does not give any device for"),
        ({"": "cuda:99"}, "device cuda:99: cannot be used here"),
        ("nowhere", "device nowhere: cannot be used here"),
    ],
)
def test_a_map_that_does_not_fit_says_where(device_map, said, zoo, tmp_path):
    with pytest.raises(InputError, match=said):
        spread(zoo, "llama", device_map, tmp_path)


def test_disk_needs_a_folder_and_one_way_to_say_where(zoo):
    pytest.importorskip("accelerate")
    with pytest.raises(InputError, match="some modules go to disk. Say where: offload_folder="):
        load(zoo.artifact("llama", 3), device_map={"": "disk"})
    with pytest.raises(InputError, match="give device= or device_map=, not both"):
        load(zoo.artifact("llama", 3), device="meta", device_map="auto")


def test_without_accelerate_the_message_holds_the_install_line(zoo, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r"pip install 'twinmerge\[devices\]'"):
        devices.dispatch(zoo.twin("llama", 3).model, "auto")
