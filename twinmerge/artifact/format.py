"""The manifest: what an artifact holds, tensor by tensor, and how to know that it is whole.

`docs/format.md` describes the folder; this module is its schema. Version 3; manifests of versions 1
and 2 are read as what they amount to in version 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ..errors import CorruptArtifact, UnsupportedFormat

FORMAT_VERSION = 3
_READ = (1, 2, FORMAT_VERSION)
MANIFEST = "manifest.json"
ROUTER = "router.safetensors"
RECIPE = "recipe.yaml"
EXAMPLES = "router-examples.json"
"""Rows that the router was fitted on, by expert, as `data.text_of` reads them."""

# Suffixes of tensor names inside experts/<name>.safetensors
A, B, DELTA, HEAD = ".a", ".b", ".delta", ".head"
Q, SCALE = ".q", ".scale"  # behind .a and .b
VALUES, MASK, INDEX = ".values", ".mask", ".index"

Kind = Literal["matrix", "vector", "head", "buffer", "base_only", "tied"]
Storage = Literal["factors", "int8", "int4", "mask", "index", "whole"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """One file: size in bytes and SHA-256 of its content."""

    bytes: int
    sha256: str


class Share(_Record):
    """What one expert keeps of one tensor."""

    rank: int | None = None
    """Rank of the factors; None where there are none (vectors, heads, sparse parts)."""
    storage: Storage
    """Float factors, quantised factors, entries under a mask or an index, or the whole tensor.
    Version 1 knows factors and whole tensors, and does not write it: the rank tells."""
    entries: int | None = None
    """Entries kept of a sparse part; None of everything else."""
    bytes: int
    error: float
    """‖D - kept‖ / ‖D‖, D = expert minus shared, Frobenius; 0 where nothing is lost."""
    truncation: float | None = None
    """The same before the factors were rounded to how they are stored; None where not measured."""
    bound: float | None = None
    """The least error that this rank allows (Eckart-Young); None where it is not known."""

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, data: Any) -> Any:
        if isinstance(data, dict) and "storage" not in data:
            return {**data, "storage": "whole" if data.get("rank") is None else "factors"}
        return data

    @property
    def empty(self) -> bool:
        """Whether nothing is stored: this expert adds nothing to the tensor."""
        return self.rank == 0 or self.entries == 0


class TensorRecord(_Record):
    """One tensor of the base, or of the experts' heads."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    """As stored in the shared expert ('float32', ...); of a head: the dtype that holds all
    experts' heads without loss."""
    bytes: int
    """In the shared expert; 0 for heads and for the second name of a tied tensor."""
    matrix: tuple[int, int] | None = None
    """The (out, in) view under which a matrix was factored."""
    tied_to: str | None = None
    experts: dict[str, Share] = {}
    """By expert. Empty where the experts do not differ from the shared expert."""


class ExpertRecord(_Record):
    """One expert: where it came from, and what its head is called."""

    name: str
    reference: str
    adapter: bool
    config: dict[str, Any] = {}
    """What its config.json says otherwise than the base's: labels, problem type, ..."""
    outputs: int | None = None
    """Outputs of its head (1: a regression); None without a head of its own."""
    drift: float
    """‖W_t - W_0‖ / ‖W_0‖ over all matrices."""
    bytes: int
    """Of its file: factors, vectors and head."""


class Tried(_Record):
    """One router that was compared, on rows that neither trained nor calibrated it."""

    kind: str
    layers: tuple[int, ...]
    pooling: str = "mean"
    accuracy: float
    """Share of the held-out rows that go to their own expert."""
    loss: float | None = None
    """Mean -log of the probability of the own expert, calibrated. None where not measured."""


class NoveltyRecord(_Record):
    """How inputs that are unlike all experts' data are told."""

    layers: tuple[int, ...]
    """Whose features are looked at."""
    pooling: Literal["mean", "first", "last"]
    """What is taken over the tokens there."""
    coverage: float
    """Share of calibration rows that stay below the threshold."""
    threshold: float
    noticed: dict[str, float]
    """By expert: the share of its rows that is noticed if the router does not know it, at the
    threshold of the same coverage. Empty with two experts or fewer."""


