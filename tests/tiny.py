"""Tiny real checkpoints: two blocks, width 16, made and saved by transformers and peft themselves.

A family (see `families`) is one architecture as a user holds it: a base folder and three experts
tuned from it. Every float tensor of an expert differs from the base's, norms, biases and running
statistics too, so that a tensor that some layer forgets shows up in the outputs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import torch
import transformers as tf
from families import BERT as BERT
from families import EVERY, VOCABULARY, Family
from families import FAMILIES as FAMILIES
from families import GQA as GQA
from families import LLAMA as LLAMA
from safetensors.torch import load_file, save_file
from torch import Tensor

from twinmerge.artifact.format import Manifest
from twinmerge.merging.build import build
from twinmerge.recipe import Recipe

EXPERTS = ("math", "code", "law")


@dataclass(frozen=True)
class Made:
    """A family on disk."""

    family: Family
    base: str
    experts: dict[str, str]
    """Name -> folder."""

    def expert(self, name: str) -> Any:
        """The expert as transformers itself opens it."""
        return opened(self.family.task, self.experts[name])


def opened(cls: Any, folder: Path | str, **options: Any) -> Any:
    """`from_pretrained` in evaluation mode, without its bars and reports."""
    return quietly(lambda: cls.from_pretrained(folder, **options)).eval()


def quietly(call: Callable[[], Any]) -> Any:
    before = tf.logging.get_verbosity()
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    finally:
        tf.logging.set_verbosity(before)


def made(family: Family, folder: Path, experts: Iterable[str] = EXPERTS, scale=0.05) -> Made:
    """Make and save a base and its experts under `folder`."""
    torch.manual_seed(0)
    base = family.base(family.config(**family.sizes))
    perturb(base, scale, seed="base")
    save(base, folder / "base")
    folders = {}
    for index, name in enumerate(experts):
        heads = {"num_labels": family.heads[index]} if family.heads else {}
        expert = family.task(family.config(**family.sizes | family.expert_sizes | heads))
        inherit(expert, base)
        perturb(expert, scale, seed=name)
        folders[name] = save(expert, folder / name)
    return Made(family, str(folder / "base"), folders)


def inherit(model: Any, base: Any) -> None:
    """Copy every tensor that `base` has too, with or without the base model's prefix."""
    theirs = base.state_dict()
    prefix = f"{model.base_model_prefix}."
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            for other in (name, name.removeprefix(prefix), prefix + name):
                if other in theirs and theirs[other].shape == tensor.shape:
                    tensor.copy_(theirs[other])


def perturb(model: Any, scale: float, seed: str) -> None:
    """Add normal noise to every float tensor, from seed and name alone.

    Running variances are multiplied by e to the power of it, so they stay positive; how many
    batches they were taken from becomes another number.
    """
    tied = {name for name, _ in model.named_parameters()}
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in tied and name not in buffers:
                continue  # the second name of a tensor
            digest = crc32(f"{seed}/{name}".encode())
            draw = torch.Generator().manual_seed(digest)
            noise = scale * torch.randn(tensor.shape, generator=draw).to(tensor)
            if not tensor.is_floating_point():
                tensor.fill_(digest % 1000)
            elif name.endswith("running_var"):
                tensor.mul_((4 * noise).exp())
            else:
                tensor.add_(noise)


def save(model: Any, folder: Path | str, **options: Any) -> str:
    quietly(lambda: model.save_pretrained(folder, **options))
    return str(folder)


def adapter(
    model: Any, folder: Path, seed: str = "adapter", scale: float = 0.1, **lora: Any
) -> str:
    """Save a peft LoRA adapter of `model` with random factors; `merged` gets the full model."""
    from peft import LoraConfig, get_peft_model

    def make() -> Any:
        adapted = get_peft_model(model, LoraConfig(**lora))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    draw = torch.Generator().manual_seed(crc32(f"{seed}/{name}".encode()))
                    parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
        adapted.save_pretrained(folder)
        merged = adapted.merge_and_unload()
        merged.save_pretrained(f"{folder}-merged")

    quietly(make)
    return str(folder)


def merged_folder(adapter_folder: str) -> str:
    """The full checkpoint that peft made of an adapter of `adapter`."""
    return f"{adapter_folder}-merged"


# ------------------------------------------------------------------------- building, by hand too


def recipe(base: str, experts: dict[str, str], **more: Any) -> Recipe:
    models = [{"model": folder, "name": name} for name, folder in experts.items()]
    return Recipe.model_validate({"base_model": base, "models": models} | more)


def merge(base: str, experts: dict[str, str], out: Path, **more: Any) -> Manifest:
    """Build an artifact; keywords are the recipe's, but for `shard_bytes`."""
    options = {key: more.pop(key) for key in ("shard_bytes", "progress") if key in more}
    return build(recipe(base, experts, **more), out, **options)


def shared_tensors(artifact: Path) -> dict[str, Tensor]:
    """The shared expert's tensors, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(artifact.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def expert_tensors(artifact: Path, name: str) -> dict[str, Tensor]:
    return load_file(artifact / "experts" / f"{name}.safetensors")


def exclusive(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """What an expert's file says of one tensor: b @ a, the difference itself, or zeros."""
    if f"{name}.a" in tensors:
        return (tensors[f"{name}.b"].double() @ tensors[f"{name}.a"].double()).view(like.shape)
    return tensors.get(f"{name}.delta", torch.zeros_like(like)).double()


def densely_merged(artifact: Path, weights: Iterable[float], names: Iterable[str] = EXPERTS):
    """W_s + Σ_t w_t b_t a_t for every tensor, from the files alone, in float64."""
    shared = {name: t.double() for name, t in shared_tensors(artifact).items()}
    for weight, expert in zip(weights, names, strict=True):
        tensors = expert_tensors(artifact, expert)
        for name in shared:
            shared[name] = shared[name] + weight * exclusive(tensors, name, shared[name])
    return shared


