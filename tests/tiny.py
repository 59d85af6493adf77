"""Tiny real checkpoints: two blocks, width 16, made and saved by transformers and peft themselves.

A family is one architecture as a user holds it: a base folder and three experts tuned from it.
Every float parameter of an expert differs from the base's, norms and biases too, so that a tensor
that some layer forgets shows up in the outputs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

from twinmerge.artifact.format import Manifest
from twinmerge.merging.build import build
from twinmerge.recipe import Recipe

EXPERTS = ("math", "code", "law")
TEXT = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
BERT = TEXT | dict(intermediate_size=24, max_position_embeddings=14, initializer_range=0.2)
LLAMA = TEXT | dict(
    intermediate_size=24, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
DISTILBERT = dict(
    vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2, initializer_range=0.2
)
GPT2 = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
VIT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
VIT |= dict(image_size=8, patch_size=4, initializer_range=0.2)
GQA = dict(num_key_value_heads=1, head_dim=8)


@dataclass(frozen=True)
class Family:
    """How to make one architecture's base and experts."""

    base: Any
    task: Any
    config: Any
    sizes: dict[str, Any]
    heads: tuple[int, ...] | None = None
    """Outputs of each expert's own head; None where the base has the head too."""
    expert_sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        return "CausalLM" in self.task.__name__ or "LMHead" in self.task.__name__

    @property
    def image(self) -> bool:
        return self.config is tf.ViTConfig


FAMILIES: dict[str, Family] = {
    "bert": Family(
        tf.BertModel, tf.BertForSequenceClassification, tf.BertConfig, BERT, heads=(2, 3, 1)
    ),
    "bert tokens": Family(
        tf.BertModel, tf.BertForTokenClassification, tf.BertConfig, BERT, heads=(2, 3, 5)
    ),
    "roberta": Family(
        tf.RobertaModel,
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig,
        BERT | dict(pad_token_id=1, type_vocab_size=1),
        heads=(2, 3, 1),
    ),
    "distilbert": Family(
        tf.DistilBertModel,
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig,
        DISTILBERT,
        heads=(2, 3, 1),
    ),
    "vit": Family(tf.ViTModel, tf.ViTForImageClassification, tf.ViTConfig, VIT, heads=(2, 3, 4)),
    "llama": Family(tf.LlamaForCausalLM, tf.LlamaForCausalLM, tf.LlamaConfig, LLAMA | GQA),
    "llama tied": Family(
        tf.LlamaForCausalLM,
        tf.LlamaForCausalLM,
        tf.LlamaConfig,
        LLAMA | dict(tie_word_embeddings=True),
    ),
    "llama classifier": Family(
        tf.LlamaForCausalLM,
        tf.LlamaForSequenceClassification,
        tf.LlamaConfig,
        LLAMA,
        heads=(2, 3, 1),
    ),
    "gpt2": Family(
        tf.GPT2LMHeadModel,
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        GPT2 | dict(bos_token_id=1, eos_token_id=2, pad_token_id=0),
    ),
    "qwen3": Family(tf.Qwen3ForCausalLM, tf.Qwen3ForCausalLM, tf.Qwen3Config, LLAMA | GQA),
    "gemma": Family(tf.GemmaForCausalLM, tf.GemmaForCausalLM, tf.GemmaConfig, LLAMA | GQA),
}


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
    """Copy every parameter that `base` has too, with or without the base model's prefix."""
    theirs = dict(base.named_parameters())
    prefix = f"{model.base_model_prefix}."
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for other in (name, name.removeprefix(prefix), prefix + name):
                if other in theirs and theirs[other].shape == parameter.shape:
                    parameter.copy_(theirs[other])


def perturb(model: Any, scale: float, seed: str) -> None:
    """Add normal noise to every float parameter, from seed and name alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.Generator().manual_seed(crc32(f"{seed}/{name}".encode()))
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))


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


def batch_of(family: Family, rows: int = 4, length: int = 7, seed: int = 0, pad: str = "right"):
    """Inputs of `rows` rows, of which all but the first are padded (images are not)."""
    draw = torch.Generator().manual_seed(seed)
    if family.image:
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=draw)}
    padding = family.sizes.get("pad_token_id") or 0
    ids = torch.randint(3, 40, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        short = 1 + row % 3
        where = slice(length - short, None) if pad == "right" else slice(0, short)
        ids[row, where], mask[row, where] = padding, 0
    return {"input_ids": ids, "attention_mask": mask}


def row(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: value[index : index + 1] for name, value in inputs.items()}


class Zoo:
    """Families, artifacts and loaded models, made when first asked for and kept for the session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, Made] = {}
        self._artifacts: dict[tuple[str, str], Path] = {}
        self._twins: dict[tuple[str, str], Any] = {}
        self._plain: dict[Any, Any] = {}

    def made(self, name: str) -> Made:
        if name not in self._made:
            self._made[name] = made(FAMILIES[name], self.folder / name.replace(" ", "-"))
        return self._made[name]

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
            self._twins[key] = load(self.artifact(name, rank))
        return self._twins[key]

    def plain(self, name: str, rank: Any, weights: Iterable[float], head: str) -> Any:
        """The densely merged model, see `plain_model`."""
        key = name, str(rank), tuple(float(w) for w in weights), head
        if key not in self._plain:
            folder = self.folder / "dense" / str(len(self._plain))
            artifact = self.artifact(name, rank)
            self._plain[key] = plain_model(self.made(name), artifact, key[2], head, folder)
        return self._plain[key]
