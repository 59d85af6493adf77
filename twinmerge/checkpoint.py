"""A folder that others wrote, read one tensor at a time under the base's tensor names.

`Checkpoint` is one full model as stored: names, shapes, dtypes from the file headers, data only
when asked for. `Expert` is a fine-tuned model seen through its base: the same names, whatever
prefix, tying or low-rank adapter it was saved with. Both work on files alone: no model class is
built, so a model larger than memory is read as easily as a small one. How a LoRA folder becomes
an `Expert` is told in `adapter.py`.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from twinmerge.errors import (
    CheckpointError,
    MissingTensor,
    ShapeMismatch,
)
from twinmerge.quantised import refuse_config, refuse_gguf, refuse_names, refuse_scaled
from twinmerge.weightfiles import TensorFiles, TensorInfo, explain, read_json, some

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[^\s+]+)?")
# Constants that older transformers stored and newer ones recompute: nothing was learnt in them.
_BUFFERS = re.compile(r"(position_ids|token_type_ids|inv_freq|attn\.(masked_)?bias)$")
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|output_embeddings?|vocab_projector)(\.|$)")
EMBEDDING: Final = re.compile(r"embed|lm_head|wte|(^|\.)shared\.|vocab_projector")
# Insides of a model saved without its wrapper: such a first segment is no `bert.` or `model.`
_INSIDE = frozenset("encoder decoder embeddings layers layer h blocks block stages wte".split())


@dataclass(frozen=True)
class LowRank:
    """A task vector in factors: `W_t - W_0 = b @ a`, any scale folded into `b`. Both float32.

    For a 2-D weight, "out in" is its shape as stored in the checkpoint (for GPT-2's Conv1D the
    stored rows are what the layer calls inputs). A conv kernel is seen as (out, rest): reshape
    `b @ a` to the kernel's shape.
    """

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]


class Unchanged(Enum):
    """The type of `UNCHANGED`."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED
"""The task vector of a tensor that an adapter does not touch: exactly zero."""


# -------------------------------------------------------------------------------- references


def _local(reference: str) -> Path:
    """The reference as a path here; a `~user` without a home stays as it is."""
    try:
        return Path(reference).expanduser()
    except RuntimeError:
        return Path(reference)


def resolve(reference: str) -> Path:
    """The folder of a reference: a local folder, else a hub id `org/name` or `org/name@revision`.

    A local path always wins. Raises `CheckpointError` if it is neither, or the hub has no answer,
    and `UnsupportedCheckpoint` for a GGUF file.
    """
    path = _local(reference)
    if reference and path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        refuse_gguf(repr(reference), path.parent, path.name)
    if path.is_file() or not _HUB_ID.fullmatch(reference):
        came = "a file" if path.is_file() else "nothing at that path"
        todo = "Name the folder that holds config.json or adapter_config.json, or a hub id."
        raise CheckpointError(explain(repr(reference), "a folder here or a hub id", came, todo))
    from huggingface_hub import snapshot_download

    repo, _, revision = reference.partition("@")
    small = ["*.json", "*.md", "*.txt", "*.model", "*.jinja", "*.spm", "*.codes", "*.bpe"]
    # Folders inside a repository and consolidated* hold the same weights in other formats.
    skip = ["*/*", "consolidated*"]
    try:
        for weights in ("*.safetensors", "*.bin"):  # .bin only where there is no safetensors
            folder = Path(
                snapshot_download(
                    repo,
                    revision=revision or None,
                    allow_patterns=[*small, weights],
                    ignore_patterns=[*skip, "training_args.bin", "optimizer.bin"],
                )
            )
            if any(folder.glob(weights)):
                break
    except Exception as error:  # offline, not found, gated, bad name: many unrelated classes
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"'{reference}': not a folder here, and the hub could not be reached or refused it "
            f"({type(error).__name__}: {reason}).\n  Check the spelling; for a gated model log in "
            f"with `hf auth login`; without a network, download it first and give its folder."
        ) from error
    return folder


def _split(reference: str) -> tuple[str, str] | None:
    """(base, adapter) if the reference is `base+adapter`; a folder with + in its name is one."""
    if _local(reference).is_dir():
        return None
    here = [i for i, letter in enumerate(reference) if letter == "+"]
    cuts = [(reference[:i], reference[i + 1 :]) for i in here]

    def known(part: str) -> float:
        return _local(part).is_dir() + 0.4 * bool(_HUB_ID.fullmatch(part))

    return max(cuts, key=lambda cut: known(cut[0]) + known(cut[1])) if cuts else None