class RouterRecord(_Record):
    """How the router was fitted, and how well it does on rows held out from its own data."""

    kind: Literal["none", "projection", "prompts", "prototype", "linear", "mlp"]
    layers: tuple[int, ...]
    """Features are hidden states after this many blocks, side by side; 0 is the embeddings."""
    pooling: Literal["mean", "first", "last"] = "mean"
    """What is taken over the tokens."""
    encoder: str | None = None
    """Where an encoder of the router's own came from; it is in `router-encoder`."""
    width: int
    """Of the features, all layers together."""
    hidden: int | None = None
    """Of an mlp's hidden layers."""
    experts: tuple[str, ...]
    shared_sha256: dict[str, str]
    """Digests of the shared expert's files that the features came from."""
    temperature: float = 1.0
    sharpness: float | Literal["top"] = 1.0
    novelty: NoveltyRecord | None = None
    """None: every input is given to the experts, however odd."""
    rows: dict[str, int]
    """Rows per expert that the router was fitted on."""
    refitted: bool = False
    """Whether what is stored has also learnt from the held-out rows, which chose it."""
    calibration_rows: int = 0
    held_out_rows: int
    held_out_accuracy: float | None
    """None where no rows were held out."""
    calibration_error: float | None = None
    """Expected calibration error on the held-out rows."""
    uncalibrated_error: float | None = None
    """The same at temperature 1."""
    confusion: dict[str, dict[str, int]]
    """Held-out rows: true expert -> chosen expert -> count."""
    tried: tuple[Tried, ...] = ()
    reason: str = ""
    """Why this one of those tried."""
    warnings: tuple[str, ...] = ()
    """What is odd about the rows that it was fitted on."""
    epoch: int | None = None
    """Of an mlp: the one that is kept."""
    seed: int
    max_tokens: int | None
    """Texts that it was fitted on were cut to this many tokens."""
    bytes: int

    @property
    def said(self) -> str:
        """What it is and what it reads, in words."""
        if self.kind == "none":
            return "the same weights for every input"
        if self.encoder is not None:
            return f"{self.kind}, reads an encoder of its own"
        return f"{self.kind}, reads {layers_said(self.layers)}"

    @model_validator(mode="before")
    @classmethod
    def _of_version_2(cls, data: Any) -> Any:
        if not (isinstance(data, dict) and "layer" in data):
            return data
        data = dict(data)
        data["layers"] = [data.pop("layer")]
        data["tried"] = [
            {"kind": "mlp", "layers": [int(layer)], "accuracy": accuracy}
            for layer, accuracy in data.pop("accuracy_by_layer", {}).items()
        ]
        return data


def layers_said(layers: Sequence[int]) -> str:
    """`layer 3`, `layers 0, 2, 4`."""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


class BudgetRecord(_Record):
    """How a budget of bytes was spent over all matrices of all experts."""

    bytes: int
    """Asked for, all experts' files together."""
    spent: int
    """Of these: factors, vectors, heads and file headers."""
    error: float
    """√(Σ ‖D - kept‖² / Σ ‖D‖²) over all matrices of all experts."""
    even_error: float
    """The same if the same bytes are spent on one rank for all matrices."""
    even_rank: int
    """That rank (the median, where the rest of the bytes pays for one more in some)."""
    at_reach: int
    """Matrices that might have been given more rank than was computed for them."""


class Manifest(_Record):
    """Everything that a reader needs to know before it opens a weight file."""

    format_version: int
    recipe: dict[str, Any]
    base: str
    model_class: str
    """Class of the task model in transformers, e.g. 'BertForSequenceClassification'."""
    experts: tuple[ExpertRecord, ...]
    tensors: tuple[TensorRecord, ...]
    files: dict[str, FileRecord]
    budget: BudgetRecord | None = None
    """None where the recipe gives no budget."""
    router: RouterRecord | None = None
    warnings: tuple[str, ...] = ()
    versions: dict[str, str]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in the order of the columns of all weights."""
        return tuple(expert.name for expert in self.experts)

    def shared_files(self) -> dict[str, str]:
        """Digests of the shared expert's weight files."""
        return {
            name: record.sha256
            for name, record in self.files.items()
            if name.endswith(".safetensors") and "/" not in name and name != ROUTER
        }


def expert_file(name: str) -> str:
    return f"experts/{name}.safetensors"


def parse_manifest(text: str, folder: Path) -> Manifest:
    """Read a manifest. Raises `UnsupportedFormat` or `CorruptArtifact`, naming the folder."""
    import json

    try:
        data = json.loads(text)
    except ValueError as problem:
        raise CorruptArtifact(
            f"{folder / MANIFEST}: expected JSON, but {problem}. Build the artifact again."
        ) from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version not in _READ:
        raise UnsupportedFormat(
            f"{folder / MANIFEST}: format version {version!r}; this release of twinmerge reads "
            f"versions {_READ[0]} to {_READ[-1]}. Upgrade twinmerge, or build the artifact "
            "again."
        )
    try:
        # What is written back (by fit-router) is of the version whose fields it has.
        return Manifest.model_validate(data | {"format_version": FORMAT_VERSION})
    except ValidationError as problem:
        where = ".".join(str(part) for part in problem.errors()[0]["loc"])
        raise CorruptArtifact(
            f"{folder / MANIFEST}: {where}: {problem.errors()[0]['msg']}. The manifest was changed "
            "by hand or cut short; build the artifact again."
        ) from None
