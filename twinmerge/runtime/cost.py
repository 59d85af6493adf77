r"""What a forward costs, in multiply-adds, from shapes alone.

A matrix (out, in) that n tokens go through costs n · out · in multiply-adds, attention over n
tokens 2 · n² · (heads · head size) beside its projections: scores, and their product with the
values. Looking up a row of a table costs nothing, and what is done entry by entry (norms,
activations, biases, softmax, positions) is not counted. Scores are counted whole, as they are
computed, whether or not a mask hides half of them. Not counted either: the extra products of
relative positions (DeBERTa).

One multiply-add is what is called two floating point operations (FLOPs) elsewhere. A memory-bound
forward (one token at a time, tiny batches) takes the time of its bytes, not of its products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, UnsupportedModel
from .heads import HeadSwitch
from .router.features import find_blocks

if TYPE_CHECKING:
    from .model import TwinModel

_ONE_ANSWER = ("SequenceClassification", "ImageClassification", "MultipleChoice")


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one row of a batch through the parts of a model, in the order they run."""

    embedding: int
    """What comes before the first block: projections of embeddings or image patches."""
    blocks: tuple[int, ...]
    head: int
    """All that comes after the last block, of an encoder-decoder the whole decoder."""

    @property
    def total(self) -> int:
        return self.embedding + sum(self.blocks) + self.head

    def until(self, layer: int) -> int:
        """Of a forward that ends at this router layer: the embedding and `layer` blocks."""
        return self.embedding + sum(self.blocks[:layer])