class Checkpoint:
    """One full checkpoint as stored. Tensors are read one at a time, from files opened when needed.

    `reference` is what the user wrote, `folder` where it is on this disk, `config` its config.json.
    """

    def __init__(self, reference: str, folder: Path, config: dict[str, Any], files: TensorFiles):
        self.reference, self.folder, self.config, self.files = reference, folder, config, files

    @classmethod
    def open(cls, reference: str) -> Checkpoint:
        """A local folder or hub id (`org/name@revision`). Reads an index, or one header.

        Raises `CheckpointError`: nothing there, no config.json or weights; `CorruptCheckpoint`,
        `UnsafePickle`; `UnsupportedCheckpoint` for quantised weights.
        """
        folder, thing = resolve(reference), f"'{reference}'"
        if not any(folder.glob("*.safetensors*")) and not any(folder.glob("*.bin*")):
            if found := sorted(path.name for path in folder.glob("*.gguf")):
                refuse_gguf(thing, folder, some(found))
        config = read_json(folder / "config.json")
        refuse_config(thing, folder, config)
        files = TensorFiles(folder, ("model", "pytorch_model"), beside=("config.json",))
        refuse_names(thing, folder, files.names())
        return cls(reference, folder, config, files)

    def names(self) -> list[str]:
        """All tensor names as stored, sorted."""
        return self.files.names()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, from the header of the file that holds it.

        Raises `MissingTensor`, `CorruptCheckpoint` if that file is damaged, and
        `UnsupportedCheckpoint` if the tensor is one of a quantised model.
        """
        info = self.files.info(name)
        refuse_scaled(f"'{self.reference}'", self.folder, name, info, self.files)
        return info

    def read(self, name: str) -> Tensor:
        """The tensor as stored: a large one is the file itself, mapped, and takes no memory.

        Raises `MissingTensor`, and `CorruptCheckpoint` if the file is not what it was at opening.
        """
        return self.files.read(name)

    def prefetch(self, name: str) -> None:
        """Ask the kernel to read the tensor ahead. Returns at once and never fails."""
        self.files.prefetch([name])

    def check(self, name: str) -> None:
        """Raise `CorruptCheckpoint` if the tensor's file was changed since it was opened."""
        self.files.check([name])

    def identity(self) -> dict[str, list[int]]:
        """{file name: [bytes, time of writing in ns]} of weights, index and config, at opening."""
        return self.files.identity()

    def bytes(self) -> int:
        """Of all tensors, from all headers; one storage under two names (.bin) counts once."""
        return self.files.bytes()

    def close(self) -> None:
        """Let go of the files. A later `read` opens them again."""
        self.files.close()

    def floats(self) -> list[str]:
        """The names of the tensors that can be merged: float ones."""
        return [n for n in self.names() if self.info(n).dtype.is_floating_point]

    def ties(self) -> bool:
        """False only where config.json says that input and output embedding are two weights."""
        nested = self.config.get("text_config") or {}
        return (
            self.config.get("tie_word_embeddings", nested.get("tie_word_embeddings")) is not False
        )

    def vocabularies(self) -> set[int]:
        """Row counts that mean "one row per token": from the config and from the embeddings."""
        nested = self.config.get("text_config") or {}
        sizes = {self.config.get("vocab_size"), nested.get("vocab_size")}
        for name in filter(EMBEDDING.search, self.names()):
            if len(self.info(name).shape) == 2 and not re.search("position|type", name):
                sizes.add(self.info(name).shape[0])
        return {size for size in sizes if isinstance(size, int)}

    def running(self) -> set[str]:
        """What batch norms keep of the batches they saw: means, variances, counts of batches.

        Known by names and shapes: beside each other `running_mean` and `running_var`, float vectors
        of one shape, and mostly an integer `num_batches_tracked`.
        """
        names, found = set(self.names()), set()
        for mean in names:
            module, _, leaf = mean.rpartition("running_mean")
            variance, count = f"{module}running_var", f"{module}num_batches_tracked"
            if leaf or (module and not module.endswith(".")) or variance not in names:
                continue
            info = self.info(mean)
            vector = len(info.shape) == 1 and info.dtype.is_floating_point
            if vector and self.info(variance) == info:
                found |= {mean, variance}
                if count in names and not self.info(count).dtype.is_floating_point:
                    found.add(count)
        return found

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same bits. Reads up to the first that differs."""
        return self.info(one) == self.info(other) and same_bits(self.read(one), self.read(other))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit: NaN equals itself, 0 not -0.

    No copies, and it stops at the first difference: two embeddings of a 70B model that are not tied
    differ in their first row, and nothing more of them is read.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    # As integers: 8-bit floats cannot be compared, and NaN would differ from itself.
    bits = _INTEGERS.get(one.dtype.itemsize, one.dtype)
    return torch.equal(one.view(bits), other.view(bits))


# --------------------------------------------------------------------------------- alignment


_RENAMED = [(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")]
# The ViT family: files keep the left names, but a live model (so a peft adapter) of transformers 5
# has the right ones. From transformers' own conversion_mapping.py.
_RENAMED_VIT = [
    (r"encoder\.layer\.(\d+)", r"layers.\1"),
    (
        r"attention\.attention\.(q)uery|attention\.attention\.([kv])(ey|alue)",
        r"attention.\1\2_proj",
    ),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
]


def canonical(name: str, vit: bool = False) -> str:
    """The name as a live model of today's transformers has it: `LayerNorm.gamma` is `.weight`."""
    for old, new in [*_RENAMED, *(_RENAMED_VIT if vit else [])]:
        name = re.sub(old, new, name)
    return name


