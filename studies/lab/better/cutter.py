"""All experts cut to some bytes, in one way: what is cut, its files, and models of these.

The shared expert is rounded to `STORED` before anything is made of it, so that files make up for
that. All is made from train inputs and weights; scores are those of models made from files, read
back.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from twinmerge.artifact.format import HEAD
from twinmerge.data import Text, batches, encode
from twinmerge.merging.linalg import SVD, svd
from twinmerge.runtime.attach import named_tensors

from ..lab import STORED, Lab
from ..rivals.packed import Packed, Vector, from_file, to_file
from ..rivals.sources import Sources
from . import refit as refits
from .activation import aware
from .basis import cores, joint
from .correction import correctable, corrected
from .files import BASES, FACTORS, RANKS, Layout, packed_cores, packed_vectors, read_cores
from .made import Made, Tally
from .moments import Moments, moments
from .ranks import Ranks, across, budgeted, even
from .store import room, row_size
from .way import MOST_INPUTS, Way

BATCH = 32
ROUNDED: torch.dtype = getattr(torch, STORED)


class TooLarge(Exception):
    """What is kept beside the factors does not fit the budget."""


class Cutter:
    """Cuts the experts of a study; read and decomposed when first asked for."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.sources = Sources(lab, lambda shape: min(shape))
        self._texts: dict[str, list[Text]] = {}
        self._means: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._fits: tuple[Any, int, dict[str, refits.Fit]] | None = None

    # --------------------------------------------------------------------------------- what is cut

    @cached_property
    def shared(self) -> Vector:
        """The average as it is stored, minus the pretrained model."""
        vectors = list(self.sources.vectors.values())
        means = {name: torch.stack([v[name] for v in vectors]).mean(dim=0) for name in vectors[0]}
        return {name: self.stored(name, mean) for name, mean in means.items()}

    def stored(self, name: str, x: Tensor) -> Tensor:
        """A shared tensor minus the pretrained one, after their sum was rounded to `STORED`."""
        pretrained = self.sources.base[name].float()
        return (pretrained + x).to(ROUNDED).float() - pretrained

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in)."""
        shapes = self.sources.shapes
        return {name: (s[0], s[1]) for name, s in shapes.items() if len(s) == 2}

    @cached_property
    def plain_vectors(self) -> dict[str, torch.Size]:
        shapes = self.sources.shapes
        return {name: shape for name, shape in shapes.items() if len(shape) != 2}

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.matrices, self.plain_vectors)

    def difference(self, task: str, name: str) -> Tensor:
        return self.sources.vectors[task][name] - self.shared[name]

    @cached_property
    def triplets(self) -> dict[str, dict[str, SVD]]:
        """Task -> matrix -> all of its difference to the average."""
        return {
            task: {name: svd(self.difference(task, name)) for name in self.matrices}
            for task in self.lab.names
        }

    def moments(self, task: str, inputs: int, *, second: bool = False) -> dict[str, Moments]:
        """Of what comes into the linear layers of an expert, from so many of its task's train rows,
        or all where there are fewer."""
        if task not in self._texts:
            texts = self.lab.texts(task, "train")
            self._texts[task] = Random(0).sample(texts, min(MOST_INPUTS, len(texts)))
        texts = self._texts[task][:inputs]
        tokenizer = self.lab.plain.tokenizer
        encoded = encode(tokenizer, texts, self.lab.settings.max_tokens)
        read = (batch for _, batch in batches(tokenizer, encoded, BATCH))
        return moments(self.lab.expert(task), read, self.sources.layers, second=second)

    def means(self, task: str, inputs: int) -> dict[str, Tensor]:
        if (task, inputs) not in self._means:
            found = self.moments(task, inputs)
            self._means[task, inputs] = {path: each.mean for path, each in found.items()}
        return self._means[task, inputs]

    # ---------------------------------------------------------------------------------------- cuts

    @torch.no_grad()
    def made(self, way: Way, budget: float) -> Made:
        """Files that weigh at most `budget` on average, a share of one float16 base model.

        Raises `TooLarge`.
        """
        assert not way.clash, way
        limit = int(budget * self.sources.base_float16)
        if way.ranks == "basis":
            found = self._on_basis(way, limit)
        else:
            found = self._factored(way, limit)
        share = found.sizes(self.sources.base_float16)["share"]
        assert share <= budget, (share, budget)
        return found

    @torch.no_grad()
    def read(self, made: Made, task: str) -> Vector:
        """What the files hold: an expert minus the pretrained model."""
        packed = from_file(made.experts[task])
        if made.way.ranks == "basis":
            bases = self.layout.read_bases(made.bases, made.way.factors)
            updates = read_cores(packed, bases, made.way.factors)
        else:
            updates = self.layout.read_factors(packed, made.way.factors)
        exclusive = updates | self.layout.read_vectors(packed, made.way.vectors)
        return {name: x + exclusive[name] for name, x in made.shared.items()}

    @torch.no_grad()
    def model(self, made: Made, task: str) -> PreTrainedModel:
        """An expert made from the files. What no expert changed is rounded as the shared expert."""
        plain = self.sources.model(task, self.read(made, task))
        tensors = dict(named_tensors(plain))
        heads = [name.removesuffix(HEAD) for name in self.sources.heads[task]]
        own = {id(tensors[name]) for name in (*made.shared, *heads)}
        for x in tensors.values():  # by identity: a tied tensor has other names, too
            if id(x) not in own:
                x.copy_(x.to(ROUNDED))
        return plain

    def _factored(self, way: Way, limit: int) -> Made:
        space = self._room(way, limit, ranks=len(self.matrices))
        same = even(self.matrices, way.factors, space)
        every_budget: dict[str, Ranks] = {}
        if way.ranks == "across":
            whole = {task: self.triplets[task] for task in self.lab.names}
            if way.ridge is not None:
                whole = {task: self._aware(task, way) for task in self.lab.names}
            values = {
                task: {name: found.s for name, found in own.items()} for task, own in whole.items()
            }
            total = space * len(self.lab.names)
            every_budget = across(values, self.matrices, way.factors, total)

        def ranks(task: str, spectra: Mapping[str, SVD]) -> Ranks:
            wanted = same
            if way.ranks == "budget":
                values = {name: found.s for name, found in spectra.items()}
                wanted = budgeted(values, self.matrices, way.factors, space)
            elif way.ranks == "across":
                wanted = every_budget[task]
            # Where rows are zero there are fewer triplets.
            return {name: min(rank, len(spectra[name].s)) for name, rank in wanted.items()}

        shared, fits = self.shared, None
        if way.rounds:
            every = {task: ranks(task, self.triplets[task]) for task in self.lab.names}
            fits = self._refitted(every, way.rounds)
            shared = self.shared | {name: fit.shared for name, fit in fits.items()}
        experts: dict[str, bytes] = {}
        tally = Tally(shared)
        for index, task in enumerate(self.lab.names):
            if fits is not None:
                kept = {name: fit.factors[index] for name, fit in fits.items()}
            else:
                spectra = self.triplets[task] if way.ridge is None else self._aware(task, way)
                wanted = ranks(task, spectra)
                kept = {name: spectra[name].cut(rank) for name, rank in wanted.items()}
            packed = self.layout.factors(kept, way.factors)
            updates = self.layout.read_factors(packed, way.factors)
            packed |= self._vectors(task, way, updates, tally)
            experts[task] = to_file(packed | self.sources.heads[task])
            tally.ranks += [len(kept[name].s) for name in self.matrices]
        return tally.made(way, experts, b"")

    def _on_basis(self, way: Way, limit: int) -> Made:
        tasks, dtype = len(self.lab.names), way.factors
        space = self._room(way, limit, ranks=0)
        sizes = {RANKS: torch.zeros(2 * len(self.matrices), dtype=torch.int16)}
        header = limit - room(sizes, BASES, dtype, limit)

        def stored(size: int) -> float:
            """Bytes of cores, and an expert's part of the bases."""
            sides = [(min(size, out), min(size, in_)) for out, in_ in self.matrices.values()]
            own = sum(left * row_size(right, dtype) for left, right in sides)
            bases = header + sum(
                left * row_size(out, dtype) + right * row_size(in_, dtype)
                for (left, right), (out, in_) in zip(sides, self.matrices.values(), strict=True)
            )
            return own + bases / tasks

        size, most = 0, max(max(shape) for shape in self.matrices.values())
        while size < most and stored(size + 1) <= space:
            size += 1
        if not size:
            raise TooLarge(f"a basis of one vector and its core do not fit {limit} bytes")
        found = {
            name: joint([self.difference(task, name) for task in self.lab.names], size)
            for name in self.matrices
        }
        bases = self.layout.bases(found, dtype)
        experts: dict[str, bytes] = {}
        tally = Tally(self.shared)
        tally.ranks += [len(side) for basis in found.values() for side in (basis.u, basis.v)]
        stored_bases = self.layout.read_bases(bases, dtype)
        fitted = [
            cores(basis, [self.difference(task, name) for task in self.lab.names])
            for name, basis in stored_bases.items()
        ]
        for index, task in enumerate(self.lab.names):
            packed = packed_cores([each[index] for each in fitted], dtype)
            updates = read_cores(packed, stored_bases, dtype)
            packed |= self._vectors(task, way, updates, tally)
            experts[task] = to_file(packed | self.sources.heads[task])
        return tally.made(way, experts, bases)

    def _aware(self, task: str, way: Way) -> dict[str, SVD]:
        """Matrices that no linear layer holds have no inputs, and are cut plainly."""
        assert way.ridge is not None
        found = dict(self.triplets[task])
        for path, each in self.moments(task, way.inputs, second=True).items():
            name = f"{path}.weight"
            second = each.second(centred=way.correct)
            found[name] = aware(self.difference(task, name), second, way.ridge)
        return found

    def _refitted(self, ranks: dict[str, Ranks], rounds: int) -> dict[str, refits.Fit]:
        """With the shared expert as it is stored. Goes on where the last call stopped, if that was
        for the same ranks and fewer rounds."""
        names, vectors = self.lab.names, self.sources.vectors
        if self._fits is None or self._fits[0] != ranks or self._fits[1] > rounds:
            fits = {
                name: refits.start(
                    [vectors[task][name] for task in names],
                    [self.triplets[task][name].cut(ranks[task][name]) for task in names],
                )
                for name in self.matrices
            }
            self._fits = ranks, 0, fits
        _, done, fits = self._fits
        for _ in range(rounds - done):
            for name, fit in fits.items():
                fits[name] = refits.refit([vectors[task][name] for task in names], fit)
        self._fits = ranks, rounds, fits
        return {
            name: refits.settled(
                [vectors[task][name] for task in names], fit, self.stored(name, fit.shared)
            )
            for name, fit in fits.items()
        }

    # ------------------------------------------------------------------------------ room, vectors

    def _room(self, way: Way, limit: int, *, ranks: int) -> int:
        """Bytes for the factors of an expert, the same for all: files weigh `limit` on average, and
        only their heads differ in size. ranks: how many are stored in a file

        Raises `TooLarge`.
        """
        vectors = {name: self.shared[name] for name in self.plain_vectors}
        fixed = packed_vectors(vectors, way.vectors)
        if ranks:
            fixed[RANKS] = torch.zeros(ranks, dtype=torch.int16)
        heads = self.sources.heads.values()
        left = fmean(room(fixed | head, FACTORS, way.factors, limit) for head in heads)
        if left < 0:
            raise TooLarge(f"head and vectors take {-left:.0f} bytes more than {limit}")
        return int(left)

    def _vectors(self, task: str, way: Way, updates: Vector, tally: Tally) -> Packed:
        """Of one expert, corrected for what `updates` lack."""
        whole = self.sources.vectors[task]
        lost = {name: whole[name] - tally.shared[name] - x for name, x in updates.items()}
        tally.add(lost, {name: self.difference(task, name) for name in lost})
        vectors = {name: self.difference(task, name) for name in self.plain_vectors}
        if way.correct:
            means = self.means(task, way.inputs)
            vectors = corrected(vectors, lost, means)
            tally.corrected = len(correctable(vectors, means))
        return packed_vectors(vectors, way.vectors)
