"""How deep in the model a tensor lies, from its name: what mergekit's gradients run over."""

import re
from collections.abc import Iterable

_LAYER = re.compile(r"^(.+?)\.(\d+)\.")
"""A module list and the index in it: `model.layers` and 3 in `model.layers.3.mlp.weight`."""


class Depths:
    """The depth of every tensor of a model: 0 in its first layer, 1 in its last.

    A layer is an entry of a module list: the first number in a name that stands alone between
    dots. Layer i of L lies at `i / (L - 1)`, the only layer of a list at 1, and what is in no
    layer (embeddings, final norms, heads) at 0, which is what mergekit 0.1.5 does with both its
    pre- and its post-weights. Every list counts for itself, so that encoder and decoder of a T5
    each run from 0 to 1.

    `names` are all tensors of the base: one tensor's name does not say how many layers there are.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._last: dict[str, int] = {}
        for name in names:
            if match := _LAYER.match(name):
                stack, index = match[1], int(match[2])
                self._last[stack] = max(index, self._last.get(stack, 0))

    def of(self, tensor: str) -> float:
        """The depth of one tensor, in [0, 1]. A list that none of the names had counts as none."""
        match = _LAYER.match(tensor)
        if match is None or match[1] not in self._last:
            return 0.0
        last = self._last[match[1]]
        return int(match[2]) / last if last else 1.0
