"""Fitting the router of an artifact, from nothing, a few lines, or rows of the user's own.

Rows are divided in parts that train, calibrate and choose (`splitting`); routers are compared on
the last (`choosing`). What is stored then learns from all rows but those that calibrate it. Unlike
the authors' code, which keeps the epoch that does best on the test rows, nothing but these rows is
ever looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...artifact.format import NoveltyRecord, RouterRecord
from ...artifact.reader import Artifact
from ...data import (
    Chat,
    Encoded,
    Text,
    batches,
    encode,
    json_of,
    row_of,
    sample,
    segments,
    token_limit,
)
from ...errors import InputError
from ...recipe import Router as Settings
from ..load import load
from ..model import TwinModel
from .calibration import Sharpness, calibration_error, fit_temperature, sharpened
from .choosing import Fitted, compare, layer_sets, train
from .encoder import TextEncoder
from .features import Features, Key, Pooling, keys
from .novelty import learnt
from .router import Router, joined
from .scorers import NOTHING, Fixed, Projection
from .splitting import Parts, alike, crossed, divide
from .statistics import finite
from .store import alone, store_router, stored

__all__ = ["fit_router", "store_router"]

Progress = Callable[[str, int, int], None]
"""Called with what is going on, steps done and steps in all."""

FEATURE_BATCH = 64
FEWEST = 5
"""Rows of each expert for the kinds that learn: one must train, one calibrate, one choose."""
SHARPNESS: tuple[Sharpness, ...] = (1.0, 2.0, 4.0, "top")
SHARPENED_ROWS = 96
"""Held-out rows on which `sharpness: auto` compares answers, all experts together."""
SMALL = 1024
"""Widths up to which several layers are looked at to tell new inputs."""
LOOKED = 5
"""Layers, at most: two matrices of each are stored."""
LEFT_OUT = 64
"""Times that lines are left out to see whether they would reach their own expert."""
CROSSED = 500
"""Held-out rows below which routers are compared on all rows but the calibrating, by turns."""
FOLDS = 5
CONFUSED = 0.1
"""Share of an expert's held-out rows that go to one other from which both are named."""


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


