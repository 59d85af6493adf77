"""Adapters, and the full checkpoints that PEFT makes of them, give one merge (Appendix A)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from twinmerge.data import Encoded, batches
from twinmerge.runtime.load import load, quiet
from twinmerge.runtime.model import TwinModel

from .lab import Lab
from .static import STATIC, Say
from .tasks import RANK
from .twin import MAIN
from .unseen import relative, shared_tensors

ADAPTER = "adapter_config.json"

ROWS = 64
"""Validation rows of each task, at most."""

WEIGHTS_SEED = 0


def paths(lab: Lab, say: Say) -> None:
    """One record; none where no expert is an adapter."""
    adapters = [name for name in lab.names if (lab.models[name] / ADAPTER).is_file()]
    if not adapters:
        return
    method = STATIC[MAIN][0]
    exclusive: dict[str, Any] = {"rank": RANK}

    def compared() -> dict[str, Any]:
        lab.work.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=lab.work) as work:
            merged = {name: full_checkpoint(lab, name, Path(work) / name) for name in adapters}
            full = replace(lab, models=dict(lab.models) | merged, work=Path(work))
            one = lab.built(lab.recipe(method, **exclusive))
            other = full.built(full.recipe(method, **exclusive))
            shared, whole = shared_tensors(one), shared_tensors(other)
            assert shared.keys() == whole.keys()
            models = load(one.folder, check=False), load(other.folder, check=False)
            return {
                "shared": max(relative(shared[name], whole[name]) for name in whole),
                "logits": {name: differences(lab, *models, name) for name in lab.names},
            }

    settings = {"method": method, "exclusive": exclusive, "adapters": adapters, "rows": ROWS}
    settings |= {"seed": WEIGHTS_SEED}
    record = lab.records.once("paths", MAIN, settings, compared)
    worst = max(max(each["one-hot"], each["mixed"]) for each in record["logits"].values())
    say(f"adapters and full checkpoints: shared within {record['shared']:.1e}, logits {worst:.1e}")


def full_checkpoint(lab: Lab, name: str, folder: Path) -> Path:
    """What PEFT merges an adapter to, saved."""
    from peft import PeftModel

    expert = lab.expert(name)
    with quiet():
        base = type(expert).from_pretrained(lab.base, config=expert.config)
        adapted: Any = PeftModel.from_pretrained(base, str(lab.models[name]))
        adapted.merge_and_unload().save_pretrained(folder)
    return folder


@torch.no_grad()
def differences(lab: Lab, one: TwinModel, other: TwinModel, name: str) -> dict[str, float]:
    """Of one task's logits: the largest difference under the task's own expert alone and under
    drawn weights, and the largest logit that it stands beside."""
    found = lab.prepared("validation")[name].encoded
    rows = Encoded(found.rows[:ROWS], found.cut[:ROWS])
    draw = torch.Generator().manual_seed(WEIGHTS_SEED)
    alone = torch.zeros(len(rows), len(one.experts))
    alone[:, one.experts.index(name)] = 1.0
    soft = torch.randn(alone.shape, generator=draw).softmax(dim=1)
    ways: Mapping[str, torch.Tensor] = {"one-hot": alone, "mixed": soft}
    largest = dict.fromkeys((*ways, "largest logit"), 0.0)
    for places, batch in batches(one.tokenizer, rows, 32):
        for way, weights in ways.items():
            a, b = (m(**batch, weights=weights[places], head=name).logits for m in (one, other))
            assert a is not None and b is not None
            largest[way] = max(largest[way], float((a - b).abs().max()))
            largest["largest logit"] = max(largest["largest logit"], float(a.abs().max()))
    return largest
