"""Seconds and memory of one piece of work in a process of its own, and what bytes alone cost."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.004
BLOCK_BYTES = 8 << 20

Prepare = Callable[..., Callable[[], Any]]
"""Does what is not to be measured (imports, parsing) and returns the work."""


@dataclass(frozen=True)
class Measured:
    """One run. Memory is what the process held at its height beyond what it held before, in bytes.

    anonymous:  that no file backs: what must be there
    resident:   all of it: mapped source files too, whose pages the kernel takes back when it likes
    """

    seconds: float
    anonymous: int
    resident: int
    returned: Any = None


def measured(prepare: Prepare, *arguments: Any) -> Measured:
    """Run `prepare(*arguments)()` in a fresh process; only the second call counts.

    Memory is read from outside, every four milliseconds. Raises `RuntimeError` if the process fails
    (it prints why).
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, prepare, arguments))
    process.start()
    theirs.close()
    assert process.pid is not None
    try:
        ours.recv()  # ready
        before = peak = _memory(process.pid)
        ours.send("go")
        while not ours.poll(SAMPLE_SECONDS):
            now = _memory(process.pid)
            peak = (max(peak[0], now[0]), max(peak[1], now[1]))
        seconds, returned = ours.recv()
    except EOFError:
        raise RuntimeError(f"{prepare.__name__} failed") from None
    finally:
        ours.close()
        process.join()
    return Measured(seconds, peak[0] - before[0], peak[1] - before[1], returned)


def _run(connection: Connection, prepare: Prepare, arguments: tuple[Any, ...]) -> None:
    work = prepare(*arguments)
    connection.send("ready")
    connection.recv()
    started = time.perf_counter()
    returned = work()
    connection.send((time.perf_counter() - started, returned))


def _memory(process: int) -> tuple[int, int]:
    """Bytes that no file backs, and all resident bytes. Needs Linux; zeros for one that ended."""
    found = {"RssAnon": 0, "VmRSS": 0}
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in found:
            found[key] = int(value.split()[0]) * 1024
    return found["RssAnon"], found["VmRSS"]


def read_and_write(sources: Iterable[Path], amount: int, out: Path) -> float:
    """Seconds to read all sources and to write `amount` bytes to the new file `out`."""
    block = bytearray(BLOCK_BYTES)
    view = memoryview(block)
    started = time.perf_counter()
    for path in sources:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass
    with open(out, "wb", buffering=0) as file:
        left = amount
        while left > 0:
            left -= file.write(view[: min(left, len(block))])
    return time.perf_counter() - started


def forget(files: Iterable[Path]) -> None:
    """Drop these files from the kernel's cache: the next to read them waits for the disk."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # only what is on the disk can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
