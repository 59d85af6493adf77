"""What will happen to every tensor, decided from file headers before any weight is read.

Every tensor of the base and of the experts gets a kind; nothing is left over. What does not fit
together (a missing tensor, another shape, heads that not all experts have) is an error here.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..artifact.format import DELTA, HEAD
from ..artifact.tensorfile import Entry, layout
from ..checkpoint import Checkpoint, Expert, check_shapes, open_expert
from ..errors import CheckpointError, MissingTensor, RecipeError, UnsupportedCheckpoint
from ..recipe import Depths, Recipe
from ..weightfiles import TensorInfo, some
from .exclusive import matrix_shape
from .keep import EXACT_WORKSPACE, Keep, keep_of, stored_as
from .planned import Planned

# What a config.json may say otherwise than the base's without changing what the weights mean.
_NEUTRAL = re.compile(
    r"^_|^(architectures|transformers_version|torch_dtype|dtype|use_cache|gradient_checkpointing)$"
    r"|dropout|_drop$|_pdrop$|^(initializer_range|output_.*|return_dict|.*_token_id)$"
)
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|decoder)\.")
_LABELS = ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "pad_token_id")
_ADAPTER_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Plan:
    """A build, before it runs. `tensors` are in the order of writing: by item size, then name, with
    numbers in names counted (layer 2 before layer 10), as checkpoints have them."""

    recipe: Recipe
    base: Checkpoint
    experts: list[Expert]
    tensors: list[Planned]
    keep: Keep
    model_class: str
    configs: dict[str, dict[str, Any]]
    outputs: dict[str, int | None]
    warnings: list[str]

    def expert_bytes(self) -> int:
        """Most bytes of the tensors in one expert's file, heads included.

        With `energy` or `full` it is what all singular values would take; with a budget it is the
        budget (one expert may get more of it, another less).
        """
        budget = self.recipe.exclusive.budget_bytes(self.shared_bytes())
        return budget if budget is not None else self.whole_bytes() + self.matrix_bytes()

    def whole_bytes(self) -> int:
        """Most bytes of what one expert keeps whole: vectors and its head."""
        vectors = not self.keep.cut.none
        return _whole_bytes(self.tensors, self.experts, vectors=vectors)

    def matrix_bytes(self) -> int:
        """Most bytes of what one expert keeps of the matrices."""
        return sum(
            self.keep.bytes_at_most(tensor) for tensor in self.tensors if tensor.kind == "matrix"
        )

    def spool_bytes(self) -> int:
        """Most bytes that experts' parts take on disk while a build is under way."""
        if self.keep.scope_all:
            double = self.recipe.dtype == "float64"
            dense = sum(
                prod(t.shape) * (8 if double or self.base.info(t.name).dtype.itemsize == 8 else 4)
                for t in self.tensors
                if t.kind == "matrix"
            )
            return len(self.experts) * (self.whole_bytes() + dense)
        return len(self.experts) * (self.whole_bytes() + self.matrix_bytes())

    def shared_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    def disk_bytes(self) -> int:
        """What the artifact takes at least, and at most where the recipe says a rank.

        With `energy` or `full` the data decide how large the factors get; they are not counted.
        """
        if self.keep.bounded:
            return self.shared_bytes() + len(self.experts) * self.expert_bytes()
        return self.shared_bytes()

    def work_bytes(self) -> int:
        """Disk that the build needs at its height: the artifact, and the parts it is made of."""
        if self.keep.bounded:
            return self.disk_bytes() + self.spool_bytes()
        return self.disk_bytes()

    def peak_bytes(self) -> int:
        """About what the build holds at once: (T + 2) × the largest tensor, and the workspace of
        an exact SVD where the recipe asks for all of the spectrum. See docs/building.md."""
        largest = max((prod(t.shape) for t in self.tensors if t.kind != "head"), default=0)
        matrix = max((prod(t.shape) for t in self.tensors if t.kind == "matrix"), default=0)
        work = 8 if self.recipe.dtype == "float64" else 4
        exact = 0 if self.keep.bounded or self.keep.cut.none else int(EXACT_WORKSPACE * matrix)
        return ((len(self.experts) + 2) * largest + exact) * work

    def summary(self) -> dict[str, Any]:
        """What a build will hold and write, for `--dry-run`. Sizes in bytes; experts' at most."""
        counts = Counter(tensor.kind for tensor in self.tensors)
        budget = self.keep.budget is not None
        each = "bytes_per_expert_on_average" if budget else "bytes_per_expert_at_most"
        artifact = self.shared_bytes() + len(self.experts) * self.expert_bytes()
        return {
            "base": self.recipe.base_model,
            "model_class": self.model_class,
            "experts": len(self.experts),
            "tensors": dict(sorted(counts.items())),
            "shared_bytes": self.shared_bytes(),
            each: self.expert_bytes(),
            "artifact_bytes_at_most": artifact,
            "disk_bytes_while_building_at_least": self.work_bytes(),
            "disk_bytes_while_building_at_most": artifact + self.spool_bytes(),
            "peak_memory_bytes": self.peak_bytes(),
            "warnings": self.warnings,
        }

    @property
    def config_dtype(self) -> str | None:
        """The dtype that config.json must name, where it is not the base's own."""
        eight_bit = any(
            info.is_floating_point and info.itemsize < 2
            for info in (self.base.info(name).dtype for name in self.base.names())
        )
        return self.recipe.out_dtype or ("bfloat16" if eight_bit else None)

    def close(self) -> None:
        for expert in self.experts:
            expert.close()
        self.base.close()


