"""Sources of a 70B model's make: hundreds of shards, tensors larger than memory, 8-bit floats."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import randn
from safetensors.torch import load_file, save_file

from twinmerge import checkpoint, sourcefile
from twinmerge.checkpoint import Checkpoint, open_expert, same_bits
from twinmerge.errors import CheckpointError, CorruptCheckpoint, UnsupportedCheckpoint
from twinmerge.weightfiles import TensorFiles

LAYERS, SHARDS = 80, 300
LINUX = sys.platform == "linux"


def llama_70b_names() -> list[str]:
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up")]
    parts += ["mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    layers = [f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in parts]
    return ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]


def sharded(folder: Path, seed: int, shards: int = SHARDS, kind: str = "safetensors") -> Path:
    """A Llama-70B in names and layout, with matrices of 2 × 2."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 4, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names, files, index = llama_70b_names(), {}, {}
    data = randn(len(names), 4, 2, seed=seed, dtype=torch.bfloat16)
    for i, name in enumerate(names):
        shard = f"{stem}-{i * shards // len(names) + 1:05}-of-{shards:05}.{kind}"
        rows = 4 if "embed" in name or "lm_head" in name else 2
        tensor = data[i, 0] if "norm" in name else data[i, :rows]
        files.setdefault(shard, {})[name], index[name] = tensor.clone(), shard
    for shard, tensors in files.items():
        save = save_file if kind == "safetensors" else torch.save
        save(tensors, str(folder / shard))
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def single(folder: Path, tensors: dict[str, torch.Tensor], **config) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def run(code: str, *args: object) -> str:
    """Standard output of a Python process of its own, which gives back what it frees at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def memory(key: str = "RssAnon") -> int:
    """Bytes that this process holds: of its own (RssAnon), or of mapped files (RssFile)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) << 10


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return sharded(tmp_path_factory.mktemp("70b") / "base", 0)


@pytest.fixture
def mapped(monkeypatch):
    """Tensors of any size are mapped, so that small files can show what large ones do."""
    monkeypatch.setattr(sourcefile, "MAPPED", 1)


# ----------------------------------------------------------------------------- many shards


def test_names_come_from_the_index_and_no_shard_is_opened_for_them(base, monkeypatch):
    opened = []
    open_ = Path.open

    def watch(path, *args, **kwargs):
        opened.append(path.name)
        return open_(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", watch)
    checkpoint = Checkpoint.open(str(base))
    assert checkpoint.names() == sorted(llama_70b_names()) and len(checkpoint.names()) == 723
    assert set(opened) <= {"config.json", "model.safetensors.index.json"}
    opened.clear()
    assert checkpoint.info("model.layers.79.mlp.down_proj.weight").shape == (2, 2)
    checkpoint.info("model.layers.79.mlp.down_proj.weight")
    assert opened == ["model-00298-of-00300.safetensors"]
    assert checkpoint.bytes() == 723 * 8 - 161 * 4 + 2 * 8


def test_eight_models_of_three_hundred_shards_fit_into_few_open_files(base, tmp_path):
    for i in range(8):
        (tmp_path / str(i)).symlink_to(base)
    code = """
        import resource, sys, torch
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
        from twinmerge import sourcefile
        from twinmerge.checkpoint import Checkpoint, open_expert
        sourcefile.MAPPED = 1
        base = Checkpoint.open(sys.argv[1])
        experts = [open_expert(str(i), f"{sys.argv[2]}/{i}", base) for i in range(8)]
        for name in base.names():
            expert_tensors = [expert.read(name) for expert in experts]
            assert all(torch.equal(base.read(name), tensor) for tensor in expert_tensors)
        assert len(sourcefile._MAPS) < 10
        print("read")
    """
    assert run(code, base, tmp_path) == "read\n"


def test_shards_of_pickles_are_let_go_of(tmp_path):
    folder = sharded(tmp_path / "bins", 3, shards=12, kind="bin")
    files = TensorFiles(folder, ("pytorch_model",))
    for name in llama_70b_names():
        files.read(name)
        assert sum(file._tensors is not None for file in files._files.values()) <= 4
    files.close()
    assert all(file._tensors is None for file in files._files.values())
    assert files.read("model.norm.weight").shape == (2,)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_many_threads_read_what_one_reads(kind, tmp_path, mapped):
    files = TensorFiles(sharded(tmp_path / "m", 3, 12, kind), ("model", "pytorch_model"))
    want = {name: files.read(name).clone() for name in files.names()}
    files.close()
    with ThreadPoolExecutor(8) as pool:
        came = pool.map(files.read, files.names() * 3)
        for name, tensor in zip(files.names() * 3, came, strict=True):
            assert torch.equal(tensor, want[name])


def test_opening_an_expert_of_many_shards_compares_no_tables(base, tmp_path, monkeypatch):
    other = sharded(tmp_path / "expert", 1, shards=40)
    monkeypatch.setattr(sourcefile.SafetensorsFile, "read", lambda *_: pytest.fail("read data"))
    opened = Checkpoint.open(str(base))
    expert = open_expert("task", str(other), opened)
    assert expert.missing() == [] == expert.head_names() and len(expert.names()) == 723


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), ""),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs"),
        (lambda path: path.write_bytes(b""), ""),
    ],
    ids=["truncated", "pointer", "empty"],
)
def test_a_damaged_shard_is_told_before_any_weight_is_read(kind, change, words, tmp_path):
    folder = sharded(tmp_path / "model", 2, shards=5, kind=kind)
    shard = sorted(folder.glob(f"*.{kind}"))[3]
    change(shard)
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(CorruptCheckpoint, match=f"(?s){shard.name}.*{words}"):
        checkpoint.floats()


