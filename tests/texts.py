"""Tiny text models with a real tokenizer, rows that a router can tell apart, and labels.

Each expert has 6 words of its own; its rows are made of them and of common words. A label is what
the expert itself answers, but for every fifth row, so that experts score well and not perfectly.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import transformers as tf
from tiny import BERT, EXPERTS, GQA, LLAMA, Family, Made, made
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from twinmerge.merging.build import build
from twinmerge.recipe import load_recipe

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
COMMON = [f"the{i}" for i in range(20)]
WORDS = {name: [f"{name}{i}" for i in range(6)] for name in EXPERTS}
VOCABULARY = [*SPECIAL, *COMMON, *(word for words in WORDS.values() for word in words)]
SIZES = dict(vocab_size=43, max_position_embeddings=40)

BERT_TEXT = Family(
    tf.BertModel, tf.BertForSequenceClassification, tf.BertConfig, BERT | SIZES, heads=(2, 3, 1)
)
LLAMA_TEXT = Family(tf.LlamaForCausalLM, tf.LlamaForCausalLM, tf.LlamaConfig, LLAMA | GQA | SIZES)
LABELS = {"math": ["no", "yes"], "code": ["red", "green", "blue"]}


def save_tokenizer(folder: Path | str, *, pairs: bool = True, pad: bool = True) -> None:
    """A word-level tokenizer: `[CLS] a [SEP] b [SEP]` with pairs, else `[CLS] a`."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if pairs else "[CLS] $A",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1" if pairs else "[CLS] $A $B:1",
        special_tokens=marks,
    )
    named = {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    if pad:
        named["pad_token"] = "[PAD]"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    names = names if pairs else [names[0], names[2]]
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=names, **named)
    tokenizer.save_pretrained(folder)


def sentence(expert: str, draw: random.Random) -> str:
    own = [draw.choice(WORDS[expert]) for _ in range(draw.randint(3, 8))]
    words = own + [draw.choice(COMMON) for _ in range(draw.randint(1, 4))]
    draw.shuffle(words)
    return " ".join(words)


def sentences(expert: str, count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Texts of one expert; every third is a pair."""
    draw = random.Random(crc32(f"{expert}/{seed}".encode()))
    return [
        (sentence(expert, draw),) if i % 3 else (sentence(expert, draw), sentence(expert, draw))
        for i in range(count)
    ]


def as_row(text: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(("text", "text_pair"), text, strict=False))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(lines)
    return path


class TextBench:
    """One text family on disk: checkpoints, recipe, artifacts and data. Read, never write to it."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.family = folder, family

    @cached_property
    def made(self) -> Made:
        """Base (with its tokenizer) and experts, as folders `base`, `math`, `code`, `law`."""
        made_ = made(self.family, self.folder)
        save_tokenizer(made_.base, pairs=not self.family.causal)
        return made_

    @cached_property
    def recipe(self) -> Path:
        """A recipe beside the checkpoints, with relative paths and label names."""
        assert self.made
        entries = [
            {"model": f"./{name}"}
            | ({"labels": LABELS[name]} if self.family.heads and name in LABELS else {})
            for name in EXPERTS
        ]
        path = self.folder / "recipe.yaml"
        # So that rows have weights on all experts, and none is new, whose weights would be less.
        router = {"sharpness": 1.0, "coverage": 1.0}
        recipe = {
            "base_model": "./base", "models": entries, "exclusive": {"rank": 4}, "router": router
        }  # fmt: skip
        path.write_text(json.dumps(recipe))  # JSON is YAML
        return path

    @cached_property
    def plain(self) -> Path:
        """The artifact without a router."""
        written = load_recipe(self.recipe)
        # Paths that work from any folder: `eval --experts` opens the experts again.
        build(written.resolved(self.folder), self.folder / "plain")
        return self.folder / "plain"

    @cached_property
    def routed(self) -> Path:
        """The artifact with a router that tells the experts' rows apart."""
        from twinmerge.runtime.router.fit import fit_router

        shutil.copytree(self.plain, self.folder / "routed")
        fit_router(self.folder / "routed", self.texts(30))
        return self.folder / "routed"

    @cached_property
    def watchful(self) -> Path:
        """Like `routed`, but its router notices new rows, whose weights are less."""
        from twinmerge.recipe import Router
        from twinmerge.runtime.router.fit import fit_router

        shutil.copytree(self.plain, self.folder / "watchful")
        fit_router(self.folder / "watchful", self.texts(30), Router(sharpness=1.0))
        return self.folder / "watchful"

    @cached_property
    def model(self) -> Any:
        from twinmerge.runtime.load import load

        return load(self.routed)

    def texts(self, count: int, seed: int = 0) -> dict[str, list[tuple[str, ...]]]:
        return {name: sentences(name, count, seed) for name in EXPERTS}

    @cached_property
    def data(self) -> Path:
        """A folder of tasks: train (30 rows), validation (12) and test (12), gzipped or not."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.made.base)
        folder = self.folder / "data"
        for name in EXPERTS:
            expert = self.made.expert(name)
            for seed, (split, count) in enumerate(
                [("train", 30), ("validation", 12), ("test", 12)]
            ):
                rows = [as_row(text) for text in sentences(name, count, seed)]
                if self.family.heads:
                    for place, row in enumerate(rows):
                        row["label"] = _label(expert, tokenizer, row, flip=place % 5 == 4)
                suffix = "jsonl.gz" if name == "code" else "jsonl"
                write_rows(folder / name / f"{split}.{suffix}", rows)
        return folder


@torch.no_grad()
def _label(expert: Any, tokenizer: Any, row: dict[str, Any], *, flip: bool) -> float | int:
    logits = expert(**tokenizer(*row.values(), return_tensors="pt")).logits[0]
    if len(logits) == 1:
        return float(logits[0]) + (1.0 if flip else 0.0)
    return (int(logits.argmax()) + flip) % len(logits)
