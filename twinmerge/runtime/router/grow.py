"""A router that follows when an expert comes, goes or is replaced, without rows of the others.

An expert that goes takes its own row of the router along; the odds among the others stay. A new one
gets a row where that can be made from its own data (prototypes) or from none (projection, fixed
weights). A linear or mlp router must be fitted again, with rows of all; else it is taken out.
Nothing is claimed that was measured with other experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...artifact.format import RouterRecord
from ...data import Chat, Text, batches, encode, row_of, sample, segments, token_limit
from ...errors import InputError, RouterError, UnsupportedModel, first_line
from ...recipe import Router as Settings
from ..model import TwinModel
from .encoder import ENCODER
from .features import Features, Key
from .fit import RouterFit
from .novelty import Novelty
from .projection import made_up
from .router import Router, joined
from .rows import FEATURE_BATCH, FEWEST, Progress
from .scorers import NOTHING, empty
from .splitting import alike, divide

Texts = Sequence[Text | Chat | str]

BY_EXPERT: dict[str, tuple[str, ...]] = {
    "none": ("logits",),
    "projection": ("usual", "spread"),
    "prototype": ("means", "counts"),
    "prompts": ("means", "counts"),
    "linear": ("layer.weight", "layer.bias"),
    "mlp": ("layers.8.weight", "layers.8.bias"),
}
"""Tensors of each kind of router that have a row for every expert."""

SAME = 1e-4
"""How near shares of made-up inputs must be to those recorded to count as unchanged."""

ENOUGH = 0.7
"""Share of a new expert's held-out rows that should reach it; with less a new fit is advised."""

Change = Callable[[str, Tensor], Tensor]
"""A tensor's name and its rows by expert -> the new rows."""


def novelty_means(layer: int) -> str:
    """The name of the means that tell new inputs on this layer."""
    return f"novelty.{layer}.means"


@dataclass(frozen=True)
class Followed:
    """The router after a change of experts."""

    router: Router | None
    """None: taken out."""
    record: RouterRecord | None
    said: tuple[str, ...]
    """What was done to it, in sentences."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Of a new expert, on rows of its own that it did not learn from: `held_out_rows`,
    `right` (how many go to it), `chosen` (by expert) and `new` (taken for unlike all). Of the
    examples kept in the artifact: `examples` and `moved` (to the new expert), by expert."""


# ------------------------------------------------------------------------------- an expert less


def shrunk(router: Router, record: RouterRecord, name: str) -> Followed:
    """The router without the expert `name`: exact for every kind but a projection.

    See `settled` for that. The odds among the others stay as they are; what would have gone to the
    one that goes is divided among them. With one expert left all goes to it.
    """
    kept = [index for index, expert in enumerate(record.experts) if expert != name]
    left = tuple(record.experts[index] for index in kept)
    smaller = _with_rows(router, lambda _, rows: rows[kept], len(kept))
    said = [f"'{name}' left the router; the odds among the others are as before"]
    scorer: Any = smaller.scorer
    if router.kind == "none" and bool((scorer.logits <= NOTHING).all()):
        scorer.logits.zero_()
        said = [f"'{name}' had all the weight; the others now have even weights"]
    if len(kept) == 1:
        smaller.novelty = None
        said = [f"'{left[0]}' is the only expert now: all inputs go to it, new ones too"]
    elif smaller.novelty is not None:
        seen = record.novelty.noticed.get(name) if record.novelty is not None else None
        share = "" if seen is None else f" ({seen:.0%} of its calibration rows were, at the fit)"
        said.append(
            f"inputs like those of '{name}' go to the others, unless they are noticed as new{share}"
        )
    return Followed(smaller, _unmeasured(record, smaller, left), tuple(said))


def settled(model: TwinModel, router: Router, record: RouterRecord) -> Followed:
    """A projection for the experts that `model` has now.

    Only layers are read in which every expert has knowledge, so one expert less may bring layers
    in. Then what made-up inputs give is taken again.
    """
    if router.kind != "projection":
        return Followed(router, record, ())
    return _projected(model, router, record, None)


# ------------------------------------------------------------------------------- an expert more