def make_plan(recipe: Recipe) -> Plan:
    """Open the base and all experts (headers only) and decide what becomes of each tensor.

    Raises `CheckpointError` and its kinds; every message names the tensor and the expert.
    """
    recipe = recipe.located()
    base = Checkpoint.open(recipe.base_model)
    experts = [open_expert(entry.name, entry.model, base) for entry in recipe.models]
    for expert in experts:
        check_shapes(base, expert)
    heads = sorted({name for expert in experts for name in expert.head_names()})
    # First: that kinds of task differ says more than the tensors in which they do.
    model_class = _model_class(base, experts)
    tensors = [_planned_head(name, base, experts) for name in heads]
    tied, running = _tied(base, experts), base.running()
    for name in base.names():
        info = base.info(name)
        dtype = stored_as(info.dtype, recipe.out_dtype)
        if not info.dtype.is_floating_point:
            count = name in running
            tensors.append(Planned(name, "buffer", info.shape, info.dtype, running=count))
            continue
        if name in tied:
            tensors.append(Planned(name, "tied", info.shape, dtype, tied_to=tied[name]))
            continue
        holders = [expert for expert in experts if name not in expert.missing()]
        if name in heads or not holders:
            if name not in heads:
                _check_optional(name, experts)
            tensors.append(Planned(name, "base_only", info.shape, dtype))
            continue
        if len(holders) < len(experts):
            lacking = next(expert for expert in experts if expert not in holders)
            raise MissingTensor(
                f"{name}: the base and expert '{holders[0].name}' have it, expert "
                f"'{lacking.name}' ({lacking.reference}) does not.\n  "
                f"Save '{lacking.name}' again with all its weights, or leave it out."
            )
        for expert in holders:
            if not (own := expert.info(name).dtype).is_floating_point:
                raise UnsupportedCheckpoint(
                    f"{name}: {info.dtype} in the base, {own} in expert '{expert.name}' "
                    f"({expert.reference}): integers cannot be merged with it.\n  Save the expert "
                    "again with its weights as floats, or leave it out."
                )
        matrix = matrix_shape(info.shape)
        kind = "matrix" if matrix else "vector"
        planned = Planned(name, kind, info.shape, dtype, matrix, running=name in running)
        tensors.append(planned)
    tensors.sort(key=lambda t: (-t.dtype.itemsize, _natural(t.name)))
    keep = keep_of(
        recipe.exclusive,
        [tensor for tensor in tensors if tensor.kind == "matrix"],
        len(experts),
        shared_bytes=sum(tensor.bytes for tensor in tensors),
        whole_bytes=_whole_bytes(tensors, experts, vectors=True) + _header_bytes(tensors, experts),
    )
    recipe.check_tensors(
        [t.name for t in tensors if t.kind in ("matrix", "vector") and not t.running],
        Depths(base.names()),
    )
    configs, warnings = _configs(base, experts, recipe)
    outputs = {expert.name: _outputs(expert, heads) for expert in experts}
    _check_labels(recipe, outputs)
    for expert, entry in zip(experts, recipe.models, strict=True):
        if expert.is_adapter and entry.labels is None and (outputs[expert.name] or 0) > 1:
            warnings.append(
                f"expert '{expert.name}': an adapter carries no names of its "
                f"{outputs[expert.name]} classes; answers will say LABEL_0 and so on. Give "
                "`labels: [...]` beside its `model`."
            )
    if recipe.merge_method == "linear" and "weight" in recipe.parameters:
        warnings.append(
            "parameters.weight: mergekit's linear, given one weight for all and a base_model, "
            "averages the base in as one more model; twinmerge averages the experts alone. Leave "
            "the weight out to say so."
        )
    for each in recipe.idle_filters(base.names()):
        warnings.append(
            f"parameters: no tensor of the base has {each!r} in its name, so that filter does "
            f"nothing; the base's names are like {some(base.floats())}."
        )
    warnings = [f"expert '{e.name}': {note}" for e in experts for note in e.notes] + warnings
    return Plan(
        recipe=recipe,
        base=base,
        experts=experts,
        tensors=tensors,
        keep=keep,
        model_class=model_class,
        configs=configs,
        outputs=outputs,
        warnings=warnings,
    )