@dataclass
class _Rows:
    """The rows of all experts, one after the other."""

    texts: list[Text | Chat]
    truth: Int[Tensor, " row"]
    encoded: Encoded


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
        rows = None if texts is None else self._rows(texts)
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

    def _projection(self, rows: _Rows | None) -> tuple[Router, RouterRecord]:
        blocks = self._blocks()
        scorer = Projection(len(blocks) * self.count, self.count)
        usual = joined(self.model.energies.read(self.made_up(), blocks), keys(blocks))
        scorer.usual.copy_(usual.mean(dim=0))
        scorer.spread.copy_(usual.std(dim=0).clamp(min=1e-6))
        router = Router(scorer, blocks, kind="projection")
        if rows is None:
            router.temperature = self._asked_temperature(1.0)
            router.sharpness = self._asked_sharpness(1.0)
            return router, self._record(router, None, reason="asked for")
        self._check_enough(rows)
        logits = router.logits(self._features(rows, keys(blocks)))
        return router, self._calibrate_projection(router, logits, rows)

    def _prompts(self, rows: _Rows) -> tuple[Router, RouterRecord]:
        layers = self._only_layers()
        features = self._features(rows, self._keys(layers))
        x = joined(features, self._keys(layers))
        every = torch.arange(len(rows.truth))
        scorer, _ = train("prompts", x, rows.truth, every, self.count, self.settings)
        router = self._router(scorer, layers, "prompts")
        logits = self._left_out(x, rows.truth)
        if logits is None:
            own = router.logits(features)
            lead = own.gather(1, rows.truth[:, None])[:, 0] - own.scatter(
                1, rows.truth[:, None], float("-inf")
            ).amax(dim=1)
            # Nothing tells how sure to be: on the lines themselves about 9 in 10.
            router.temperature = self._asked_temperature(max(median(lead.tolist()) / 2, 1e-3))
        else:
            router.temperature = self._asked_temperature(fit_temperature(logits, rows.truth))
        router.sharpness = self._asked_sharpness(1.0)
        record = self._record(router, rows, reason="asked for", counted=every)
        if logits is not None:  # each line by a router that has not seen it
            scaled = logits / router.temperature
            record = record.model_copy(update=self._held_out(logits, scaled, rows.truth))
        return router, record.model_copy(update={"warnings": self._odd(rows, record)})

    def _learnt(self, rows: _Rows) -> tuple[Router, RouterRecord]:
        self._check_enough(rows)
        sets = self._sets()
        wanted = {key for layers in sets for key in self._keys(layers)}
        if self.settings.encoder is None and self.settings.coverage < 1:
            wanted |= {key for layers in sets for look in self._looks(layers) for key in look}
        features = self._features(rows, sorted(wanted))
        parts, pairs = self._divided(rows)
        if self.settings.layer == "auto":
            sets = self._telling(sets, features, [own for own, _ in pairs])

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
                **self._held_out(fitted.logits, fitted.scaled, rows.truth[held]),
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
        warnings = self._odd(rows, record)
        return router, record.model_copy(update={"novelty": novelty, "warnings": warnings})

    # ------------------------------------------------------------------ pieces of them

    def _calibrate_projection(
        self, router: Router, logits: Float[Tensor, "row expert"], rows: _Rows
    ) -> RouterRecord:
        """A router that learnt nothing, with its temperature and sharpness set on rows."""
        parts, _ = self._divided(rows)
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
            | self._held_out(logits[held], scaled, truth[held])
        )
        return record.model_copy(update={"warnings": self._odd(rows, record)})

    def _rows(self, texts: Mapping[str, Sequence[Text | Chat | str]]) -> _Rows:
        for expert in self.experts:
            if not len(texts.get(expert, ())):
                raise InputError(
                    f"expert '{expert}': expected rows to fit a router, got 0. A few dozen texts "
                    "that look like its inputs will do; for a few lines each there is the kind "
                    "prompts, without any data the kind projection."
                )
        extra = sorted(set(texts) - set(self.experts))
        if extra:
            known = ", ".join(self.experts)
            raise InputError(f"rows for '{extra[0]}', but no such expert. Known: {known}.")
        rows = [
            (index, row_of(text))
            for index, expert in enumerate(self.experts)
            for text in sample(texts[expert], self.settings.rows_per_task, self.settings.seed)
        ]
        found = [text for _, text in rows]
        encoded = encode(self.model.tokenizer, found, self.limit)
        for place, (index, text) in enumerate(rows):
            if not encoded.rows[place]["input_ids"] or not "".join(segments(text)).strip():
                raise InputError(
                    f"expert '{self.experts[index]}': a row has no text, got {text!r:.80}. A "
                    "router learns nothing from it: remove it."
                )
        return _Rows(found, torch.tensor([index for index, _ in rows]), encoded)

    def _check_enough(self, rows: _Rows) -> None:
        for expert, count in self._per(rows, torch.arange(len(rows.truth))).items():
            if count < FEWEST:
                raise InputError(
                    f"expert '{expert}': expected at least {FEWEST} rows to fit and check a "
                    f"router, got {count}. A few dozen that look like its inputs will do; with so "
                    "few there is the kind prompts (--kind prompts)."
                )

    def _sets(self) -> list[tuple[int, ...]]:
        if self.settings.encoder is not None:
            return [(0,)]
        width = self._width or 1 << 30
        return layer_sets(self.model.features.layers, width, self.settings.layer)

    def _only_layers(self) -> tuple[int, ...]:
        """Without rows to choose on: what was asked for, else a layer past the middle."""
        if self.settings.encoder is not None:
            return (0,)
        if self.settings.layer == "auto":
            return (-(-2 * self.model.features.layers // 3),)
        return layer_sets(self.model.features.layers, 0, self.settings.layer)[0]

    def _blocks(self) -> tuple[int, ...]:
        """Blocks that projections are read in: numbered from 1."""
        layers, asked = self.model.features.layers, self.settings.layer
        if asked == "auto":
            return tuple(range(1, layers + 1))
        blocks = layer_sets(layers, 0, asked)[0]
        if min(blocks) < 1 or max(blocks) > layers:
            raise InputError(
                f"router layer {asked}: a projection reads within blocks, 1 to {layers} here."
            )
        return blocks

    def made_up(self) -> dict[str, Tensor]:
        """Inputs of random tokens: what an input that says nothing gives."""
        tokenizer = self.model.tokenizer
        draw = torch.Generator().manual_seed(self.settings.seed)
        special = set(tokenizer.all_special_ids)
        known = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
        ids = known[torch.randint(len(known), (64, 24), generator=draw)].to(self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

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

    def _looks(self, layers: Sequence[int]) -> list[tuple[Key, ...]]:
        """Features by which new inputs may be told, up to the last of the layers that route.

        They are on the way of these. The last token's first: what it has of a text is more unlike
        for another format than the mean over tokens is.
        """
        if self.settings.encoder is not None:
            return [self._keys(layers)]
        last = max(layers)
        looked = sorted({round(last * part / (LOOKED - 1)) for part in range(LOOKED)})
        if (self._width or SMALL + 1) > SMALL:
            looked = [last]
        poolings: tuple[Pooling, ...] = ("last", "mean")
        return [keys(looked, pooling) for pooling in poolings]

    @property
    def _width(self) -> int | None:
        return getattr(self.model.model.config, "hidden_size", None)

    def _telling(
        self, sets: list[tuple[int, ...]], features: Features, parts: Sequence[Tensor]
    ) -> list[tuple[int, ...]]:
        """Without those that name a layer which says the same of every row of a part.

        The embedding of the first token is such a layer. All of them if none is left: then trying
        says what is wrong.
        """
        found = [
            each
            for each in sets
            if all(_tells(features[key][own]) for key in self._keys(each) for own in parts)
        ]
        return found or sets

    def _features(self, rows: _Rows, wanted: Sequence[Key]) -> Features:
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

    def _divided(self, rows: _Rows) -> tuple[Parts, list[tuple[Tensor, Tensor]]]:
        """And what routers that are compared train on and are scored on."""
        shares, seed = (self.settings.calibration, self.settings.held_out), self.settings.seed
        groups = alike(rows.texts)
        parts = divide(groups, rows.truth, self.experts, shares, seed)
        if not self.settings.refit or len(parts.held_out) >= CROSSED:
            return parts, [(parts.train, parts.held_out)]
        return parts, crossed(parts, groups, rows.truth, FOLDS, seed)

    def _left_out(
        self, x: Float[Tensor, "row width"], truth: Int[Tensor, " row"]
    ) -> Float[Tensor, "row expert"] | None:
        """Logits of every line by prototypes of the others; None if an expert has only one."""
        if int(torch.bincount(truth, minlength=self.count).min()) < 2:
            return None
        logits = torch.empty(len(truth), self.count)
        apart = torch.arange(len(truth)) % LEFT_OUT if len(truth) > LEFT_OUT else None
        for number in range(min(len(truth), LEFT_OUT)):
            left = torch.arange(len(truth)) == number if apart is None else apart == number
            rest = (~left).nonzero()[:, 0]
            scorer, _ = train("prompts", x, truth, rest, self.count, self.settings)
            logits[left] = scorer(x[left])
        return logits

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
        looks = [
            tuple(key for key in look if _tells(features[key][own]))
            for look in self._looks(router.layers)
        ]
        looks = [look for look in looks if look] or [self._keys(router.layers)]
        wanted = {key for look in looks for key in look}
        known, check = ({key: features[key][rows] for key in wanted} for rows in (own, calibration))
        self.say("learning what is new", 0, 1)
        router.novelty, noticed = learnt(
            known,
            truth[own],
            check,
            truth[calibration],
            self.count,
            self.settings.coverage,
            looks,
        )
        self.say("learning what is new", 1, 1)
        return {self.experts[place]: share for place, share in noticed.items()}

    def _asked_temperature(self, found: float) -> float:
        asked = self.settings.temperature
        return found if asked == "auto" else float(asked)

    def _asked_sharpness(self, otherwise: Sharpness) -> Sharpness:
        asked = self.settings.sharpness
        return otherwise if asked == "auto" else asked

    @torch.no_grad()
    def _sharpness(
        self, rows: _Rows, held: Int[Tensor, " held"], scaled: Float[Tensor, "held expert"]
    ) -> Sharpness:
        """What brings rows nearest to the answers of their own expert, all weight on it.

        The distance of answers is that of their logits, squared, of each expert as a share of the
        shared expert's distance. No labels are needed. `scaled`: logits over the temperature.
        """
        if self.settings.sharpness != "auto":
            return self.settings.sharpness
        probabilities = scaled.softmax(dim=-1).float()
        each = max(1, SHARPENED_ROWS // self.count)
        places = [
            place
            for expert in range(self.count)
            for place in (rows.truth[held] == expert).nonzero()[:each, 0].tolist()
        ]
        off = torch.zeros(len(SHARPNESS), self.count, dtype=torch.float64)
        scale = torch.zeros(self.count, dtype=torch.float64)
        chosen = Encoded([rows.encoded.rows[int(held[p])] for p in places], [False] * len(places))
        done = 0
        for indices, batch in batches(self.model.tokenizer, chosen, FEATURE_BATCH // 4):
            self.say("comparing answers", done, len(places))
            inputs = {key: value.to(self.model.device) for key, value in batch.items()}
            at = torch.tensor([places[i] for i in indices])
            own = rows.truth[held[at]]
            answer = _Answers(self.model, inputs, [self.experts[t] for t in own])
            truth = answer(torch.eye(self.count)[own])
            if truth is None:
                return 1.0
            shared = answer(torch.zeros(len(at), self.count))
            scale.index_add_(0, own, _apart(shared, truth))
            for place, sharpness in enumerate(SHARPNESS):
                given = answer(sharpened(probabilities[at], sharpness))
                off[place].index_add_(0, own, _apart(given, truth))
            done += len(indices)
        self.say("comparing answers", done, len(places))
        if not bool((scale > 0).any()):
            return 1.0
        mean = (off[:, scale > 0] / scale[scale > 0]).mean(dim=1)
        return SHARPNESS[int(mean.argmin())]

    # ------------------------------------------------------------------ what is said of it

    def _record(
        self,
        router: Router,
        rows: _Rows | None,
        *,
        reason: str,
        counted: Tensor | None = None,
    ) -> RouterRecord:
        counts = dict.fromkeys(self.experts, 0)
        if rows is not None and counted is not None:
            counts = self._per(rows, counted)
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

    def _per(self, rows: _Rows, chosen: Int[Tensor, " chosen"]) -> dict[str, int]:
        counts = torch.bincount(rows.truth[chosen], minlength=self.count).tolist()
        return dict(zip(self.experts, counts, strict=True))

    def _held_out(
        self,
        logits: Float[Tensor, "held expert"],
        scaled: Float[Tensor, "held expert"],
        truth: Int[Tensor, " held"],
    ) -> dict[str, Any]:
        guess = logits.argmax(dim=1)
        return {
            "held_out_rows": len(truth),
            "held_out_accuracy": float((guess == truth).double().mean()),
            "calibration_error": calibration_error(scaled.softmax(dim=1), truth),
            "uncalibrated_error": calibration_error(logits.softmax(dim=1), truth),
            "confusion": confusion(truth, guess, self.experts),
        }

    def _odd(self, rows: _Rows, record: RouterRecord) -> tuple[str, ...]:
        """What is odd about the rows: the same ones under two experts, experts that look alike."""
        told = []
        if self._encoder is not None and self._encoder.cut:
            told.append(
                f"{self._encoder.cut} of {len(rows.texts)} texts are longer than the "
                f"{self._encoder.max_tokens} tokens that the encoder reads: it routes on their "
                "beginning"
            )
        own: dict[str, set[int]] = {}
        for text, expert in zip(rows.texts, rows.truth.tolist(), strict=True):
            own.setdefault("\t".join(segments(text)).lower(), set()).add(expert)
        twice: dict[tuple[int, ...], int] = {}
        for experts in own.values():
            if len(experts) > 1:
                twice[tuple(sorted(experts))] = twice.get(tuple(sorted(experts)), 0) + 1
        for experts, count in sorted(twice.items(), key=lambda item: -item[1]):
            names = " and ".join(self.experts[t] for t in experts)
            told.append(
                f"{names}: {count} texts are among the rows of each. No router can tell whose they "
                "are; say task= or allowed= where you know."
            )
        for true, row in record.confusion.items():
            total = sum(row.values())
            for chosen, count in row.items():
                if chosen == true or count < max(3, CONFUSED * total):
                    continue
                most = " Are its rows in the right file?" if count > total / 2 else ""
                told.append(
                    f"{true}: {count} of its {total} held-out rows look like {chosen}.{most}"
                )
        return tuple(told)


def _tells(features: Float[Tensor, "row width"]) -> bool:
    """Whether they are not the same for every row."""
    return bool((features != features[0]).any())


class _Answers:
    """What the model answers to a batch with some weights, as (batch, number)."""

    def __init__(self, model: TwinModel, inputs: dict[str, Tensor], heads: list[str]) -> None:
        self.model, self.inputs = model, inputs
        self.head = heads if model.has_heads else None

    def __call__(self, weights: Float[Tensor, "batch expert"]) -> Float[Tensor, "batch n"] | None:
        output = self.model(**self.inputs, weights=weights, head=self.head)
        logits = output.logits
        if logits is None:
            return None
        if logits.ndim == 3:  # the last token's: what is said next
            mask = self.inputs.get("attention_mask", torch.ones(logits.shape[:2]))
            place = torch.arange(logits.shape[1], device=mask.device).expand(len(logits), -1)
            last = place.masked_fill(~mask.bool(), -1).amax(dim=1).clamp(min=0)
            logits = logits[torch.arange(len(logits)), last.to(logits.device)]
        return logits.masked_fill(logits.isinf(), 0.0).flatten(1).cpu()


def _apart(one: Tensor | None, other: Tensor) -> Float[Tensor, " batch"]:
    assert one is not None
    return (one.double() - other.double()).square().sum(dim=1)


def confusion(
    truth: Int[Tensor, " row"], guess: Int[Tensor, " row"], experts: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Rows by true expert, then by chosen expert; those that are 0 left out."""
    return {
        true: {
            chosen: count
            for j, chosen in enumerate(experts)
            if (count := int(((truth == i) & (guess == j)).sum()))
        }
        for i, true in enumerate(experts)
    }