def grown(
    model: TwinModel,
    router: Router,
    record: RouterRecord,
    name: str,
    *,
    texts: Mapping[str, Texts] | None = None,
    weights: Mapping[str, float] | None = None,
    examples: Mapping[str, Texts] | None = None,
    progress: Progress | None = None,
) -> Followed:
    """The router of `record.experts`, for the experts of `model`: those and `name`.

    texts:    by expert. Prototypes need those of `name` alone, linear and mlp those of all
    weights:  of a router of kind none; default even
    examples: rows of the experts before, to see which change

    Without what its kind needs the router is taken out. Raises `InputError` for rows without text.
    """
    say: Progress = progress or (lambda stage, done, total: None)
    if record.kind == "none":
        return _weighted(model, record, name, weights)
    if record.kind == "projection":
        return _projected(model, router, record, name)
    texts = texts or {}
    if record.kind in ("linear", "mlp"):
        return _refitted(model, record, name, texts, progress)
    if not len(texts.get(name, ())):
        return _out(record, f"its kind ({record.kind}) needs rows of '{name}', and none were given")
    return _Prototypes(model, router, record, name, say).grown(texts[name], examples or {})


def _weighted(
    model: TwinModel, record: RouterRecord, name: str, weights: Mapping[str, float] | None
) -> Followed:
    settings = Settings(kind="none", weights=None if weights is None else dict(weights))
    router, fitted = RouterFit(model, settings, None, None).run(None)
    said = "even weights for all" if weights is None else "the weights given"
    record = _unmeasured(record, router, model.experts)
    return Followed(router, record, (f"'{name}' entered the fixed weighting: {said}",))


def _projected(
    model: TwinModel, router: Router, record: RouterRecord, name: str | None
) -> Followed:
    """Usual shares and their spread, of `name` anew; of all where other layers are read now."""
    settings = Settings(kind="projection", seed=record.seed)
    inputs = made_up(model, settings.seed)
    count, place = len(model.experts), None if name is None else model.experts.index(name)
    try:
        found = joined(model.energies.read(inputs, router.layers), router.keys)
    except UnsupportedModel as problem:
        return _out(record, f"with these experts it cannot be read: {first_line(problem)}")
    now = {
        "usual": found.mean(dim=0).view(-1, count).T,
        "spread": found.std(dim=0).clamp(min=1e-6).view(-1, count).T,
    }
    old = [index for index in range(count) if index != place]
    before: Any = router.scorer
    recorded = before.usual.view(-1, len(old)).T
    same = torch.allclose(recorded, now["usual"][old], rtol=SAME, atol=SAME)
    said = [] if name is None else [f"'{name}' entered it, without data"]

    def change(tensor: str, rows: Tensor) -> Tensor:
        if not same:
            return now[tensor]
        return rows if place is None else _inserted(rows, now[tensor][place], place)

    if not same:
        said.append(
            "other layers are read now (those in which all experts have knowledge), so what "
            "made-up inputs give was taken again for all"
        )
    changed = _with_rows(router, change, count) if place is not None or not same else router
    return Followed(changed, _unmeasured(record, changed, model.experts), tuple(said))


def _refitted(
    model: TwinModel,
    record: RouterRecord,
    name: str,
    texts: Mapping[str, Texts],
    progress: Progress | None,
) -> Followed:
    lacking = [expert for expert in model.experts if not len(texts.get(expert, ()))]
    if lacking:
        return _out(
            record,
            f"its kind ({record.kind}) must be fitted again with rows of all experts, and none "
            f"were given of {', '.join(lacking)}",
        )
    encoder = None if record.encoder is None else str(model.folder / ENCODER)
    layers = "auto" if record.encoder is not None else list(record.layers)
    asked = _settings(model).model_dump() | {
        "kind": record.kind,
        "layer": layers,
        "pooling": record.pooling,
        "encoder": encoder,
        "hidden": record.hidden,
        "seed": record.seed,
        "sharpness": record.sharpness,
    }
    if record.novelty is not None:
        asked["coverage"] = record.novelty.coverage
    elif len(record.experts) > 1:  # of one alone none is ever new
        asked["coverage"] = 1.0
    given = {expert: texts[expert] for expert in model.experts}
    fit = RouterFit(model, Settings.model_validate(asked), record.max_tokens, progress)
    router, fitted = fit.run(given)
    fitted = fitted.model_copy(update={"encoder": record.encoder})
    return Followed(router, fitted, (f"fitted again, with rows of all experts and '{name}'",))


def _out(record: RouterRecord, why: str) -> Followed:
    return Followed(
        None,
        None,
        (f"the router ({record.said}) was taken out: {why}. Run 'twinmerge fit-router' again",),
    )


