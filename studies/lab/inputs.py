"""What a study is of: digests of weights and rows, so that other inputs are another study."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from twinmerge.checkpoint import Checkpoint

WEIGHTS = (".safetensors", ".bin", "config.json")
ROWS = (".jsonl", ".jsonl.gz")


def inputs(
    base: str, experts: Mapping[str, Path], rows: Mapping[str, Path]
) -> dict[str, dict[str, str]]:
    """SHA-256 of base, experts and tasks, by name; of a base on the hub its id.

    experts, rows: name -> folder

    Raises `CheckpointError` for a base that cannot be opened.
    """
    Checkpoint.open(base).close()
    place = Path(base)
    return {
        "base": {"": _digest(place, WEIGHTS) if place.is_dir() else base},
        "experts": {name: _digest(folder, WEIGHTS) for name, folder in experts.items()},
        "rows": {name: _digest(folder, ROWS) for name, folder in rows.items()},
    }


def _digest(folder: Path, ends: Iterable[str]) -> str:
    """Of the files in a folder that end so, and their names."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.endswith(tuple(ends)):
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
            whole.update(f"{path.name} {digest.hexdigest()}\n".encode())
    return whole.hexdigest()[:32]
