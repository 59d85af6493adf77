"""Everything that a report shows, measured once: scores, routing, calibration, bytes, spectra.

Routing is read in one pass over all rows; `score.evaluate` runs the protocols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...artifact.reader import Artifact
from ...data import Encoded, batches, encode, text_of, token_limit
from ...errors import InputError, RouterError, TwinMergeError
from ...recipe import Recipe
from ...runtime.base import load_base
from ...runtime.model import TwinModel
from ...runtime.router.calibration import calibration_error
from ...runtime.router.held_out import confusion
from ...show import summarise
from ..metrics import metric
from ..reference import expert_model, score_plain
from ..score import PROTOCOLS, Prepared, Progress, Report, Rows, evaluate, prepare
from . import measure
from .measure import Bin
from .signatures import Signature, seen
from .spectra import Spectrum, spectra

COVERAGES = (0.9, 0.95, 0.99)
"""Of the seen rows, at which unseen ones are counted."""


@dataclass(frozen=True)
class Noticed:
    """Rows of tasks that no expert saw, told from the seen by one measure of oddity."""

    by: str
    """`novelty` or `confidence`."""
    at: dict[float, float]
    """Coverage of the seen -> share of all unseen rows that are odder."""
    tasks: dict[str, dict[float, float]]
    """The same by unseen task."""


@dataclass(frozen=True)
class Routing:
    """What the router made of the rows. Tasks are experts' names; so are the keys inside."""

    experts: tuple[str, ...]
    learns: bool
    """Whether its weights depend on the input."""
    temperature: float
    held_out_accuracy: float | None
    """When it was fitted."""
    coverage: float | None
    """Asked for when it was fitted; None if it takes nothing for new."""
    accuracy: float
    accuracies: dict[str, float]
    """By task: share of rows that it finds likeliest to be their own expert's."""
    confusion: dict[str, dict[str, int]]
    weights: dict[str, dict[str, float]]
    """Mean weights by task (the paper's Figure 5), unseen tasks too."""
    unseen: tuple[str, ...]
    entropy: float
    """Of the weights of a row, in nats, mean over the rows of experts' tasks."""
    new: dict[str, float]
    """By task: share of rows taken for unlike all experts' data."""
    noticed: dict[str, float]
    """The same of unseen tasks."""
    calibration_error: float
    uncalibrated_error: float
    """At temperature 1."""
    reliability: list[Bin]
    uncalibrated: list[Bin]
    curves: dict[str, list[tuple[float, float]]]
    """`confidence`, `novelty`: (share of rows kept, share of these that reach their expert)."""
    told: list[Noticed]
    """How well unseen rows are told from seen ones; empty without unseen rows."""


