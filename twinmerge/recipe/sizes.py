"""Budgets as a recipe writes them: "6%", "50MB", "50MiB", or a plain number of bytes."""

import re
from fractions import Fraction
from typing import Any

from .words import shown

UNITS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
"""Bytes of each unit, without regard to case."""

SMALLEST_PLAIN = 1000
"""A number below this is hardly meant as bytes; `6` may be 6 % or 6 MB, so we ask."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(%|[A-Za-z]+)")
_WAYS = 'Write a share of the shared expert such as "6%", or a size such as "50MB" or "50MiB"'


def size_of(budget: int | str, whole: int) -> int:
    """A budget in bytes, rounded down; `whole` is the number of bytes that "6%" is a share of.

    Raises `ValueError` with a line that says what to write.
    """
    if isinstance(budget, int):
        return budget
    amount, unit = _parts(budget)
    # Fractions: 0.29 * 100 is 28.999999999999996
    return int(amount * whole / 100 if unit == "%" else amount * UNITS[unit])


def checked_size(budget: Any) -> int | str:
    """The budget as it came; raises `ValueError` with a line that says what to write."""
    if isinstance(budget, bool) or not isinstance(budget, int | float | str):
        raise ValueError(f"expected a size, got {shown(budget)}. {_WAYS}.")
    if budget == 0 or (isinstance(budget, str) and _parts(budget)[0] == 0):
        raise ValueError(
            f"got {budget!r}, and nothing can be kept in no bytes. "
            "Write `rank: none` instead for a static merge."
        )
    if isinstance(budget, str):
        if size_of(budget, whole=100 * UNITS["tib"]) < 1:
            raise ValueError(f"{budget!r} is less than one byte. {_WAYS}.")
        return budget
    if isinstance(budget, int) and budget >= SMALLEST_PLAIN:
        return budget
    if 0 < budget < SMALLEST_PLAIN:
        share, size = (budget * 100, 50) if budget < 1 else (budget, budget)
        raise ValueError(
            f'{budget!r} of what? Write "{share:g}%" for a share of the shared expert\'s bytes, '
            f'or a size such as "{size:g}MB".'
        )
    if isinstance(budget, float) and budget.is_integer() and budget > 0:
        raise ValueError(f"expected a whole number of bytes, got {budget!r}: write {int(budget)}.")
    raise ValueError(f"expected a size, got {shown(budget)}. {_WAYS}.")


def _parts(budget: str) -> tuple[Fraction, str]:
    """("1.5", "gb") of "1.5 GB"."""
    match = _SIZE.fullmatch(budget.strip())
    unit = match[2].lower() if match else ""
    if match is None or (unit != "%" and unit not in UNITS):
        raise ValueError(f"expected a size, got {shown(budget)}. {_WAYS}.")
    return Fraction(match[1]), unit
