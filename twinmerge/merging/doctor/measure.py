r"""How far, and in which directions, experts moved from their base: one pass, in numbers.

With `d_t = W_t - W_0` the task vector of expert t, over all tensors that are merged:

    drift_t = ‖d_t‖ / ‖W_0‖        cos_ts = <d_t, d_s> / (‖d_t‖ ‖d_s‖)

and, over single entries, how often two experts moved one up and down. Of a sample of the matrices
also the singular values of the exclusive part `W_t - W_s`, see `spectra`.

Sources: task vectors and their cosines, Ilharco et al., arXiv:2212.04089; sign conflicts, Yadav et
al. (TIES), arXiv:2306.01708; the exclusive part, Lu et al. (Twin-Merging), arXiv:2406.15479.

Every tensor is read once and dropped. Entries are looked at in blocks, so beyond the tensors as
stored only a few blocks are held, and of a sampled matrix three copies.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from ...checkpoint import Checkpoint, Expert, LowRank, Unchanged
from ..linalg import ProductSVD, spectrum, svd, truncated_svd
from ..threads import one_thread
from .spectra import Spectrum, Subject, choose, spectrum_of

BLOCK = 2**23
"""Entries of all experts that are looked at together: 32 MB in float32."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Moved:
    """One tensor: the base's norm and how far each expert is from it, in the order of experts."""

    name: str
    shape: tuple[int, ...]
    layer: str
    matrix: bool
    base: float
    moved: tuple[float, ...]


@dataclass(frozen=True)
class Shared:
    """How the shared expert of one tensor is made: `W_s = (1 + rest) W_0 + Σ c_t d_t`."""

    c: Float[Tensor, " expert"]
    rest: float = 0.0
    """What an average of weights that do not sum to 1 adds of the base."""


@dataclass
class Measured:
    """What one pass over base and experts has found. Matrices are (expert, expert), float64."""

    experts: list[str]
    tensors: list[Moved] = field(default_factory=list)
    products: Tensor = field(default_factory=lambda: torch.zeros(0))
    """<d_t, d_s> over all measured tensors."""
    both: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Entries that both moved."""
    opposed: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Of these, entries that the two moved in opposite directions."""
    shared_entries: int = 0
    """Entries that at least two experts moved."""
    conflicts: int = 0
    """Of these, entries that some moved up and some down."""
    alike: set[tuple[int, int]] = field(default_factory=set)
    """Pairs whose tensors are equal bit by bit, heads included."""
    not_finite: list[tuple[str, str | None]] = field(default_factory=list)
    """(tensor, expert or None for the base) that hold NaN or infinity; left out of all sums."""
    too_large: list[tuple[str, str | None]] = field(default_factory=list)
    """(tensor, expert or None) with entries that float16 cannot hold, if that was asked."""
    spectra: list[Spectrum] = field(default_factory=list)
    sampled: list[str] = field(default_factory=list)
    matrices: int = 0
    """In which an expert differs from the base, or the shared expert does."""
    known: set[str] = field(default_factory=set)
    """Tensors whose shared expert the recipe's weights say; for all others stands the average."""
    rests: dict[str, float] = field(default_factory=dict)
    """Tensor -> `Shared.rest`, where it is not 0."""
    read_bytes: int = 0
    read_seconds: float = 0.0
    svd_seconds: float = 0.0
    """An estimate of the time that all SVDs of the build take on one core."""

    def drift(self, expert: int, layer: str | None = None) -> float | None:
        """Over all matrices (or those of one layer), as the build reports it; None if ‖W_0‖ = 0."""
        held = [t for t in self.tensors if t.matrix and layer in (None, t.layer)]
        base = sum(t.base**2 for t in held)
        moved = sum(t.moved[expert] ** 2 for t in held)
        if base == 0.0:
            return None if moved else 0.0
        return (moved / base) ** 0.5

    def layers(self) -> list[str]:
        """In the order of the model's depth; only those that have matrices."""
        return list(dict.fromkeys(t.layer for t in sorted(self.tensors, key=_depth) if t.matrix))

    def moved(self) -> set[str]:
        """Tensors in which an expert or the shared expert differs from the base."""
        return {t.name for t in self.tensors if any(t.moved) or t.name in self.rests}

    def cosine(self, one: int, other: int) -> float | None:
        """Between two task vectors; None where one of them is zero."""
        norm = float((self.products[one, one] * self.products[other, other]).sqrt())
        return max(-1.0, min(1.0, float(self.products[one, other]) / norm)) if norm else None


