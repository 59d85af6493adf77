"""A router by projection, made without rows: usual is what inputs give that say nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ...recipe import Router as Settings
from ..model import TwinModel
from .features import keys
from .router import Router, joined
from .scorers import Projection
from .wanted import projected_blocks


def by_projection(model: TwinModel, settings: Settings) -> Router:
    """It knows the usual shares in each expert's space, and how much they vary."""
    count, blocks = len(model.experts), projected_blocks(model, settings)
    scorer = Projection(len(blocks) * count, count)
    inputs = made_up(model, settings.seed)
    usual = joined(model.energies.read(inputs, blocks), keys(blocks))
    scorer.usual.copy_(usual.mean(dim=0))
    scorer.spread.copy_(usual.std(dim=0).clamp(min=1e-6))
    return Router(scorer, blocks, kind="projection")


def made_up(model: TwinModel, seed: int) -> dict[str, Tensor]:
    """Inputs of random tokens: what an input that says nothing gives."""
    tokenizer = model.tokenizer
    draw = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    known = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    ids = known[torch.randint(len(known), (64, 24), generator=draw)].to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
