"""Exclusive parts of one matrix as they run: `Σ_t w_t D_t` without ever adding it up.

`D_t` is what expert t knows of one (out, in) matrix, and every row of a batch has its own w. A
part holds the D_t of some experts, as the artifact stores them:

    Factors    D_t = B_t A_t in floats, all experts stacked along the rank
    Packed     the same with A and B quantised, and kept so
    Scattered  one expert's D_t, few of whose entries are not zero, kept as values and positions

A matrix whose experts are stored in several ways has several parts, and what they give is added.
Each part serves every kind of layer by the operations of `Part`, and is exact for each row.
Experts without a weight in the batch cost nothing; where each row has few experts of its own
(`Mix.chosen`), only these are multiplied, in float factors by products of one row each, in the
other parts expert by expert.

No dense copy of a quantised or sparse part is kept: within an operation, at most `BLOCK` entries of
it (never less than a row) are dequantised or written out at a time. Only `dense`, for bare
parameters and dense merges, gives a whole matrix.
"""

from .factors import Factors as Factors
from .factors import TableFactors as TableFactors
from .packed import Packed as Packed
from .part import Part as Part
from .part import aligned as aligned
from .partlist import PartList as PartList
from .partlist import stacked as stacked
from .scattered import Scattered as Scattered
