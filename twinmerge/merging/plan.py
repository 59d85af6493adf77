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

from ..artifact.format import DELTA, HEAD, A, B, Kind
from ..checkpoint import Checkpoint, Expert, check_shapes, open_expert
from ..errors import CheckpointError, MissingTensor, RecipeError, UnsupportedCheckpoint
from ..recipe import Exclusive, Recipe
from ..weightfiles import TensorInfo, some
from .exclusive import Cut, matrix_shape

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
class Planned:
    """One tensor and its fate."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    """In which it is stored: the recipe's out_dtype, or the base's own."""
    matrix: tuple[int, int] | None = None
    tied_to: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes in the shared expert."""
        if self.kind in ("head", "tied"):
            return 0
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A build, before it runs. `tensors` are in the order of writing: by item size, then name."""

    recipe: Recipe
    base: Checkpoint
    experts: list[Expert]
    tensors: list[Planned]
    cut: Cut
    model_class: str
    configs: dict[str, dict[str, Any]]
    outputs: dict[str, int | None]
    warnings: list[str]

    def expert_entries(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and largest shapes of what one expert's file may hold."""
        entries: list[tuple[str, tuple[int, ...]]] = []
        for tensor in self.tensors:
            if tensor.kind == "head":
                shapes = (expert.info(tensor.name).shape for expert in self.experts)
                entries.append((tensor.name + HEAD, max(shapes, key=prod)))
            elif tensor.kind == "matrix" and tensor.matrix and not self.cut.none:
                out, in_ = tensor.matrix
                rank = self.cut.limit(out, in_)
                entries += [(tensor.name + A, (rank, in_)), (tensor.name + B, (out, rank))]
            elif tensor.kind == "vector" and not self.cut.none:
                entries.append((tensor.name + DELTA, tensor.shape))
        return entries

    def expert_bytes(self) -> int:
        """Upper bound of the tensors in one expert's file, heads included."""
        sizes = {tensor.name: tensor.dtype.itemsize for tensor in self.tensors}
        return sum(
            prod(shape) * sizes[name.rpartition(".")[0]] for name, shape in self.expert_entries()
        )

    def shared_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    def disk_bytes(self) -> int:
        """What the artifact takes at least, and at most where the recipe says a rank.

        With `energy` or `full` the data decide how large the factors get; they are not counted.
        """
        if self.cut.energy is None and not self.cut.full:
            return self.shared_bytes() + len(self.experts) * self.expert_bytes()
        return self.shared_bytes()

    def peak_bytes(self) -> int:
        """About what the build holds at once: base, experts, and working copies of one tensor."""
        largest = max((prod(t.shape) for t in self.tensors if t.kind != "head"), default=0)
        work = 8 if self.recipe.dtype == "float64" else 4
        return (2 * len(self.experts) + 3) * largest * work

    def summary(self) -> dict[str, Any]:
        """What a build will hold and write, for `--dry-run`. Sizes in bytes; experts' at most."""
        counts = Counter(tensor.kind for tensor in self.tensors)
        return {
            "base": self.recipe.base_model,
            "model_class": self.model_class,
            "experts": len(self.experts),
            "tensors": dict(sorted(counts.items())),
            "shared_bytes": self.shared_bytes(),
            "bytes_per_expert_at_most": self.expert_bytes(),
            "peak_memory_bytes": self.peak_bytes(),
            "warnings": self.warnings,
        }

    def close(self) -> None:
        for expert in self.experts:
            expert.close()
        self.base.close()


def make_plan(recipe: Recipe) -> Plan:
    """Open the base and all experts (headers only) and decide what becomes of each tensor.

    Raises `CheckpointError` and its kinds; every message names the tensor and the expert.
    """
    base = Checkpoint.open(recipe.base_model)
    experts = [open_expert(entry.name, entry.model, base) for entry in recipe.models]
    for expert in experts:
        check_shapes(base, expert)
    heads = sorted({name for expert in experts for name in expert.head_names()})
    # First: that kinds of task differ says more than the tensors in which they do.
    model_class = _model_class(base, experts)
    tensors = [_planned_head(name, base, experts) for name in heads]
    tied = _tied(base, experts)
    for name in base.names():
        info = base.info(name)
        dtype = getattr(torch, recipe.out_dtype) if recipe.out_dtype else info.dtype
        if not info.dtype.is_floating_point:
            tensors.append(Planned(name, "buffer", info.shape, info.dtype))
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
        if info.dtype.itemsize < 2:
            raise UnsupportedCheckpoint(
                f"{name}: stored as {info.dtype}, which cannot be merged without a scale.\n  "
                "Save the models in bfloat16 first."
            )
        matrix = matrix_shape(info.shape)
        tensors.append(Planned(name, "matrix" if matrix else "vector", info.shape, dtype, matrix))
    tensors.sort(key=lambda t: (-t.dtype.itemsize, t.name))
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
    warnings = [f"expert '{e.name}': {note}" for e in experts for note in e.notes] + warnings
    return Plan(
        recipe=recipe,
        base=base,
        experts=experts,
        tensors=tensors,
        cut=cut_of(recipe.exclusive),
        model_class=model_class,
        configs=configs,
        outputs=outputs,
        warnings=warnings,
    )


def cut_of(exclusive: Exclusive) -> Cut:
    """What the recipe's `exclusive` section keeps of each matrix."""
    if exclusive.energy is not None:
        return Cut(energy=exclusive.energy)
    if isinstance(exclusive.rank, int):
        return Cut(rank=exclusive.rank)
    assert exclusive.rank is not None, "a recipe has a rank or an energy"
    if exclusive.rank.endswith("%"):
        return Cut(share=float(exclusive.rank.rstrip("% ")) / 100)
    return Cut(full=True) if exclusive.rank == "full" else Cut(none=True)


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
    dtype = functools.reduce(torch.promote_types, [info.dtype for info in infos.values()])
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
                    untied = not torch.equal(expert.read(name), expert.read(twin))
                    if name not in expert.missing() and untied:
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
    kinds = {cls: _kind(cls, own) for cls in classes.values()}
    if len(set(kinds.values()) - {""}) > 1:
        listed = ", ".join(f"'{name}' is a {cls}" for name, cls in classes.items())
        raise CheckpointError(
            f"the experts are different kinds of task model: {listed}.\n  "
            "One artifact holds one kind; build one for each."
        )
    return min(kinds, key=lambda cls: (not kinds[cls], cls.startswith("Auto"), cls))


def _kind(cls: str, own: str) -> str:
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