def plain_model(made: Made, artifact: Path, weights: Iterable[float], head: str, folder: Path):
    """The densely merged model with one expert's head, opened by transformers alone."""
    state = {name: t.float().contiguous() for name, t in densely_merged(artifact, weights).items()}
    for name, tensor in expert_tensors(artifact, head).items():
        if name.endswith(".head"):
            state[name.removesuffix(".head")] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(Path(made.experts[head], "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return opened(made.family.task, folder)


def batch_of(
    family: Family, rows: int = 4, length: int = 7, seed: int = 0, pad: str = "right"
) -> dict[str, Tensor]:
    """Inputs of `rows` rows, of which all but the first are padded (images are not)."""
    draw = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    if family.image:
        shape = (rows, 3, family.image_size, family.image_size)
        inputs["pixel_values"] = torch.randn(shape, generator=draw)
    if not family.text:
        return inputs
    padding = family.sizes.get("pad_token_id") or 0
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(rows):
        short = 1 + row % 3 if row else 0
        where = slice(length - short, None) if pad == "right" else slice(0, short)
        ids[row, where], mask[row, where] = padding, 0
        if family.ends is not None:
            ids[row, mask[row].nonzero()[-1]] = family.ends
    inputs |= {"input_ids": ids, "attention_mask": mask}
    if family.decoder and family.generates:  # classifiers give the decoder the same text
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 4), generator=draw)
    return inputs


def prompt_of(family: Family, rows: int = 3, seed: int = 5) -> dict[str, Tensor]:
    """Inputs to generate from. Decoders' are padded on the left; encoders number positions from
    the left, so theirs are not."""
    inputs = batch_of(family, rows=rows, seed=seed, pad="right" if family.decoder else "left")
    inputs.pop("decoder_input_ids", None)
    return inputs


_OUTPUTS = (
    *("logits", "start_logits", "end_logits", "text_embeds", "image_embeds"),
    *("last_hidden_state", "pooler_output"),
)


def outputs(output: Any) -> dict[str, Tensor]:
    """What a model answers, by name: what the tests compare."""
    inner = getattr(output, "model_output", None)
    found = {name: getattr(output, name, None) for name in _OUTPUTS}
    for name, value in found.items():
        found[name] = getattr(inner, name, None) if value is None else value
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def row(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: value[index : index + 1] for name, value in inputs.items()}


class Towers:
    """A model of two towers (CLIP), asked tower by tower: its forward compares every text with
    every image, which is refused for rows of other weights."""

    def __init__(self, twin: Any) -> None:
        self.__dict__["twin"] = twin

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["twin"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.twin, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.twin, name)

    def __call__(self, pixel_values: Tensor, plan: str = "auto", **text: Any) -> Any:
        texts = self.twin.get_text_features(plan=plan, **text)
        # Images run with what the texts run with.
        given = {"weights": texts.weights, "head": [EXPERTS[i] for i in texts.expert]}
        images = self.twin.get_image_features(pixel_values=pixel_values, plan=plan, **given)
        embeds = (found.pooler_output for found in (texts, images))
        text_embeds, image_embeds = (x / x.norm(p=2, dim=-1, keepdim=True) for x in embeds)
        inner = SimpleNamespace(text_embeds=text_embeds, image_embeds=image_embeds)
        told = {name: getattr(texts, name) for name in ("weights", "expert", "dropped", "plan")}
        return SimpleNamespace(model_output=inner, **told)


def by_towers(twin: Any) -> Any:
    return Towers(twin) if hasattr(twin.model, "get_text_features") else twin


class Zoo:
    """Families, artifacts and loaded models, made when first asked for and kept for the session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, Made] = {}
        self._artifacts: dict[tuple[str, str], Path] = {}
        self._twins: dict[tuple[str, str], Any] = {}
        self._plain: dict[Any, Any] = {}
        self._experts: dict[tuple[str, str], Any] = {}

    def made(self, name: str) -> Made:
        if name not in self._made:
            self._made[name] = made(EVERY[name], self.folder / name.replace(" ", "-"))
        return self._made[name]

    def expert(self, name: str, expert: str) -> Any:
        """The expert as transformers itself opens it."""
        key = name, expert
        if key not in self._experts:
            # Gradients would choose another kernel, with other bits, than a model without has.
            self._experts[key] = self.made(name).expert(expert).requires_grad_(False)
        return self._experts[key]

    def artifact(self, name: str, rank: Any = "full") -> Path:
        """Built by averaging, cut to `rank`. Read it, never write to it."""
        key = name, str(rank)
        if key not in self._artifacts:
            made = self.made(name)
            out = Path(made.base).parent / f"artifact-{rank}"
            merge(made.base, made.experts, out, exclusive={"rank": rank})
            self._artifacts[key] = out
        return self._artifacts[key]

    def twin(self, name: str, rank: Any = "full") -> Any:
        from twinmerge.runtime.load import load

        key = name, str(rank)
        if key not in self._twins:
            self._twins[key] = by_towers(load(self.artifact(name, rank)))
        return self._twins[key]

    def plain(self, name: str, rank: Any, weights: Iterable[float], head: str) -> Any:
        """The densely merged model, see `plain_model`."""
        key = name, str(rank), tuple(float(w) for w in weights), head
        if key not in self._plain:
            folder = self.folder / "dense" / str(len(self._plain))
            artifact = self.artifact(name, rank)
            plain = plain_model(self.made(name), artifact, key[2], head, folder)
            self._plain[key] = plain.requires_grad_(False)
        return self._plain[key]
