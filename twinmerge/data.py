"""Rows of text that others wrote: JSON lines, plain lines, and folders of tasks.

A row is a JSON object; its text is one column, a pair of columns, or a chat (`messages`), which the
tokenizer's template turns into tokens. A folder of tasks holds, for every expert,
`<expert>/<split>.jsonl` or `<expert>.jsonl` (also gzipped).
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import InputError, did_you_mean

Text = tuple[str, ...]
"""One text, or a pair."""

MESSAGES = "messages"
"""The column that holds a chat, as public data sets and servers name it."""


@dataclass(frozen=True)
class Chat:
    """A chat that waits for its answer; see `chat_of`."""

    messages: tuple[dict[str, Any], ...]
    """Each with `role` and `content`, the oldest first."""
    tools: tuple[Any, ...] = ()
    """What the model may call, for templates that say so."""

    @property
    def text(self) -> Text:
        """What was said, without roles."""
        return tuple(str(message["content"]) for message in self.messages)


COLUMNS: tuple[Text, ...] = (
    ("text", "text_pair"),
    ("text",),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence",),
    ("prompt",),
)
"""Names under which public data sets keep their text, tried in this order."""

SUFFIXES = (".jsonl", ".jsonl.gz")

ENCODING = "utf-8-sig"
"""UTF-8, with or without the mark that some editors put first."""


@runtime_checkable
class Tokenizer(Protocol):
    """What we need of transformers' tokenizers."""

    pad_token_id: Any
    pad_token: Any
    eos_token: Any

    def __call__(self, text: Any, /, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, /, **options: Any) -> Any: ...
    def pad(self, encoded: Any, **options: Any) -> Any: ...


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl or .jsonl.gz file. Raises `InputError` with the line's number."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding=ENCODING) as lines:
            return list(_rows(enumerate(lines, start=1), str(path)))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as problem:
        raise InputError(f"{path}: cannot be read as JSON lines ({problem}).") from None


