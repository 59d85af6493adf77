"""Comparing routers on rows held out from the user's own, and choosing one.

The cheapest of those that the held-out rows cannot tell from the best: the one-standard-error rule
of Breiman et al. (Classification and Regression Trees, 1984), on the paired differences of the
calibrated loss; but none that seems worse by more than `WORSE`, which few rows would let pass.
Cheap is what reads an early layer (a smaller part of a forward), then the simpler kind, then fewer
features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ...artifact.format import Tried, layers_said
from ...recipe import Router as Settings
from .calibration import fit_temperature
from .mlp import RouterMLP
from .scorers import Linear, Prototype
from .statistics import check as check_features

LEARNT = ("prototype", "linear", "mlp")
"""Kinds that learn from rows, the simplest first."""
WIDEST = 3072
"""Of features of several layers that are tried unasked."""
MOST_LAYERS = 13
WORSE = 0.05
"""Of the mean loss, in nats: the right expert is given about 5 % less."""
FINALISTS = 3
"""Sets of layers on which the slower kinds are tried: the best with prototypes."""


@dataclass(frozen=True)
class Fitted:
    """How one router does on rows that it has not seen."""

    kind: str
    layers: tuple[int, ...]
    logits: Float[Tensor, "held expert"]
    scaled: Float[Tensor, "held expert"]
    """Logits over the temperature."""
    losses: Float[Tensor, " held"]
    accuracy: float
    epoch: int | None
    """Of an mlp: when to stop."""

    @property
    def cost(self) -> tuple[int, int, int]:
        return max(self.layers, default=-1), LEARNT.index(self.kind), len(self.layers)

    @property
    def tried(self) -> Tried:
        return Tried(
            kind=self.kind,
            layers=self.layers,
            accuracy=self.accuracy,
            loss=float(self.losses.mean()),
        )


def layer_sets(layers: int, width: int, asked: int | str | list[int]) -> list[tuple[int, ...]]:
    """What is tried: what was asked for; or every layer alone, and three at once up to each."""
    if asked != "auto":
        return [tuple(asked) if isinstance(asked, list) else (int(asked),)]
    step = max(1, -(-layers // (MOST_LAYERS - 1)))
    single = sorted({*range(0, layers + 1, step), layers})
    several = []
    if 3 * width <= WIDEST:
        several = [(0, single[place // 2], last) for place, last in enumerate(single) if place > 1]
    return [(layer,) for layer in single] + several


def compare(
    features: Mapping[int, Float[Tensor, "row width"]],
    truth: Int[Tensor, " row"],
    calibration: Int[Tensor, " calibration"],
    pairs: Sequence[tuple[Tensor, Tensor]],
    experts: int,
    sets: Sequence[tuple[int, ...]],
    settings: Settings,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Fitted], Fitted, str]:
    """All that were tried, the chosen one, and why.

    features: by layer
    pairs: rows to train on and rows to score, the latter in the order of `Fitted`'s
    """
    kinds = {"auto": LEARNT, "mlp": ("prototype", "mlp")}.get(settings.kind, (settings.kind,))
    if settings.kind == "mlp" and len(sets) <= FINALISTS:
        kinds = ("mlp",)
    tried: list[Fitted] = []
    chosen_sets = list(sets)
    total = len(sets) + (len(kinds) - 1) * min(FINALISTS, len(sets))
    for kind in kinds:
        for layers in chosen_sets:
            if progress:
                progress(len(tried), total)
            x = torch.cat([features[layer] for layer in layers], dim=1)
            tried.append(_fitted(kind, layers, x, truth, calibration, pairs, experts, settings))
        if kind == "prototype":
            best = sorted(tried, key=lambda each: float(each.losses.mean()))
            chosen_sets = [each.layers for each in best[:FINALISTS]]
    if progress:
        progress(total, total)
    if settings.kind == "mlp":  # where prototypes only said which layers to try
        tried = [each for each in tried if each.kind == "mlp"]
    chosen, reason = choose(tried)
    return tried, chosen, reason


def choose(tried: Sequence[Fitted]) -> tuple[Fitted, str]:
    """The cheapest whose loss is within one standard error of the best's, row by row."""
    best = min(tried, key=lambda each: float(each.losses.mean()))
    near = []
    for each in tried:
        worse = each.losses - best.losses
        error = float(worse.std()) / len(worse) ** 0.5 if len(worse) > 1 else 0.0
        if each is best or float(worse.mean()) <= min(error, WORSE):
            near.append(each)
    chosen = min(near, key=lambda each: (each.cost, float(each.losses.mean())))
    if len(tried) == 1:
        return chosen, "asked for"
    if chosen is best:
        return chosen, f"lowest loss on held-out rows of {len(tried)} tried"
    return chosen, (
        f"cheapest of {len(near)} (of {len(tried)} tried) whose loss on held-out rows is within "
        f"one standard error, and {WORSE:g}, of the lowest ({_named(best)}, {best.accuracy:.1%} "
        "right)"
    )


