"""The router: what it reads of an input, and what follows from it.

    features -> logits -> probabilities = softmax(logits / temperature)
             -> weights = probabilities ^ sharpness, scaled to sum 1
                          · exp(threshold - score) for what is new, its score being higher

An input that is unlike all experts' data gets the less of them the more unlike it is, down to the
shared expert alone. Its probabilities still say whose head comes nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...artifact.format import layers_said
from .calibration import Sharpness, sharpened
from .encoder import TextEncoder
from .features import Features, Key, Pooling, keys
from .novelty import Novelty

if TYPE_CHECKING:
    from ..model import TwinModel

Kind = Literal["none", "projection", "prompts", "prototype", "linear", "mlp"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Routed:
    """What a router says of a batch; all float32."""

    weights: Float[Tensor, "batch expert"]
    """How much of each expert to add; rows sum to 1, or to less where `new` is true."""
    probabilities: Float[Tensor, "batch expert"]
    """Calibrated: of the rows that are given 0.8, about 80 % are that expert's."""
    novelty: Float[Tensor, " batch"]
    """How unlike all experts' data; 0 where the router does not look."""
    new: Bool[Tensor, " batch"]
    """Whether that is above the router's threshold."""

    @property
    def confidence(self) -> Float[Tensor, " batch"]:
        return self.probabilities.amax(dim=-1)


class Router(nn.Module):
    """Features -> `Routed`.

    layers:  what the scorer reads, in this order: layers of hidden states; blocks (projection); 0
             (an encoder of its own); nothing
    pooling: of hidden states over tokens
    """

    def __init__(
        self,
        scorer: nn.Module,
        layers: tuple[int, ...] = (),
        *,
        kind: Kind = "mlp",
        pooling: Pooling = "mean",
        encoder: TextEncoder | None = None,
        temperature: float = 1.0,
        sharpness: Sharpness = 1.0,
        novelty: Novelty | None = None,
    ) -> None:
        super().__init__()
        self.scorer, self.encoder, self.novelty = scorer, encoder, novelty
        self.layers, self.temperature = tuple(layers), temperature
        self.kind: Kind = kind
        self.pooling: Pooling = pooling
        self.sharpness: Sharpness = sharpness

    @property
    def keys(self) -> tuple[Key, ...]:
        """What the scorer reads."""
        return keys(self.layers, self.pooling)

    @property
    def wanted(self) -> tuple[Key, ...]:
        """All that is read: by the scorer and to tell new inputs."""
        more = () if self.novelty is None else self.novelty.keys
        return tuple(dict.fromkeys((*self.keys, *more)))

    @property
    def last(self) -> int:
        """The last layer that is read; -1 if none is."""
        return max((layer for layer, _ in self.wanted), default=-1)

    @property
    def said(self) -> str:
        """What it is and what it reads, in words."""
        if self.kind == "none":
            return "the same weights for every input"
        what = "an encoder of its own" if self.encoder is not None else layers_said(self.layers)
        return f"{self.kind}, reads {what}"

    @property
    def reads_hidden_states(self) -> bool:
        """Whether its features come by on the way of any forward."""
        return self.encoder is None and self.kind not in ("none", "projection")

    def read(self, twin: TwinModel, inputs: Mapping[str, Any]) -> Features:
        """The features of a batch, under the shared expert."""
        from ..arguments import batch_size

        if self.kind == "none":
            return {(0, "mean"): torch.zeros(batch_size(inputs), 0, device=twin.device)}
        if self.encoder is not None:
            return {(0, self.pooling): self.encoder.read(inputs)}
        if self.kind == "projection":
            return twin.energies.read(inputs, self.layers)
        return twin.features.read(inputs, self.wanted)

    def forward(
        self, features: Features, allowed: Bool[Tensor, "batch expert"] | None = None
    ) -> Routed:
        """allowed: the experts that each row may be given to; None: all."""
        logits = self.logits(features)
        if allowed is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), float("-inf"))
        probabilities = (logits / self.temperature).softmax(dim=-1)
        weights = sharpened(probabilities, self.sharpness)
        score = torch.zeros_like(weights[:, 0])
        new = torch.zeros_like(score, dtype=torch.bool)
        if self.novelty is not None:
            score = self.novelty(features)
            new = self.novelty.is_new(score)
            weights = weights * (self.novelty.threshold - score).clamp(max=0).exp()[:, None]
        return Routed(weights, probabilities, score, new)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves it; but it stays in float32 when the model around it is cast to half precision."""

        def move(tensor: Tensor) -> Tensor:
            done = fn(tensor)
            return done if done.dtype == tensor.dtype else tensor.to(done.device)

        return super()._apply(move, recurse)

    def as_recorded(self) -> dict[str, Any]:
        """What a `RouterRecord` says of it that may be set after a fit."""
        scorer: Any = self.scorer
        return {
            "kind": self.kind,
            "layers": self.layers,
            "pooling": self.pooling,
            "width": scorer.width,
            "hidden": getattr(scorer, "hidden", None),
            "temperature": self.temperature,
            "sharpness": self.sharpness,
        }

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored: the scorer's, and the novelty's behind `novelty.`; no encoder's.

        Of symmetric matrices the lower triangle, row by row.
        """
        found = dict(self.scorer.state_dict())
        if self.novelty is not None:
            own = self.novelty.state_dict()
            found |= {f"novelty.{_short(name)}": tensor for name, tensor in own.items()}
        found = {name: tensor.detach().cpu() for name, tensor in found.items()}
        return {
            name: (_triangle(tensor) if _symmetric(name) else tensor).contiguous()
            for name, tensor in found.items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The other way. Raises `KeyError` or `RuntimeError` for tensors that do not fit."""
        tensors = {n: _square(t) if _symmetric(n) else t for n, t in tensors.items()}
        of_novelty = {n: t for n, t in tensors.items() if n.startswith("novelty.")}
        self.scorer.load_state_dict({n: t for n, t in tensors.items() if n not in of_novelty})
        if self.novelty is not None:
            names = self.novelty.state_dict()
            self.novelty.load_state_dict(
                {name: of_novelty[f"novelty.{_short(name)}"] for name in names}
            )

    def logits(self, features: Features) -> Float[Tensor, "batch expert"]:
        return self.scorer(joined(features, self.keys))


def joined(features: Features, wanted: Sequence[Key]) -> Float[Tensor, "batch joined"]:
    """These features side by side; the only ones there are if none is named."""
    found = [features[key] for key in wanted] if wanted else list(features.values())
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _short(name: str) -> str:
    """`0.means` of `distances.0.means`."""
    return name.removeprefix("distances.")


def _symmetric(name: str) -> bool:
    return name == "precision" or (name.startswith("novelty.") and name.endswith(("near", "far")))


def _triangle(matrix: Float[Tensor, "n n"]) -> Float[Tensor, " packed"]:
    rows, columns = torch.tril_indices(*matrix.shape)
    return matrix[rows, columns]


def _square(packed: Float[Tensor, " packed"]) -> Float[Tensor, "n n"]:
    n = round(((8 * len(packed) + 1) ** 0.5 - 1) / 2)
    matrix = packed.new_zeros(n, n)
    rows, columns = torch.tril_indices(n, n)
    matrix[rows, columns] = packed
    matrix[columns, rows] = packed
    return matrix