def align(base: Iterable[str], expert: Iterable[str]) -> tuple[str, str, dict[str, str]]:
    """(prefix in the base, prefix in the expert, {base name: expert name}) that match most names.

    `encoder.x` and `bert.encoder.x` give ("", "bert.", ...); the reverse gives ("bert.", "", ...);
    `model.x` and `model.language_model.x` give both. One prefix has to start or end with the
    other, so that `encoder.0` is never taken for `decoder.0`. Names outside of the base's prefix
    match if they are equal.
    """
    sides = (list(base), list(expert))
    vit = any(".attention.attention.query" in n for names in sides for n in names)
    ours, theirs = ({canonical(n, vit): n for n in names} for names in sides)

    def prefixes(names: Iterable[str], total: int) -> list[str]:
        parts = [n.split(".") for n in names]
        counts = Counter(".".join(p[:d]) + "." for p in parts for d in (1, 2, 3) if d < len(p))
        return ["", *(p for p, count in counts.items() if count >= total / 5)]

    def mapping(before: str, after: str) -> dict[str, str]:
        found = {}
        for name, stored in ours.items():
            moved = after + name[len(before) :] if name.startswith(before) else name
            if moved in theirs:
                found[stored] = theirs[moved]
        return found

    pairs = [
        (p, q)
        for p in prefixes(ours, len(ours))
        for q in prefixes(theirs, len(theirs))
        if p.startswith(q) or p.endswith(q) or q.startswith(p) or q.endswith(p)
    ]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))  # of equal ones, the shortest
    best = max(pairs, key=lambda pair: len(set(mapping(*pair).values())))
    return *best, mapping(*best)


def is_head(name: str, base: Checkpoint) -> bool:
    """Whether this base tensor belongs to a task head, so that experts may differ in its shape.

    In transformers a head is a top-level sibling of the backbone (`classifier.` beside `bert.`).
    So: some first segment holds more than half of the base's parameters, this tensor is outside of
    it, and it is not the output embedding (a row per token), which is a head only by name. A base
    saved without its wrapper (`encoder.`, `embeddings.`) has no heads.
    """
    sizes: Counter[str] = Counter()
    for each in base.names():
        sizes[each.split(".")[0]] += max(1, torch.Size(base.info(each).shape).numel())
    body, size = max(sizes.items(), key=lambda item: item[1], default=("", 0))
    first = name.split(".")[0]
    inside = {body, first} & _INSIDE or first.endswith("_model") or first == body
    if inside or 2 * size <= sum(sizes.values()) or _OUTPUT.search(name):
        return False
    return not base.vocabularies() & set(base.info(name).shape[:1])


# ------------------------------------------------------------------------------------ experts


@dataclass(frozen=True)
class Entry:
    """One tensor of an expert: its own name and header, how to read it, its factors if known."""

    own: str
    info: TensorInfo
    read: Callable[[], Tensor]
    vector: Callable[[], LowRank | Unchanged | None] = lambda: None
    stored: tuple[str, ...] = ()
    """Names in the expert's own files of what `read` needs from there."""


