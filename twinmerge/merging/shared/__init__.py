"""Ways to make the shared expert `W_s`: one small function each, and one registry of them.

    linear            weighted average                      arXiv:2203.05482
    task_arithmetic   base plus weighted task vectors       arXiv:2212.04089
    ties              trim, elect a sign, average the rest  arXiv:2306.01708
    dare_linear       drop at random, then add              arXiv:2311.03099
    dare_ties         drop at random, then elect a sign     arXiv:2311.03099

Names, parameters and semantics are mergekit 0.1.5's, and a test compares the two on real
models; where we differ, the function's docstring says so. Everything is computed in the dtype
of the tensors given: pass float32 or float64.
"""

from .dare import dare_linear, dare_ties
from .linear import linear
from .registry import METHODS, Option, SharedMethod, coefficients, get, merge, shared_expert
from .task_arithmetic import task_arithmetic
from .ties import ties

__all__ = [
    "METHODS",
    "Option",
    "SharedMethod",
    "coefficients",
    "dare_linear",
    "dare_ties",
    "get",
    "linear",
    "merge",
    "shared_expert",
    "task_arithmetic",
    "ties",
]
