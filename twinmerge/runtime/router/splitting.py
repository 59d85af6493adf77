"""Dividing rows in parts that train, calibrate and choose, so that alike rows stay together.

Two rows are alike if a text, or one text of a pair, is the same but for case and punctuation, or if
they share half of their runs of three words. Rows that are alike, directly or through others, are
in one group, and a group is in one part: nothing chooses what was trained on its near-copy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ...data import Chat, Text
from ...errors import InputError

RUN = 3
SHARED = 0.5
COMMON = 50
"""Runs of words in more rows than these are phrases, and say nothing about copies."""
SEGMENT = 4
"""Words from which one text of a pair makes rows alike."""


@dataclass(frozen=True)
class Parts:
    """Rows by position."""

    train: Int[Tensor, " train"]
    calibration: Int[Tensor, " calibration"]
    held_out: Int[Tensor, " held"]


def divide(
    groups: Int[Tensor, " row"],
    truth: Int[Tensor, " row"],
    experts: Sequence[str],
    shares: tuple[float, float],
    seed: int,
) -> Parts:
    """Whole groups, drawn at random until each expert has its shares held out and calibrating.

    Raises `InputError` if an expert has no row left to train on.
    """
    draw = torch.Generator().manual_seed(seed)
    calibration, held_out = shares
    place: dict[int, int] = {}  # group -> 0 train, 1 calibration, 2 held out
    for expert in truth.unique().tolist():
        rows = (truth == expert).nonzero()[:, 0]
        sizes = Counter(groups[rows].tolist())
        wanted = {2: max(1, round(held_out * len(rows))), 1: max(1, round(calibration * len(rows)))}
        lacks = {**wanted, 0: 0}
        for group in sizes:
            if group in place:  # of an expert before
                lacks[place[group]] -= sizes[group]
        free = [group for group in sizes if group not in place]
        order = torch.randperm(len(free), generator=draw).tolist()
        small = sorted(sizes[group] for group in free)[:2]  # one for each part at least
        for group in (free[i] for i in order):
            # Very many copies of one row train: in another part they would be all that counts.
            fits = [p for p in wanted if lacks[p] > 0 and sizes[group] <= max(lacks[p], *small)]
            place[group] = max(fits, key=lambda p: lacks[p] / wanted[p], default=0)
            lacks[place[group]] -= sizes[group]
    part = torch.tensor([place[group] for group in groups.tolist()])
    for index, expert in enumerate(experts):
        if not bool((part[truth == index] == 0).any()):
            raise InputError(
                f"expert '{expert}': after setting rows aside none are left to fit on. Give more "
                "rows that differ, smaller shares of calibration and held_out, or a few lines and "
                "kind prompts, which sets none aside."
            )
    return Parts(*((part == p).nonzero()[:, 0] for p in (0, 1, 2)))


def crossed(
    parts: Parts, groups: Int[Tensor, " row"], truth: Int[Tensor, " row"], number: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Rows that train and rows that are scored, `number` times: each row but those that calibrate
    is scored once, by what saw no row like it. Once, with the parts as they are, if an expert's
    rows are too alike for that."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.cat([parts.train, parts.held_out])
    rows = rows[torch.randperm(len(rows), generator=draw)]
    fold: dict[int, int] = {}
    for expert in truth[rows].unique().tolist():
        sizes = Counter(groups[rows[truth[rows] == expert]].tolist())
        held = [0] * number
        for group, size in sizes.most_common():  # the large ones first, then what evens them out
            fold.setdefault(group, min(range(number), key=lambda f: (held[f], f)))
            held[fold[group]] += size
        if max(held) == sum(held):  # what trains would have none of this expert
            return [(parts.train, parts.held_out)]
    of = torch.tensor([fold[group] for group in groups[rows].tolist()])
    return [(rows[of != f], rows[of == f]) for f in range(number) if bool((of == f).any())]


def alike(texts: Sequence[Text | Chat]) -> Int[Tensor, " row"]:
    """A number for each row; the same for rows that are alike."""
    first: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    runs: list[set[tuple[str, ...]]] = []
    for row, text in enumerate(texts):
        segments = [words(each) for each in (text.text if isinstance(text, Chat) else text)]
        keys = [" ".join(word for segment in segments for word in segment) or repr(text)]
        if len(segments) > 1:
            keys += [" ".join(segment) for segment in segments if len(segment) >= SEGMENT]
        pairs += [(first.setdefault(key, row), row) for key in keys]
        runs.append(
            {tuple(s[i : i + RUN]) for s in segments for i in range(max(0, len(s) - RUN + 1))}
        )
    pairs += _copies(runs)
    if not pairs:
        return torch.arange(len(texts))
    one, other = np.array(pairs).T
    graph = csr_matrix((np.ones(len(one)), (one, other)), shape=(len(texts), len(texts)))
    _, found = connected_components(graph, directed=False)
    return torch.from_numpy(found.astype(np.int64))


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; of a text without words, its characters."""
    return re.findall(r"\w+", text.lower()) or list(text.strip())


def _copies(runs: list[set[tuple[str, ...]]]) -> list[tuple[int, int]]:
    """Pairs of rows that share at least `SHARED` of the runs of the one that has fewer."""
    seen = Counter(run for row in runs for run in row)
    number = {run: i for i, run in enumerate(r for r, n in seen.items() if 1 < n <= COMMON)}
    if not number:
        return []
    at = [(row, number[run]) for row, own in enumerate(runs) for run in own if run in number]
    rows, columns = np.array(at).T
    ones = np.ones(len(rows), dtype=np.int32)
    table = csr_matrix((ones, (rows, columns)), shape=(len(runs), len(number)))
    both = (table @ table.T).tocoo()
    size = np.array([len(own) for own in runs])
    fewer = np.minimum(size[both.row], size[both.col])
    kept = (both.row < both.col) & (both.data >= SHARED * fewer) & (fewer >= 2)
    return list(zip(both.row[kept].tolist(), both.col[kept].tolist(), strict=True))
