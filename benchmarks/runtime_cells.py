"""Cells of the runtime benchmark: batch x tokens x experts x rank, and which of them are timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

import typer

AXES = {"batch": (1, 8, 32, 64), "tokens": (32, 128, 512), "experts": (2, 8, 32, 64)}
AXES |= {"rank": (1, 16, 64)}


@dataclass(frozen=True)
class Cell:
    batch: int = 32
    tokens: int = 128
    experts: int = 8
    rank: int = 16

    @classmethod
    def product(cls, text: str, headline: Cell) -> Iterator[Cell]:
        """Cells of "experts=2,8 tokens=32"; what is not named is as in the headline."""
        axes: dict[str, tuple[int, ...]] = {k: (v,) for k, v in asdict(headline).items()}
        for word in text.split():
            key, _, values = word.partition("=")
            if key not in axes or not all(v.isdigit() for v in values.split(",")):
                raise typer.BadParameter(
                    f"{word!r}: expected axis=number,number,... with an axis of {', '.join(axes)}."
                )
            axes[key] = tuple(int(v) for v in values.split(","))
        yield from (cls(*values) for values in product(*axes.values()))


def chosen_cells(words: list[str], headline: Cell, full: bool, quick: bool) -> list[Cell]:
    """In an order that opens each artifact once."""
    if words:
        cells = [cell for text in words for cell in Cell.product(text, headline)]
    elif full:
        cells = [Cell(*values) for values in product(*AXES.values())]
    elif quick:
        cells = [headline, replace(headline, experts=2)]
    else:
        cells = [
            replace(headline, **{axis: value}) for axis, values in AXES.items() for value in values
        ]
        cells += [Cell(*values) for values in product((1, 64), (32,), (2, 64), (1, 64))]
    return sorted(set(cells), key=lambda c: (c.experts, c.rank, c.batch, c.tokens))
