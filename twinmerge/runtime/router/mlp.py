"""The paper's router: three linear layers with BatchNorm and LeakyReLU (appendix D.1)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class RouterMLP(nn.Module):
    """Features (batch, width) -> logits (batch, expert), float32.

    Source: Twin-Merging, arXiv:2406.15479, appendix D.1: "a three-layer linear network with Leaky
    ReLU activations and batch normalization". Dropout between the layers is the reference code's.
    """

    def __init__(self, width: int, hidden: int, experts: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.width, self.hidden, self.experts = width, hidden, experts
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, experts),
        )

    def forward(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch expert"]:
        return self.layers(features)
