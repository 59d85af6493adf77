"""The documents are true: their blocks run, their links lead somewhere, their tables are complete.

Blocks of quickstart.md run in order, in one folder of tiny checkpoints. The comment above a block
says what it is for:

    (none)            console, bash: commands after `$ `; python: run, all in one namespace
    file: NAME        written to NAME first
    rows: NAME        is what the first lines of the file NAME look like
    tree: NAME        the paths in it exist
    fails             its last command ends with exit code 1
    not run: REASON   left out

What a console block shows must come, line by line and in this order; `...` matches anything.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from pydantic import BaseModel
from tiny import BERT, LLAMA, adapter, inherit, opened, perturb, save
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from twinmerge import cli
from twinmerge.artifact import format as artifact_format
from twinmerge.merging.shared import METHODS
from twinmerge.recipe import REFUSED, Exclusive, Expert, Recipe, Router
from twinmerge.runtime.router.mlp import RouterMLP

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


# ------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the comment above it, its text, and where it stands."""

    language: str
    mark: str
    text: str
    line: int

    @property
    def verb(self) -> str:
        return self.mark.partition(":")[0]

    @property
    def name(self) -> str:
        return self.mark.partition(":")[2].strip()


def blocks(page: str) -> list[Block]:
    fence = re.compile(
        r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
    )
    return [
        Block(m["language"], m["mark"] or "", m["text"], page.count("\n", 0, m.start("text")))
        for m in fence.finditer(page)
    ]


@dataclass(frozen=True)
class Command:
    """One line after `$ `, and the lines that are shown below it."""

    words: list[str]
    shown: list[str]


def commands(block: Block) -> list[Command]:
    found: list[Command] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(Command(shlex.split(line[2:], comments=True), []))
        elif block.language == "bash":
            raise AssertionError(f"line {block.line}: bash blocks are marked as not run")
        else:
            assert found, f"line {block.line}: output before the first command"
            found[-1].shown.append(line)
    assert found, f"line {block.line}: no command"
    return found


def is_shown(shown: list[str], output: str) -> bool:
    """Whether the lines come in this order; `...` and any run of blanks match anything there."""
    lines = iter([" ".join(line.split()) for line in output.splitlines()])
    for line in shown:
        words = " ".join(line.split())
        if words in ("", "..."):
            continue
        # a blank beside `...` may be part of what it stands for
        parts = [re.escape(part.strip()) for part in words.split("...")]
        if not any(re.fullmatch(r"\s?.*".join(parts), come) for come in lines):
            return False
    return True


def test_what_is_shown_is_compared_with_what_comes():
    output = 'a  b: 12 c\n{"x": 1, "y": {}}\nlast'
    assert is_shown(["a b: ... c", "...", '{"x": ..., "y": {...}}', "last"], output)
    assert not is_shown(["last", "a b: ..."], output)  # the order counts
    assert not is_shown(["a b: ..., c"], output)
    assert not is_shown(["first"], output)


# ------------------------------------------------------------------------------- a small world

WORDS = (
    "a the cat dog sat ran film is that good bad fun stocks fell rose team won lost rain and not"
)
TEXTS = {
    "sentiment": ["a film that is good fun", "a bad film", "good fun", "the film is not good"],
    "topic": ["stocks fell", "the team won", "stocks rose and fell", "the team lost", "rain fell"],
    "grammar": ["cat a sat", "the cat sat", "sat cat the", "the dog ran and ran", "ran dog the a"],
}
PAIRS = [
    ("a cat sat", "the cat sat", 4.2),
    ("a cat sat", "stocks fell", 0.4),
    ("a dog ran", "the dog ran", 4.0),
    ("a dog ran", "rain fell", 0.5),
    ("the team won", "the team lost", 2.5),
]
OUTPUTS = {"sentiment": 2, "topic": 3, "similarity": 1}


