"""What turns features into logits: one class for each kind of router.

| kind | from | needs |
| --- | --- | --- |
| none | nothing: one weighting for every input | weights, or none for even ones |
| projection | activations in the experts' right singular spaces | no data |
| prompts, prototype | distances to the experts' means under a shared covariance | lines; rows |
| linear | multinomial logistic regression | rows |
| mlp | the paper's network (`mlp`) | rows |

All take features (batch, width) in float32 and give logits (batch, expert).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .mlp import RouterMLP
from .statistics import precision, statistics


class Scorer(nn.Module):
    """Features -> logits."""

    width: int
    experts: int


NOTHING = -1e4
"""Logit of a weight of zero: not -inf, so that an expert without weight is chosen where `allowed=`
leaves no other."""


class Fixed(Scorer):
    """The same logits for every input; features have no width."""

    logits: Tensor

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.width, self.experts = 0, experts
        self.register_buffer("logits", torch.zeros(experts))

    def forward(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch expert"]:
        return self.logits.expand(len(features), -1)


class Projection(Scorer):
    """Shares of activations in the experts' spaces (batch, block · expert) -> logits.

    A share is compared with what made-up inputs gave there: mean and spread over these are part of
    the router. The logit is the mean over blocks.
    """

    usual: Tensor
    spread: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.width, self.experts = width, experts
        self.register_buffer("usual", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def forward(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch expert"]:
        z = (features - self.usual) / self.spread
        return z.view(len(z), -1, self.experts).mean(dim=1)


class Prototype(Scorer):
    """log N(x; m_t, Σ) of every expert, up to what all have in common.

    Linear discriminant analysis with even priors: `m_tᵀ Σ⁻¹ x - ½ m_tᵀ Σ⁻¹ m_t`, around the mean. A
    mean of n rows is off by a squared distance of about width / n, which would count against
    experts of few rows: half of it is added.
    """

    means: Tensor
    mean: Tensor
    precision: Tensor
    counts: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.width, self.experts = width, experts
        self.register_buffer("means", torch.zeros(experts, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("precision", torch.zeros(width, width))
        self.register_buffer("counts", torch.ones(experts))

    @staticmethod
    def fitted(
        features: Float[Tensor, "row width"], truth: Int[Tensor, " row"], experts: int
    ) -> Prototype:
        found = statistics(features, truth, experts)
        prototype = Prototype(features.shape[1], experts)
        prototype.means.copy_(found.means)
        prototype.mean.copy_(found.mean)
        prototype.precision.copy_(precision(found.within))
        prototype.counts.copy_(found.counts)
        return prototype

    def forward(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch expert"]:
        means = self.means - self.mean
        weight = means @ self.precision
        squared = (weight * means).sum(dim=1) - self.width / self.counts
        return (features - self.mean) @ weight.T - 0.5 * squared


class Linear(Scorer):
    """Multinomial logistic regression: `W x + b`."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.width, self.experts = width, experts
        self.layer = nn.Linear(width, experts, device="meta")  # draws no random numbers
        self.layer.to_empty(device="cpu")
        for parameter in self.layer.parameters():
            nn.init.zeros_(parameter)

    @staticmethod
    def fitted(
        features: Float[Tensor, "row width"],
        truth: Int[Tensor, " row"],
        experts: int,
        strength: float,
    ) -> Linear:
        """strength: of the ridge, in units of rows (scikit-learn's 1 / C), on scaled features."""
        from sklearn.linear_model import LogisticRegression

        linear = Linear(features.shape[1], experts)
        if experts == 1:
            return linear  # nothing to tell apart
        x = features.double()
        mean, spread = x.mean(dim=0), x.std(dim=0)
        spread = torch.where(spread > 0, spread, 1.0)
        model = LogisticRegression(C=1 / strength, max_iter=500)
        model.fit(((x - mean) / spread).numpy(), truth.numpy())
        weight = torch.from_numpy(model.coef_) / spread
        bias = torch.from_numpy(model.intercept_) - weight @ mean
        if experts == 2:  # scikit-learn gives the second one's odds alone
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        with torch.no_grad():
            linear.layer.weight.copy_(weight)
            linear.layer.bias.copy_(bias)
        return linear

    def forward(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch expert"]:
        return self.layer(features)


def empty(kind: str, width: int, experts: int, hidden: int | None = None) -> nn.Module:
    """A scorer of this kind to load tensors into."""
    if kind == "none":
        return Fixed(experts)
    if kind == "projection":
        return Projection(width, experts)
    if kind in ("prompts", "prototype"):
        return Prototype(width, experts)
    if kind == "linear":
        return Linear(width, experts)
    with torch.random.fork_rng(devices=[]):  # what it starts from is overwritten
        return RouterMLP(width, hidden or width, experts)
