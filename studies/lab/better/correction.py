r"""Bias correction: what a cut changes in the mean output of a layer, given back by its bias.

An expert's layer answers `W_t x + b_t`; cut, it answers `(W_s + B A) x + b`. With m the mean of its
inputs under the expert, the means are equal for

    b = b_t + (W_t - W_s - B A) m

which costs no byte where the expert's bias is stored anyway. A layer without a bias, or whose bias
no expert changed and so none stores, is left as it is.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
arXiv:1906.04721, section 4.2. There m comes from batch norms; here from unlabelled inputs, as in
their appendix D.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..rivals.packed import Vector


def corrected(vectors: Vector, lost: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> Vector:
    """The expert's vectors with every bias moved that can be.

    lost:  weight -> `W_t - W_s - B A`, (out, in)
    means: path of a linear layer -> m, (in)
    """
    found = dict(vectors)
    for path in correctable(vectors, means):
        moved = lost[f"{path}.weight"].double() @ means[path].double()
        found[f"{path}.bias"] = vectors[f"{path}.bias"] + moved.float()
    return found


def correctable(vectors: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> list[str]:
    """Paths of the layers whose bias is among `vectors`."""
    return [path for path in means if f"{path}.bias" in vectors]