def layer_of(name: str) -> str:
    """`encoder.layer.3` of a tensor inside; the module of one outside of the layers."""
    inside = re.match(r"(.*?\.\d+)\.", name)
    return inside[1] if inside else name.rpartition(".")[0] or name


def _depth(tensor: Moved) -> tuple[int, list[int], str]:
    numbers = [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", tensor.name)]
    return 1 if numbers else 0 if "embed" in tensor.layer else 2, numbers, tensor.name


@torch.no_grad()
def measure(
    base: Checkpoint,
    experts: Sequence[Expert],
    subjects: Sequence[Subject],
    *,
    heads: Sequence[str] = (),
    shared: Callable[[str], Shared | None] = lambda name: None,
    limit: Callable[[int, int], int] | None = None,
    sample: int | None = 40,
    largest: float | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Read every subject of base and experts once, and say what there is.

    `shared(name)` says how the shared expert of a tensor is made, None: then the average stands for
    it (the base for a single expert, whose average is itself). `limit(out, in)` is the rank that
    the recipe keeps, None if data decide it. `largest`: entries beyond it are told. Raises
    `CheckpointError` and its kinds for what cannot be read.
    """
    count = len(experts)
    out = Measured([expert.name for expert in experts])
    out.products, out.both, out.opposed = torch.zeros(3, count, count, dtype=torch.float64)
    out.alike = {(i, j) for i in range(count) for j in range(i + 1, count)}
    made = {subject.name: each for subject in subjects if (each := shared(subject.name))}
    out.known = set(made)
    out.rests = {name: each.rest for name, each in made.items() if each.rest}
    affine = len(made) == len(subjects) and not out.rests
    factored = affine and all(expert.is_adapter for expert in experts)
    chosen = choose(subjects, sample, 0.0 if factored else float(count))
    pass_ = _Pass(base, experts, out, made, limit, largest)
    for done, subject in enumerate(subjects):
        if progress:
            progress(done, len(subjects), subject.name)
        for following in subjects[done + 1 : done + 2]:
            for source in (base, *experts):
                source.prefetch(following.name)
        pass_.see(subject, subject.name in chosen)
    for name in heads:
        pass_.see_head(name)
    out.svd_seconds = pass_.svd_seconds()
    if progress:
        progress(len(subjects), len(subjects), "")
    return out


class _Pass:
    """One pass at work."""

    def __init__(
        self,
        base: Checkpoint,
        experts: Sequence[Expert],
        out: Measured,
        shared: Mapping[str, Shared],
        limit: Callable[[int, int], int] | None,
        largest: float | None,
    ) -> None:
        self.base, self.experts, self.out = base, experts, out
        self.shared, self.limit, self.largest = shared, limit, largest
        count = len(experts)
        each = 1 / count if count > 1 else 0.0
        self.stand_in = Shared(torch.full((count,), each, dtype=torch.float64))
        self._dense: list[tuple[int, int]] = []  # matrices whose SVD the build takes densely
        self._factored = 0  # ... and from factors
        self._dense_times: dict[tuple[int, int], float] = {}  # of one SVD of this shape
        self._factored_times: list[float] = []

    # -------------------------------------------------------------------- one tensor

    def see(self, subject: Subject, sampled: bool) -> None:
        name = subject.name
        own, size = self._read(name)
        start = time.perf_counter()
        base = self.base.read(name)
        self.out.read_seconds += time.perf_counter() - start
        self.out.read_bytes += size + base.numel() * base.element_size()
        wide = any(isinstance(tensor, LowRank) for tensor in own)
        base = _flat(base, wide)
        own = [_flat(tensor, wide) if isinstance(tensor, Tensor) else tensor for tensor in own]
        work = torch.float64 if base.dtype == torch.float64 else torch.float32
        found = self._sums(base, own, work)
        if not all(torch.isfinite(part).all() for part in (found.products, found.base)):
            bad = [e.name for e, t in zip(self.experts, own, strict=True) if not _finite(t)]
            broken: list[str | None] = [*bad] if _finite(base) else [None, *bad]
            if broken:
                self.out.not_finite += [(name, whose) for whose in broken]
                self.out.alike -= {p for p in self.out.alike if not found.alike(p)}
                return
            found = self._sums(base, own, torch.float64)  # squares that float32 cannot hold
        self._add(subject, found)
        made = self.shared.get(name)
        if subject.matrix is None or not (found.products.any() or (made and made.rest)):
            return
        self.out.matrices += 1
        stacked = sum(tensor.a.shape[0] for tensor in own if isinstance(tensor, LowRank))
        known = all(tensor is None or isinstance(tensor, LowRank) for tensor in own)
        # As the build decides it: see `stream.read_step`.
        affine = made is not None and not made.rest
        factored = affine and known and 2 * stacked <= min(subject.matrix)
        if factored:
            self._factored += 1
        else:
            self._dense.append(subject.matrix)
        if sampled:
            self.out.sampled.append(name)
            made = made or self.stand_in
            if factored:
                self._spectra_of_factors(subject, own, made.c)
            else:
                self._spectra(subject, base, own, made, work)

    def see_head(self, name: str) -> None:
        """Heads are kept whole: only that they are finite, and whether two are equal."""
        heads = [e.read(name) if name in e.head_names() else None for e in self.experts]
        for expert, head in zip(self.experts, heads, strict=True):
            if head is not None and not _finite(head):
                self.out.not_finite.append((name, expert.name))
        self.out.alike -= {(i, j) for i, j in self.out.alike if not _equal(heads[i], heads[j])}

    def _read(self, name: str) -> tuple[list[Tensor | LowRank | None], int]:
        """Every expert's tensor, its factors, or None where it is the base's; and their bytes."""
        own: list[Tensor | LowRank | None] = []
        size = 0
        start = time.perf_counter()
        for expert in self.experts:
            known = expert.task_vector(name)
            if isinstance(known, Unchanged):
                own.append(None)
                continue
            tensor = expert.read(name) if known is None else known
            own.append(tensor)
            parts = (tensor.a, tensor.b) if isinstance(tensor, LowRank) else (tensor,)
            size += sum(part.numel() * part.element_size() for part in parts)
        self.out.read_seconds += time.perf_counter() - start
        return own, size

    def _sums(
        self, base: Tensor, own: Sequence[Tensor | LowRank | None], work: torch.dtype
    ) -> _Sums:
        count = len(own)
        found = _Sums(count)
        changed = [i for i, tensor in enumerate(own) if tensor is not None]
        for rows in _blocks(base.shape[0], base.shape[1], count):
            start = time.perf_counter()
            block = base[rows].to(work)
            if self.largest is not None:
                found.large[0] |= bool((block.abs() > self.largest).any())
            vectors = torch.zeros(count, block.numel(), dtype=work)
            for i in changed:
                vectors[i] = _rows(own[i], rows, block).flatten()
                if self.largest is not None:
                    entries = vectors[i].view_as(block) + block
                    found.large[1 + i] |= bool((entries.abs() > self.largest).any())
            self.out.read_seconds += time.perf_counter() - start
            found.base += torch.linalg.vector_norm(block, dtype=torch.float64).square()
            if changed:
                found.see(vectors, self.out.alike)
        return found

    def _add(self, subject: Subject, found: _Sums) -> None:
        out = self.out
        out.products += found.products
        out.both += found.both
        out.opposed += found.opposed
        out.shared_entries += found.shared_entries
        out.conflicts += found.conflicts
        out.alike -= {pair for pair in out.alike if not found.alike(pair)}
        owners = [None, *out.experts]
        out.too_large += [
            (subject.name, who) for who, large in zip(owners, found.large, strict=True) if large
        ]
        moved = found.products.diagonal().clamp(min=0).sqrt().tolist()
        matrix = subject.matrix is not None
        base = float(found.base.sqrt())
        layer = layer_of(subject.name)
        out.tensors.append(Moved(subject.name, subject.shape, layer, matrix, base, tuple(moved)))

    # ----------------------------------------------------------------------- spectra

    def _spectra(
        self,
        subject: Subject,
        base: Tensor,
        own: list[Tensor | LowRank | None],
        made: Shared,
        work: torch.dtype,
    ) -> None:
        """Of `d_t - Σ c_s d_s - rest W_0`, one expert after the other."""
        assert subject.matrix is not None
        whole = slice(None)
        start = base.to(work)
        shared = made.rest * start
        for weight, tensor in zip(made.c.tolist(), own, strict=True):
            if tensor is not None:
                shared += weight * _rows(tensor, whole, start)
        for index, tensor in enumerate(own):
            part = -shared if tensor is None else _rows(tensor, whole, start) - shared
            part = part.reshape(subject.matrix)
            # A whole SVD takes long: one of them, and one truncated one of every shape.
            known = subject.matrix in self._dense_times if self.limit else self._dense_times
            if not known and part.any():
                self._dense_times[subject.matrix] = self._time(part)
            self._note(subject, index, spectrum(part))

    def _spectra_of_factors(
        self, subject: Subject, own: list[Tensor | LowRank | None], c: Tensor
    ) -> None:
        """The same from one QR of all factors, as the build does it."""
        held = [(i, tensor) for i, tensor in enumerate(own) if isinstance(tensor, LowRank)]
        owner = torch.cat([torch.full((v.a.shape[0],), i) for i, v in held])
        start = time.perf_counter()
        b, a = torch.cat([v.b for _, v in held], 1), torch.cat([v.a for _, v in held])
        product = ProductSVD(b, a)
        values = [product.svd((owner == i).double() - c[owner]).s for i in range(len(own))]
        self._factored_times.append(time.perf_counter() - start)
        for index, s in enumerate(values):
            self._note(subject, index, s)

    def _note(self, subject: Subject, expert: int, s: Float[Tensor, " rank"]) -> None:
        assert subject.matrix is not None
        rank = self.limit(*subject.matrix) if self.limit is not None else None
        found = spectrum_of(s, subject, self.out.experts[expert], rank)
        if found is not None:
            self.out.spectra.append(found)

    def _time(self, matrix: Float[Tensor, "out in"]) -> float:
        """Seconds that the recipe's SVD of this matrix takes on one core."""
        rank = self.limit(*matrix.shape) if self.limit is not None else None
        if rank == 0:
            return 0.0
        with one_thread():
            start = time.perf_counter()
            svd(matrix) if rank is None else truncated_svd(matrix, rank)
            return time.perf_counter() - start

    def svd_seconds(self) -> float:
        """Times of shapes that were not timed: by out · in · rank, beside the slowest that was."""
        factored = sum(self._factored_times) / max(1, len(self._factored_times)) * self._factored
        if not self._dense_times:
            return factored
        known = max(self._dense_times, key=self._dense_times.__getitem__)
        rate = self._dense_times[known] / self._weight(known)
        each = [self._dense_times.get(s, rate * self._weight(s)) for s in self._dense]
        return factored + len(self.experts) * sum(each)

    def _weight(self, shape: tuple[int, int]) -> int:
        return prod(shape) * max(1, self.limit(*shape) if self.limit else min(shape))


@dataclass
class _Sums:
    """What blocks of one tensor add up to."""

    count: int

    def __post_init__(self) -> None:
        shape = (3, self.count, self.count)
        self.products, self.both, self.opposed = torch.zeros(shape, dtype=torch.float64)
        self.base = torch.zeros((), dtype=torch.float64)
        self.shared_entries = self.conflicts = 0
        self.large = [False] * (1 + self.count)
        self._differ: set[tuple[int, int]] = set()

    def see(self, vectors: Float[Tensor, "expert entry"], pairs: set[tuple[int, int]]) -> None:
        self.products += (vectors @ vectors.T).double()
        # Zeros, ones and minus ones: sums of up to 2^24 of them are exact in float32.
        signs = vectors.sign().float()
        moved = signs.abs()
        both = (moved @ moved.T).double()
        self.both += both
        self.opposed += (both - (signs @ signs.T).double()) / 2
        self.shared_entries += int((moved.sum(0) > 1).sum())
        self.conflicts += int(((signs.amax(0) > 0) & (signs.amin(0) < 0)).sum())
        for i, j in pairs - self._differ:
            if not torch.equal(vectors[i], vectors[j]):
                self._differ.add((i, j))

    def alike(self, pair: tuple[int, int]) -> bool:
        return pair not in self._differ


def _flat(tensor: Tensor, wide: bool) -> Float[Tensor, "row entry"]:
    """Rows to go through: `wide` ones, as LoRA's factors see a kernel, or else short ones."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.flatten(1) if wide else tensor.flatten(0, -2)


def _blocks(rows: int, width: int, experts: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, width * experts))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _rows(
    tensor: Tensor | LowRank | None, rows: slice, base: Float[Tensor, "row entry"]
) -> Float[Tensor, "row entry"]:
    """Rows of a task vector, in the dtype of the base's rows."""
    assert tensor is not None
    if isinstance(tensor, LowRank):
        return tensor.b[rows].to(base.dtype) @ tensor.a.to(base.dtype)
    return tensor[rows].to(base.dtype) - base


def _finite(tensor: Tensor | LowRank | None) -> bool:
    if isinstance(tensor, LowRank):
        return _finite(tensor.a) and _finite(tensor.b)
    return tensor is None or bool(torch.isfinite(tensor.double()).all())


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)
