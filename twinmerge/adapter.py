"""A PEFT LoRA folder, seen as an expert: which base tensors it changes, and by what factors.

For a linear layer, LoRA stores `A: (rank, in)`, `B: (out, rank)` and means

    W_t = W_0 + s · B @ A        s = alpha / rank, or alpha / √rank for rsLoRA

so the task vector is known in factors and never has to be subtracted or decomposed. Everything in
the file is either used or an error: a tensor skipped here would be quality lost without a trace.
Variants whose algebra is not this sum (DoRA, PiSSA, ...) are refused by name.

Sources: Hu et al., LoRA, arXiv:2106.09685; Kalajdzievski, rsLoRA, arXiv:2312.03732; the file layout
and the meaning of each config key are those of peft 0.18 to 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from twinmerge.checkpoint import (
    EMBEDDING,
    UNCHANGED,
    Checkpoint,
    Entry,
    Expert,
    LowRank,
    align,
)
from twinmerge.errors import CheckpointError, UnsupportedCheckpoint
from twinmerge.weightfiles import TensorFiles, TensorInfo, explain, read_json, some

_MERGE = "Merge it first with peft's `merge_and_unload()`, save that, and give us the full folder."

# Read here, or of no effect on what the stored tensors mean.
_KNOWN = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying
    eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern
    layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_core
    modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision runtime_config
    target_modules task_type use_rslora
    """.split()
)
_REFUSED = {
    "use_dora": "DoRA (use_dora), which rescales the columns of the sum",
    "alora_invocation_tokens": "aLoRA (alora_invocation_tokens), which acts on some tokens only",
    "use_qalora": "QA-LoRA (use_qalora), which pools its inputs",
    "layer_replication": "layer_replication, which copies layers that the base has once",
    "target_parameters": "target_parameters, LoRA on fused expert parameters",
    "trainable_token_indices": "trainable_token_indices, single rows of an embedding",
    "megatron_config": "Megatron parallel layers (megatron_config)",
    "arrow_config": "Arrow routing (arrow_config)",
    "kasa_config": "KaSA (kasa_config), which truncates the base's weights",
    "monteclora_config": "MonteCLoRA (monteclora_config), whose factors are random",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
}
# Starts that leave the base's weights alone. PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA rewrite them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

_LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB])(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)


def _check_config(thing: str, config: dict[str, Any]) -> None:
    """Raises `UnsupportedCheckpoint` for whatever is not plain LoRA, by name."""
    kind = str(config.get("peft_type")).upper().removeprefix("PEFTTYPE.")
    if kind != "LORA":
        raise UnsupportedCheckpoint(explain(thing, "peft_type LORA", f"peft_type {kind}", _MERGE))
    for key, what in _REFUSED.items():
        if config.get(key):
            raise UnsupportedCheckpoint(explain(thing, "plain LoRA", what, _MERGE))
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        came = f"init_lora_weights='{start}', which changed the base's weights before training"
        todo = f"Convert it to plain LoRA when saving (peft documents how), or: {_MERGE}"
        raise UnsupportedCheckpoint(explain(thing, "plain LoRA", came, todo))
    if unknown := sorted(k for k, v in config.items() if v and k not in _KNOWN):
        came = f"config keys that we do not know ({some(unknown, 5)})"
        raise UnsupportedCheckpoint(explain(thing, "plain LoRA", came, _MERGE))