@dataclass(frozen=True)
class Found:
    """All that was measured of one artifact on one folder of rows."""

    artifact: str
    data: str
    split: str
    summary: dict[str, Any]
    """As `inspect` says."""
    router: dict[str, Any] | None
    """The manifest's record of the router, and `said`."""
    no_router: str | None
    """Why nothing was routed."""
    rows: dict[str, int]
    truncated: dict[str, int]
    unseen_rows: dict[str, int]
    reports: dict[str, Report]
    """By protocol; empty for models without heads to score."""
    reference: dict[str, float] | None
    """The experts' own scores."""
    base: dict[str, float] | None
    """Scores of the base with each expert's head; None if the base is not here."""
    majority: dict[str, float]
    """Scores of always answering the commonest label."""
    routing: Routing | None
    spectra: list[Spectrum]
    signatures: tuple[Signature, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """As JSON; what is a share lies between 0 and 1."""
        plain = {
            name: asdict(value) if name == "routing" and value is not None else value
            for name, value in vars(self).items()
        }
        plain["reports"] = {name: report.to_dict() for name, report in self.reports.items()}
        plain["spectra"] = [asdict(each) for each in self.spectra]
        plain["signatures"] = [asdict(each) for each in self.signatures]
        return plain


def gather(
    model: TwinModel,
    rows: Mapping[str, Rows],
    *,
    unseen: Mapping[str, Rows] | None = None,
    recipe: Recipe | None = None,
    base: str | None = None,
    data: str = "",
    split: str = "",
    batch_size: int = 32,
    max_tokens: int | None = None,
    columns: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Found:
    """Measure an artifact on rows of every expert (task name -> rows with text and `label`).

    unseen:   rows of tasks that no expert saw; labels are not read
    recipe:   that the artifact was built from: its experts are scored too
    base:     the base model, scored under each expert's head; default the recipe's, else what the
              manifest names if that is on this disk
    data, split: where the rows are from, to be said

    Models that generate have no labels to score: only their routing is measured. Raises
    `InputError` for rows that do not fit, `CheckpointError` for experts or a base that are gone.
    """
    progress = progress or (lambda stage, done, total: None)
    limit = token_limit(model, max_tokens)
    if model.has_heads:
        prepared = prepare(model, rows, max_tokens=max_tokens, columns=columns)
        encoded = {name: task.encoded for name, task in prepared.items()}
    else:
        if recipe is not None or base is not None:
            raise InputError("--experts, --base: this model has no heads whose answers are scored.")
        prepared = {}
        encoded = _encoded(model, rows, limit, columns)
    others = _encoded(model, unseen or {}, limit, columns)
    routing, no_router = None, None
    if model.router is not None:
        routing = _routing(model, encoded, others, batch_size, progress)
    else:
        no_router = _why_none(model)
    reports, reference, base_scores = {}, None, None
    if prepared:
        if recipe is not None:
            reference = _own_scores(model, prepared, recipe, base, batch_size, progress)
            base = base or recipe.located().base_model
        base_scores = _base_scores(model, prepared, base, batch_size, progress)
        for protocol in PROTOCOLS:
            if routing is None and protocol in ("routed", "known-head"):
                continue
            reports[protocol] = evaluate(
                model,
                prepared,
                protocol,
                reference=reference,
                batch_size=batch_size,
                progress=lambda _, done, total, stage=protocol: progress(stage, done, total),
            )
    artifact = Artifact(model.folder, check=False)
    record = model.manifest.router
    found = Found(
        artifact=str(model.folder),
        data=data,
        split=split,
        summary=summarise(model.manifest, model.folder),
        router=None if record is None else record.model_dump(mode="json") | {"said": record.said},
        no_router=no_router,
        rows={name: len(each) for name, each in encoded.items()},
        truncated={name: each.truncated for name, each in encoded.items()},
        unseen_rows={name: len(each) for name, each in others.items()},
        reports=reports,
        reference=reference,
        base=base_scores,
        majority={name: _majority(task) for name, task in prepared.items()},
        routing=routing,
        spectra=spectra(artifact),
    )
    return replace(found, signatures=seen(found))


def _why_none(model: TwinModel) -> str:
    try:
        Artifact(model.folder, check=False).router()
    except RouterError as problem:
        return str(problem)
    return "the model was given without its router"


def _encoded(
    model: TwinModel, rows: Mapping[str, Rows], limit: int, columns: Sequence[str] | None
) -> dict[str, Encoded]:
    out = {}
    for name, found in rows.items():
        if not found:
            raise InputError(f"task '{name}': expected at least one row, got none.")
        try:
            texts = [text_of(dict(row), columns) for row in found]
        except InputError as problem:
            raise InputError(f"task '{name}': {problem}") from None
        out[name] = encode(model.tokenizer, texts, limit)
    return out


# ------------------------------------------------------------------------------------ routing


@torch.no_grad()
def _routing(
    model: TwinModel,
    seen_rows: Mapping[str, Encoded],
    unseen_rows: Mapping[str, Encoded],
    batch_size: int,
    progress: Progress,
) -> Routing:
    """One pass over all rows."""
    record = model.manifest.router
    assert record is not None and model.router is not None
    names = [*seen_rows, *unseen_rows]
    done, total = 0, sum(len(e) for e in (*seen_rows.values(), *unseen_rows.values()))
    weights, probabilities, novelty, new, task = [], [], [], [], []
    for place, encoded in enumerate((*seen_rows.values(), *unseen_rows.values())):
        for indices, batch in batches(model.tokenizer, encoded, batch_size):
            inputs: dict[str, Any] = {k: v.to(model.device) for k, v in batch.items()}
            said = model.routing(**inputs)
            weights.append(said.weights.cpu())
            probabilities.append(said.probabilities.cpu())
            novelty.append(said.novelty.cpu())
            new.append(said.new.cpu())
            task.append(torch.full((len(indices),), place))
            done += len(indices)
            progress("routing", done, total)
    return _summed(
        model,
        names,
        len(seen_rows),
        *(torch.cat(parts) for parts in (weights, probabilities, novelty, new, task)),
    )


def _summed(
    model: TwinModel,
    names: list[str],
    known: int,
    weights: Tensor,
    probabilities: Tensor,
    novelty: Tensor,
    new: Tensor,
    task: Tensor,
) -> Routing:
    """names: of tasks, of which `known` are experts; task: each row's place among them."""
    record, router = model.manifest.router, model.router
    assert record is not None and router is not None
    experts = tuple(model.experts)
    of_seen = task < known
    own = torch.tensor([experts.index(name) for name in names[:known]])
    truth, guess = own[task[of_seen]], probabilities[of_seen].argmax(dim=1)
    right = guess == truth
    before = measure.heated(probabilities[of_seen], router.temperature)
    confidence = probabilities.amax(dim=1).double()
    odd = {"confidence": -confidence} | ({} if router.novelty is None else {"novelty": novelty})
    shares = {name: float(new[task == i].double().mean()) for i, name in enumerate(names)}
    calibrated = probabilities[of_seen]
    return Routing(
        experts=experts,
        learns=router.kind != "none",
        temperature=router.temperature,
        held_out_accuracy=record.held_out_accuracy,
        coverage=None if record.novelty is None else record.novelty.coverage,
        accuracy=float(right.double().mean()),
        accuracies={
            name: float(right[task[of_seen] == i].double().mean())
            for i, name in enumerate(names[:known])
        },
        confusion=confusion(truth, guess, experts),
        weights={
            name: dict(zip(experts, weights[task == i].double().mean(dim=0).tolist(), strict=True))
            for i, name in enumerate(names)
        },
        unseen=tuple(names[known:]),
        entropy=measure.entropy(weights[of_seen]),
        new={name: shares[name] for name in names[:known]},
        noticed={name: shares[name] for name in names[known:]},
        calibration_error=calibration_error(calibrated, truth),
        uncalibrated_error=calibration_error(before, truth),
        reliability=measure.reliability(calibrated, truth),
        uncalibrated=measure.reliability(before, truth),
        curves={by: measure.coverage_curve(score[of_seen], right) for by, score in odd.items()},
        told=[
            _noticed(
                by, score[of_seen], {n: score[task == i] for i, n in enumerate(names) if i >= known}
            )
            for by, score in odd.items()
        ]
        if known < len(names)
        else [],
    )


def _noticed(by: str, of_seen: Tensor, unseen: dict[str, Tensor]) -> Noticed:
    together = torch.cat(list(unseen.values()))
    return Noticed(
        by,
        {share: measure.noticed_at(of_seen, together, share) for share in COVERAGES},
        {
            name: {share: measure.noticed_at(of_seen, odd, share) for share in COVERAGES}
            for name, odd in unseen.items()
        },
    )


# ------------------------------------------------------------------------- what scores are beside


def _own_scores(
    model: TwinModel,
    prepared: Mapping[str, Prepared],
    recipe: Recipe,
    base: str | None,
    batch_size: int,
    progress: Progress,
) -> dict[str, float]:
    scores = {}
    for done, (name, task) in enumerate(prepared.items()):
        progress("experts", done, len(prepared))
        plain = expert_model(model, name, recipe, base=base)
        scores[name] = score_plain(model, plain, name, task, batch_size=batch_size).score
    progress("experts", len(prepared), len(prepared))
    return scores


def _base_scores(
    model: TwinModel,
    prepared: Mapping[str, Prepared],
    base: str | None,
    batch_size: int,
    progress: Progress,
) -> dict[str, float] | None:
    """Of the base with each expert's head. None if it is not given and cannot be loaded."""
    scores = {}
    for done, (name, task) in enumerate(prepared.items()):
        progress("base", done, len(prepared))
        try:
            plain = load_base(model, name, base)
        except TwinMergeError:
            if base is not None:
                raise
            return None
        scores[name] = score_plain(model, plain, name, task, batch_size=batch_size).score
    progress("base", len(prepared), len(prepared))
    return scores


def _majority(task: Prepared) -> float:
    """Of the commonest label; for a regression of the mean."""
    if task.task.metric == "pearson_spearman":
        constant = fmean(task.truth)
    else:
        constant = max(sorted(set(task.truth)), key=task.truth.count)
    return metric(task.task.metric)(task.truth, [constant] * len(task.truth))
