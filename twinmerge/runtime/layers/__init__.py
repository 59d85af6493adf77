"""Shared weight plus weighted factors, for every kind of layer that is linear in its weights.

A row x with weights w gets exactly what the densely merged weight would give it,

    (W_s + Σ_t w_t B_t A_t) x  =  W_s x + Σ_t w_t B_t (A_t x),

without forming one (out, in) matrix per row of the batch. `parts` says how; a layer takes any of
them. Outside a routing (`routing.routed`) every layer is the shared expert's own.

Where one weighting serves all rows (`Mix.one`), the layer may add its tensors up densely instead:
it does where that is cheaper (`denser`), and layers of other kinds (`TwinAny`) always do. Whoever
reads a tensor of a layer under a routing, without calling the layer, finds it mixed too (`Reads`).
"""

from .affine import Affine as Affine
from .affine import TwinConv1D as TwinConv1D
from .affine import TwinLinear as TwinLinear
from .anything import TwinAny as TwinAny
from .batch_norm import TwinBatchNorm as TwinBatchNorm
from .conv import TwinConv as TwinConv
from .mixing import STATIC_INSTEAD as STATIC_INSTEAD
from .mixing import Mixing as Mixing
from .mixing import Parts as Parts
from .mixing import Patch as Patch
from .mixing import Reads as Reads
from .mixing import Whole as Whole
from .mixing import Wrapping as Wrapping
from .mixing import called_with as called_with
from .mixing import mixer as mixer
from .mixing import read as read
from .mixing import stored as stored
from .norms import TwinElementwise as TwinElementwise
from .norms import TwinLayerNorm as TwinLayerNorm
