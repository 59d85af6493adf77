"""One tensor: read, merged to the shared expert, and every expert's difference cut.

Pure computation: what comes out is what will be written, whoever writes it and wherever.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..artifact.format import DELTA, HEAD, Share
from ..checkpoint import LowRank
from ..errors import CheckpointError, NotFinite, RecipeError
from ..recipe import Depths
from .blocks import Buffers, Merge, Moved, all_finite, merge_blocks
from .exclusive import Factors, factorize, factorize_svd, squared_norm
from .journal import Candidate
from .linalg import ProductSVD
from .plan import Plan
from .planned import Planned
from .shared import coefficients, get, merge
from .sparse import Entries, dropout, magnitude
from .stream import Step, check_step, pairs, read_heads, read_step, unlike

LARGEST_COEFFICIENT = 1e30
"""Of a task vector: far from the end of float32, and from anything that is meant."""

DENSE = ".dense"
"""Suffix of a whole difference in the spool, from which entries are chosen when all are known."""


@dataclass
class Kept:
    """What one expert keeps of one tensor."""

    tensors: dict[str, Tensor]
    """By suffix of the tensor's name."""
    share: Share
    candidate: Candidate | None = None


@dataclass
class Done:
    """One tensor, ready to be written."""

    tensor: Planned
    shared: Tensor | None = None
    kept: dict[str, Kept] = field(default_factory=dict)
    base_square: float = 0.0
    moved: tuple[float, ...] = ()
    unlike: tuple[tuple[int, int], ...] = ()

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        kept = (part for each in self.kept.values() for part in each.tensors.values())
        return sum(part.nbytes for part in (self.shared, *kept) if part is not None)


