"""Task metrics, from scikit-learn and scipy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import InputError, did_you_mean


def _sklearn() -> Any:
    import sklearn.metrics  # slow to import, and `twinmerge --help` needs none

    return sklearn.metrics


def accuracy(truth: Sequence[float], guess: Sequence[float]) -> float:
    return float(_sklearn().accuracy_score(truth, guess))


def matthews(truth: Sequence[float], guess: Sequence[float]) -> float:
    """Matthews correlation; 0 where all guesses are of one class."""
    return float(_sklearn().matthews_corrcoef(truth, guess))


def f1(truth: Sequence[float], guess: Sequence[float]) -> float:
    """F1 of class 1."""
    # labels=[1]: a guess may also be -1, "no answer"
    score = _sklearn().f1_score(truth, guess, labels=[1], average="macro", zero_division=0)
    return float(score)


def accuracy_f1(truth: Sequence[float], guess: Sequence[float]) -> float:
    """Mean of accuracy and the F1 of class 1, as GLUE scores MRPC and QQP."""
    return (accuracy(truth, guess) + f1(truth, guess)) / 2


def macro_f1(truth: Sequence[float], guess: Sequence[float]) -> float:
    """Mean F1 over the classes that occur in `truth`."""
    classes = sorted(set(truth))
    score = _sklearn().f1_score(truth, guess, labels=classes, average="macro", zero_division=0)
    return float(score)


def pearson_spearman(truth: Sequence[float], guess: Sequence[float]) -> float:
    """Mean of Pearson and Spearman correlation; 0 where all guesses are equal."""
    from scipy.stats import pearsonr, spearmanr

    if len(set(guess)) < 2 or len(set(truth)) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # near-constant input: scipy warns and still answers
        linear: Any = pearsonr(truth, guess)
        ranked: Any = spearmanr(truth, guess)
    return float(linear[0] + ranked[0]) / 2


Metric = Callable[[Sequence[float], Sequence[float]], float]

METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "f1": f1,
    "accuracy_f1": accuracy_f1,
    "macro_f1": macro_f1,
    "pearson_spearman": pearson_spearman,
}


def metric(name: str) -> Metric:
    """The metric of that name. Raises `InputError` with the known names."""
    if name not in METRICS:
        raise InputError(
            f"metric {name!r}: no such metric.{did_you_mean(name, list(METRICS))} "
            f"Known: {', '.join(METRICS)}."
        )
    return METRICS[name]