class Expert:
    """One fine-tuned model, full or adapter, under the base's tensor names.

    `folder` is where it is on this disk, an adapter's own for `base+adapter`. `config` is the
    expert's own config.json (an adapter has none: the base's). `prefix` stands before the base's
    names in the expert ("bert."), `base_prefix` the other way round; "" if the names are equal.
    `tied` maps a second name of a tensor to the base name it is read from. `notes` are plain
    sentences about what a person should know. `adapter_config` is None for full checkpoints.
    """

    def __init__(
        self,
        name: str,
        reference: str,
        folder: Path,
        base: Checkpoint,
        files: TensorFiles,
        entries: dict[str, Entry],
        heads: dict[str, Entry],
        *,
        config: dict[str, Any],
        prefixes: tuple[str, str] = ("", ""),
        tied: dict[str, str] | None = None,
        notes: list[str] | None = None,
        adapter_config: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.reference, self.folder, self.config = name, reference, folder, config
        self.base_prefix, self.prefix = prefixes
        self.tied, self.notes = tied or {}, notes or []
        self.adapter_config, self.is_adapter = adapter_config, adapter_config is not None
        self._files = files
        # A head that the base has too, in another shape: its whole module goes, weight and bias.
        other = {n for n, e in entries.items() if e.info.shape != base.info(n).shape}
        modules = {n.split(".")[0] for n in other if is_head(n, base)}
        moved = {n for n in entries if n.split(".")[0] in modules}
        self._heads = heads | {entries[n].own: entries[n] for n in moved}
        self._entries = {n: e for n, e in entries.items() if n not in moved}
        self._missing = sorted(n for n in base.names() if n not in entries)

    def names(self) -> list[str]:
        """The base's names of the tensors it has, sorted; tied ones included."""
        return sorted(self._entries)

    def head_names(self) -> list[str]:
        """Tensors without a counterpart in the base, under the expert's own names, sorted."""
        return sorted(self._heads)

    def missing(self) -> list[str]:
        """Base tensors that it lacks, of any dtype (not those it has as a head), sorted."""
        return self._missing

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of what `read` gives. Raises `MissingTensor`."""
        return self._entry(name).info

    def read(self, name: str) -> Tensor:
        """The full tensor W_t, by base name or head name. Raises `MissingTensor`.

        As stored; where an adapter adds something: base plus delta, computed and given in float32.
        """
        return self._entry(name).read()

    def task_vector(self, name: str) -> LowRank | Unchanged | None:
        """`W_t - W_0` where it is known without a subtraction.

        `UNCHANGED` if an adapter leaves the tensor alone, factors if it changes it by LoRA only,
        None where only the dense difference is known: full checkpoints, `modules_to_save`, biases,
        heads. Raises `MissingTensor`.
        """
        return self._entry(name).vector()

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same bits. Reads nothing for names of one tensor."""
        x, y = self._entry(one), self._entry(other)
        return x is y or (x.info == y.info and same_bits(x.read(), y.read()))

    def prefetch(self, name: str) -> None:
        """Ask the kernel to read ahead what `read` needs of the expert's own files.

        Not the base's weight under an adapter: that is `base.prefetch`. Returns at once and never
        fails.
        """
        with contextlib.suppress(MissingTensor):
            self._files.prefetch(self._entry(name).stored)

    def check(self, name: str) -> None:
        """Raise `CorruptCheckpoint` if the tensor's own file was changed since it was opened."""
        self._files.check(self._entry(name).stored)

    def identity(self) -> dict[str, list[int]]:
        """{file name: [bytes, time of writing in ns]} of its weights, index and config, at opening.

        An adapter's own files; the base has an identity of its own.
        """
        return self._files.identity()

    def close(self) -> None:
        """Let go of the expert's files (the base stays open). A later `read` opens them again."""
        self._files.close()

    def _entry(self, name: str) -> Entry:
        for key in (name, self.tied.get(name)):
            if key in self._entries:
                return self._entries[key]
        if name in self._heads:
            return self._heads[name]
        todo = "`names()`, `head_names()` and `missing()` list what there is."
        came = f"{len(self._entries)} others ({some(self._entries)})"
        raise MissingTensor(explain(f"expert '{self.name}'", f"tensor {name}", came, todo))


def _open_full(name: str, reference: str, folder: Path, base: Checkpoint) -> Expert:
    """A full checkpoint as an expert: names aligned, ties found, heads told from buffers."""
    own = Checkpoint.open(str(folder))
    floats = base.floats()
    before, after, found = align(base.names(), own.names())
    matched = sum(n in found for n in floats)
    if 2 * matched < len(floats) or not matched:
        expected = f"the base's names, e.g. {some(floats)}"
        came = f"{some(own.floats())} ({matched} of {len(floats)} match)"
        todo = "This is a checkpoint of another architecture or of another base: check both paths."
        raise CheckpointError(explain(f"expert '{name}'", expected, came, todo))

    def entry(stored: str) -> Entry:
        return Entry(stored, own.info(stored), lambda: own.read(stored), stored=(stored,))

    entries = {n: entry(stored) for n, stored in found.items()}
    tied, heads, buffers = {}, {}, []
    rows = own.vocabularies() if own.ties() else set()
    for extra in sorted(set(own.names()) - set(found.values())):
        shape = own.info(extra).shape
        twins = (n for n, stored in found.items() if own.same(stored, extra))
        if shape and shape[0] in rows and (twin := next(twins, None)):
            tied[extra] = twin
        elif own.info(extra).dtype.is_floating_point and not _BUFFERS.search(extra):
            heads[extra] = entry(extra)
        else:
            buffers.append(extra)
    notes = [f"Left out: buffers that the base does not have ({some(buffers)})."] if buffers else []
    rows = base.vocabularies() if base.ties() else set()
    for lost in sorted(set(floats) - set(found)):
        shape = base.info(lost).shape
        twins = (n for n in found if base.same(n, lost))
        if shape and shape[0] in rows and (twin := next(twins, None)):
            tied[lost], entries[lost] = twin, entries[twin]
    prefixes, config = (before, after), own.config
    shared: dict[str, Any] = dict(config=config, prefixes=prefixes, tied=tied, notes=notes)
    return Expert(name, reference, folder, base, own.files, entries, heads, **shared)


def open_expert(name: str, reference: str, base: Checkpoint) -> Expert:
    """Open a fine-tuned model of `base`: a full checkpoint, an adapter, or `base+adapter`.

    Each part is a local folder (which always wins) or a hub id, `org/name@revision`. Reads headers,
    and data only where tied tensors have to be compared. Shapes are not compared here, except an
    adapter's: see `check_shapes`. Raises `CheckpointError` and its kinds.
    """
    # Here, not above: adapter.py builds on this module.
    from twinmerge.adapter import open_adapter

    parts = _split(reference)
    if parts and parts[0] != base.reference:
        if resolve(parts[0]).resolve() != base.folder.resolve():
            expected, came = f"the recipe's base '{base.reference}'", f"'{parts[0]}' before the +"
            todo = "The adapter's base is not the recipe's base: write the same one in both places."
            raise CheckpointError(explain(f"expert '{name}'", expected, came, todo))
    folder = resolve(parts[1] if parts else reference)
    weights = any(folder.glob("adapter_model.*")) or not (folder / "config.json").is_file()
    if parts or ((folder / "adapter_config.json").is_file() and weights):
        return open_adapter(name, reference, folder, base)
    return _open_full(name, reference, folder, base)


def check_shapes(base: Checkpoint, expert: Expert) -> None:
    """Raises `ShapeMismatch` for the first shared tensor whose shape is not the base's."""
    for name in expert.names():
        want, came = base.info(name).shape, expert.info(name).shape
        if want == came:
            continue
        message = f"{name}: base has shape {want}, expert '{expert.name}' has {came}.\n  "
        table = len(want) == len(came) == 2 and want[1] == came[1] and EMBEDDING.search(name)
        if table and "position" not in name and came[0] > want[0]:
            message += f"The expert grew its vocabulary by {came[0] - want[0]}. Resize the base to "
            message += f"{came[0]} rows first, or leave `{expert.name}` out."
        elif table and "position" not in name:
            message += f"The expert's vocabulary is smaller by {want[0] - came[0]}. Resize the "
            message += f"expert to {want[0]} rows first, or leave `{expert.name}` out."
        else:
            message += f"It was tuned from another base: check both, or leave `{expert.name}` out."
        raise ShapeMismatch(message)
