r"""TSV-Compress: the leading singular triplets of every matrix of a task vector.

For expert t and one matrix, `Δ_t ≈ Σ_{j ≤ k} σ_j u_j v_jᵀ`. The paper keeps the same share of each
matrix's triplets for every task, k = min(out, in) / T (sections 4.1 and 5.2), and asks for the
task. It stores k (out + 1 + in) numbers for each matrix, and vectors whole (appendix B.3).

Ours: u and v are float16, σ and vectors float32. What is no matrix is stored whole, which is also
what an artifact does with vectors. No shared tensor beside the pretrained model.

Source: Gargiulo et al., Task Singular Vectors, arXiv:2412.00081. Our implementation.
"""

from __future__ import annotations

from collections.abc import Mapping

from twinmerge.merging.linalg import SVD

from .rival_packed import Packed, Shapes, Vector

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
            packed[f"{name}.whole"] = x
            continue
        kept = factors[name].cut(counts[name])
        packed |= {f"{name}.u": kept.u.half(), f"{name}.s": kept.s, f"{name}.vh": kept.vh.half()}
    return packed


def unpack(packed: Packed, shapes: Shapes) -> Vector:
    return {
        name: packed[f"{name}.whole"]
        if f"{name}.whole" in packed
        else (packed[f"{name}.u"].float() * packed[f"{name}.s"]) @ packed[f"{name}.vh"].float()
        for name in shapes
    }