class _Prototypes:
    """A new expert's mean under the precision that is stored, for prototypes and prompts."""

    def __init__(
        self, model: TwinModel, router: Router, record: RouterRecord, name: str, say: Progress
    ) -> None:
        self.model, self.router, self.record, self.say = model, router, record, say
        self.name, self.place = name, model.experts.index(name)
        self.settings = _settings(model)

    def grown(self, texts: Texts, examples: Mapping[str, Texts]) -> Followed:
        rows = [row_of(t) for t in sample(texts, self.settings.rows_per_task, self.record.seed)]
        features = self._features(rows, f"expert '{self.name}'")
        train, held = self._divided(rows)
        learnt = self._with_mean(features, train)
        measured = self._measured(learnt, features, held) if len(held) else {}
        every = torch.arange(len(rows))
        refit = self.record.refitted or self.record.kind == "prompts"
        counted = every if refit else train
        router = self._with_mean(features, counted) if refit else learnt
        moved = self._moved(router, examples)
        measured |= {
            "examples": {expert: count for expert, (_, count) in moved.items()},
            "moved": {expert: gone for expert, (gone, _) in moved.items()},
        }
        record = _unmeasured(self.record, router, self.model.experts)
        told, said = self._told(measured, len(counted))
        counts = self.record.rows | {self.name: len(counted)}
        record = record.model_copy(
            update={
                "rows": {expert: counts.get(expert, 0) for expert in self.model.experts},
                "warnings": (*record.warnings, told),
            }
        )
        return Followed(router, record, said, measured)

    def _told(self, measured: dict[str, Any], rows: int) -> tuple[str, tuple[str, ...]]:
        """For the record, and for the report."""
        said = [
            f"'{self.name}' entered with the mean of {rows} rows; the odds among the other experts "
            "are exactly as before, so an answer changes only where it is the likeliest, takes a "
            "share, or makes an input less new"
        ]
        told = f"'{self.name}' was added after the fit"
        if "right" not in measured:
            return f"{told}; too few rows to hold some out", tuple(said)
        share = f"{measured['right']} of {measured['held_out_rows']} of its held-out rows go to it"
        if measured["new"]:
            share += f", {measured['new']} are taken for new"
        said.append(share)
        if min(measured["right"], measured["held_out_rows"] - measured["new"]) < (
            ENOUGH * measured["held_out_rows"]
        ):
            said.append(
                "that is few: fit the router again ('twinmerge fit-router') with rows of all"
            )
        return f"{told}; {share}", tuple(said)

    def _features(self, rows: Sequence[Text | Chat], whose: str) -> Features:
        limit = token_limit(self.model, self.record.max_tokens)
        encoded = encode(self.model.tokenizer, rows, limit)
        for text, row in zip(rows, encoded.rows, strict=True):
            if not row["input_ids"] or not "".join(segments(text)).strip():
                raise InputError(
                    f"{whose}: a row has no text, got {text!r:.80}. A router learns nothing from "
                    "it: remove it."
                )
        found: dict[Key, list[Tensor]] = {}
        order: list[int] = []
        for indices, batch in batches(self.model.tokenizer, encoded, FEATURE_BATCH):
            self.say("reading features", len(order), len(rows))
            inputs = {key: value.to(self.model.device) for key, value in batch.items()}
            for key, each in self.router.read(self.model, inputs).items():
                found.setdefault(key, []).append(each.cpu())
            order += indices
        back = torch.tensor(order).argsort()
        features = {key: torch.cat(each)[back] for key, each in found.items()}
        if not all(bool(each.isfinite().all()) for each in features.values()):
            raise InputError(
                f"{whose}: NaN or infinity in the shared expert's hidden states for its rows. "
                "Fit a router on another layer ('twinmerge fit-router --layer')."
            )
        return features

    def _divided(self, rows: Sequence[Text | Chat]) -> tuple[Tensor, Tensor]:
        """Rows that give the mean, and rows held out; none of few rows, or rows that are alike."""
        every = torch.arange(len(rows))
        if len(rows) < FEWEST:
            return every, every[:0]
        shares = self.settings.calibration, self.settings.held_out
        truth = torch.zeros(len(rows), dtype=torch.long)
        try:
            parts = divide(alike(rows), truth, [self.name], shares, self.record.seed)
        except InputError:
            return every, every[:0]
        return torch.cat([parts.train, parts.calibration]).sort().values, parts.held_out

    def _with_mean(self, features: Features, chosen: Tensor) -> Router:
        """The router with the mean of these rows as the new expert's."""

        def mean(x: Tensor) -> Tensor:
            return x[chosen].double().mean(dim=0).float()

        new = {
            "means": mean(joined(features, self.router.keys)),
            "counts": torch.tensor(float(len(chosen))),
        }
        if self.router.novelty is not None:
            new |= {novelty_means(key[0]): mean(features[key]) for key in self.router.novelty.keys}
        return _with_rows(
            self.router,
            lambda name, rows: _inserted(rows, new[name], self.place),
            len(self.model.experts),
        )

    def _measured(self, router: Router, features: Features, held: Tensor) -> dict[str, Any]:
        routed = router({key: each[held] for key, each in features.items()})
        chosen = routed.probabilities.argmax(dim=-1).tolist()
        counts = {e: chosen.count(i) for i, e in enumerate(self.model.experts) if i in chosen}
        return {
            "held_out_rows": len(held),
            "right": counts.get(self.name, 0),
            "chosen": counts,
            "new": int(routed.new.sum()),
        }

    def _moved(self, router: Router, examples: Mapping[str, Texts]) -> dict[str, tuple[int, int]]:
        """Of each expert's examples: how many now go to the new expert, and how many there are."""
        moved = {}
        for expert, texts in examples.items():
            if expert == self.name or not len(texts):
                continue
            features = self._features([row_of(text) for text in texts], f"examples of '{expert}'")
            now = router(features).probabilities.argmax(dim=-1)
            moved[expert] = int((now == self.place).sum()), len(texts)
        return moved


