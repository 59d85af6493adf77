"""The eight GLUE tasks with GLUE's own metrics (Wang et al., arXiv:1804.07461)."""

from __future__ import annotations

from . import Task

GLUE = {
    "cola": Task("matthews", ("sentence",)),
    "sst2": Task("accuracy", ("sentence",)),
    "mrpc": Task("accuracy_f1", ("sentence1", "sentence2")),
    "stsb": Task("pearson_spearman", ("sentence1", "sentence2")),
    "qqp": Task("accuracy_f1", ("question1", "question2")),
    "mnli": Task("accuracy", ("premise", "hypothesis")),
    "qnli": Task("accuracy", ("question", "sentence")),
    "rte": Task("accuracy", ("sentence1", "sentence2")),
}
