"""TwinModel: one model that routes every input to what it needs, and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..artifact.format import ExpertRecord, Manifest, RouterRecord
from ..errors import InputError, RouterError, did_you_mean
from .heads import HeadSwitch
from .router.features import FeatureReader
from .router.mlp import RouterMLP
from .routing import Routing, routed

Weights = Float[Tensor, "batch expert"]


@dataclass
class TwinOutput(ModelOutput):
    """What a forward gives.

    logits:  as the task model gives them: (batch, class), (batch, seq, vocab), ... Where heads
             differ in width, outputs that a row's head does not have are -inf.
    weights: (batch, expert), how much of each expert's exclusive knowledge every row ran with.
    expert:  (batch,), index into `TwinModel.experts` of the head that answered each row.
    model_output: everything else that the task model returned (caches, hidden states).
    """

    logits: Tensor | None = None
    weights: Tensor | None = None
    expert: Tensor | None = None
    model_output: Any = None


@dataclass(frozen=True)
class Answer:
    """One row's answer in words."""

    expert: str
    """Whose head answered."""
    weight: float
    """Routing weight of that expert."""
    label: str | None
    """The label with the highest score; None for a regression."""
    score: float
    """Softmax probability of the label, or the regression's value."""


class TwinModel(nn.Module):
    """A shared expert with the exclusive knowledge of T experts, chosen per row.

    Made by `twinmerge.load`. Called like the task model that it stands for; every row of a batch
    runs with its own weights, in one forward.
    """

    def __init__(
        self,
        model: nn.Module,
        manifest: Manifest,
        folder: Path,
        router: tuple[RouterMLP, RouterRecord] | None,
        router_problem: RouterError | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.manifest = manifest
        self.folder = folder
        self.experts: tuple[str, ...] = manifest.names
        self.router = None if router is None else router[0]
        self.router_layer = None if router is None else router[1].layer
        self._router_problem = router_problem
        self._has_heads = any(isinstance(module, HeadSwitch) for module in model.modules())
        self._tokenizer = None

    @cached_property
    def features(self) -> FeatureReader:
        """Reads router features. Raises `UnsupportedModel` if the model has no blocks to read from;
        such a model still runs with given weights.
        """
        return FeatureReader(self.model)

    @property
    def config(self) -> Any:
        """The task model's configuration (labels are per expert: see `labels`)."""
        return self.model.config

    @property
    def can_generate(self) -> bool:
        """Whether the task model is one that generates."""
        return bool(getattr(self.model, "can_generate", bool)())

    @property
    def dtype(self) -> torch.dtype:
        """In which the shared expert runs."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def tokenizer(self):
        """The base's tokenizer, loaded from the artifact when first asked for."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder)
            except (OSError, ValueError) as problem:
                raise InputError(
                    f"{self.folder}: holds no tokenizer that transformers can open ({problem}). "
                    "Give tokenized inputs instead of text."
                ) from None
            _give_padding(self._tokenizer, self.config)
        return self._tokenizer

    @property
    def labels(self) -> dict[str, list[str] | None]:
        """Label names by expert, in the order of its logits; None for a regression or no head."""
        out: dict[str, list[str] | None] = {}
        for expert in self.manifest.experts:
            known, width = self._known_labels(expert), self.outputs[expert.name] or 0
            named = [known.get(i, f"LABEL_{i}") for i in range(width)]
            out[expert.name] = named if width > 1 else None
        return out

    @property
    def outputs(self) -> dict[str, int | None]:
        """How many outputs each expert's head has: 1 for a regression, None without a head."""
        return {
            expert.name: expert.outputs or len(self._known_labels(expert)) or None
            for expert in self.manifest.experts
        }

    def _known_labels(self, expert: ExpertRecord) -> dict[int, str]:
        stored = expert.config.get("id2label") or {}
        if expert.outputs is None and "Classification" in type(self.model).__name__:
            stored = stored or self._base_labels()  # a head that base and experts have alike
        return {int(key): str(value) for key, value in stored.items()}

    def _base_labels(self) -> dict[Any, str]:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder, local_files_only=True).id2label or {}

    # ------------------------------------------------------------------ routing

    @torch.no_grad()
    def route(self, **inputs: Tensor) -> Weights:
        """Routing weights of every row: (batch, expert), float32, rows sum to 1.

        `w(x) = softmax(router(mean over tokens of the shared expert's hidden states))`, read after
        the layer that `fit-router` chose. Raises `RouterError` if the artifact has no router.
        """
        if self.router is None or self.router_layer is None:
            raise self._router_problem or RouterError("this model has no router")
        features = self.features.read(_tensors(inputs), [self.router_layer])[self.router_layer]
        return self.router(features).softmax(dim=-1)

    def _routing(
        self,
        inputs: Mapping[str, Any],
        weights: Tensor | Mapping[str, float] | Sequence | None,
        task: str | Sequence[str] | None,
        head: str | Sequence[str] | None,
    ) -> tuple[Routing, Weights, Tensor]:
        batch = _batch_size(inputs)
        if task is not None:
            if weights is not None:
                raise InputError("give task= or weights=, not both: each sets the weights")
            chosen = self._indices(task, batch, "task")
            resolved = torch.eye(len(self.experts), device=self.device)[chosen]
            head = task if head is None else head
        elif weights is not None:
            resolved = self._as_weights(weights, batch)
        else:
            resolved = self.route(**inputs)
        if head is not None:
            index = self._indices(head, batch, "head")
        else:
            empty = (resolved == 0).all(dim=-1)
            if self._has_heads and bool(empty.any()):
                row = int(empty.nonzero()[0, 0])
                raise InputError(
                    f"weights: row {row} is all zero (the shared expert), so no expert's head "
                    f"follows from it. Say whose head answers: head= one of {list(self.experts)}."
                )
            index = resolved.argmax(dim=-1)
        running = resolved if bool(resolved.any()) else None
        return Routing(running, index), resolved, index

    def _indices(self, names: str | Sequence[str], batch: int, what: str) -> Int[Tensor, " batch"]:
        listed = [names] * batch if isinstance(names, str) else list(names)
        if len(listed) != batch:
            raise InputError(f"{what}=: expected one name or {batch} of them, got {len(listed)}.")
        for name in listed:
            if name not in self.experts:
                hint = did_you_mean(str(name), list(self.experts))
                raise InputError(
                    f"{what}={name!r}: no such expert.{hint} Known: {', '.join(self.experts)}."
                )
        return torch.tensor([self.experts.index(name) for name in listed], device=self.device)

    def _as_weights(self, weights: Tensor | Mapping[str, float] | Sequence, batch: int) -> Weights:
        if isinstance(weights, Mapping):
            for name in weights:
                self._indices(str(name), 1, "weights")
            weights = [float(weights.get(name, 0.0)) for name in self.experts]
        tensor = torch.as_tensor(weights, dtype=torch.float32, device=self.device)
        if tensor.ndim == 1:
            tensor = tensor.expand(batch, -1)
        if tensor.shape != (batch, len(self.experts)):
            raise InputError(
                f"weights=: expected shape ({batch}, {len(self.experts)}) (batch, expert) or "
                f"({len(self.experts)},), got {tuple(tensor.shape)}. Experts in order: "
                f"{', '.join(self.experts)}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InputError("weights=: expected finite numbers, got NaN or infinity.")
        return tensor

    def weights_for(
        self,
        inputs: Mapping[str, Any],
        *,
        weights: Tensor | Mapping[str, float] | Sequence | None = None,
        task: str | Sequence[str] | None = None,
    ) -> Weights:
        """The weights that a call with these arguments runs with: (batch, expert)."""
        return self._routing(inputs, weights, task, None)[1]

    # ------------------------------------------------------------------ running

    def forward(
        self,
        *,
        weights: Tensor | Mapping[str, float] | Sequence | None = None,
        task: str | Sequence[str] | None = None,
        head: str | Sequence[str] | None = None,
        **inputs: Any,
    ) -> TwinOutput:
        """Route, then answer: every row with its own weights, in one forward.

        weights: (batch, expert) or (expert,) or {name: weight}: runs with these, router not asked
        task:    one name or one per row: all weight on that expert, and its head
        head:    one name or one per row: whose head answers; default the expert of highest weight
        inputs:  what the task model takes, as its tokenizer or processor makes it

        Raises `InputError` for unknown names and wrong shapes, `RouterError` without a router.
        """
        if inputs.get("labels") is not None:
            raise InputError(
                "labels=: no loss is defined over rows with different heads. Compute it from "
                "`logits` and `expert`."
            )
        routing, resolved, index = self._routing(inputs, weights, task, head)
        with routed(routing):
            output = self.model(**inputs)
        logits = getattr(output, "logits", None)
        return TwinOutput(logits=logits, weights=resolved, expert=index, model_output=output)

    @torch.no_grad()
    def generate(
        self,
        *,
        weights: Tensor | Mapping[str, float] | Sequence | None = None,
        task: str | Sequence[str] | None = None,
        **inputs: Any,
    ) -> Any:
        """`transformers`' generate, with the weights decided once, from the prompt.

        They stay as they are while tokens are added, so the key-value cache stays valid. Takes
        everything that `generate` takes. Raises `InputError` if the task model cannot generate.
        """
        if not self.can_generate:
            raise InputError(
                f"{type(self.model).__name__} cannot generate; call the model instead."
            )
        config = inputs.get("generation_config") or self.model.generation_config

        def setting(name: str) -> int:
            value = inputs.get(name)
            return int(value or getattr(config, name, None) or 1)

        prompt = {key: inputs[key] for key in _PROMPT if inputs.get(key) is not None}
        if "input_ids" in prompt and "attention_mask" not in prompt:
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
            inputs["attention_mask"] = prompt["attention_mask"]
        routing, _, _ = self._routing(prompt, weights, task, None)
        times = max(setting("num_beams"), setting("num_return_sequences"))
        with routed(routing.repeated(times)):
            return self.model.generate(**inputs)  # type: ignore[operator]

    def merged(
        self, weights: Tensor | Mapping[str, float] | Sequence[float], *, head: str | None = None
    ) -> PreTrainedModel:
        """One weighting for all inputs, merged densely: a plain transformers model.

        weights: (expert,) or {name: weight}; head: whose head, default that of the highest weight.
        For many weightings in a row use `runtime.export.DenseMerge`.
        """
        from .export import DenseMerge

        return DenseMerge(self).at(self._as_weights(weights, 1)[0], head)

    def answers(self, output: TwinOutput) -> list[Answer]:
        """The rows of a classification or regression output, in words.

        Raises `InputError` unless the model gives one answer for a row.
        """
        if output.logits is None or output.logits.ndim != 2:
            came = "no logits" if output.logits is None else f"logits {tuple(output.logits.shape)}"
            raise InputError(
                f"expected one answer per row: answers in words exist for logits of (batch, "
                f"class), but {type(self.model).__name__} gave {came}. Call the model from Python "
                "and read output.logits or output.model_output."
            )
        assert output.weights is not None and output.expert is not None
        labels = self.labels
        out = []
        for logits, weights, index in zip(
            output.logits.float(), output.weights, output.expert.tolist(), strict=True
        ):
            name = self.experts[index]
            names = labels[name]
            if names is None:
                out.append(Answer(name, float(weights[index]), None, float(logits[0])))
                continue
            scores = logits[: len(names)].softmax(dim=-1)
            best = int(scores.argmax())
            out.append(Answer(name, float(weights[index]), names[best], float(scores[best])))
        return out


_PROMPT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


def _give_padding(tokenizer: Any, config: Any) -> None:
    """A tokenizer without a padding token (Llama, GPT-2) gets the model's, else the end token."""
    if tokenizer.pad_token_id is None:
        known = getattr(config, "pad_token_id", None)
        token = tokenizer.eos_token if known is None else tokenizer.convert_ids_to_tokens(known)
        if token is not None:
            tokenizer.pad_token = token


def _tensors(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if isinstance(value, Tensor)}


def _batch_size(inputs: Mapping[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds", "pixel_values"):
        if isinstance(inputs.get(name), Tensor):
            return int(inputs[name].shape[0])
    given = ", ".join(sorted(inputs)) or "nothing"
    raise InputError(
        f"expected input_ids, inputs_embeds or pixel_values (a tensor, batch first), got {given}. "
        "Tokenize text first: model(**model.tokenizer(texts, return_tensors='pt', padding=True))."
    )