# ------------------------------------------------------------------------------- pieces


def _settings(model: TwinModel) -> Settings:
    return Settings.model_validate(model.manifest.recipe.get("router", {}))


def _inserted(rows: Tensor, new: Tensor, place: int) -> Tensor:
    return torch.cat([rows[:place], new[None].to(rows), rows[place:]])


def _with_rows(router: Router, change: Change, experts: int) -> Router:
    """A copy of a router in which every tensor that has a row for each expert is changed."""
    scorer: Any = router.scorer
    by_expert = BY_EXPERT[router.kind]
    if not set(by_expert) <= set(scorer.state_dict()):
        raise RouterError(f"a router of kind {router.kind} has no {' or '.join(by_expert)}.")
    state = dict(scorer.state_dict())
    for name in by_expert:
        rows = state[name]
        if router.kind == "projection":  # block by block, the experts side by side
            state[name] = change(name, rows.view(-1, scorer.experts).T).T.reshape(-1)
        else:
            state[name] = change(name, rows)
    width = len(state["usual"]) if router.kind == "projection" else scorer.width
    changed: nn.Module = empty(router.kind, width, experts, getattr(scorer, "hidden", None))
    changed.load_state_dict(state)
    novelty, before = None, router.novelty
    if before is not None:
        means = {layer: before.at(layer).means for layer in before.layers}
        widths = {layer: found.shape[1] for layer, found in means.items()}
        novelty = Novelty(widths, experts, before.threshold, before.pooling)
        changed_means = {
            f"distances.{layer}.means": change(novelty_means(layer), found)
            for layer, found in means.items()
        }
        novelty.load_state_dict(before.state_dict() | changed_means)
    return Router(
        changed.eval(),
        router.layers,
        kind=router.kind,
        pooling=router.pooling,
        encoder=router.encoder,
        temperature=router.temperature,
        sharpness=router.sharpness,
        novelty=novelty,
    ).eval()


def _unmeasured(record: RouterRecord, router: Router, experts: Sequence[str]) -> RouterRecord:
    """The record for these experts, without what was measured with others."""
    gone = set(record.experts) - set(experts)
    novelty = record.novelty if router.novelty is not None else None
    note = "what was measured on held-out rows was measured with other experts, and is left out"
    warnings = [w for w in record.warnings if not any(_names(w, name) for name in gone)]
    return record.model_copy(
        update={
            **router.as_recorded(),
            "experts": tuple(experts),
            "rows": {expert: record.rows.get(expert, 0) for expert in experts},
            "novelty": novelty and novelty.model_copy(update={"noticed": {}}),
            "held_out_rows": 0,
            "held_out_accuracy": None,
            "calibration_error": None,
            "uncalibrated_error": None,
            "confusion": {},
            "tried": (),
            "reason": "",
            "warnings": tuple(w for w in warnings if w != note)
            + ((note,) if record.held_out_rows or note in record.warnings else ()),
        }
    )


def _names(text: str, name: str) -> bool:
    """Whether a warning speaks of this expert."""
    return re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text) is not None