def forward_cost(model: nn.Module, tokens: int) -> Cost:
    """One forward of a plain model, or of the shared expert in a `TwinModel`, on `tokens` tokens.

    An image has as many tokens as its patches and its class token. A decoder beside an encoder is
    taken to have as many tokens. Raises `UnsupportedModel` for convolutional models, whose number
    of positions changes on the way, for two towers, and where there is no list of blocks.
    """
    blocks, *more = find_blocks(model)
    if more:
        raise UnsupportedModel(
            f"{type(model).__name__}: has towers of their own for text and images. Ask for the "
            "cost of each."
        )
    config: Any = model.config
    text = _text_config(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    first = id(blocks[0])
    before, after, passed = 0, 0, False
    attention = 2 * tokens * tokens * _attention_width(text)
    for path, module in model.named_modules():
        passed = passed or id(module) == first
        if id(module) in inside:
            continue
        count = _own_cost(module, path, tokens, text)
        if isinstance(module, HeadSwitch):  # a row goes through one of them
            costs = (
                sum(_own_cost(m, path, tokens, text) for m in h.modules()) for h in module.heads
            )
            count = max(costs)
            inside |= {id(each) for each in module.modules()}
        if passed:
            after += count // tokens if _sees_one_token(model, path) else count
        else:
            before += count
    per_block = tuple(
        attention + sum(_own_cost(m, path, tokens, text) for path, m in block.named_modules())
        for block in blocks
    )
    if getattr(config, "is_encoder_decoder", False):
        decoder = getattr(text, "num_decoder_layers", None) or getattr(text, "decoder_layers", 0)
        after += 2 * decoder * attention  # to itself and to what was encoded
    return Cost(before, per_block, after)


def routing_share(model: nn.Module, layer: int, tokens: int) -> float:
    """Predicted share of a plain forward that a pass of its own for routing at `layer` costs.

    The embedding and `layer` of the model's blocks, without its head; the router itself, three
    small products a row, is not counted.
    """
    cost = forward_cost(model, tokens)
    if not 0 <= layer <= len(cost.blocks):
        raise InputError(
            f"router layer {layer}: this model has layers 0 (the embeddings) to {len(cost.blocks)}."
        )
    return cost.until(layer) / cost.total


def _own_cost(module: nn.Module, path: str, tokens: int, config: Any) -> int:
    """Of the parameters that the module itself holds."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.stride != module.kernel_size:
            raise UnsupportedModel(
                f"{path}: a convolution that is no embedding of patches; how often it is applied "
                "does not follow from its shape. Count with torch.utils.flop_counter instead."
            )
        return tokens * module.weight.numel()
    if isinstance(module, nn.Linear | Conv1D):
        return tokens * module.weight.numel()
    if isinstance(module, nn.Embedding):
        return 0
    own = dict(module.named_parameters(recurse=False))
    if "weight" in own and own["weight"].ndim == 2:  # a mixture's gate
        return tokens * own["weight"].numel()
    # Weights of a mixture's experts, held as one (expert, out, in): each token sees a few of them.
    fused = sum(p.numel() for p in own.values() if p.ndim == 3 and len(p) > 1)
    if not fused:
        return 0
    mixture = _mixture(config)
    return 0 if mixture is None else tokens * fused * mixture[0] // mixture[1]


def _attention_width(config: Any) -> int:
    """Heads times head size."""
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    width = getattr(config, "hidden_size", 0)
    return heads * size if heads and size else width


def _sees_one_token(model: nn.Module, path: str) -> bool:
    """Whether a matrix after the blocks is applied to one token of a row: poolers, classifiers."""
    if any(word in path for word in ("pool", "projection")):
        return True
    if not any(word in type(model).__name__ for word in _ONE_ANSWER):
        return False
    if getattr(model.config, "is_encoder_decoder", False):
        return "classif" in path
    return path != "score"  # decoders that classify score every token, then pick one


@dataclass(frozen=True)
class PlanCosts:
    """Multiply-adds per token in the matrices that differ between experts, by the way they run."""

    plain: int
    """The shared expert alone."""
    stacked: int
    """Factors of all experts, stacked along the rank: plain + Σ_t r_t (in + out)."""
    selected: int
    """Each row's own experts, filled up to the largest rank: plain + k · max_t r_t (in + out)."""
    merged: int
    """Densely merged: the same as plain, once `merging` is paid."""
    merging: int
    """Once for each weighting, whatever the number of tokens: Σ_t r_t · in · out."""

    @property
    def break_even(self) -> float:
        """Tokens of one weighting from which merging it is cheaper than stacking.

        About in · out / (in + out): the ranks cancel out.
        """
        more = self.stacked - self.merged
        return self.merging / more if more else float("inf")


def plan_costs(twin: TwinModel, active: int = 1) -> PlanCosts:
    """What the ways to run a batch cost, from the ranks in the manifest.

    active: experts with a weight in each row, for `selected`

    A table of embeddings costs nothing to look up, its factors rank · width. Sparse parts
    count as the whole matrices that they are written out to.
    """
    if not 1 <= active <= len(twin.experts):
        raise InputError(f"active={active}: expected 1 to {len(twin.experts)} experts.")
    plain = stacked = selected = merging = 0
    for use in _uses(twin):
        out, in_ = use.shape
        whole = 0 if use.table else out * in_ * use.part // use.of
        each = [rank * (in_ if use.table else in_ + out) * use.part // use.of for rank in use.ranks]
        plain += whole
        stacked += whole + sum(each)
        selected += whole + min(active * max(each), sum(each))
        merging += sum(rank * out * in_ for rank in use.ranks)
    return PlanCosts(plain, stacked, selected, plain, merging)


@dataclass(frozen=True)
class _Use:
    """One module that a matrix is used by."""

    shape: tuple[int, int]
    ranks: list[int]
    table: bool
    """Whether it is looked up in, not multiplied by."""
    part: int
    of: int
    """How many of a mixture's experts each token runs through, and how many there are."""


def _uses(twin: TwinModel) -> Iterator[_Use]:
    from .load import body_places  # which makes the model that asks for costs

    found = body_places(twin.model, twin.manifest)  # type: ignore[arg-type]
    parameters = dict(twin.model.named_parameters(remove_duplicate=False))
    users: dict[int, list[nn.Module]] = {}
    for module in twin.model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    mixture = _mixture(_text_config(twin.model))
    for record in twin.manifest.tensors:
        place = found.get(record.name)
        if record.matrix is None or not record.experts or place is None:
            continue
        if place.parameter not in parameters:
            continue  # a buffer, which nothing is multiplied by
        whole = min(record.matrix)  # what a sparse part is written out to has no lower rank
        ranks = [whole if each.rank is None else each.rank for each in record.experts.values()]
        part, of = mixture if place.index and mixture else (1, 1)
        for module in users[id(parameters[place.parameter])]:  # a tied one has several
            table = isinstance(getattr(module, "inner", module), nn.Embedding)
            yield _Use(record.matrix, ranks, table, part, of)


def _mixture(config: Any) -> tuple[int, int] | None:
    """How many experts of a mixture each token runs through, and how many there are."""
    counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts"))
    experts = next((count for count in counts if count), None)
    used = getattr(config, "num_experts_per_tok", None)
    return None if experts is None or used is None else (used, experts)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