# ------------------------------------------------------------------- files that go or change


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


GOING = {
    "gone": (Path.unlink, "got no such file any more"),
    "cut": (shorter, r"got [\d,]+ bytes"),
    "written to": (touched, "got one that was written to since"),
    "a link to itself": (
        lambda path: (path.unlink(), path.symlink_to(path)),
        "got .*symbolic links",
    ),
}


@pytest.mark.parametrize("way", GOING)
@pytest.mark.parametrize("when", ["header read", "mapped", "nothing read"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_shard_that_goes_half_way_is_named_with_what_to_do(way, when, kind, tmp_path, mapped):
    folder = sharded(tmp_path / "model", 2, shards=5, kind=kind)
    checkpoint = Checkpoint.open(str(folder))
    name = "model.layers.79.mlp.down_proj.weight"
    held = checkpoint.read(name) if when == "mapped" else None
    if when == "header read":
        checkpoint.info(name)
    change, words = GOING[way]
    shard = sorted(folder.glob(f"*.{kind}"))[4]
    change(shard)
    with pytest.raises(CorruptCheckpoint, match=f"(?s){shard.name}.*{words}.*run again"):
        checkpoint.read(name)
    assert checkpoint.read("model.embed_tokens.weight").shape == (4, 2)
    del held


def test_a_file_that_shrinks_between_the_look_and_the_read_is_told(tmp_path, monkeypatch):
    files = TensorFiles(Path(single(tmp_path / "one", {"w": torch.ones(4, 4)})), ("model",))
    monkeypatch.setattr(files, "_check", lambda shard: None)
    shorter(tmp_path / "one/model.safetensors")
    for least in (1, 1 << 20):
        monkeypatch.setattr(sourcefile, "MAPPED", least)
        with pytest.raises(CorruptCheckpoint, match=r"model.safetensors: expected tensor w"):
            files.read("w")


def test_a_failing_disk_is_no_traceback(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(single(tmp_path / "one", {"w": torch.ones(4, 4)}))

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(CheckpointError, match="model.safetensors: .*got Input/output error"):
        checkpoint.read("w")
    checkpoint.prefetch("w")  # never fails


def test_identity_is_size_and_time_of_all_files_as_they_were_opened(tmp_path):
    folder = sharded(tmp_path / "model", 2, shards=5)
    checkpoint = Checkpoint.open(str(folder))
    before = checkpoint.identity()
    names = {path.name for path in folder.iterdir()}
    assert set(before) == names and len(names) == 7
    look = (folder / "config.json").stat()
    assert before["config.json"] == [look.st_size, look.st_mtime_ns]
    assert json.loads(json.dumps(before)) == before == Checkpoint.open(str(folder)).identity()
    expert = open_expert("task", str(folder), checkpoint)
    assert expert.identity() == before
    touched(folder / "model-00002-of-00005.safetensors")
    assert checkpoint.identity() == before != Checkpoint.open(str(folder)).identity()


# ----------------------------------------------------------------------------------- memory


def numbers(mib: int) -> torch.Tensor:
    return torch.arange(mib << 18, dtype=torch.int32).view(torch.float32).view(-1, 1 << 10)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_a_large_tensor_is_the_file_itself_and_takes_no_memory(tmp_path):
    folder = single(tmp_path / "one", {"w": numbers(64), "b": torch.ones(3)})
    checkpoint = Checkpoint.open(folder)
    checkpoint.prefetch("w")
    anonymous, files = memory(), memory("RssFile")
    tensor = checkpoint.read("w")
    assert tensor.view(torch.int32)[-1, -1] == (64 << 18) - 1
    assert tensor.view(torch.int32).sum(dtype=torch.int64) > 0
    assert memory() - anonymous < 4 << 20
    assert memory("RssFile") - files > 60 << 20
    rows = tensor[5:7]
    del tensor  # a slice keeps the map, the last one gives it back
    assert rows.view(torch.int32)[0, 0] == 5 << 10
    del rows
    assert memory("RssFile") - files < 4 << 20 and not sourcefile._MAPS


@pytest.mark.skipif(not LINUX, reason="needs sparse files")
def test_a_tensor_larger_than_memory_is_read_where_it_is_looked_at(tmp_path):
    rows, size = 1 << 20, 1 << 39  # half a TiB, a hole but for its last bytes
    entry = {"dtype": "BF16", "shape": [rows, size // rows // 2], "data_offsets": [0, size]}
    header = json.dumps({"w": entry}).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
        file.seek(-2, os.SEEK_END)
        file.write(b"\x80\x3f")
    tensor = Checkpoint.open(str(tmp_path)).read("w")
    assert tensor[-1, -1] == 1 and not tensor[0].any()


def test_what_a_caller_writes_into_a_tensor_stays_out_of_the_file(tmp_path, mapped):
    folder = single(tmp_path / "one", {"w": torch.ones(4, 4)})
    checkpoint = Checkpoint.open(folder)
    checkpoint.read("w").zero_()
    assert torch.equal(checkpoint.read("w"), torch.ones(4, 4))


def test_more_maps_than_the_system_likes_are_copies(tmp_path, mapped, monkeypatch):
    monkeypatch.setattr(sourcefile, "_MOST_MAPS", 3)
    files = TensorFiles(Path(single(tmp_path / "one", {"w": randn(4, 4, seed=0)})), ("model",))
    held = [files.read("w") for _ in range(9)]
    assert len(sourcefile._MAPS) == 3
    assert all(torch.equal(tensor, held[0]) for tensor in held)


@pytest.mark.parametrize("least", [1, 1 << 20])
def test_every_dtype_shape_and_offset_reads_as_safetensors_reads_it(least, tmp_path, monkeypatch):
    monkeypatch.setattr(sourcefile, "MAPPED", least)
    bits = torch.arange(48, dtype=torch.uint8)
    tensors = {str(d): bits.clone().view(d) for d in sourcefile._DTYPES.values() if d != torch.bool}
    tensors |= {"bool": bits > 5, "none": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    folder = Path(single(tmp_path / "one", tensors))
    files = TensorFiles(folder, ("model",))
    want = load_file(folder / "model.safetensors")
    assert files.names() == sorted(want)
    for name, tensor in want.items():
        assert files.info(name).shape == tuple(tensor.shape)
        assert same_bits(files.read(name), tensor), name
    # A header that ends anywhere, as old writers have it: the data lie across their own size.
    for pad in range(1, 8):
        data = randn(8, 8, seed=1)
        header = json.dumps(
            {"w": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}}
        ).encode()
        header += b" " * (pad - len(header) % 8)
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + data.numpy().tobytes())
        assert torch.equal(TensorFiles(folder, ("model",)).read("w"), data)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_a_lora_on_a_large_matrix_takes_one_copy_of_it(tmp_path):
    rows, columns, rank = 4096, 2048, 2  # 16 MiB in bfloat16, 32 in float32
    weight = randn(rows, columns, seed=0, dtype=torch.bfloat16)
    base = Checkpoint.open(single(tmp_path / "base", {"model.layers.0.up.weight": weight}))
    (tmp_path / "a").mkdir()
    a, b = randn(rank, columns, seed=1), randn(rows, rank, seed=2)
    stem = "base_model.model.model.layers.0.up.lora_"
    save_file(
        {stem + "A.weight": a, stem + "B.weight": b}, tmp_path / "a/adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    expert = open_expert("task", str(tmp_path / "a"), base)
    assert set(expert.identity()) == {"adapter_config.json", "adapter_model.safetensors"}
    expert.prefetch("model.layers.0.up.weight")
    expert.prefetch("nowhere")
    (name,) = expert.names()
    assert torch.equal(expert.read(name), weight.float() + b @ a)
    del weight
    code = """
        import sys, torch
        torch.set_num_threads(1)
        from twinmerge.checkpoint import Checkpoint, open_expert
        base = Checkpoint.open(sys.argv[1])
        expert = open_expert("task", sys.argv[2], base)
        torch.ones(64, 64) @ torch.ones(64, 64)
        def own():
            pages = open("/proc/self/status").read()
            return int(pages.partition("RssAnon:")[2].split()[0]) << 10
        peak = before = own()
        import threading
        done = threading.Event()
        def watch():
            global peak
            while not done.wait(0.0005):
                peak = max(peak, own())
        watcher = threading.Thread(target=watch)
        watcher.start()
        for _ in range(5):
            tensor = expert.read("model.layers.0.up.weight")
            del tensor
        done.set()
        watcher.join()
        print(peak - before)
    """
    peak = int(run(code, base.reference, tmp_path / "a"))
    assert 24 << 20 < peak < 60 << 20  # one float32 copy, and a block at a time of the base


def test_tied_tables_are_compared_up_to_the_first_difference(tmp_path):
    one = numbers(8)
    other = one.clone()
    other[0, 0] = 1.5
    folder = single(tmp_path / "m", {"embed_tokens.weight": one, "lm_head.weight": other})
    opened = Checkpoint.open(folder)
    names = ("embed_tokens.weight", "lm_head.weight")
    assert not opened.same(*names) and opened.same(names[0], names[0])
    # NaN equals itself and zero is not minus zero: these are bits, of any dtype.
    nan = torch.full((3,), float("nan"))
    assert same_bits(nan, nan.clone()) and not same_bits(torch.zeros(1), -torch.zeros(1))
    eight = randn(4, 4, seed=0).to(torch.float8_e5m2)
    assert same_bits(eight, eight.clone()) and not same_bits(eight, eight.float())
    expert = open_expert("task", folder, opened)
    assert not expert.same(*names) and expert.same(names[1], names[1])


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_comparing_tables_takes_no_memory(tmp_path):
    table = numbers(32)
    folder = single(tmp_path / "m", {"embed_tokens.weight": table, "lm_head.weight": table.clone()})
    opened = Checkpoint.open(folder)
    before = memory()
    assert opened.same("embed_tokens.weight", "lm_head.weight")
    assert memory() - before < 4 << 20


def test_two_names_of_one_storage_are_not_read_to_be_compared(tmp_path, monkeypatch):
    table = randn(4, 4, seed=0)
    (tmp_path / "config.json").write_text("{}")
    torch.save({"embed": table, "lm_head": table}, tmp_path / "pytorch_model.bin")
    opened = Checkpoint.open(str(tmp_path))
    monkeypatch.setattr(checkpoint.torch, "equal", lambda *_: pytest.fail("compared data"))
    assert opened.same("embed", "lm_head")


# ----------------------------------------------------------------------- 8 bits and fewer


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_plain_cast_to_float8_is_read_exactly(dtype, tmp_path):
    weight = randn(16, 16, seed=0).to(dtype)
    name = "model.layers.0.mlp.up_proj.weight"
    opened = Checkpoint.open(single(tmp_path / "base", {name: weight}))
    assert opened.info(name).dtype is dtype and opened.floats() == [name]
    assert torch.equal(opened.read(name).float(), weight.float())
    (tmp_path / "a").mkdir()
    stem = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    a, b = randn(2, 16, seed=1), randn(16, 2, seed=2)
    save_file(
        {stem + "A.weight": a, stem + "B.weight": b}, tmp_path / "a/adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    expert = open_expert("task", str(tmp_path / "a"), opened)
    assert torch.equal(expert.read(name), weight.float() + b @ a)


CONFIGS = {
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "bitsandbytes": (
        {"quantization_config": {"load_in_4bit": True}},
        r"bitsandbytes.*model\.dequantize",
    ),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "fp8.*FineGrainedFP8Config"),
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4.*Mxfp4Config"),
    "torchao": ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
    "compressed": (
        {"compression_config": {"quant_method": "compressed-tensors"}},
        "compressed-tensors.*CompressedTensorsConfig",
    ),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    "nested": ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    "unnamed": ({"quantization_config": True}, "unnamed"),
}


@pytest.mark.parametrize("scheme", CONFIGS)
def test_a_config_that_says_quantised_is_refused_by_method(scheme, tmp_path):
    config, words = CONFIGS[scheme]
    folder = single(tmp_path / "q", {"a.weight": torch.ones(2, 2)}, **config)
    with pytest.raises(UnsupportedCheckpoint, match=f"(?s)/q': .*{words}.*bfloat16.*config.json"):
        Checkpoint.open(folder)
    assert Checkpoint.open(single(tmp_path / "q", {"a": torch.ones(2)}, quantization_config=None))


U8, I8, F8 = torch.uint8, torch.int8, torch.float8_e4m3fn
TENSORS = {
    "GPTQ or AWQ": {"a.qweight": torch.int32, "a.qzeros": torch.int32, "a.scales": torch.float16},
    "bitsandbytes": {"a.weight": U8, "a.weight.absmax": torch.float32, "a.weight.quant_map": U8},
    "bitsandbytes:": {"a.weight": I8, "a.SCB": torch.float32},
    "compressed-tensors": {"a.weight_packed": torch.int32, "a.weight_scale": torch.bfloat16},
    "fp8 in blocks": {"a.weight": F8, "a.weight_scale_inv": torch.float32},
    "8-bit floats with scales": {"a.weight": F8, "a.weight_scale": torch.bfloat16},
    "8-bit floats with scales:": {"a.gate_up_proj": F8, "a.gate_up_proj_scale": torch.bfloat16},
    "8-bit floats with scales: a": {"a.weight": torch.float8_e5m2, "a.scale": torch.float32},
    "ComfyUI": {"a.weight": F8, "a.scale_weight": torch.float32, "scaled_fp8": F8},
    "MXFP4": {"a.gate_up_proj_blocks": U8, "a.gate_up_proj_scales": U8},
    "integers with scales": {"a.weight": torch.uint32, "a.scales": torch.float16},
    "integers with scales:": {"a.weight": I8, "a.weight_scale": torch.bfloat16},
    "integers in place of weights": {"a.weight": U8},
    "HQQ": {"a.W_q": U8, "a.scale": torch.float16},
    "quanto": {"a.weight._data": I8, "a.weight._scale": torch.float16},
    "torchao": {"a._weight_qdata": I8, "a._weight_scale": torch.float16},
    "EXL2": {"a.q_weight": torch.int32, "a.q_groups": torch.int16},
}


@pytest.mark.parametrize("scheme", TENSORS)
def test_quantised_tensors_are_refused_by_scheme_and_name(scheme, tmp_path):
    tensors = {name: torch.ones(4, 4).to(dtype) for name, dtype in TENSORS[scheme].items()}
    folder = single(tmp_path / "q", {"b.weight": torch.ones(4, 4)} | tensors)
    (tmp_path / "q/README.md").write_text("---\nbase_model:\n- acme/Llama-7B\n---\n")
    words = rf"(?s)/q': expected plain weights.*{scheme}.*a\..*bfloat16.*'acme/Llama-7B', says"
    with pytest.raises(UnsupportedCheckpoint, match=words):
        Checkpoint.open(folder).floats()


def test_integers_and_scales_of_plain_models_are_no_quantisation(tmp_path):
    tensors = {
        "attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "embeddings.position_ids": torch.arange(4)[None],
        "norm.scale": torch.ones(4),
        "block.layer_scale.gamma": torch.ones(4),
        "q.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "q.weight_scale": torch.ones(1),
        "logit_scale": torch.tensor(1.0),
    }
    opened = Checkpoint.open(single(tmp_path / "m", tensors))
    assert {name: opened.info(name).dtype for name in opened.names()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0"])
def test_numbers_of_fewer_bits_are_refused_by_name(dtype, tmp_path):
    header = json.dumps({"x.w": {"dtype": dtype, "shape": [8], "data_offsets": [0, 4]}}).encode()
    folder = single(tmp_path / "q", {})
    path = tmp_path / "q/model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    words = rf"model.safetensors: .*packed {dtype} numbers \(tensor x.w\).*bfloat16"
    with pytest.raises(UnsupportedCheckpoint, match=f"(?s){words}"):
        Checkpoint.open(folder)


def test_gguf_is_refused_as_file_and_as_folder(tmp_path):
    path = tmp_path / "model-Q4_K_M.gguf"
    path.write_bytes(b"GGUF")
    for reference in (path, tmp_path):
        with pytest.raises(UnsupportedCheckpoint, match=r"(?s)GGUF.*Q4_K_M.gguf.*gguf_file="):
            Checkpoint.open(str(reference))


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_quantised_and_sparse_tensors_in_a_pickle_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    quantised = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    for tensor in (quantised, torch.eye(3).to_sparse()):
        torch.save({"a.weight": tensor}, tmp_path / "pytorch_model.bin")
        with pytest.raises(UnsupportedCheckpoint, match="(?s)dense tensors.*a.weight.*dequantize"):
            Checkpoint.open(str(tmp_path))