def _named(each: Fitted) -> str:
    return f"{each.kind} on {layers_said(each.layers)}"


def _fitted(
    kind: str,
    layers: tuple[int, ...],
    x: Float[Tensor, "row width"],
    truth: Int[Tensor, " row"],
    calibration: Int[Tensor, " calibration"],
    pairs: Sequence[tuple[Tensor, Tensor]],
    experts: int,
    settings: Settings,
) -> Fitted:
    found, scaled, epochs = [], [], []
    for own, held in pairs:
        scorer, epoch = train(kind, x, truth, own, experts, settings, check=calibration)
        temperature = settings.temperature
        with torch.no_grad():
            if temperature == "auto":
                temperature = fit_temperature(scorer(x[calibration]), truth[calibration])
            found.append(scorer(x[held]))
        scaled.append(found[-1] / temperature)
        epochs.append(epoch)
    told = truth[torch.cat([held for _, held in pairs])]
    logits, over = torch.cat(found), torch.cat(scaled)
    losses = F.cross_entropy(over.double(), told, reduction="none")
    accuracy = float((logits.argmax(dim=1) == told).double().mean())
    stop = None if None in epochs else sorted(epochs)[len(epochs) // 2]
    return Fitted(kind, layers, logits, over, losses, accuracy, stop)


def train(
    kind: str,
    features: Float[Tensor, "row width"],
    truth: Int[Tensor, " row"],
    rows: Int[Tensor, " train"],
    experts: int,
    settings: Settings,
    check: Int[Tensor, " check"] | None = None,
    epochs: int | None = None,
) -> tuple[nn.Module, int | None]:
    """A scorer trained on these rows, and of an mlp the epoch that is kept.

    That is the one that does best on the rows `check`; without them, the last of `epochs`. Raises
    `InputError` for features that are not finite, or the same in all rows.
    """
    x, y = features[rows], truth[rows]
    check_features(x)
    if kind in ("prototype", "prompts"):
        return Prototype.fitted(x, y, experts), None
    if kind == "linear":
        return Linear.fitted(x, y, experts, settings.strength), None
    return _train_mlp(x, y, experts, settings, epochs, _held(features, truth, check))


def _held(features: Tensor, truth: Tensor, check: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if check is None else (features[check], truth[check])


def _train_mlp(
    x: Float[Tensor, "row width"],
    y: Int[Tensor, " row"],
    experts: int,
    settings: Settings,
    epochs: int | None,
    held: tuple[Tensor, Tensor] | None,
) -> tuple[RouterMLP, int]:
    """Source: Twin-Merging, arXiv:2406.15479, appendix D.1: cross-entropy on the expert's name."""
    width, epochs = x.shape[1], epochs or settings.epochs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        mlp = RouterMLP(width, settings.hidden or width, experts, settings.dropout)
        optimizer = torch.optim.Adam(mlp.parameters(), lr=settings.learning_rate)
        best: tuple[float, float, int, Mapping[str, Tensor]] | None = None
        size = max(2, settings.batch_size)  # batches of one would all be passed over below
        for epoch in range(1, epochs + 1):
            mlp.train()
            for chosen in torch.randperm(len(x)).split(size):
                if len(chosen) < 2:
                    continue  # BatchNorm has no variance of one row; the next epoch draws another
                loss = F.cross_entropy(mlp(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            mlp.eval()
            if held is None:
                continue
            with torch.no_grad():
                logits = mlp(held[0])
                accuracy = float((logits.argmax(dim=-1) == held[1]).float().mean())
                held_loss = float(F.cross_entropy(logits, held[1]))
            if best is None or (accuracy, -held_loss) > (best[0], -best[1]):
                state = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
                best = accuracy, held_loss, epoch, state
    if best is None:
        return mlp, epochs
    mlp.load_state_dict(best[3])
    return mlp, best[2]
