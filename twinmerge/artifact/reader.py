"""Opening an artifact: the manifest checked first, then digests, then tensors one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ArtifactError, CorruptArtifact, RouterError
from .format import EXAMPLES, MANIFEST, ROUTER, Manifest, expert_file, parse_manifest
from .tensorfile import record


class Artifact:
    """A folder that `twinmerge merge` wrote.

    Raises `ArtifactError` if it is not one, `UnsupportedFormat` for an unknown version, and
    `CorruptArtifact` if a file is missing or its size or (with `check=True`) digest differs.
    """

    def __init__(self, folder: Path | str, *, check: bool = True) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise ArtifactError(
                f"{self.folder}: expected a folder written by 'twinmerge merge', but it has no "
                f"{MANIFEST}. Check the path; a build that was interrupted leaves no folder behind."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CorruptArtifact(f"{path}: not a text file. Build the artifact again.") from None
        self.manifest: Manifest = parse_manifest(text, self.folder)
        self._check(digests=check)

    def _check(self, *, digests: bool) -> None:
        for name, expected in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise CorruptArtifact(
                    f"{path}: listed in {MANIFEST} but missing. Copy the folder again, or rebuild."
                )
            size = path.stat().st_size
            if size != expected.bytes:
                raise CorruptArtifact(
                    f"{path}: expected {expected.bytes:,} bytes, found {size:,}. "
                    "Copy the folder again, or rebuild."
                )
            if digests and record(path).sha256 != expected.sha256:
                raise CorruptArtifact(
                    f"{path}: its SHA-256 differs from the manifest's: a byte was changed. "
                    "Copy the folder again, or rebuild."
                )

    @contextmanager
    def expert(self, name: str) -> Iterator[TensorMap]:
        """The tensors of one expert's file, read when asked for."""
        with _opened(self.folder / expert_file(name)) as file:
            yield TensorMap(file)

    def router(self) -> dict[str, Tensor]:
        """The router's tensors. Raises `RouterError` if none was fitted, or for other experts."""
        fitted = self.manifest.router
        if fitted is None:
            fit = f"Run 'twinmerge fit-router {self.folder} DATA' first, or say"
            if (self.folder / "preprocessor_config.json").exists():
                fit = "For images none can be fitted yet: say"
            raise RouterError(
                f"{self.folder}: has no router yet, so it cannot choose between its experts. "
                f"{fit} which expert to use (task= or weights=)."
            )
        if fitted.experts != self.manifest.names:
            raise RouterError(
                f"{self.folder}: the router was fitted for the experts {list(fitted.experts)}, the "
                f"artifact holds {list(self.manifest.names)}. Run 'twinmerge fit-router' again."
            )
        if fitted.shared_sha256 != self.manifest.shared_files():
            raise RouterError(
                f"{self.folder}: the router was fitted on another shared expert. "
                "Run 'twinmerge fit-router' again."
            )
        with _opened(self.folder / ROUTER) as file:
            return {name: file.get_tensor(name) for name in file.keys()}

    def examples(self) -> dict[str, list[Any]]:
        """Rows that `fit-router --examples` kept, by expert; empty if none were."""
        path = self.folder / EXAMPLES
        if EXAMPLES not in self.manifest.files:
            return {}
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file of ours; what is wrong with it is a `CorruptArtifact`.

    Needed where digests were not compared, or a file changed since.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as problem:
        raise CorruptArtifact(
            f"{path}: expected a safetensors file as the manifest lists it, got one that cannot be "
            f"read ({problem}). Copy the folder again, or rebuild."
        ) from problem


class TensorMap:
    """A read-only view of a safetensors file: `map[name]` reads one tensor."""

    def __init__(self, file) -> None:
        self._file = file
        self._names = set(file.keys())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def names(self) -> set[str]:
        return self._names
