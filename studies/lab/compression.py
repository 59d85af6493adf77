"""What is kept of each expert, against its true bytes (the paper's Figure 6)."""

from __future__ import annotations

from typing import Any

from .lab import Lab
from .static import STATIC, Say
from .twin import MAIN, oracle

RANKS = (1, 4, 16, 64)


def settings(lab: Lab) -> list[dict[str, Any]]:
    """Every way to cut and store that is compared; the shared expert is `MAIN`."""
    largest = max(lab.settings.ranks)
    ranks = [rank for rank in RANKS if rank <= largest]
    found: list[dict[str, Any]] = [
        {"rank": rank, "dtype": dtype}
        for dtype in ("float32", "float16", "int8", "int4")
        for rank in (*ranks, *((128,) if dtype == "int4" and largest >= 64 else ()))
    ]
    found += [
        {"budget": f"{share}%", "dtype": dtype}
        for dtype, shares in (("float16", (1, 2, 3.5, 7)), ("int4", (0.35, 1, 2, 3.5, 7)))
        for share in shares
    ]
    found += [{"energy": share, "dtype": "float16"} for share in (0.3, 0.6, 0.9)]
    found += [
        {"form": "magnitude", "density": density, "scope": scope, "dtype": "float16"}
        for scope in ("tensor", "all")
        for density in (0.01, 0.05, 0.1, 0.3)
    ]
    found += [
        {"form": "dropout", "density": density, "dtype": "float16"} for density in (0.05, 0.1, 0.3)
    ]
    return found


def compression(lab: Lab, say: Say) -> None:
    method = STATIC[MAIN].method
    for exclusive in settings(lab):
        oracle(lab, say, MAIN, method, {}, exclusive, keep=False)
