"""The paper's own normalised scores of RoBERTa-base on eight GLUE tasks, to stand beside ours.

Source: Lu et al., Twin-Merging, arXiv:2406.15479v2, the tables named in each line. Its protocol is
the true task's head and, in the reference code, the true task's biases as well.

Tables 2 and 8 give the averages of TIES and of task arithmetic with DARE the other way round; both
are here. The tasks of Table 8 average to what Table 8 says of these two (and to 42.70 for the
pretrained model, where both tables say 41.69).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Published:
    """One row of one of the paper's tables; `score` in percent, as printed.

    part, name, rank: of our record beside it; rank None: not Twin-Merging, or the
    largest that all shared experts have been routed at
    """

    tables: str
    method: str
    score: float
    part: Literal["static", "twin", "ablation", "grouped"]
    name: str
    rank: int | None = None


PUBLISHED = (
    Published("2, 6, 8", "Pretrained", 41.69, "static", "pretrained"),
    Published("2, 8, 11", "Weight Averaging", 52.56, "static", "averaging"),
    Published("2, 6, 8, 11, 12", "Task Arithmetic", 67.80, "static", "task arithmetic"),
    Published("2", "Task Arithmetic (w/ DARE)", 64.66, "static", "DARE + task arithmetic"),
    Published("8", "Task Arithmetic (w/ DARE)", 63.68, "static", "DARE + task arithmetic"),
    Published("2, 11", "Ties-Merging", 63.68, "static", "TIES"),
    Published("8", "Ties-Merging", 64.66, "static", "TIES"),
    Published("2, 8", "Ties-Merging (w/ DARE)", 65.58, "static", "DARE + TIES"),
    Published("2, 8", "Twin-Merging (Rank-1)", 86.00, "twin", "task arithmetic", 1),
    Published("2, 8, 11", "Twin-Merging, 90 % compressed", 96.14, "twin", "task arithmetic"),
    Published("11", "Twin-Merging + Weight Average", 96.23, "twin", "averaging"),
    Published("11", "Twin-Merging + Ties-Merging", 96.34, "twin", "TIES"),
    Published("6", "Dynamic Merging", 81.47, "ablation", "dynamic"),
    Published("6", "Pretrain + Dynamic Merging", 85.90, "ablation", "pretrained + dynamic"),
    Published("6", "Shared + Dynamic Merging", 96.14, "ablation", "shared + dynamic"),
    Published("12", "Twin-Merging", 96.14, "grouped", "exact"),
    Published("12", "Twin-Merging, group-wise, 20 groups", 90.02, "grouped", "20"),
)