def _rows(lines: Iterable[tuple[int, str]], where: str) -> Iterator[dict[str, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise InputError(f"{where}, line {number}: not JSON ({problem}).") from None
        if not isinstance(row, dict):
            raise InputError(
                f"{where}, line {number}: expected a JSON object such as "
                f'{{"text": "..."}}, got {type(row).__name__}.'
            )
        yield row


def parse_inputs(lines: Iterable[str], where: str = "input") -> list[dict[str, Any]]:
    """Rows from JSON lines or plain lines (told apart by the first: does it start with '{'?).

    A plain line is one text; a tab in it separates a pair. Empty lines are skipped.
    """
    kept = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if kept and kept[0][1].lstrip().startswith("{"):
        return list(_rows(kept, where))
    rows: list[dict[str, Any]] = []
    for number, line in kept:
        parts = line.rstrip("\r\n").split("\t")
        if len(parts) > 2:
            raise InputError(
                f"{where}, line {number}: expected one text, or two with a tab between "
                f"them, got {len(parts)} parts. Use JSON lines for text that holds tabs."
            )
        rows.append(dict(zip(("text", "text_pair"), parts, strict=False)))
    return rows


def text_of(row: dict[str, Any], columns: Sequence[str] | None = None) -> Text | Chat:
    """The text, pair or chat of a row. Raises `InputError` if no known column is there."""
    if columns is not None and not 1 <= len(columns) <= 2:
        raise InputError(
            f"--columns: expected one column, or two for a pair, got {len(columns)}: "
            f"{', '.join(columns) or 'none'}."
        )
    if list(columns or [MESSAGES]) == [MESSAGES] and isinstance(row.get(MESSAGES), list):
        return chat_of(row[MESSAGES], row.get("tools") or ())
    for names in [tuple(columns)] if columns else COLUMNS:
        if all(isinstance(row.get(name), str) for name in names):
            return tuple(row[name] for name in names)
    for name in columns or [name for names in COLUMNS for name in names]:
        if row.get(name) is not None and not isinstance(row[name], str):
            raise InputError(
                f"a row's column {name} holds {row[name]!r:.40} ({type(row[name]).__name__}); "
                "expected text, in quotes."
            )
    known = ", ".join("+".join(names) for names in COLUMNS)
    wanted = "+".join(columns) if columns else f"one of {known}, or a chat in {MESSAGES}"
    raise InputError(
        f"a row has the columns {', '.join(map(str, row)) or '(none)'}; expected text in {wanted}. "
        "Name yours with --columns."
    )


def chat_of(messages: Sequence[Any], tools: Sequence[Any] = ()) -> Chat:
    """The chat up to the last message that is not the model's own: that is what is answered.

    Replies at the end, as data sets for training have them, are left out: a router must see what
    it will see later. Raises `InputError` for anything but messages with a role and a content.
    """
    for place, message in enumerate(messages):
        known = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not known or "content" not in message:
            raise InputError(
                f"{MESSAGES}[{place}]: expected an object such as "
                f'{{"role": "user", "content": "..."}}, got {message!r:.80}.'
            )
    asked = list(messages)
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    if not asked:
        raise InputError(
            f"{MESSAGES}: expected a message to answer, got {len(messages)} from the assistant "
            "alone. Add the user's."
        )
    return Chat(tuple(asked), tuple(tools))


def row_of(text: Text | Chat | str) -> Text | Chat:
    """What callers may give for one input, a lone string as a text of one part."""
    if isinstance(text, Chat):
        return text
    return (text,) if isinstance(text, str) else tuple(text)


def segments(row: Text | Chat) -> Text:
    """Its words, part by part, without roles."""
    return row.text if isinstance(row, Chat) else row


def json_of(text: Text | Chat | str) -> dict[str, Any]:
    """A row that `text_of` reads back."""
    row = row_of(text)
    if isinstance(row, Chat):
        return {"messages": list(row.messages), "tools": list(row.tools)}
    return dict(zip(("text", "text_pair"), row, strict=False))


def task_files(folder: Path, split: str) -> dict[str, Path]:
    """Task name -> file, for a folder of tasks."""
    if not folder.is_dir():
        came = "it is a file" if folder.exists() else "it is not there"
        raise InputError(f"{folder}: expected a folder with rows for every expert; {came}.")
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        for suffix in SUFFIXES:
            inside = entry / f"{split}{suffix}"
            if entry.is_dir() and inside.is_file():
                found.setdefault(entry.name, []).append(inside)
            elif entry.is_file() and entry.name.endswith(suffix):
                found.setdefault(entry.name.removesuffix(suffix), []).append(entry)
    for name, paths in found.items():
        if len(paths) > 1:
            raise InputError(
                f"{folder}: rows for '{name}' are in {' and in '.join(map(str, paths))}; expected "
                "one file. Remove the other."
            )
    return {name: paths[0] for name, paths in found.items()}


def read_tasks(
    folder: Path, experts: Sequence[str], split: str
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Rows for every expert, and the names of tasks in the folder that no expert answers.

    Raises `InputError` if an expert has no rows.
    """
    files = task_files(folder, split)
    missing = [name for name in experts if name not in files]
    if missing:
        hint = did_you_mean(missing[0], list(files))
        raise InputError(
            f"{folder}: no rows for expert '{missing[0]}'"
            f"{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}.{hint} Expected "
            f"{missing[0]}/{split}.jsonl or {missing[0]}.jsonl (or .gz); found tasks: "
            f"{', '.join(files) or 'none'}."
        )
    rows = {name: read_rows(files[name]) for name in experts}
    for name, found in rows.items():
        if not found:
            raise InputError(f"{files[name]}: is empty; expected at least one row.")
    return rows, [name for name in files if name not in experts]


@dataclass(frozen=True)
class Encoded:
    """Token ids of many texts, not padded yet."""

    rows: list[dict[str, list[int]]]
    cut: list[bool]
    """Which texts were cut to fit."""

    @property
    def truncated(self) -> int:
        return sum(self.cut)

    def __len__(self) -> int:
        return len(self.rows)


def encode(tokenizer: Tokenizer, texts: Sequence[Text | Chat | str], max_tokens: int) -> Encoded:
    """Tokenize texts, pairs and chats, mixed; longer ones are cut to `max_tokens` and counted.

    Of a chat the oldest turns are cut, see `encode_chat`. Raises `InputError` for anything else.
    """
    texts = [(text,) if isinstance(text, str) else text for text in texts]
    for i, text in enumerate(texts):
        if not isinstance(text, Chat) and not 1 <= len(text) <= 2:
            raise InputError(f"text {i}: expected one text or a pair, got {len(text)} parts.")
    rows: list[dict[str, list[int]]] = [{} for _ in texts]
    was_cut = [False] * len(texts)
    for i, text in enumerate(texts):
        if isinstance(text, Chat):
            rows[i], was_cut[i] = encode_chat(tokenizer, text, max_tokens)
    for size in (1, 2):
        same = [(i, t) for i, t in enumerate(texts) if not isinstance(t, Chat) and len(t) == size]
        if not same:
            continue
        chosen = [i for i, _ in same]
        columns = [[text[column] for _, text in same] for column in range(size)]
        # Token ids beyond the limit only serve to count what is cut; no warning is due for them.
        full = tokenizer(*columns, truncation=False, verbose=False)
        cut = tokenizer(*columns, truncation=True, max_length=max_tokens)
        for place, i in enumerate(chosen):
            was_cut[i] = len(full["input_ids"][place]) > max_tokens
            rows[i] = {key: cut[key][place] for key in cut}
            if len(rows[i]["input_ids"]) > max_tokens:  # the tokenizer gave up without a word
                raise InputError(
                    f"--max-tokens {max_tokens}: too few for the marks that the tokenizer sets "
                    "around a text. Allow more."
                )
    return Encoded(rows, was_cut)


def encode_chat(
    tokenizer: Tokenizer, chat: Chat, max_tokens: int
) -> tuple[dict[str, list[int]], bool]:
    """Tokens of a chat by the tokenizer's template, up to where the answer begins.

    One that is too long loses its oldest turns after the system's message, and true is returned
    with it. Raises `InputError` if the last turn alone is too long, or without a template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"a row holds a chat ({MESSAGES}), but the tokenizer has no chat template. Give the "
            "text as the model was trained to see it, or put a chat_template.jinja into the folder."
        )
    fixed = [m for m in chat.messages[:1] if m["role"] == "system"]
    turns, cut = list(chat.messages[len(fixed) :]), False
    while True:
        row = tokenizer.apply_chat_template(
            [*fixed, *turns],
            tools=list(chat.tools) or None,
            add_generation_prompt=True,
            return_dict=True,
        )
        count = len(row["input_ids"])
        if count <= max_tokens:
            return {key: row[key] for key in row}, cut
        # From one message of the user to the next: templates want the roles to alternate.
        users = [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]
        if not users:
            raise InputError(
                f"--max-tokens {max_tokens}: the last turn of a chat alone has {count} tokens. "
                "Allow more, or shorten it."
            )
        turns, cut = turns[users[0] :], True


def batches(
    tokenizer: Tokenizer, encoded: Encoded, size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Padded batches of rows of similar length: (indices into `encoded`, tensors)."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded.rows[i]["input_ids"]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, pad(tokenizer, [encoded.rows[i] for i in chosen])


def pad(tokenizer: Tokenizer, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """One batch of tensors, padded to its longest row."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError("the tokenizer has neither a padding nor an end token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token  # any will do: the mask hides it
    tensors = tokenizer.pad(
        {key: [row[key] for row in rows] for key in rows[0]}, return_tensors="pt"
    )
    return {key: tensors[key] for key in tensors if isinstance(tensors[key], torch.Tensor)}


def sample(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """At most `count` of the rows, drawn without replacement; all of them, shuffled, if fewer."""
    return random.Random(seed).sample(list(rows), min(count, len(rows)))


def drawn(rows: Sequence[Any], most: int | None) -> list[Any]:
    """At most so many rows, drawn with the seed 0, in their order; all for None.

    The first would not do: files are often sorted, STS-B's by source.
    """
    if most is None or most >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), most))]


def known_positions(model: Any) -> int:
    """How many positions a model has (a very large number where its config names no limit)."""
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    pad_offset = getattr(config, "pad_token_id", 0) or 0
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= pad_offset + 1  # their positions start after the padding index
    return positions


def token_limit(model: Any, asked: int | None) -> int:
    """The most tokens that a model takes: what was asked for, within its positions."""
    positions = known_positions(model)
    if asked is not None and asked < 1:
        raise InputError(f"--max-tokens {asked}: expected at least 1.")
    if asked is not None and asked > positions:
        raise InputError(f"--max-tokens {asked}: the model has {positions} positions.")
    return min(asked or 512, positions)
