"""A base and experts of any size, shaped as Llama's: only names, shapes and bytes matter here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from twinmerge.artifact.tensorfile import layout, raw

SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Family:
    """Folders of a base and its experts, and what they hold."""

    base: Path
    experts: list[Path]
    model_bytes: int
    largest_bytes: int
    """Of the largest tensor, in float32, in which a merge computes."""

    def sources(self) -> list[Path]:
        return [file for folder in (self.base, *self.experts) for file in weight_files(folder)]


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def make_family(
    root: Path, size: int, *, width: int, dtype: torch.dtype = torch.float32, experts: int = 3
) -> Family:
    """Checkpoints of about `size` bytes each, in shards of one gigabyte.

    The size decides on the number of layers, the width on the largest tensor. Tensors of one shape
    are equal within a model: random numbers cost more than everything that is to be measured.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": 16 * width,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }
    vocabulary, layer = 2 * 16 * width**2 * dtype.itemsize, 49 * width**2 // 4 * dtype.itemsize
    config["num_hidden_layers"] = max(1, round((size - vocabulary) / layer))
    shapes = dict(_shapes(config))
    generator = torch.Generator().manual_seed(0)
    start = {
        shape: torch.randn(shape, generator=generator) * 0.02
        for shape in sorted(set(shapes.values()))
    }
    base = root / "base"
    _save(base, config, shapes, {shape: t.to(dtype) for shape, t in start.items()})
    folders = []
    for number in range(experts):
        moved = {s: t + 0.001 * torch.randn(s, generator=generator) for s, t in start.items()}
        folders.append(root / f"expert-{number}")
        _save(folders[-1], config, shapes, {shape: t.to(dtype) for shape, t in moved.items()})
    entries = [prod(shape) for shape in shapes.values()]
    return Family(base, folders, sum(entries) * dtype.itemsize, max(entries) * 4)


def _shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    yield "model.embed_tokens.weight", (vocab, width)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name in "qkvo":
            yield f"{layer}.self_attn.{name}_proj.weight", (width, width)
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", (inner, width)
        yield f"{layer}.mlp.down_proj.weight", (width, inner)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocab, width)


def _save(
    folder: Path,
    config: dict,
    shapes: dict[str, tuple[int, ...]],
    values: dict[tuple[int, ...], Tensor],
) -> None:
    """A checkpoint as `save_pretrained` leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size and size + values[shape].nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += values[shape].nbytes
    where = {}
    for number, names in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        where |= dict.fromkeys(names, shard)
        with open(folder / shard, "wb", buffering=0) as file:
            file.write(layout((n, values[shapes[n]].dtype, shapes[n]) for n in names).header)
            for name in names:
                file.write(raw(values[shapes[name]]))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
