"""Ways to make the shared expert `W_s`: one small function each, and one registry of them.

    linear            weighted average                            arXiv:2203.05482
    task_arithmetic   base plus weighted task vectors             arXiv:2212.04089
    ties              trim, elect a sign, average the rest        arXiv:2306.01708
    dare_linear       drop at random, then add                    arXiv:2311.03099
    dare_ties         drop at random, then elect a sign           arXiv:2311.03099
    della             drop small ones rather, then elect a sign   arXiv:2406.11617
    della_linear      drop small ones rather, then add            arXiv:2406.11617
    breadcrumbs       drop the largest and the small, then add    arXiv:2312.06795
    breadcrumbs_ties  the same, then elect a sign                 arXiv:2312.06795
    slerp             along the arc between two models            SIGGRAPH 1985
    model_stock       average, drawn to the base by the angles    arXiv:2403.19522
    sce               select, weigh by energy, erase minorities   arXiv:2408.07990
    tsv_m             task singular vectors, orthogonalised       arXiv:2412.00081
    iso_c             summed task matrices, spectrum made flat    arXiv:2502.04959
    iso_cts           the same, with directions of each task      arXiv:2502.04959

Names, parameters and semantics are mergekit 0.1.5's, for all but the last three, which it does not
have. A test compares the two on real models; where we differ, the function's docstring says so.
Everything is computed in the dtype of the tensors given: pass float32 or float64. The inputs are
left as they are, and but for the last three no method forms more than its result and some blocks.
"""

from .breadcrumbs import breadcrumbs, breadcrumbs_ties
from .dare import dare_linear, dare_ties
from .della import della, della_linear
from .linear import linear
from .model_stock import model_stock
from .registry import METHODS, Option, SharedMethod, coefficients, get, merge, shared_expert
from .sce import sce
from .singular_vectors import iso_c, iso_cts, tsv_m
from .slerp import slerp
from .task_arithmetic import task_arithmetic
from .ties import ties

__all__ = [
    "METHODS",
    "Option",
    "SharedMethod",
    "breadcrumbs",
    "breadcrumbs_ties",
    "coefficients",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "get",
    "iso_c",
    "iso_cts",
    "linear",
    "merge",
    "model_stock",
    "sce",
    "shared_expert",
    "slerp",
    "task_arithmetic",
    "ties",
    "tsv_m",
]
