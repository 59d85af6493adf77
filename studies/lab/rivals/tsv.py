r"""TSV-Compress: the leading singular triplets of every matrix of a task vector.

For expert t and one matrix, `Δ_t ≈ Σ_{j ≤ k} σ_j u_j v_jᵀ`. The paper keeps the same share of each
matrix's triplets for every task, k = min(out, in) / T (sections 4.1 and 5.2), and asks for the
task. It stores k (out + 1 + in) numbers for each matrix, and vectors whole (appendix B.3).

Ours: all numbers are float16. What is no matrix is stored whole, which is also what an artifact
does with vectors, in the dtype of its factors. No shared tensor beside the pretrained model.

Source: Gargiulo et al., Task Singular Vectors, arXiv:2412.00081. Our implementation.
"""

from __future__ import annotations

from collections.abc import Mapping

from twinmerge.merging.linalg import SVD

from .packed import Packed, Shapes, Vector

TITLE = "TSV-Compress"
SOURCE = "https://arxiv.org/abs/2412.00081"


def count(shape: tuple[int, ...], tasks: int) -> int:
    """The paper's k for one matrix: a `tasks`-th of its triplets, at least one."""
    return max(1, min(shape) // tasks)


def pack(vector: Vector, factors: Mapping[str, SVD], counts: Mapping[str, int]) -> Packed:
    """factors: matrix -> triplets, at least as many as `counts` says"""
    packed: Packed = {}
    for name, x in vector.items():
        if name not in factors:
            packed[f"{name}.whole"] = x.half()
            continue
        kept = factors[name].cut(counts[name])
        parts = {"u": kept.u, "s": kept.s, "vh": kept.vh}
        packed |= {f"{name}.{part}": x.half() for part, x in parts.items()}
    return packed


def unpack(packed: Packed, shapes: Shapes) -> Vector:
    found = {name: x.float() for name, x in packed.items()}
    return {
        name: found[f"{name}.whole"]
        if f"{name}.whole" in found
        else (found[f"{name}.u"] * found[f"{name}.s"]) @ found[f"{name}.vh"]
        for name in shapes
    }
