"""Tokenizers compared as files: the same words under the same numbers, cut the same way?

An artifact has the base's tokenizer. An expert that learnt with another one gets numbers that mean
other words to it, and no shape tells. No tokenizer library is needed: `tokenizer.json` says it all,
and the older `vocab.txt` and `vocab.json` + `merges.txt` nearly all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXAMPLES = 5
"""Tokens that are named of each kind of difference."""


@dataclass(frozen=True)
class Tokenizer:
    """What a folder says about its tokenizer. Empty parts are unknown, not different."""

    tokens: dict[str, int] = field(default_factory=dict)
    """Token -> number, added tokens included."""
    rules: dict[str, Any] = field(default_factory=dict)
    """How text is cut: merges, normalizer, pre_tokenizer; of a sentencepiece file its digest."""
    template: str | None = None


@dataclass(frozen=True)
class TokenizerDifference:
    """What an expert's tokenizer says otherwise than the base's."""

    lacking: int = 0
    """Tokens that only the base has."""
    added: int = 0
    """Tokens that only the expert has."""
    renumbered: int = 0
    """Tokens of both under different numbers."""
    examples: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    """Parts that cut text differently: merges, normalizer, pre_tokenizer, sentencepiece."""
    chat_template: bool = False

    def __bool__(self) -> bool:
        return bool(self.lacking or self.added or self.renumbered or self.rules) or (
            self.chat_template
        )


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer beside a model, or None if there is none that can be read."""
    tokens, rules = _fast(folder) or _slow(folder)
    if not tokens and not rules:
        return None
    for token, number in (_json(folder / "added_tokens.json") or {}).items():
        tokens.setdefault(token, number)
    return Tokenizer(tokens, rules, _template(folder))


def compare(base: Tokenizer, expert: Tokenizer) -> TokenizerDifference:
    """What differs, only between parts that both have: another file format is no difference."""
    lacking, added, moved = [], [], []
    if base.tokens and expert.tokens:
        lacking = sorted(base.tokens.keys() - expert.tokens.keys(), key=base.tokens.__getitem__)
        added = sorted(expert.tokens.keys() - base.tokens.keys(), key=expert.tokens.__getitem__)
        both = base.tokens.keys() & expert.tokens.keys()
        moved = [token for token in both if base.tokens[token] != expert.tokens[token]]
        moved.sort(key=base.tokens.__getitem__)
    examples = [f"{t!r} is new ({expert.tokens[t]})" for t in added[:EXAMPLES]]
    examples += [f"{t!r} is missing" for t in lacking[:EXAMPLES]]
    examples += [f"{t!r}: {base.tokens[t]} -> {expert.tokens[t]}" for t in moved[:EXAMPLES]]
    return TokenizerDifference(
        lacking=len(lacking),
        added=len(added),
        renumbered=len(moved),
        examples=tuple(examples),
        rules=tuple(
            sorted(k for k in base.rules.keys() & expert.rules if base.rules[k] != expert.rules[k])
        ),
        # An expert without a template was saved without one; it says nothing.
        chat_template=expert.template is not None and expert.template != base.template,
    )


def _fast(folder: Path) -> tuple[dict[str, int], dict[str, Any]] | None:
    content = _json(folder / "tokenizer.json")
    model = content.get("model") if content else None
    if not content or not isinstance(model, dict) or not model.get("vocab"):
        return None
    vocab = model["vocab"]
    if isinstance(vocab, list):  # unigram: [token, score], numbered as they stand
        vocab = {pair[0]: number for number, pair in enumerate(vocab)}
    added = {
        token["content"]: token["id"]
        for token in content.get("added_tokens") or []
        if isinstance(token, dict) and {"content", "id"} <= token.keys()
    }
    # Merges are written as "a b" by older versions, as ["a", "b"] by newer ones.
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    rules = {"merges": merges} if merges else {}
    rules |= {key: content[key] for key in ("normalizer", "pre_tokenizer") if key in content}
    return vocab | added, rules


def _slow(folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
    tokens: dict[str, int] = {}
    rules: dict[str, Any] = {}
    if words := _lines(folder / "vocab.txt"):
        tokens = {word: number for number, word in enumerate(words)}
    elif vocab := _json(folder / "vocab.json"):
        tokens = vocab
        merges = [m for m in _lines(folder / "merges.txt") if m and not m.startswith("#version")]
        rules = {"merges": merges} if merges else {}
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"):
        if (folder / name).is_file():
            rules["sentencepiece"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            break
    return tokens, rules


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace").strip()
    config = _json(folder / "tokenizer_config.json") or {}
    template = config.get("chat_template")
    return None if template is None else str(template).strip()


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, ValueError):
        return []
