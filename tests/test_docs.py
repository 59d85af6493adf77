"""The documents are true: their blocks run, their links lead somewhere, their tables are complete.

Blocks of quickstart.md, building.md and running.md run in order, each page in a folder of tiny
checkpoints. The comment above a block says what it is for:

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
from twinmerge.recipe.words import shown
from twinmerge.runtime.router.novelty import Novelty
from twinmerge.runtime.router.router import KINDS
from twinmerge.runtime.router.router import Router as RunningRouter
from twinmerge.runtime.router.scorers import empty

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


@pytest.fixture
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
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


def run_console(page: str, block: Block, monkeypatch, capsys) -> None:
    todo = commands(block)
    for command in todo:
        capsys.readouterr()
        code = run(command.words, monkeypatch)
        come = capsys.readouterr()
        where = f"{page}, line {block.line}: {shlex.join(command.words)}"
        wanted = int(block.verb == "fails" and command is todo[-1])
        assert code == wanted, f"{where}: exit code {code}\n{come.out}{come.err}"
        text = come.err if wanted else come.out
        assert is_shown(command.shown, text), f"{where}: other output came\n{text}"


LONG = [pytest.param(page, marks=pytest.mark.slow) for page in ("building.md", "running.md")]


@pytest.mark.parametrize("page", ["quickstart.md", *LONG])
def test_every_block_of_the_page_runs(page, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "160")
    names: dict[str, Any] = {}
    for block in blocks((DOCS / page).read_text()):
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
            exec(compile(source, page, "exec"), names)
        else:
            assert block.language in ("console", "bash"), f"line {block.line}: what is it for?"
            run_console(page, block, monkeypatch, capsys)


def test_the_example_of_a_new_method_registers_and_merges():
    (example,) = [
        b for b in blocks((ROOT / "CONTRIBUTING.md").read_text()) if b.language == "python"
    ]
    try:
        names: dict[str, Any] = {}
        exec(example.text, names)
        base, experts = torch.ones(2), torch.tensor([[3.0, 1.0], [1.0, 5.0]])
        assert names["halfway"](base, experts).tolist() == [2.0, 3.0]
        assert set(METHODS["halfway"].options) == {"weight", "normalize"}
    finally:
        METHODS.pop("halfway", None)


# -------------------------------------------------------------------------------------- links


def anchors(page: str) -> set[str]:
    """What GitHub makes of the headings: lower case, blanks to hyphens, other signs dropped."""
    page = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), f"{page.name}: {target}: no such file"
        if heading and path.suffix == ".md":
            assert heading in anchors(path.read_text()), f"{page.name}: {target}: no such heading"


# -------------------------------------------------------------------------------------- tables


def section(page: str, heading: str) -> str:
    """The text below one heading, up to the next."""
    found = re.search(rf"^#+ {re.escape(heading)}$\n(.*?)(?=^#|\Z)", page, re.M | re.S)
    assert found, f"no heading {heading!r}"
    return found[1]


def table(text: str, first: str) -> list[list[str]]:
    """Rows, as cells, of the first table whose first column is called `first`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |")) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


RECIPE = (DOCS / "recipe.md").read_text()
FORMAT = (DOCS / "format.md").read_text()
SECTIONS: dict[str, type[BaseModel]] = {
    "The top level": Recipe,
    "models": Expert,
    "exclusive": Exclusive,
    "router": Router,
}
# Computed where nothing is given: told in words.
IN_WORDS = {"name", "exclusive", "router"}


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_of_a_recipe_is_described_with_its_default_and_no_other(heading):
    fields = SECTIONS[heading].model_fields
    rows = {quoted(row[0])[0]: row for row in table(section(RECIPE, heading), "key")}
    assert list(rows) == list(fields)
    for name, (_, kind, default, meaning) in rows.items():
        assert kind and meaning
        if name in IN_WORDS:
            continue
        value = fields[name].get_default(call_default_factory=True)
        if fields[name].is_required():
            assert default == "required", name
        else:
            value = shown(value) if isinstance(value, bool) else value
            assert default == ("-" if value is None else f"`{value}`"), name


