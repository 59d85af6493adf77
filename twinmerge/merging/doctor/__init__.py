"""The doctor: what a person should know of a recipe's models before anything long runs.

    examine      opens the models, puts all together: `diagnose`
    measure      one pass: drifts, cosines, sign conflicts, spectra
    vocabulary   tokenizers compared as files
    findings     what the numbers mean, in sentences
    diagnosis    the result as plain data

Findings are "fail" where a build would stop, "look" where it would run and the result may
disappoint, "ok" where a usual trouble is not there. Nothing is written.
"""

from .diagnosis import SCHEMA, Diagnosis, ExpertReport, Finding, Needs
from .examine import SAMPLE, diagnose

__all__ = ["SAMPLE", "SCHEMA", "Diagnosis", "ExpertReport", "Finding", "Needs", "diagnose"]