def _whole_bytes(tensors: list[Planned], experts: list[Expert], *, vectors: bool) -> int:
    total = 0
    for tensor in tensors:
        if tensor.kind == "head":
            shapes = (expert.info(tensor.name).shape for expert in experts)
            total += max(map(prod, shapes)) * tensor.dtype.itemsize
        elif tensor.kind == "vector" and vectors:
            total += prod(tensor.shape) * tensor.dtype.itemsize
    return total


def _header_bytes(tensors: list[Planned], experts: list[Expert]) -> int:
    """Most bytes of the header of one expert's file without factors."""
    entries: list[Entry] = []
    for tensor in tensors:
        if tensor.kind == "head":
            shapes = [expert.info(tensor.name).shape for expert in experts]
            entries.append((tensor.name + HEAD, torch.float64, max(shapes, key=prod)))
        elif tensor.kind == "vector":
            entries.append((tensor.name + DELTA, torch.float64, tensor.shape))
    # "BF16" is a letter longer than "F64"; the whole is rounded up to 8 bytes.
    return len(layout(entries).header) + len(entries) + 8


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(p)) if p.isdecimal() else (1, p) for p in re.split(r"(\d+)", name) if p]


def _planned_head(name: str, base: Checkpoint, experts: list[Expert]) -> Planned:
    infos: dict[str, TensorInfo] = {}
    for expert in experts:
        try:
            infos[expert.name] = expert.info(name)
        except MissingTensor:
            having = next(e.name for e in experts if name in e.head_names())
            raise MissingTensor(
                f"{name}: a head tensor of expert '{having}' that expert '{expert.name}' "
                f"({expert.reference}) does not have; its heads: {some(expert.head_names())}.\n  "
                "All experts of one merge need the same kind of head (classes may differ). For an "
                "adapter, save the head with modules_to_save."
            ) from None
    # One dtype, and so one order of writing, serves all files; none loses anything by it.
    dtypes = [stored_as(info.dtype, None) for info in infos.values()]
    dtype = functools.reduce(torch.promote_types, dtypes)
    return Planned(name, "head", infos[experts[0].name].shape, dtype)


def _check_optional(name: str, experts: list[Expert]) -> None:
    """Raise `MissingTensor` unless a base tensor that no expert has belongs to a part of its own.

    Task models leave out whole parts of a base: its language-model head, its pooler. A tensor
    beside others that the experts do have is missing.
    """
    depth = 3 if any(expert.base_prefix for expert in experts) else 2
    parts = name.split(".")
    for part in range(1, min(depth, len(parts))):
        root = ".".join(parts[:part]) + "."
        if not any(held.startswith(root) for expert in experts for held in expert.names()):
            return
    if "pooler" in name:
        return
    raise MissingTensor(
        f"{name}: the base has it, no expert does, although the experts have other tensors of the "
        "same part.\n  Save the experts again with all their weights."
    )


def _check_labels(recipe: Recipe, outputs: dict[str, int | None]) -> None:
    """Raise `RecipeError` if an entry names another number of labels than its head has outputs."""
    for entry in recipe.models:
        count = outputs[entry.name]
        if entry.labels is not None and count is not None and len(entry.labels) != count:
            raise RecipeError(
                f"expert '{entry.name}': labels: expected {count} names, one for each output of "
                f"its head, got {len(entry.labels)}."
                + (" An expert with one output (a regression) has none." if count == 1 else "")
            )


