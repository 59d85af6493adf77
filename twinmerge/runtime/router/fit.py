"""Fitting the router of an artifact, from nothing, a few lines, or rows of the user's own.

Rows are divided in parts that train, calibrate and choose (`splitting`); routers are compared on
the last (`choosing`). What is stored then learns from all rows but those that calibrate it. Unlike
the authors' code, which keeps the epoch that does best on the test rows, nothing but these rows is
ever looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...artifact.format import NoveltyRecord, RouterRecord
from ...artifact.reader import Artifact
from ...data import Chat, Text, batches, json_of, sample, token_limit
from ...errors import InputError
from ...recipe import Router as Settings
from ..load import load
from ..model import TwinModel
from .calibration import Sharpness, fit_temperature
from .choosing import Fitted, compare, train
from .encoder import TextEncoder
from .features import Features, Key, keys
from .held_out import measured
from .novelty import learnt
from .oddities import oddities
from .projection import by_projection
from .prompts import guessed_temperature, left_out
from .router import Router, joined
from .rows import FEATURE_BATCH, Progress, Rows, check_enough, divided, prepared
from .scorers import NOTHING, Fixed
from .sharpness import best_sharpness
from .statistics import finite
from .store import alone, store_router, stored
from .wanted import looks, only_layers, telling, tells, tried_layers

__all__ = ["fit_router", "store_router"]


def fit_router(
    folder: Path | str,
    texts: Mapping[str, Sequence[Text | Chat | str]] | None = None,
    settings: Settings | None = None,
    *,
    max_tokens: int | None = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> RouterRecord:
    """Fit the router of an artifact on texts of every expert, and store it there.

    texts: expert name -> texts like those that the expert is for: strings, pairs (tuples of two) or
        chats (`data.chat_of`). The kinds `none` and `projection` need none
    settings: default those of the recipe that the artifact was built from
    max_tokens: longer texts are cut to this many tokens; default 512, or what the model takes
    dtype: what the model computes in meanwhile, as in `load`; default as stored. Half precision is
        slow on most processors

    What the router reads (unless set) is the cheapest of what the held-out rows cannot tell from
    the best: an early layer costs a smaller part of a forward. Returns what is recorded in the
    manifest. Raises `InputError` for missing or too few rows, `OutputError` while another fit of
    the same artifact runs.
    """
    if texts is not None and not isinstance(texts, Mapping):
        raise InputError(
            f"texts=: expected {{expert: texts}}, got a {type(texts).__name__}. "
            "twinmerge.data.read_tasks(folder, experts, split) reads rows of a folder."
        )
    with alone(Path(folder)), torch.inference_mode(False), torch.enable_grad():
        model = load(folder, check=True, dtype=dtype)
        chosen = settings or Settings.model_validate(model.manifest.recipe.get("router", {}))
        fit = RouterFit(model, chosen, max_tokens, progress)
        router, record = fit.run(texts)
        kept = fit.examples(texts)
        return stored(Artifact(folder, check=False), router, record, kept)


class RouterFit:
    """One fit; holds what its steps share."""

    def __init__(
        self,
        model: TwinModel,
        settings: Settings,
        max_tokens: int | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.settings = model, settings
        self.experts, self.count = model.experts, len(model.experts)
        self.limit = token_limit(model, max_tokens)
        self.say: Progress = progress or (lambda stage, done, total: None)

    # ------------------------------------------------------------------ the steps

    def run(
        self, texts: Mapping[str, Sequence[Text | Chat | str]] | None
    ) -> tuple[Router, RouterRecord]:
        kind = self.settings.kind
        if kind == "none":
            return self._none()
        rows = None if texts is None else prepared(self.model, texts, self.settings, self.limit)
        if kind == "projection":
            return self._projection(rows)
        if rows is None:
            raise InputError(
                f"router kind {kind}: expected texts of every expert, got none. Without data there "
                "are the kinds projection and none."
            )
        return self._prompts(rows) if kind == "prompts" else self._learnt(rows)

    def examples(
        self, texts: Mapping[str, Sequence[Text | Chat | str]] | None
    ) -> dict[str, list[Any]]:
        """Texts to keep, by expert, as JSON has them."""
        count = self.settings.examples
        if texts is None or count == 0:
            return {}
        return {
            expert: [json_of(each) for each in sample(texts[expert], count, self.settings.seed)]
            for expert in self.experts
        }

    def _none(self) -> tuple[Router, RouterRecord]:
        weights = self.settings.weights or {name: 1 / self.count for name in self.experts}
        given = self.model.as_weights(weights, 1)[0]
        if float(given.sum()) <= 0 or bool((given < 0).any()):
            raise InputError(f"router weights: expected numbers above 0, got {weights}.")
        scorer = Fixed(self.count)
        scorer.logits.copy_((given / given.sum()).log().clamp(min=NOTHING))
        router = Router(scorer, kind="none")
        return router, self._record(router, None, reason="asked for")

    def _projection(self, rows: Rows | None) -> tuple[Router, RouterRecord]:
        router = by_projection(self.model, self.settings)
        if rows is None:
            router.temperature = self._asked_temperature(1.0)
            router.sharpness = self._asked_sharpness(1.0)
            return router, self._record(router, None, reason="asked for")
        check_enough(rows)
        logits = router.logits(self._features(rows, router.keys))
        return router, self._calibrate_projection(router, logits, rows)

    def _prompts(self, rows: Rows) -> tuple[Router, RouterRecord]:
        layers = only_layers(self.model, self.settings)
        features = self._features(rows, self._keys(layers))
        x = joined(features, self._keys(layers))
        every = torch.arange(len(rows.truth))
        scorer, _ = train("prompts", x, rows.truth, every, self.count, self.settings)
        router = self._router(scorer, layers, "prompts")
        logits = left_out(x, rows.truth, self.count, self.settings)
        if logits is None:
            guessed = guessed_temperature(router.logits(features), rows.truth)
            router.temperature = self._asked_temperature(guessed)
        else:
            router.temperature = self._asked_temperature(fit_temperature(logits, rows.truth))
        router.sharpness = self._asked_sharpness(1.0)
        record = self._record(router, rows, reason="asked for", counted=every)
        if logits is not None:  # each line by a router that has not seen it
            scaled = logits / router.temperature
            record = record.model_copy(update=measured(logits, scaled, rows.truth, self.experts))
        return router, record.model_copy(update={"warnings": oddities(rows, record, self._encoder)})

    def _learnt(self, rows: Rows) -> tuple[Router, RouterRecord]:
        check_enough(rows)
        sets = tried_layers(self.model, self.settings)
        wanted = {key for layers in sets for key in self._keys(layers)}
        if self.settings.encoder is None and self.settings.coverage < 1:
            found = [look for layers in sets for look in looks(self.model, self.settings, layers)]
            wanted |= {key for look in found for key in look}
        features = self._features(rows, sorted(wanted))
        parts, pairs = divided(rows, self.settings)
        if self.settings.layer == "auto":
            trained = [own for own, _ in pairs]
            sets = telling(sets, self.settings.pooling, features, trained)

        def step(done: int, total: int) -> None:
            self.say("comparing routers", done, total)

        own_pooling = self.settings.pooling
        by_layer = {layer: x for (layer, how), x in features.items() if how == own_pooling}
        tried, fitted, reason = compare(
            by_layer, rows.truth, parts.calibration, pairs, self.count, sets, self.settings, step
        )
        held = torch.cat([scored for _, scored in pairs])
        refit = self.settings.refit
        own = torch.cat([parts.train, parts.held_out]) if refit else parts.train
        router = self._trained(fitted, features, rows.truth, own, parts.calibration)
        router.sharpness = self._sharpness(rows, held, fitted.scaled)
        noticed = self._learn_new(router, features, rows.truth, own, parts.calibration)
        record = self._record(router, rows, reason=reason, counted=own)
        record = record.model_copy(
            update={
                "tried": tuple(
                    each.tried.model_copy(update={"pooling": self.settings.pooling})
                    for each in tried
                ),
                "epoch": fitted.epoch,
                "refitted": refit,
                "calibration_rows": len(parts.calibration),
                **measured(fitted.logits, fitted.scaled, rows.truth[held], self.experts),
            }
        )
        novelty = None
        if router.novelty is not None:
            novelty = NoveltyRecord(
                layers=router.novelty.layers,
                pooling=router.novelty.pooling,
                coverage=self.settings.coverage,
                threshold=router.novelty.threshold,
                noticed=noticed,
            )
        warnings = oddities(rows, record, self._encoder)
        return router, record.model_copy(update={"novelty": novelty, "warnings": warnings})

    # ------------------------------------------------------------------ pieces of them

    def _calibrate_projection(
        self, router: Router, logits: Float[Tensor, "row expert"], rows: Rows
    ) -> RouterRecord:
        """A router that learnt nothing, with its temperature and sharpness set on rows."""
        parts, _ = divided(rows, self.settings)
        truth, held = rows.truth, parts.held_out
        calibration = torch.cat([parts.train, parts.calibration])
        router.temperature = self._asked_temperature(
            fit_temperature(logits[calibration], truth[calibration])
        )
        scaled = logits[held] / router.temperature
        router.sharpness = self._sharpness(rows, held, scaled)
        record = self._record(router, rows, reason="asked for", counted=calibration[:0])
        record = record.model_copy(
            update={"calibration_rows": len(calibration)}
            | measured(logits[held], scaled, truth[held], self.experts)
        )
        return record.model_copy(update={"warnings": oddities(rows, record, self._encoder)})

    @property
    def _encoder(self) -> TextEncoder | None:
        if self.settings.encoder is None:
            return None
        if not hasattr(self, "_opened"):
            self._opened = TextEncoder(
                self.settings.encoder, self.model.tokenizer, self.settings.pooling
            )
        return self._opened

    def _router(self, scorer: nn.Module, layers: tuple[int, ...], kind: Any) -> Router:
        return Router(
            scorer.eval(),
            layers,
            kind=kind,
            pooling=self.settings.pooling,
            encoder=self._encoder,
        )

    def _keys(self, layers: Sequence[int]) -> tuple[Key, ...]:
        return keys(layers, self.settings.pooling)

    def _features(self, rows: Rows, wanted: Sequence[Key]) -> Features:
        parts: dict[Key, list[Tensor]] = {key: [] for key in wanted}
        order: list[int] = []
        total, tokenizer = len(rows.texts), self.model.tokenizer
        for indices, batch in batches(tokenizer, rows.encoded, FEATURE_BATCH):
            self.say("reading features", len(order), total)
            found = self._read({k: v.to(self.model.device) for k, v in batch.items()}, wanted)
            for key in wanted:
                parts[key].append(found[key].cpu())
            order += indices
        self.say("reading features", total, total)
        back = torch.tensor(order).argsort()
        features = {key: torch.cat(parts[key])[back] for key in wanted}
        for each in features.values():
            finite(each)
        return features

    def _read(self, inputs: dict[str, Tensor], wanted: Sequence[Key]) -> Features:
        if self.settings.kind == "projection":
            return self.model.energies.read(inputs, [layer for layer, _ in wanted])
        if self._encoder is not None:
            return {(0, self.settings.pooling): self._encoder.read(inputs)}
        return self.model.features.read(inputs, wanted)

    def _trained(
        self,
        fitted: Fitted,
        features: Features,
        truth: Tensor,
        own: Int[Tensor, " own"],
        calibration: Int[Tensor, " calibration"],
    ) -> Router:
        """The router that is stored: trained on the rows `own`, calibrated on others.

        These stay apart: what was set on a router of fewer rows does not fit one of more. Where
        features are as wide as there are rows, logits and distances shrink as rows are added.
        """
        x = joined(features, self._keys(fitted.layers))
        scorer, _ = train(
            fitted.kind, x, truth, own, self.count, self.settings, epochs=fitted.epoch
        )
        router = self._router(scorer, fitted.layers, fitted.kind)
        with torch.no_grad():
            found = fit_temperature(scorer(x[calibration]), truth[calibration])
        router.temperature = self._asked_temperature(found)
        return router

    def _learn_new(
        self,
        router: Router,
        features: Features,
        truth: Tensor,
        own: Int[Tensor, " own"],
        calibration: Int[Tensor, " calibration"],
    ) -> dict[str, float]:
        """Has it notice new inputs. Returns what it would notice of experts it does not know."""
        # Of one expert alone the relative distance is zero for every row.
        if self.settings.coverage >= 1 or self.count == 1:
            return {}
        found = [
            tuple(key for key in look if tells(features[key][own]))
            for look in looks(self.model, self.settings, router.layers)
        ]
        found = [look for look in found if look] or [self._keys(router.layers)]
        wanted = {key for look in found for key in look}
        known, check = ({key: features[key][rows] for key in wanted} for rows in (own, calibration))
        self.say("learning what is new", 0, 1)
        router.novelty, noticed = learnt(
            known,
            truth[own],
            check,
            truth[calibration],
            self.count,
            self.settings.coverage,
            found,
        )
        self.say("learning what is new", 1, 1)
        return {self.experts[place]: share for place, share in noticed.items()}

    def _asked_temperature(self, found: float) -> float:
        asked = self.settings.temperature
        return found if asked == "auto" else float(asked)

    def _asked_sharpness(self, otherwise: Sharpness) -> Sharpness:
        asked = self.settings.sharpness
        return otherwise if asked == "auto" else asked

    def _sharpness(
        self, rows: Rows, held: Int[Tensor, " held"], scaled: Float[Tensor, "held expert"]
    ) -> Sharpness:
        if self.settings.sharpness != "auto":
            return self.settings.sharpness
        return best_sharpness(self.model, rows, held, scaled, self.say)

    # ------------------------------------------------------------------ what is said of it

    def _record(
        self,
        router: Router,
        rows: Rows | None,
        *,
        reason: str,
        counted: Tensor | None = None,
    ) -> RouterRecord:
        counts = dict.fromkeys(self.experts, 0)
        if rows is not None and counted is not None:
            counts = rows.per_expert(counted)
        return RouterRecord(
            **router.as_recorded(),
            encoder=self.settings.encoder if router.encoder is not None else None,
            experts=self.experts,
            shared_sha256=self.model.manifest.shared_files(),
            rows=counts,
            held_out_rows=0,
            held_out_accuracy=None,
            confusion={},
            reason=reason,
            seed=self.settings.seed,
            max_tokens=None if rows is None else self.limit,
            bytes=0,
        )