class Worker:
    """Does one tensor after another, with the threads of `pool`.

    `alike` are the pairs of experts that were equal in all tensors so far.
    """

    def __init__(
        self, plan: Plan, pool: Executor, alike: Iterable[tuple[int, int]] | None = None
    ) -> None:
        self.plan, self.pool = plan, pool
        self.names = [expert.name for expert in plan.experts]
        self.alike = pairs(len(self.names)) if alike is None else set(alike)
        self.method = get(plan.recipe.merge_method)
        self.depths = Depths(plan.base.names())
        self._buffers = Buffers(2)  # one is written while the next is made
        self._local = threading.local()

    def do(self, tensor: Planned) -> Done:
        """Raises `NotFinite`, or `CheckpointError` for buffers that differ."""
        done = self._do(tensor)
        for name, kept in done.kept.items():
            check_part(kept.tensors, kept.share.error, tensor, name)
        return done

    def _do(self, tensor: Planned) -> Done:
        if tensor.kind == "head":
            return self._head(tensor)
        if tensor.kind in ("buffer", "base_only"):
            value = self.plan.base.read(tensor.name)
            self._check_buffer(tensor, value)
            return Done(tensor, cast(value, tensor.dtype, tensor.name))
        if tensor.kind == "tied":
            return Done(tensor)
        if tensor.running:
            return self._dense(read_step(self.plan, tensor, affine=False), _mean)
        parameters = self.plan.recipe.parameters_at(tensor.name, self.depths.of(tensor.name))
        c = coefficients(self.method.name, parameters, len(self.names))
        if c is not None and not float(c.abs().max()) < LARGEST_COEFFICIENT:
            raise RecipeError(
                f"parameters: at {tensor.name} a task vector would be multiplied by "
                f"{float(c.abs().max()):g}. Give smaller weights, or a smaller lambda."
            )
        step = read_step(self.plan, tensor, affine=c is not None)
        if step.vectors is not None:
            assert c is not None
            return self._factored(step, c)
        way = c
        if c is None and self.method.blockwise:
            way = partial(self._by_block, parameters)
        return self._dense(step, way, parameters)

    # ------------------------------------------------------------------ what is not merged

    def _head(self, tensor: Planned) -> Done:
        done = Done(tensor)
        heads = read_heads(self.plan, tensor)
        done.unlike = self._unlike(heads)
        for name, head in zip(self.names, heads, strict=True):
            own = cast(head, tensor.dtype, tensor.name)
            done.kept[name] = Kept({HEAD: own}, Share(storage="whole", bytes=own.nbytes, error=0.0))
        return done

    def _check_buffer(self, tensor: Planned, value: Tensor) -> None:
        if tensor.kind != "buffer" or tensor.running:
            return
        for expert in self.plan.experts:
            if tensor.name in expert.missing():
                continue  # constants that newer transformers no longer store
            if expert.info(tensor.name).dtype != value.dtype or not torch.equal(
                expert.read(tensor.name), value
            ):
                raise CheckpointError(
                    f"{tensor.name}: a {value.dtype} tensor, which cannot be merged and must be "
                    f"equal everywhere, but expert '{expert.name}' ({expert.reference}) has other "
                    "values than the base.\n  Leave the expert out, or give it the base's values."
                )

    # ------------------------------------------------------------------ the two ways to merge

    def _dense(
        self, step: Step, way: Merge | Tensor | None, parameters: dict | None = None
    ) -> Done:
        """Merge in `way` of `merge_blocks`, or by the method as a whole.

        `parameters` are the method's; without, `way` is an average of the experts alone.
        """
        tensor, experts = step.tensor, step.experts
        assert experts is not None
        work = self._work(step.base)

        moved, stored = merge_blocks(
            step.base,
            experts,
            way,
            work=work,
            store=tensor.dtype,
            pool=self.pool,
            buffers=self._buffers,
        )
        self._check(step, moved, work)
        if not moved.finite:
            raise _too_large(tensor)
        done = Done(tensor, moved=tuple(moved.experts), base_square=moved.base)
        done.unlike = self._unlike([None if own is step.base else own for own in experts])
        if tensor.matrix is None:
            done.base_square, done.moved = 0.0, ()
        if not moved.changed and (parameters is None or self._keeps(parameters)):
            done.shared = cast(step.base, tensor.dtype, tensor.name)
            return done
        if stored is None:
            assert parameters is not None
            stored = self._whole(step, parameters, work).to(tensor.dtype)
            if not all_finite(stored):
                raise _too_large(tensor)
        done.shared = stored
        if self.plan.keep.cut.none:
            return done
        # Against what was stored, rounding included: full rank gives the expert back.
        ground = stored.to(work)

        keep = partial(self._keep_difference, tensor, ground)
        named = list(zip(self.names, experts, strict=True))
        at_once = self.plan.keep.at_once(tensor, len(experts))
        for start in range(0, len(named), at_once):
            some = named[start : start + at_once]
            for (name, _), kept in zip(some, self.pool.map(keep, some), strict=True):
                done.kept[name] = kept
        return done

    def _by_block(self, parameters: dict, base: Tensor, own: list[Tensor]) -> Tensor:
        return merge(self.method.name, base, torch.stack(own), parameters)

    def _keep_difference(self, tensor: Planned, ground: Tensor, pair: tuple[str, Tensor]) -> Kept:
        """What the expert `pair[0]` keeps of its tensor `pair[1]` beyond `ground`."""
        name, own = pair
        out = self._scratch(ground) if tensor.matrix and self.plan.keep.form == "svd" else None
        return self._keep(tensor, name, torch.sub(_as(own, ground.dtype), ground, out=out))

    def _whole(self, step: Step, parameters: dict, work: torch.dtype) -> Tensor:
        """The shared expert by a method that wants all of a tensor at once."""
        assert step.experts is not None
        stacked = torch.empty(len(step.experts), *step.base.shape, dtype=work)
        for index, own in enumerate(step.experts):
            stacked[index].copy_(own)
        draws = self._generators(step.tensor.name)
        return merge(self.method.name, step.base.to(work), stacked, parameters, draws)

    def _factored(self, step: Step, c: Float[Tensor, " expert"]) -> Done:
        """The same for task vectors known in factors, and a shared expert affine in them.

        With c the coefficients, `W_t - W_s = Σ_j (δ_tj - c_j) B_j A_j`: the SVDs of all of these
        follow from one QR of the stacked factors, and no dense difference is formed.
        """
        assert step.vectors is not None
        tensor, view, vectors = step.tensor, step.tensor.matrix, step.vectors
        assert view is not None
        work = self._work(step.base)
        alone, _ = merge_blocks(step.base, [], None, work=work, store=work, pool=self.pool)
        self._check(Step(tensor, step.base), alone, work)
        held = [(index, v) for index, v in enumerate(vectors) if v is not None]
        owner = torch.cat([torch.full((v.a.shape[0],), index) for index, v in held])
        a = torch.cat([v.a for _, v in held])
        b = torch.cat([v.b for _, v in held], dim=1)
        merged = (b.to(work) * c[owner].to(work)) @ a.to(work)
        merged = merged.view(step.base.shape).add_(step.base.to(work))
        stored = merged.to(tensor.dtype)
        if not all_finite(stored):
            raise _too_large(tensor)
        # The exact factors know nothing of the rounding of what is stored; the error does.
        rounding = 0.0
        if tensor.dtype != work:
            lost, _ = merge_blocks(merged, [stored], None, work=work, store=work, pool=self.pool)
            rounding = lost.experts[0]
        done = Done(tensor, stored, base_square=alone.base)
        done.moved = tuple(0.0 if v is None else _square_of(v) for v in vectors)
        done.unlike = self._unlike(
            [None if v is None else torch.cat([v.b.T, v.a], 1) for v in vectors]
        )
        keep = self.plan.keep
        if keep.cut.none:
            return done
        if keep.form != "svd":
            ground = stored.to(work)
            base = step.base.to(work)
            for name, v in zip(self.names, vectors, strict=True):
                own = base if v is None else base + (v.b.to(work) @ v.a.to(work)).view(base.shape)
                done.kept[name] = self._keep(tensor, name, own - ground)
            return done
        product = ProductSVD(b, a)
        for index, name in enumerate(self.names):
            mine = product.svd((owner == index).double() - c[owner])
            factors = factorize_svd(
                mine,
                keep.cut,
                view,
                keep.dtype_of(tensor),
                bits=keep.bits,
                by_rank=keep.budget is not None,
                rounding=rounding,
            )
            done.kept[name] = _kept(factors)
        return done

    # ------------------------------------------------------------------ one expert's part

    def _keep(self, tensor: Planned, name: str, delta: Tensor) -> Kept:
        keep = self.plan.keep
        dtype = keep.dtype_of(tensor)
        if tensor.matrix is None:
            kept = cast(delta, tensor.dtype, tensor.name)
            square = squared_norm(delta)
            lost = squared_norm(delta - kept.to(delta.dtype)) if square else 0.0
            error = (lost / square) ** 0.5 if square else 0.0
            return Kept({DELTA: kept}, Share(storage="whole", bytes=kept.nbytes, error=error))
        if keep.form == "svd":
            return _kept(
                factorize(
                    delta.reshape(*tensor.matrix),
                    keep.cut,
                    dtype,
                    bits=keep.bits,
                    by_rank=keep.budget is not None,
                )
            )
        if keep.scope_all:
            share = Share(storage="whole", bytes=delta.nbytes, error=0.0)
            return Kept({DENSE: delta}, share)
        if keep.form == "magnitude":
            entries = magnitude(delta, keep.density, dtype)
        else:
            draw = self._generator(f"{tensor.name}/exclusive", name)
            entries = dropout(delta, keep.density, draw, dtype)
        return _sparse(entries)

    # ------------------------------------------------------------------ small things

    def _work(self, base: Tensor) -> torch.dtype:
        """What is computed in: the recipe's dtype, but float64 for a base of float64."""
        asked: torch.dtype = getattr(torch, self.plan.recipe.dtype)
        return torch.float64 if base.dtype == torch.float64 else asked

    def _scratch(self, like: Tensor) -> Tensor:
        """Room for a difference that is gone when the next one comes; one for each thread."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers(1)
        return self._local.buffers.next(like.numel(), like.dtype).view(like.shape)

    def _check(self, step: Step, moved: Moved, work: torch.dtype) -> None:
        """Raise `NotFinite` if a sum that would show it is not finite."""
        if not all(map(math.isfinite, (moved.base, *moved.experts))):
            check_step(self.plan, step, work)

    def _unlike(self, tensors: list[Tensor | None] | list[Tensor]) -> tuple[tuple[int, int], ...]:
        found = unlike(sorted(self.alike), tensors)
        self.alike -= set(found)
        return tuple(found)

    def _keeps(self, parameters: dict) -> bool:
        """Whether a tensor that no expert changed stays the base's (not if weights do not sum to 1
        in an unnormalised average)."""
        one = torch.ones(1, dtype=torch.float64)
        experts = one.expand(len(self.names), 1)
        out = merge(self.method.name, one, experts, parameters, self._generators("one"))
        return bool((out - 1).abs() < 1e-9)

    def _generators(self, tensor: str) -> list[torch.Generator] | None:
        if not self.method.random:
            return None
        return [self._generator(tensor, name) for name in self.names]

    def _generator(self, tensor: str, name: str) -> torch.Generator:
        """Seeded by seed, tensor and expert: the order of neither matters."""
        key = f"{self.plan.recipe.seed}/{tensor}/{name}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        return torch.Generator().manual_seed(seed)


def _mean(base: Tensor, experts: list[Tensor]) -> Tensor:
    """The average of running means or variances, of which no method makes a better one.

    Variances must not become negative: neither by a sum of task vectors, nor by its rounding.
    """
    return torch.stack(experts).mean(dim=0)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` as `dtype`. Raises `NotFinite` where a finite number becomes infinite by it."""
    out = tensor.to(dtype)
    if not (tensor.dtype.is_floating_point and dtype.is_floating_point):
        return out
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not all_finite(out):
        wide = tensor.double()
        if torch.isfinite(wide).all():
            raise NotFinite(
                f"{name}: holds {float(wide.abs().max()):g}, which {_named(dtype)} cannot (its "
                f"largest number is {torch.finfo(dtype).max:g}).\n  Set out_dtype to bfloat16 or "
                "float32."
            )
    return out


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _too_large(tensor: Planned) -> NotFinite:
    """What was merged from finite inputs is not finite as it is stored."""
    largest = torch.finfo(tensor.dtype).max
    advice = "Give smaller weights, or a smaller lambda."
    if tensor.dtype == torch.float16:
        advice = "Set out_dtype to bfloat16 or float32."
    return NotFinite(
        f"{tensor.name}: the merge gives values that {_named(tensor.dtype)} cannot hold (its "
        f"largest number is {largest:g}).\n  {advice}"
    )


