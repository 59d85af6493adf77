"""What a recipe calls a model: a folder, a hub id, either with `@revision`, or `base+adapter`."""

import os
import re
from pathlib import Path
from typing import Any


def default_name(model: str) -> str:
    """The last part of a path or hub id; of `base+adapter` the adapter's, without `@revision`."""
    last = model.split("+")[-1].split("@")[0]
    return re.split(r"[/\\]", last.rstrip("/\\"))[-1]


def canonical(reference: str) -> str:
    """One spelling for './cola', 'cola' and 'cola/'."""
    return "+".join(os.path.normpath(part) for part in reference.split("+"))


def is_same(one: Any, other: Any) -> bool:
    """Whether two references, of any type, are texts that mean the same model."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    return canonical(one) == canonical(other)


def resolved(reference: str, folder: str | Path) -> str:
    """A relative path that exists under `folder` made absolute; anything else as written.

    A reference of several parts, `base+adapter`, is resolved part by part.
    """
    if Path(reference).is_absolute() or not reference:
        return reference
    path = Path(folder, reference)
    if path.exists():
        return os.path.abspath(path)  # not Path.resolve(): a link keeps its own name
    if "+" in reference:
        return "+".join(resolved(part, folder) for part in reference.split("+"))
    return reference
