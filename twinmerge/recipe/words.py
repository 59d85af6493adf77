"""Values in the words of a YAML file, for messages."""

from collections.abc import Iterable
from typing import Any


def shown(value: Any) -> str:
    """A value as YAML spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str | int | float) else str(value)


def kind_of(value: Any) -> str:
    """A value's kind."""
    kinds = {dict: "a mapping", list: "a list", tuple: "a list", str: "text", type(None): "nothing"}
    return kinds.get(type(value)) or shown(value)


def either(words: Iterable[str], last: str = "or") -> str:
    """`a`, `a or b`, `a, b or c`."""
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end