def _tied(base: Checkpoint, experts: list[Expert]) -> dict[str, str]:
    """Second names of tensors that the base stores twice: an output embedding and its input.

    Raises `CheckpointError` if an expert has two different tensors under these names.
    """
    if not base.ties():
        return {}
    rows = base.vocabularies()
    shapes = {name: base.info(name).shape for name in base.floats()}
    tables = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] in rows]
    tied: dict[str, str] = {}
    for name in tables:
        if _OUTPUT.search(name):  # the input embedding is the one that transformers saves
            twin = next((t for t in tables if not _OUTPUT.search(t) and base.same(t, name)), None)
            if twin is not None:
                tied[name] = twin
                for expert in experts:
                    if name not in expert.missing() and not expert.same(name, twin):
                        raise CheckpointError(
                            f"{name}: in the base it equals {twin} (tied embeddings), in expert "
                            f"'{expert.name}' ({expert.reference}) the two differ.\n  Write "
                            '"tie_word_embeddings": false into the base\'s config.json.'
                        )
    return tied


def _outputs(expert: Expert, heads: list[str]) -> int | None:
    """Outputs of an expert's head: rows of the one matrix that no other head matrix reads from."""
    shapes = [expert.info(name).shape for name in heads]
    matrices = [shape for shape in shapes if len(shape) == 2]
    last = [s for s in matrices if not any(s[0] == o[1] for o in matrices if o is not s)]
    return min((shape[0] for shape in last or matrices), default=None)


def _model_class(base: Checkpoint, experts: list[Expert]) -> str:
    """The task model's class in transformers; one for the whole artifact.

    An expert saved without any head goes with all kinds; if the others have one, that its head is
    missing is told by `_planned_head`.
    """
    classes: dict[str, str] = {}
    own = (base.config.get("architectures") or ["AutoModel"])[0]
    for expert in experts:
        if expert.adapter_config is None:
            classes[expert.name] = (expert.config.get("architectures") or [own])[0]
        else:
            task = expert.adapter_config.get("task_type")
            if task is None and expert.head_names():
                raise UnsupportedCheckpoint(
                    f"expert '{expert.name}': has a head of its own, but its adapter_config.json "
                    f"names no task_type.\n  Set it to one of {', '.join(_ADAPTER_CLASSES)}."
                )
            classes[expert.name] = _ADAPTER_CLASSES.get(str(task), own)
    kinds = {cls: kind_of(cls, own) for cls in classes.values()}
    if len(set(kinds.values()) - {""}) > 1:
        listed = ", ".join(f"'{name}' is a {cls}" for name, cls in classes.items())
        raise CheckpointError(
            f"the experts are different kinds of task model: {listed}.\n  "
            "One artifact holds one kind; build one for each."
        )
    return min(kinds, key=lambda cls: (not kinds[cls], cls.startswith("Auto"), cls))


def kind_of(cls: str, own: str) -> str:
    """`ForSequenceClassification` of `BertForSequenceClassification`; `` of `BertModel`."""
    found = re.search(r"For[A-Z]\w*$", cls)
    if found:
        return found[0]
    return "ForCausalLM" if cls.endswith("LMHeadModel") else ""


def _configs(
    base: Checkpoint, experts: list[Expert], recipe: Recipe
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What each expert's config says otherwise: its labels kept, anything of weight warned of."""
    configs: dict[str, dict[str, Any]] = {}
    warnings = []
    for expert, entry in zip(experts, recipe.models, strict=True):
        config: dict[str, Any] = {}
        if not expert.is_adapter:
            config = {
                key: expert.config[key]
                for key in _LABELS
                if expert.config.get(key) is not None and expert.config[key] != base.config.get(key)
            }
            for key in sorted(set(expert.config) & set(base.config)):
                ours, theirs = base.config[key], expert.config[key]
                if ours != theirs and key not in _LABELS and not _NEUTRAL.search(key):
                    warnings.append(
                        f"expert '{expert.name}': its config.json has {key} = {theirs!r}, the "
                        f"base's {ours!r}; the artifact runs with the base's."
                    )
        if entry.labels is not None:
            config["id2label"] = {str(i): label for i, label in enumerate(entry.labels)}
        configs[expert.name] = config
    return configs, warnings
