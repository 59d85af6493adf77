"""Quantised checkpoints, known by what their config and tensors are called, and refused by name.

A merge adds weights, and the numbers of such files are no weights: they mean something only
together with scales, zero points or tables beside them. 8-bit floats that were merely cast are
weights, and are read like any others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container
from pathlib import Path
from typing import Any

from .errors import UnsupportedCheckpoint
from .sourcefile import TensorInfo, explain, some

# Names that no plain model has, by who writes them.
_NAMES = [
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros)$")),
    ("bitsandbytes", re.compile(r"\.(SCB|(nested_)?(absmax|quant_map)|quant_state(\..+)?)$")),
    ("compressed-tensors", re.compile(r"\.(weight_packed|weight_zero_point)$")),
    ("fp8 in blocks with scales, as DeepSeek's", re.compile(r"_scale_inv$")),
    ("float8 with scales, as ComfyUI's", re.compile(r"(^|\.)(scaled_fp8|scale_weight)$")),
    ("HQQ", re.compile(r"\.W_q$")),
    ("quanto", re.compile(r"\.weight\._(data|scale)$")),
    ("torchao", re.compile(r"\._?weight_qdata$")),
    ("EXL2", re.compile(r"\.(q_weight|q_groups|q_scale_max)$")),
]
# What stands for `weight` or after it in the name of its scales.
_SCALES = ("_scale", "_scales", "_scale_2", ".scale", ".scales", "._scale")
_HOW = {
    "bitsandbytes": "load it with transformers and call `model.dequantize()`",
    "higgs": "load it with transformers and call `model.dequantize()`",
    "fp8": "load it with transformers and FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "load it with transformers and Mxfp4Config(dequantize=True)",
    "compressed-tensors": "load it with transformers and CompressedTensorsConfig(dequantize=True)",
    "gguf": "load it with transformers and `gguf_file=`, which dequantises",
}


def refuse_config(thing: str, folder: Path, config: dict[str, Any]) -> None:
    """Raise `UnsupportedCheckpoint` if the config.json says that the weights are quantised."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if said := part.get(key):
                method = _method(said, key)
                came = f"weights quantised by {method or 'an unnamed method'} ({key})"
                plain = f"If they are plain weights by now, take {key} out of its config.json."
                raise UnsupportedCheckpoint(
                    explain(thing, "plain weights", came, f"{_todo(folder, method)} {plain}")
                )


def _method(said: Any, key: str) -> str:
    if not isinstance(said, dict):
        return ""
    if said.get("load_in_4bit") or said.get("load_in_8bit"):
        return "bitsandbytes"
    return str(said.get("quant_method") or ("MLX" if key == "quantization" else ""))


def refuse_names(thing: str, folder: Path, names: Collection[str]) -> None:
    """Raise `UnsupportedCheckpoint` if tensors are called what only a quantiser calls them."""
    for scheme, pattern in _NAMES:
        if found := [name for name in names if pattern.search(name)]:
            _refuse(thing, folder, scheme, some(found))
    known = set(names)
    for name in sorted(known):
        if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in known:
            _refuse(thing, folder, "MXFP4", f"{name}, and its _scales")


def refuse_scaled(
    thing: str, folder: Path, name: str, info: TensorInfo, names: Container[str]
) -> None:
    """Raise `UnsupportedCheckpoint` if this tensor means nothing without scales beside it.

    8-bit floats without any are a plain cast. Integers in place of a weight matrix are packed,
    scales or not. `names` are all names of the checkpoint.
    """
    floating = info.dtype.is_floating_point
    if (floating and info.dtype.itemsize > 1) or (not floating and len(info.shape) < 2):
        return
    stems = (name, name.removesuffix(".weight"))
    scale = next((s + end for s in stems for end in _SCALES if s + end in names), None)
    if scale is not None:
        scheme = "8-bit floats with scales" if floating else "integers with scales"
        _refuse(thing, folder, scheme, f"{name}, {info.dtype}, and {scale}")
    if not floating and name.endswith(".weight"):
        _refuse(thing, folder, "integers in place of weights", f"{name}, {info.dtype}")


def refuse_gguf(thing: str, folder: Path, found: str) -> None:
    """Always raises: a model in llama.cpp's format."""
    came = f"GGUF, llama.cpp's format ({found})"
    raise UnsupportedCheckpoint(
        explain(thing, "safetensors or .bin files", came, _todo(folder, "gguf"))
    )


def _refuse(thing: str, folder: Path, scheme: str, tensors: str) -> None:
    came = f"quantised ones ({scheme}: {tensors})"
    raise UnsupportedCheckpoint(explain(thing, "plain weights", came, _todo(folder, scheme)))


def _todo(folder: Path, method: str) -> str:
    """What to do, with the model that it was made from if its card names that."""
    original = "the model that it was quantised from"
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if named := re.search(r"^base_model:\s*(?:-\s*)?[\"']?(\w[\w.-]*/[\w.-]+)", text, re.MULTILINE):
        original += f" ('{named[1]}', says its README.md)"
    known = _HOW.get(method.lower().partition(" ")[0])
    how = f" ({known})" if known else ""
    return f"Dequantise it{how} and save it in bfloat16 first, or give us {original}."