def _pattern(patterns: dict[str, Any] | None, module: str, default: int | float) -> int | float:
    """The value of the first pattern that matches the end of the module's path, as in peft."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


class _Target:
    """The LoRA tensors of one module: checked against the config, then read on demand."""

    def __init__(self, module: str, keys: dict[str, str], files: TensorFiles, thing: str):
        self.module, self.files, self.thing = module, files, f"{thing}: {module}"
        self.embedding = "lora_embedding_A" in keys
        kind = "lora_embedding_" if self.embedding else "lora_"
        pair = [kind + "A", kind + "B"] if self.embedding else ["lora_A.weight", "lora_B.weight"]
        if lacking := [part for part in pair if part not in keys]:
            todo = "The file is incomplete: save the adapter again with `save_pretrained`."
            raise CheckpointError(explain(self.thing, " and ".join(pair), f"no {lacking[0]}", todo))
        self.a, self.b = (keys.pop(part) for part in pair)
        self.bias = keys.pop("lora_B.bias", None)
        self.leftover = sorted(keys.values())
        # (rank, in, ...) and (out, rank, ...); an embedding's are (rank, vocab) and (dim, rank).
        self.shape_a, self.shape_b = files.info(self.a).shape, files.info(self.b).shape
        self.transposed = self.embedding
        self.scale = 0.0

    def check(self, config: dict[str, Any], name: str, shape: tuple[int, ...]) -> None:
        """Rank against the config, factors against `shape`, that of the base's tensor `name`."""
        rank = int(_pattern(config.get("rank_pattern"), self.module, config["r"]))
        alpha = _pattern(config.get("alpha_pattern"), self.module, config["lora_alpha"])
        came = f"A {self.shape_a} and B {self.shape_b}"
        if len(self.shape_b) < 2 or not rank == self.shape_a[0] == self.shape_b[1]:
            todo = "The scale would be wrong. The config belongs to another adapter file: check it."
            expected = f"rank {rank} (adapter_config.json)"
            raise CheckpointError(
                explain(self.thing, expected, f"rank {self.shape_a[0]}, {came}", todo)
            )
        self.scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        delta = (self.shape_b[0], *self.shape_a[1:])
        fits = {delta} if not self.embedding else set()
        if len(delta) == 2:
            fits |= {delta[::-1]} if self.embedding else {delta, delta[::-1]}
        if shape not in fits or math.prod(self.shape_b) != self.shape_b[0] * rank:
            todo = "This is an adapter for another base: check both, or leave it out."
            raise CheckpointError(explain(self.thing, f"factors for {name} {shape}", came, todo))
        if not self.embedding and shape != delta:
            self.transposed = True

    def factors(self) -> LowRank:
        """`b @ a` in the orientation of the stored weight, scale in `b`, float32."""
        a = self.files.read(self.a).float().flatten(1)
        b = self.files.read(self.b).float().flatten(1)
        if self.transposed:  # the layer stores its weight as (in, out): (B @ A).T = A.T @ B.T
            a, b = b.T, a.T
        return LowRank(a=a.contiguous(), b=(self.scale * b).contiguous())

    def bias_delta(self) -> Tensor:
        assert self.bias is not None
        return self.scale * self.files.read(self.bias).float()


def _orient(targets: dict[str, _Target], base: Checkpoint, config: dict[str, Any]) -> None:
    """Square weights cannot tell (out, in) from Conv1D's (in, out): the config has to.

    peft sets `fan_in_fan_out` to what the last layer it met needed. So where the oblong layers of
    one adapter disagree with the flag or with each other, a square one is not guessed at.
    """
    linear = {n: t for n, t in targets.items() if not t.embedding and len(t.shape_a) == 2}
    square = {n for n in linear if len(set(base.info(n).shape)) == 1}
    flag = bool(config.get("fan_in_fan_out"))
    against = {n for n in set(linear) - square if linear[n].transposed != flag}
    if square and against:
        name = min(square)
        came = f"fan_in_fan_out={flag}, against which {some(against)} speaks"
        raise UnsupportedCheckpoint(explain(linear[name].thing, "one orientation", came, _MERGE))
    for name in square:
        linear[name].transposed = flag


def _sort(files: TensorFiles) -> tuple[dict[str, dict[str, str]], dict[str, tuple[str, bool]]]:
    """{module: {part: stored name}} of LoRA, and {own name: (stored name, is a base layer's)}."""
    lora: dict[str, dict[str, str]] = {}
    plain: dict[str, tuple[str, bool]] = {}
    originals: dict[str, str] = {}
    for stored in files.names():
        name = stored.removeprefix("base_model.model.")
        if match := _LORA.fullmatch(name):
            part = match["part"] + (f".{match['leaf']}" if match["leaf"] else "")
            lora.setdefault(match["module"], {})[part] = stored
        elif ".original_module." in name:  # bias="all" saves the bias that was replaced, too
            originals[name.replace(".original_module.", ".")] = stored
        else:
            name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
            plain[name.replace(".base_layer.", ".")] = (stored, ".base_layer." in name)
    for name, stored in originals.items():
        plain.setdefault(name, (stored, False))
    return lora, plain


