"""The eight GLUE tasks with GLUE's own metrics (Wang et al., arXiv:1804.07461)."""

from __future__ import annotations

from . import Task

_PAIR = ("sentence1", "sentence2")

GLUE = {
    "cola": Task("matthews", ("sentence",), ("unacceptable", "acceptable")),
    "sst2": Task("accuracy", ("sentence",), ("negative", "positive")),
    "mrpc": Task("accuracy_f1", _PAIR, ("not_equivalent", "equivalent")),
    "stsb": Task("pearson_spearman", _PAIR),
    "qqp": Task("accuracy_f1", ("question1", "question2"), ("not_duplicate", "duplicate")),
    "mnli": Task("accuracy", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": Task("accuracy", ("question", "sentence"), ("entailment", "not_entailment")),
    "rte": Task("accuracy", _PAIR, ("entailment", "not_entailment")),
}
