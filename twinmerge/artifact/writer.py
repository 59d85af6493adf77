"""Writing to places that may be taken, full, or not ours: told before the work, in words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError


def check_target(target: Path) -> None:
    """Raise `OutputError` unless `target` is free (absent, or an empty folder)."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        what = "is not empty" if target.is_dir() else "is a file"
        raise OutputError(
            f"{target}: expected a new or empty folder to write to, but it {what}. "
            "Choose another folder, or remove this one first."
        )


def check_space(target: Path, needed: int) -> None:
    """Raise `OutputError` if the disk under `target` has less than `needed` bytes free."""
    there = target.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OutputError(
            f"{target}: the artifact needs about {needed:,} bytes, the disk has {free:,} free. "
            "Free some space, choose another disk, or keep a lower rank."
        )


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with explained(path):
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# EEXIST and ENOTDIR: a file stands where a folder is wanted. ENOTEMPTY: someone else was faster.
_CANNOT_WRITE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOTDIR, errno.ENOTEMPTY),
    *(errno.EBUSY, errno.EINVAL),
)


@contextmanager
def explained(target: Path, kept: Path | None = None) -> Iterator[None]:
    """Turn a full disk or a missing permission into an `OutputError` that says what to do.

    kept: a folder that may hold what was done so far
    """
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{target}: the disk is full; nothing was left there. Free some space or choose "
                "another disk, then run the same command again."
                + (f"\n  What was done is kept in {kept}." if kept and kept.is_dir() else "")
            ) from problem
        if problem.errno in _CANNOT_WRITE:
            raise OutputError(
                f"{target}: cannot be written ({problem.strerror}). "
                "Choose a folder that you may write to."
            ) from problem
        raise