def tokenizer_into(folder: Path) -> None:
    """A WordPiece tokenizer of a few words, as `save_pretrained` writes it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: number for number, word in enumerate([*special, *WORDS.split()])}
    words = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    words.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    tokens = {f"{name}_token": token for name, token in names.items()}
    tf.PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def checkpoints_into(folder: Path) -> None:
    """The checkpoints of quickstart.md."""
    sizes = BERT | dict(max_position_embeddings=24)
    base = tf.BertModel(tf.BertConfig(**sizes))
    tokenizer_into(folder / "bert-base")
    save(base, folder / "bert-base")
    for name, outputs in OUTPUTS.items():
        expert = tf.BertForSequenceClassification(tf.BertConfig(**sizes, num_labels=outputs))
        inherit(expert, base)
        perturb(expert, 0.05, seed=name)
        save(expert, folder / f"bert-{name}")
    for name in ("grammar", "spam"):
        model = tf.BertForSequenceClassification(tf.BertConfig(**sizes, num_labels=2))
        inherit(model, base)
        lora = dict(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
        adapter(model, folder / f"lora-{name}", seed=name, **lora)

    causal = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))
    tokenizer_into(folder / "llama-base")
    save(causal, folder / "llama-base")
    expert = opened(tf.LlamaForCausalLM, folder / "llama-base")
    perturb(expert, 0.05, seed="math")
    save(expert, folder / "llama-math")
    lora = dict(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)
    adapter(causal, folder / "lora-code", seed="code", **lora)


def rows_into(folder: Path) -> None:
    """The rows of quickstart.md."""
    data = folder / "data"
    classes = {"sentiment": 2, "topic": 3, "grammar": 2}
    for name, texts in TEXTS.items():
        rows = [{"text": text, "label": i % classes[name]} for i, text in enumerate(texts * 2)]
        jsonl(data / name / "test.jsonl", rows[: len(texts)])
        jsonl(data / name / "train.jsonl", [{**row, "text": row["text"] + " and"} for row in rows])
    pairs = [{"sentence1": one, "sentence2": two, "label": value} for one, two, value in PAIRS]
    jsonl(data / "similarity" / "test.jsonl", pairs)
    jsonl(data / "similarity" / "train.jsonl", pairs * 2)
    for name, texts in {"math": TEXTS["topic"], "code": TEXTS["grammar"]}.items():
        jsonl(folder / "prompts" / f"{name}.jsonl", [{"prompt": text} for text in texts])
    (folder / "questions.txt").write_text("stocks fell\nthe team won\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    torch.manual_seed(0)
    checkpoints_into(folder)
    rows_into(folder)
    return folder


def run(words: list[str], monkeypatch) -> int:
    """The command line as the shell starts it; its exit code."""
    assert words[0] == "twinmerge", f"only twinmerge is run, got: {shlex.join(words)}"
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    return code if isinstance(code, int) else int(code is not None)


def run_console(block: Block, monkeypatch, capsys) -> None:
    todo = commands(block)
    for command in todo:
        capsys.readouterr()
        code = run(command.words, monkeypatch)
        come = capsys.readouterr()
        where = f"quickstart.md, line {block.line}: {shlex.join(command.words)}"
        wanted = int(block.verb == "fails" and command is todo[-1])
        assert code == wanted, f"{where}: exit code {code}\n{come.out}{come.err}"
        text = come.err if wanted else come.out
        assert is_shown(command.shown, text), f"{where}: other output came\n{text}"


def test_every_block_of_the_quickstart_runs(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "160")
    names: dict[str, Any] = {}
    for block in blocks((DOCS / "quickstart.md").read_text()):
        if block.verb == "not run":
            assert block.name, f"line {block.line}: say why it is not run"
        elif block.verb == "file":
            Path(block.name).write_text(block.text)
        elif block.verb == "rows":
            assert Path(block.name).read_text().startswith(block.text)
        elif block.verb == "tree":
            paths = re.findall(r"^  (\S+\.jsonl)", block.text, re.M)
            assert paths and all(Path(block.name, path).is_file() for path in paths)
        elif block.language == "python":
            source = "\n" * block.line + block.text  # a traceback names the line of the page
            exec(compile(source, "quickstart.md", "exec"), names)
        else:
            assert block.language in ("console", "bash"), f"line {block.line}: what is it for?"
            run_console(block, monkeypatch, capsys)
