"""What the runtime benchmark runs: artifacts of any number of experts, batches, and the rivals."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessor

from twinmerge.artifact.format import MANIFEST, ROUTER, expert_file
from twinmerge.artifact.reader import Artifact
from twinmerge.data import encode, read_tasks, text_of
from twinmerge.evaluation.tasks import task_for
from twinmerge.merging.build import build
from twinmerge.recipe import Recipe, Router
from twinmerge.runtime.export import DenseMerge
from twinmerge.runtime.load import quiet
from twinmerge.runtime.model import TwinModel
from twinmerge.runtime.router.fit import fit_router

SEED = 0
Batch = dict[str, Tensor]

BERT_BASE: dict[str, Any] = dict(model_type="bert")
SMOL: dict[str, Any] = dict(
    model_type="llama",
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
"""The shape of SmolLM2-135M."""
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
TINY |= dict(vocab_size=96)


# -------------------------------------------------------------------------------------- artifacts


def folders(experts: Path) -> list[Path]:
    return sorted(path for path in experts.iterdir() if path.is_dir())


def merged(base: str, experts: Mapping[str, str], out: Path, rank: int, **more: Any) -> Path:
    """An artifact of these experts, unless `out` has been built before."""
    if not (out / MANIFEST).is_file():
        models = [{"model": folder, "name": name} for name, folder in experts.items()]
        recipe = {"base_model": base, "models": models, "exclusive": {"rank": rank}}
        build(Recipe.model_validate(recipe | more), out)
    return out


def with_router(artifact: Path, out: Path, data: Path, rows: int, max_tokens: int) -> Path:
    """A copy of the artifact with a router fitted on train rows."""
    if not (out / ROUTER).is_file():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(artifact, out)
        names = Artifact(out, check=False).manifest.names
        found, _ = read_tasks(data, names, "train")
        texts = {
            name: [text_of(row, task_for(name, None).columns) for row in table]
            for name, table in found.items()
        }
        # The paper's network on one layer: what is timed is where a router reads, not which.
        middle = AutoConfig.from_pretrained(out).num_hidden_layers // 2
        settings = Router(kind="mlp", layer=middle, coverage=1.0, rows_per_task=rows)
        fit_router(out, texts, settings, max_tokens=max_tokens)
    return out


def replicated(artifact: Path, count: int, out: Path) -> Path:
    """The artifact with `count` experts: the first of its own, or all of them again and again.

    A copy is an expert like any other to the runtime, with a file, factors and a head of its own.
    """
    if (out / MANIFEST).is_file():
        return out
    manifest = Artifact(artifact, check=False).manifest
    own = len(manifest.experts)
    origin = {
        manifest.names[i % own] + (f"-{i // own}" if i >= own else ""): manifest.experts[i % own]
        for i in range(count)
    }
    files = {name: manifest.files[name] for name in manifest.shared_files()}
    files |= {name: f for name, f in manifest.files.items() if "/" not in name and name != ROUTER}
    files |= {
        expert_file(new): manifest.files[expert_file(old.name)] for new, old in origin.items()
    }
    tensors = tuple(
        record.model_copy(
            update={
                "experts": {
                    new: record.experts[old.name]
                    for new, old in origin.items()
                    if old.name in record.experts
                }
            }
        )
        for record in manifest.tensors
    )
    experts = tuple(old.model_copy(update={"name": new}) for new, old in origin.items())
    update = {"experts": experts, "tensors": tensors, "files": files, "router": None}
    (out / "experts").mkdir(parents=True)
    for path in artifact.iterdir():
        if path.is_file() and path.name not in (MANIFEST, ROUTER):
            _link(path, out / path.name)
    for new, old in origin.items():
        _link(artifact / expert_file(old.name), out / expert_file(new))
    (out / MANIFEST).write_text(manifest.model_copy(update=update).to_json(), encoding="utf-8")
    return out


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def random_base(shape: Mapping[str, Any], folder: Path) -> Path:
    """A model of this shape with random weights."""
    if not (folder / "config.json").is_file():
        options = dict(shape)
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        causal = config.model_type == "llama"
        torch.manual_seed(SEED)
        with quiet():
            model = (AutoModelForCausalLM if causal else AutoModel).from_config(config)
        # No end token: every row is generated to its full length.
        if model.can_generate():
            model.generation_config.eos_token_id = model.config.eos_token_id = None
            model.generation_config.pad_token_id = model.config.pad_token_id = 0
        with quiet():
            model.save_pretrained(folder)
    return folder


class Adapters:
    """Random LoRA adapters on every linear layer of a base, as peft runs and saves them.

    `artifact` is made of the same adapters over the unchanged base, so that both do the same sums.
    """

    @torch.inference_mode(False)  # peft wants parameters that could be trained
    def __init__(self, base: str, count: int, rank: int, work: Path) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=rank,
            lora_alpha=max(1, rank // 4),
            target_modules="all-linear",
            init_lora_weights=False,
            use_rslora=False,
        )
        self.names = [f"lora-{index}" for index in range(count)]
        torch.manual_seed(SEED)
        with quiet():
            names = AutoConfig.from_pretrained(base).architectures or []
            causal = any("CausalLM" in name for name in names)
            model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(base)
            torch.manual_seed(SEED)
            self.model = get_peft_model(model, config, adapter_name=self.names[0])
            for name in self.names[1:]:
                self.model.add_adapter(name, config)
        self.model.eval().requires_grad_(False)
        saved = work / "adapters"
        if not saved.is_dir():
            self.model.save_pretrained(str(saved), selected_adapters=self.names)
        self.artifact = merged(
            base,
            {name: str(saved / name) for name in self.names},
            work / "artifact",
            rank,
            merge_method="task_arithmetic",
            parameters={"weight": 0.0},
        )


# ---------------------------------------------------------------------------------------- batches


def real_batch(tokenizer: Any, data: Path, experts: Sequence[str], rows: int, tokens: int) -> Batch:
    """`rows` rows of all tasks in turn, each exactly `tokens` long: validation texts, joined."""
    found, _ = read_tasks(data, experts, "validation")
    texts = []
    for number in range(rows):
        name = experts[number % len(experts)]
        columns, table = task_for(name, None).columns, found[name]
        words: list[str] = []
        place = 40 * (number // len(experts))
        while len(words) < tokens:
            text = text_of(table[place % len(table)], columns)
            assert isinstance(text, tuple), "GLUE has no chats"
            words += " ".join(text).split()
            place += 1
        texts.append((" ".join(words),))
    encoded = encode(tokenizer, texts, tokens)
    lengths = {len(row["input_ids"]) for row in encoded.rows}
    assert lengths == {tokens}, f"rows of {lengths} tokens"
    return {key: torch.tensor([row[key] for row in encoded.rows]) for key in encoded.rows[0]}


def random_batch(vocabulary: int, rows: int, tokens: int) -> Batch:
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1, vocabulary, (rows, tokens), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def row(batch: Batch, *index: int) -> Batch:
    return {key: value[list(index)] for key, value in batch.items()}


def moved(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


def answer(output: Any) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    output = getattr(output, "model_output", output)
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def difference(mixed: Tensor, alone: Tensor) -> float:
    """Largest absolute difference, over the outputs that `alone` has."""
    return float((mixed[..., : alone.shape[-1]].float() - alone.float()).abs().max())


# ----------------------------------------------------------------------------------------- rivals


class DenseSums:
    """The reference code's way: every expert's dense difference in memory, summed for each row."""

    def __init__(self, twin: TwinModel) -> None:
        self._merge = DenseMerge(twin)
        vectors: list[dict[str, Tensor]] = []
        for one in torch.eye(len(twin.experts), device=twin.device):
            self._merge.at(one)
            now = {name: p.clone() for name, p in self._merge.targets.items()}
            vectors.append({name: p - self._merge.shared[name] for name, p in now.items()})
        self._vectors = vectors

    def at(self, weights: Tensor) -> PreTrainedModel:
        for name, target in self._merge.targets.items():
            total = self._merge.shared[name].clone()
            for weight, vector in zip(weights.tolist(), self._vectors, strict=True):
                total += weight * vector[name]
            target.copy_(total)
        return self._merge.with_head(weights)

    def rows(self, batch: Batch, weights: Tensor) -> list[Tensor]:
        """Each row's own model is made, then run on that row alone."""
        return [answer(self.at(own)(**row(batch, index)))[0] for index, own in enumerate(weights)]


class OwnExperts:
    """All experts as plain models in memory; each runs on the rows that are its own."""

    def __init__(self, twin: TwinModel) -> None:
        eye = torch.eye(len(twin.experts), device=twin.device)
        self.models = [DenseMerge(twin).at(one) for one in eye]

    def rows(self, batch: Batch, expert: Sequence[int]) -> dict[int, Tensor]:
        out: dict[int, Tensor] = {}
        for each in sorted(set(expert)):
            mine = [index for index, chosen in enumerate(expert) if chosen == each]
            answers = answer(self.models[each](**row(batch, *mine)))
            out |= dict(zip(mine, answers, strict=True))
        return out


class TokenClock(LogitsProcessor):
    """Notes when each token's logits are known; changes nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        self.times.append(time.perf_counter())
        return scores