def test_every_merge_method_is_described_with_its_parameters_and_no_other():
    text = section(RECIPE, "Merge methods")
    rows = {quoted(row[0])[0]: row for row in table(text, "method")}
    assert set(rows) == set(METHODS)
    for name, (_, what, parameters, paper) in rows.items():
        method = METHODS[name]
        assert what
        assert quoted(parameters) == [
            f"{option.name}: {json.dumps(option.default)}" for option in method.options.values()
        ]
        assert f"]({method.paper})" in paper
    options = {o.name: o for method in METHODS.values() for o in method.options.values()}
    rows = {quoted(row[0])[0]: row for row in table(text, "parameter")}
    assert set(rows) == set(options)
    for name, (_, kind, per_expert, meaning) in rows.items():
        assert per_expert == ("yes" if options[name].per_expert else "no"), name
        assert (kind == "true or false") == (options[name].kind is bool), name
        assert meaning


def test_every_key_of_mergekits_that_is_refused_is_named():
    named = {key for row in table(section(RECIPE, "mergekit's configs"), "key") for key in row[:1]}
    assert set(REFUSED) <= {key for cell in named for key in quoted(cell)}


RECORDS = {
    record.__name__: record
    for record in vars(artifact_format).values()
    if isinstance(record, type)
    and issubclass(record, BaseModel)
    and record.__module__ == artifact_format.__name__
    and not record.__name__.startswith("_")
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_of_the_manifest_is_described_and_no_other(name):
    manifest = section(FORMAT, "Manifest")
    below = manifest if name == "Manifest" else manifest.partition(f"(`{name}`)")[2]
    assert below, f"no table for {name}"
    described = [key for row in table(below, "field") for key in quoted(row[0])]
    assert sorted(described) == sorted(RECORDS[name].model_fields)


def test_the_format_names_every_kind_suffix_and_tensor_of_the_router():
    kinds = [quoted(row[0])[0] for row in table(section(FORMAT, "Tensors"), "kind")]
    assert kinds == list(artifact_format.Kind.__args__)  # type: ignore[attr-defined]
    for suffix in (artifact_format.A, artifact_format.B, artifact_format.DELTA):
        assert f"`<name>{suffix}`" in FORMAT
    assert f"`<name>{artifact_format.HEAD}`" in FORMAT
    assert f"Format version {artifact_format.FORMAT_VERSION};" in FORMAT


@pytest.mark.parametrize("kind", KINDS)
def test_the_format_describes_every_tensor_of_every_kind_of_router_and_no_other(kind):
    text = section(FORMAT, "Router")
    tensors = {
        key: quoted(row[1]) for row in table(text, "kind") for key in quoted(row[0])
    }  # the kinds that are described alike are in one row
    assert list(tensors) == list(KINDS)
    described = tensors[kind]
    if kind == "mlp":
        described = [key for row in table(text, "tensor") for key in quoted(row[0])]
    router = RunningRouter(empty(kind, 6, 2, 4), novelty=Novelty({0: 6}, 2, 1.0))
    of_novelty = sorted(name for name in router.tensors() if name.startswith("novelty."))
    assert sorted(described) == sorted(set(router.tensors()) - set(of_novelty))
    assert sorted(set(re.findall(r"`(novelty\.[\w.]+)`", text.replace(".k.", ".0.")))) == of_novelty


def tree(text: str) -> dict[str, set[str]]:
    """Folder -> what is named in it, from indentation; words of a line are in its first folder."""
    found: dict[str, set[str]] = {}
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        names = re.findall(r"(?<![\w*/])(?:[\w-]+/)+(?![*\w])|\w+\.py\b", line)
        indent = len(line) - len(line.lstrip())
        if not names or not line.strip().startswith(names[0]):
            continue
        above = [(i, folder) for i, folder in above if i < indent]
        parent = above[-1][1] if above else ""
        for name in names:
            found.setdefault(parent, set()).add(name)
            if name.endswith("/"):
                found.setdefault(parent + name, set())
                if name == names[0]:
                    above.append((indent, parent + name))
                    parent += name
    return found


def test_the_tree_of_the_readme_names_every_module_and_no_other():
    """A folder with nothing below it stands for all that is in it."""
    readme = (ROOT / "README.md").read_text()
    marked = re.search(r"<!-- tree -->(.*?)<!-- /tree -->", readme, re.S)
    assert marked, "README.md has no tree"
    named = tree(marked[1])
    for folder, names in named.items():
        for name in names:
            assert (ROOT / folder / name).exists(), f"no {folder}{name}"
    for path in (ROOT / "twinmerge").rglob("*.py"):
        folder = f"{path.parent.relative_to(ROOT).as_posix()}/"
        assert folder in named, f"{folder} is not in the tree"
        if path.name != "__init__.py" and named[folder]:
            assert path.name in named[folder], f"{folder}{path.name} is not in the tree"
