"""What the recipe keeps of every expert's matrices: ranks or entries, and their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from ..artifact.codec import row_bytes, sparse_bytes
from ..errors import RecipeError
from ..recipe import Exclusive
from .exclusive import Cut
from .planned import Planned
from .sparse import count_of

REACH = 4
"""With a budget, every matrix is cut to this many times the rank that an even spread would give it;
the budget is spent among those. What asks for more still is rare, and reported."""

LEAST_REACH = 16
"""And to no less than this rank."""


SMALL = 1 << 22
"""Entries below which memory does not count: 16 MB in float32."""

TRUNCATED_WORKSPACE, ENTRIES_WORKSPACE, EXACT_WORKSPACE = 1.5, 2.5, 14.0
"""What one expert's part takes while it is made, in sizes of its tensor: a truncated SVD, entries,
an exact SVD. Measured; the last is what LAPACK and Gram matrices in float64 want."""


@dataclass(frozen=True)
class Keep:
    """What is kept of `W_t - W_s`, and how it is stored.

    form:    svd (factors), or magnitude or dropout (a share `density` of the entries)
    cut:     how much of each matrix the svd keeps; with a budget, the most that it may
    bits:    8 or 4 for factors stored as integers
    dtype:   of factors and entries; None: as the shared expert stores the tensor
    scope_all: the largest entries of all matrices together, not of each
    budget:  bytes of all experts' files together
    """

    form: str
    cut: Cut
    bits: int | None = None
    dtype: torch.dtype | None = None
    density: float = 1.0
    scope_all: bool = False
    budget: int | None = None

    @property
    def bounded(self) -> bool:
        """Whether the recipe, and not the data, says how large the parts get at most."""
        return self.form != "svd" or (self.cut.energy is None and not self.cut.full)

    def dtype_of(self, tensor: Planned) -> torch.dtype:
        """In which factors or entries of this tensor are stored, where they are floats."""
        return self.dtype or tensor.dtype

    def component_bytes(self, tensor: Planned) -> int:
        """Bytes of one singular value's two vectors, as stored."""
        assert tensor.matrix is not None
        if self.bits is None:
            return sum(tensor.matrix) * self.dtype_of(tensor).itemsize
        return sum(row_bytes(n, self.bits) for n in tensor.matrix)

    def at_once(self, tensor: Planned, experts: int) -> int:
        """How many experts' parts of a tensor may be made side by side, for memory's sake.

        Beside the shared expert's two buffers a build may hold as many tensors of the largest size
        as there are experts. Small tensors do not count.
        """
        size = prod(tensor.shape)
        if size < SMALL:
            return max(1, experts)
        each = TRUNCATED_WORKSPACE if self.bounded else EXACT_WORKSPACE
        if self.form != "svd":
            each = ENTRIES_WORKSPACE
        return max(1, int(experts / each))

    def bytes_at_most(self, tensor: Planned) -> int:
        """Of one expert's part of a matrix."""
        if tensor.matrix is None or self.cut.none:
            return 0
        if self.form == "svd":
            return self.cut.limit(*tensor.matrix) * self.component_bytes(tensor)
        size = prod(tensor.shape)
        # Dropout keeps a random number of entries: allow for what will not happen in any lifetime.
        count = size if self.form == "dropout" and size < 1000 else count_of(size, self.density)
        if self.form == "dropout":
            count = min(size, count + int(10 * count**0.5) + 1)
        if self.scope_all:
            count = size
        return sparse_bytes(count, size, self.dtype_of(tensor).itemsize)


def keep_of(
    exclusive: Exclusive,
    matrices: list[Planned],
    experts: int,
    *,
    shared_bytes: int,
    whole_bytes: int,
) -> Keep:
    """The recipe's `exclusive` section in numbers.

    whole_bytes: of one expert's vectors and head and its file's header, for which a budget pays
    first

    Raises `RecipeError` if the budget is smaller than those.
    """
    bits = {"int8": 8, "int4": 4}.get(exclusive.dtype or "")
    dtype = getattr(torch, exclusive.dtype) if exclusive.dtype and not bits else None
    if exclusive.form != "svd":
        assert exclusive.density is not None, "the recipe asks for it"
        return Keep(
            exclusive.form,
            Cut(full=True),
            dtype=dtype,
            density=exclusive.density,
            scope_all=exclusive.scope == "all",
        )
    each = exclusive.budget_bytes(shared_bytes)
    if each is None:
        return Keep("svd", _cut(exclusive), bits, dtype)
    if each < whole_bytes:
        raise RecipeError(
            f"exclusive.budget: {exclusive.budget} is {each:,} bytes for each expert, but the "
            "vectors and the head, which are kept whole, and the file's header alone take up to "
            f"{whole_bytes:,}.\n  "
            "Give more, or build a static merge (exclusive: {rank: none})."
        )
    plain = Keep("svd", Cut(full=True), bits, dtype)
    one_rank = sum(plain.component_bytes(tensor) for tensor in matrices)
    even = (each - whole_bytes) / one_rank if one_rank else 0
    reach = max(LEAST_REACH, int(REACH * even) + 1)
    return Keep("svd", Cut(rank=reach), bits, dtype, budget=each * experts)


def _cut(exclusive: Exclusive) -> Cut:
    if exclusive.energy is not None:
        return Cut(energy=exclusive.energy)
    if isinstance(exclusive.rank, int):
        return Cut(rank=exclusive.rank)
    assert exclusive.rank is not None, "a recipe has a rank, an energy or a budget"
    if exclusive.rank.endswith("%"):
        return Cut(share=float(exclusive.rank.rstrip("% ")) / 100)
    return Cut(full=True) if exclusive.rank == "full" else Cut(none=True)


def stored_as(dtype: torch.dtype, out_dtype: str | None) -> torch.dtype:
    """In which a base's tensor of this dtype is stored: the recipe's out_dtype, or as it is.

    Except for 8-bit floats: a merge rounded to them loses what small task vectors say, and nothing
    runs such weights without a scale. They are stored as bfloat16, which holds all their values.
    """
    if out_dtype is not None:
        return getattr(torch, out_dtype)
    return torch.bfloat16 if dtype.is_floating_point and dtype.itemsize < 2 else dtype