def open_adapter(name: str, reference: str, folder: Path, base: Checkpoint) -> Expert:
    """A folder with adapter_config.json as an expert of `base`. Reads headers, seldom data.

    Raises `UnsupportedCheckpoint` for anything but plain LoRA, `CheckpointError` for an adapter of
    another base, one that disagrees with its config, or a tensor that nothing would use.
    """
    thing = f"adapter '{name}'"
    config = read_json(folder / "adapter_config.json")
    _check_config(thing, config)
    if lacking := [k for k in ("r", "lora_alpha") if not isinstance(config.get(k), int | float)]:
        todo = "Copy the adapter's own adapter_config.json: without it the scale is unknown."
        raise CheckpointError(explain(thing, "r and lora_alpha", f"no {lacking[0]}", todo))
    files = TensorFiles(folder, ("adapter_model",), beside=("adapter_config.json",))
    lora, plain = _sort(files)
    before, after, found = align(base.names(), [*(f"{m}.weight" for m in lora), *plain])
    ours = {own: ours for ours, own in found.items()}
    notes = _notes(config, base)

    infos = {n: base.info(n) for n in base.names()}
    dense: dict[str, str] = {}  # base name -> stored name of a tensor that replaces it
    heads: dict[str, Entry] = {}
    tied: dict[str, str] = {}
    leftover: list[str] = []
    saved = config.get("modules_to_save") or []
    for own, (stored, inner) in plain.items():
        if own in ours:
            if inner and _equal(files.read(stored), base, ours[own]):
                continue  # a copy of the base's own weight, which peft saves beside embeddings
            dense[ours[own]], infos[ours[own]] = stored, files.info(stored)
        elif any(f".{module}." in f".{own}" for module in saved):
            heads[own] = Entry(own, files.info(stored), _reader(files, stored), stored=(stored,))
        else:
            leftover.append(stored)

    targets: dict[str, _Target] = {}
    for module, keys in lora.items():
        target, weight = _Target(module, dict(keys), files, thing), ours.get(f"{module}.weight")
        leftover += target.leftover
        if weight is None:
            _refuse_target(target, base)
            continue
        target.check(config, weight, infos[weight].shape)
        targets[weight] = target
    _orient(targets, base, config)
    biases: dict[str, _Target] = {}
    for weight, target in targets.items():
        if target.bias:
            bias = weight.removesuffix("weight") + "bias"
            came = f"{tuple(files.info(target.bias).shape)}"
            if bias not in infos or infos[bias].shape != files.info(target.bias).shape:
                expected = (
                    f"the shape of {bias}, {infos[bias].shape if bias in infos else 'absent'}"
                )
                todo = "This is an adapter for another base: check both, or leave it out."
                raise CheckpointError(explain(f"{target.thing} lora_B.bias", expected, came, todo))
            biases[bias] = target
    if leftover:
        todo = f"Nothing is dropped quietly, and we do not know their meaning. {_MERGE}"
        raise CheckpointError(explain(thing, "tensors of plain LoRA only", some(leftover, 6), todo))

    entries = {
        n: _entry(n, infos[n], base, files, dense.get(n), targets.get(n), biases.get(n))
        for n in base.names()
    }
    for n in sorted({*dense, *targets}):
        _follow_ties(n, base, {*dense, *targets}, entries, tied, notes)
    options: dict[str, Any] = dict(config=base.config, prefixes=(before, after), tied=tied)
    options |= dict(notes=notes, adapter_config=config)
    return Expert(name, reference, folder, base, files, entries, heads, **options)