def check_part(parts: dict[str, Tensor], error: float, tensor: Planned, name: str) -> None:
    """Raise `NotFinite` if a number of one expert's part is not finite as it is stored."""
    floats = [part for part in parts.values() if part.dtype.is_floating_point]
    if math.isfinite(error) and all(map(all_finite, floats)):
        return
    raise NotFinite(
        f"{tensor.name}: the difference of expert '{name}' from the shared expert cannot be stored "
        f"as {_named(floats[0].dtype) if floats else 'it should be'}: its numbers are too large.\n"
        "  Set exclusive.dtype to bfloat16 or float32, or look whether this expert is broken."
    )


def _as(tensor: Tensor, work: torch.dtype) -> Tensor:
    # 8-bit floats know no arithmetic; all others are promoted within one operation, without a copy.
    return tensor.to(work) if tensor.element_size() == 1 else tensor


def _square_of(vector: LowRank) -> float:
    """‖B A‖² = tr((BᵀB)(A Aᵀ))."""
    b, a = vector.b.double(), vector.a.double()
    return float(((b.T @ b) * (a @ a.T).T).sum())


def _kept(factors: Factors) -> Kept:
    size = sum(tensor.nbytes for tensor in factors.stored.values()) if factors.rank else 0
    share = Share(
        storage=factors.storage,
        rank=factors.rank,
        bytes=size,
        error=factors.error,
        truncation=factors.truncation,
        bound=factors.bound,
    )
    candidate = None
    if factors.squares:  # asked for: a budget chooses
        candidate = Candidate(
            squares=factors.squares, captured=factors.captured, missed=factors.missed
        )
    return Kept(dict(factors.stored) if factors.rank else {}, share, candidate)


def _sparse(entries: Entries) -> Kept:
    size = sum(tensor.nbytes for tensor in entries.stored.values()) if entries.count else 0
    share = Share(storage=entries.storage, entries=entries.count, bytes=size, error=entries.error)
    return Kept(dict(entries.stored) if entries.count else {}, share)
