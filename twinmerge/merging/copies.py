"""What an artifact takes over from the base besides weights: configuration, tokenizer, index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..artifact.format import FileRecord
from ..artifact.tensorfile import record
from .plan import Plan
from .planned import Planned

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "bpe.codes",
    "vocab.bpe",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "video_preprocessor_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


MORE_TEMPLATES = "additional_chat_templates"
TEMPLATE = "chat_template.jinja"


def copy_files(plan: Plan, folder: Path, shards: dict[str, list[Planned]]) -> dict[str, FileRecord]:
    """Copy or write configuration, tokenizer and the shards' index into `folder`.

    A base without a chat template gets the one that its experts agree on, if they do.
    """
    out: dict[str, FileRecord] = {}
    source = plan.base.folder
    dtype = plan.config_dtype
    more = [f"{MORE_TEMPLATES}/{p.name}" for p in sorted((source / MORE_TEMPLATES).glob("*.jinja"))]
    for name in ("config.json", *TOKENIZER_FILES, *more):
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
            if name == "config.json" and dtype:
                _store_dtype(folder / name, dtype)
            out[name] = record(folder / name)
    learned = set(_templates(plan).values())
    if _chat_template(source) is None and len(learned) == 1:
        (folder / TEMPLATE).write_text(learned.pop(), encoding="utf-8")
        out[TEMPLATE] = record(folder / TEMPLATE)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": plan.shared_bytes()},
            "weight_map": {
                tensor.name: shard
                for shard, tensors in shards.items()
                for tensor in sorted(tensors, key=lambda t: t.name)
                if tensor.kind not in ("head", "tied")
            },
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        out[path.name] = record(path)
    return out


def tokenizer_warnings(plan: Plan) -> list[str]:
    """Experts whose tokenizer has another vocabulary, or chat template, than the base's."""
    ours = _vocabulary(plan.base.folder)
    warnings = _template_warnings(plan)
    for expert in plan.experts:
        if ours is None or _same_file(plan.base.folder, expert.folder, "tokenizer.json"):
            continue
        theirs = _vocabulary(expert.folder)
        if theirs is not None and theirs != ours:
            warnings.append(
                f"expert '{expert.name}': its tokenizer has another vocabulary than the "
                "base's; the artifact has the base's."
            )
    return warnings


def _template_warnings(plan: Plan) -> list[str]:
    """A model has one chat template: who was tuned with another is told."""
    ours, theirs = _chat_template(plan.base.folder), _templates(plan)
    if ours is None and len(set(theirs.values())) > 1:
        return [
            f"the experts {', '.join(theirs)} have different chat templates and the base has none, "
            f"so the artifact has none: format chats yourself, or put a {TEMPLATE} into it."
        ]
    return [
        f"expert '{name}': its chat template is another than the base's; the artifact has the "
        "base's. Its answers to chats may suffer."
        for name, template in theirs.items()
        if ours is not None and template != ours
    ]


def _templates(plan: Plan) -> dict[str, str]:
    """The chat templates of the experts that have one."""
    found = {expert.name: _chat_template(expert.folder) for expert in plan.experts}
    return {name: template for name, template in found.items() if template is not None}


def _chat_template(folder: Path) -> str | None:
    """The chat template of a tokenizer, in a file of its own or in its configuration."""
    try:
        if (folder / TEMPLATE).is_file():
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = config.get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(template, list):  # several by name, as transformers wrote them once
        named = {each.get("name"): each.get("template") for each in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _store_dtype(path: Path, dtype: str) -> None:
    """Make a config.json name this dtype: `from_pretrained` believes it before the weights."""

    def named(config: dict) -> dict:
        kept = {key: value for key, value in config.items() if key != "torch_dtype"}
        kept = {key: named(v) if isinstance(v, dict) else v for key, v in kept.items()}
        return kept | {"dtype": dtype} if {"dtype", "torch_dtype"} & set(config) else kept

    config = {"dtype": None, **json.loads(path.read_text(encoding="utf-8"))}
    path.write_text(json.dumps(named(config), indent=2) + "\n", encoding="utf-8")


def _same_file(one: Path, other: Path, name: str) -> bool:
    mine, theirs = one / name, other / name
    return theirs.is_file() and mine.read_bytes() == theirs.read_bytes()


def _vocabulary(folder: Path) -> object:
    """What a tokenizer.json maps to what; None without one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["model"]["vocab"], content["model"].get("merges")
    except (ValueError, KeyError, TypeError):
        return None