def _notes(config: dict[str, Any], base: Checkpoint) -> list[str]:
    """A sentence if the adapter names its base otherwise: usual for a local copy of a hub model."""
    named = config.get("base_model_name_or_path")
    if not named or named == base.reference or Path(named).resolve() == base.folder.resolve():
        return []
    return [
        f"The adapter says that it was trained on '{named}'; it is used on '{base.reference}', "
        f"which its tensors fit."
    ]


def _reader(files: TensorFiles, stored: str) -> Callable[[], Tensor]:
    return lambda: files.read(stored)


# Numbers that are brought to another dtype at a time: whole tables never are.
_BLOCK = 1 << 20


def _blocks(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat pieces of two tensors of equal shape, in step; views, unless `other` is strided."""
    yield from zip(one.view(-1).split(_BLOCK), other.reshape(-1).split(_BLOCK), strict=True)


def _equal(tensor: Tensor, base: Checkpoint, name: str) -> bool:
    return base.info(name).shape == tensor.shape and all(
        torch.equal(x.float(), y.float()) for x, y in _blocks(tensor.contiguous(), base.read(name))
    )


def _plus(weight: Float[Tensor, " *shape"], delta: Tensor) -> Float[Tensor, " *shape"]:
    """`weight + delta` in the place of `delta`, in float32, or float64 if the weight is.

    A base stored in float64 keeps its digits. Besides the sum, no copy of the weight is made.
    """
    total = delta.reshape(weight.shape).to(_wide(weight.dtype))
    for part, own in _blocks(total, weight):
        part += own.to(total.dtype)
    return total


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _entry(
    name: str,
    info: TensorInfo,
    base: Checkpoint,
    files: TensorFiles,
    dense: str | None,
    target: _Target | None,
    bias: _Target | None,
) -> Entry:
    """One base tensor under this adapter: replaced or not, plus factors, a bias or nothing."""
    whole = _reader(files, dense) if dense else lambda: base.read(name)
    stored = (dense,) if dense else ()
    if bias is not None and bias.bias is not None:
        stored += (bias.bias,)
    elif target is not None:
        stored += (target.a, target.b)
    if target is None and bias is None:
        return Entry(name, info, whole, lambda: None if dense else UNCHANGED, stored)

    def read() -> Tensor:
        if bias is not None:
            return _plus(whole(), bias.bias_delta())
        assert target is not None
        factors = target.factors()
        return _plus(whole(), factors.b @ factors.a)

    def vector() -> LowRank | None:
        return target.factors() if target is not None and dense is None else None

    return Entry(name, TensorInfo(info.shape, _wide(info.dtype)), read, vector, stored)


def _refuse_target(target: _Target, base: Checkpoint) -> None:
    """Always raises: the base has no weight for this target."""
    came = f"no such tensor in the base ({some(base.floats())})"
    expected = f"a weight for factors A {target.shape_a} and B {target.shape_b}"
    if EMBEDDING.search(target.module) and base.ties():
        todo = "The base ties it to its input embedding. Untie them (config tie_word_embeddings: "
        todo += f"false) in base and expert, or: {_MERGE}"
        raise UnsupportedCheckpoint(explain(target.thing, expected, came, todo))
    todo = "This is an adapter for another base: check both, or leave it out."
    raise CheckpointError(explain(target.thing, expected, came, todo))


def _follow_ties(
    name: str,
    base: Checkpoint,
    touched: set[str],
    entries: dict[str, Entry],
    tied: dict[str, str],
    notes: list[str],
) -> None:
    """A changed embedding changes its tied twin: one storage, as `merge_and_unload` has it."""
    if not EMBEDDING.search(name) or "position" in name or not base.ties():
        return
    matrices = [n for n in entries if n not in touched and base.info(n) == base.info(name)]
    twins = [n for n in matrices if EMBEDDING.search(n) and base.same(n, name)]
    for twin in twins:
        tied[twin], entries[twin] = name, entries[name]
    nested = base.config.get("text_config") or {}
    says = base.config.get("tie_word_embeddings", nested.get("tie_word_embeddings"))
    if twins or (says and not any("lm_head" in n for n in entries)):
        notes.append(
            f"The base ties its output embedding to {name}, so the adapter's change acts on both, "
            f"as it does after peft's merge_and_unload."
        )
