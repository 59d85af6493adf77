"""TwinModel: one model that routes every input to what it needs, and answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..artifact.format import ExpertRecord, Manifest
from ..errors import InputError, RouterError, UnsupportedModel, first_line
from .arguments import (
    Allowed,
    Given,
    Weights,
    allowed_experts,
    as_weights,
    batch_size,
    by_position,
    check_images,
    check_names,
    expert_indices,
    highest,
    tensors,
    tokens_of,
)
from .caches import PromptCache, brought, cached_weights, filled, given_back, tag
from .cost import plan_costs
from .generate import generate, prefill
from .heads import HeadSwitch
from .labels import PerExpertConfig
from .per_row import NotRowWise, PerRow
from .plan import Planner, Way, drop, groups
from .router.energies import EnergyReader
from .router.features import FeatureReader, Features
from .router.router import Routed, Router
from .router.store import of_router
from .routing import Cell, Routing, routed
from .split import run_split

if TYPE_CHECKING:
    from .explain import Explanation


@dataclass
class TwinOutput(ModelOutput):
    """What a forward gives.

    logits:  as the task model gives them: (batch, class), (batch, seq, vocab), ... Where heads
             differ in width, outputs that a row's head does not have are -inf.
    weights: (batch, expert), how much of each expert's exclusive knowledge every row ran with.
    expert:  (batch,), index into `TwinModel.experts` of the head that answered each row.
    model_output: everything else that the task model returned (caches, hidden states). Its fields
             are found as attributes of this, too (`start_logits`, `last_hidden_state`, ...).
    dropped: (batch,), how much weight `top_k` and `threshold` left out; None if neither was given.
    routed:  what the router said (`Routed`: probabilities, novelty, whether a row is new and so ran
             nearer to the shared expert); None where it was not asked.
    plan:    which way the batch ran, see `runtime.plan`.
    """

    logits: Tensor | None = None
    weights: Tensor | None = None
    expert: Tensor | None = None
    model_output: Any = None
    dropped: Tensor | None = None
    routed: Any = None
    plan: str | None = None

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("model_output")
        if name.startswith("_") or inner is None or not hasattr(inner, name):
            raise AttributeError(f"{type(self).__name__} has no {name!r}, nor has its model_output")
        return getattr(inner, name)


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


@dataclass(frozen=True)
class Decided:
    """What one call runs with."""

    routing: Routing
    weights: Weights
    """After `top_k` and `threshold`."""
    expert: Int[Tensor, " batch"]
    """Whose head answers."""
    dropped: Float[Tensor, " batch"] | None
    way: str
    routed: Routed | None = None
    """What the router said, if it was asked."""


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
        router: Router | None,
        router_problem: RouterError | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.manifest = manifest
        self.folder = folder
        self.experts: tuple[str, ...] = manifest.names
        self.router = router
        self._router_problem = router_problem
        self.has_heads = any(isinstance(module, HeadSwitch) for module in model.modules())
        self.planner = Planner()
        self.untouched_layers = -1
        """The last layer that no expert changes: a router that reads there costs no forward."""
        self._tokenizer = None
        self._main_device: torch.device | None = None

    @cached_property
    def features(self) -> FeatureReader:
        """Reads router features. Raises `UnsupportedModel` if the model has no blocks to read from;
        such a model still runs with given weights.
        """
        return FeatureReader(self.model)

    @cached_property
    def energies(self) -> EnergyReader:
        """Reads how much of an input lies in each expert's space, for a router kind projection."""
        return EnergyReader(self.features, len(self.experts))

    @cached_property
    def break_even(self) -> float:
        """Tokens of one weighting from which merging it densely costs less, see `runtime.cost`."""
        return max(plan_costs(self).break_even, 1.0)

    @property
    def config(self) -> Any:
        """The task model's configuration. Its labels raise `InputError` where the experts' differ:
        see `labels`.
        """
        return self.model.config if self._labelled_alike else self._guarded_config

    @cached_property
    def _labelled_alike(self) -> bool:
        kinds = [expert.config.get("problem_type") for expert in self.manifest.experts]
        labels = list(self.labels.values())
        return all(each == labels[0] for each in labels) and len(set(kinds)) == 1

    @cached_property
    def _guarded_config(self) -> PerExpertConfig:
        return PerExpertConfig(self.model.config, self.experts)

    @property
    def generation_config(self) -> Any:
        """The task model's defaults for `generate`; None if it does not generate."""
        return getattr(self.model, "generation_config", None)

    @property
    def input_modalities(self) -> Any:
        """As the task model says it."""
        return getattr(self.model, "input_modalities", None)

    @property
    def output_modalities(self) -> Any:
        """As the task model says it."""
        return getattr(self.model, "output_modalities", None)

    def can_generate(self) -> bool:
        """Whether the task model is one that generates."""
        return bool(getattr(self.model, "can_generate", bool)())

    @property
    def dtype(self) -> torch.dtype:
        """In which the shared expert runs."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def origin(self) -> tuple[str, torch.dtype]:
        """Digest of the weight files, and the dtype: what a key-value cache is valid for."""
        return self._weights_digest, self.dtype

    @cached_property
    def _weights_digest(self) -> str:
        files = self.manifest.files.items()
        kept = sorted((name, record.sha256) for name, record in files if not of_router(name))
        return sha256(repr(kept).encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        """Where inputs are expected."""
        return self._main_device or next(self.model.parameters()).device

    @property
    def hf_device_map(self) -> dict[str, Any] | None:
        """Module -> device, of a model that `load(device_map=)` spread; None if in one place."""
        return getattr(self.model, "hf_device_map", None)

    def _apply(self, fn, recurse=True):
        # .to(), .half(), .cuda() and the like all come here.
        if self._main_device is not None:
            raise InputError(
                "the model was loaded with device_map=, so it cannot be moved or cast. Load it "
                "again with another device_map= or dtype=."
            )
        self.planner.forget()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.planner.forget()
        return super().load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> TwinModel:
        """As of any module; the router, whose norms would learn from what it reads, stays."""
        super().train(mode)
        if self.router is not None:
            self.router.eval()
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self._main_device is not None:
            raise InputError(
                "the model was loaded with device_map=, so it cannot be pickled or copied. Load it "
                "in the process that runs it."
            )
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        from .pipelines import register

        super().__setstate__(state)
        register()

    @property
    def tokenizer(self):
        """The base's tokenizer, loaded from the artifact when first asked for."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder)
            except (OSError, ValueError, KeyError) as problem:
                advice = "Give tokenized inputs instead of text."
                if "image" in str(self.input_modalities):
                    advice = "It reads images: see model.image_processor."
                raise InputError(
                    f"{self.folder}: holds no tokenizer that transformers can open "
                    f"({first_line(problem)}). {advice}"
                ) from None
            _give_padding(self._tokenizer, self.config)
        return self._tokenizer

    @cached_property
    def image_processor(self) -> Any:
        """The base's image processor, loaded from the artifact when first asked for."""
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError, ImportError) as problem:
            raise InputError(
                f"{self.folder}: holds no image processor that transformers can open "
                f"({first_line(problem)}). Give pixel_values prepared as for the "
                "base, to a pipeline: image_processor=."
            ) from None

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

    def __repr__(self) -> str:
        """In a few lines; `model.model` shows every layer."""
        listed = ", ".join(self.experts[:8]) + (", ..." if len(self.experts) > 8 else "")
        router = "none" if self.router is None else self.router.said
        return (
            f"TwinModel({type(self.model).__name__}, {len(self.experts)} experts: {listed}\n"
            f"  router: {router}; {self.dtype}, {self.device}; from {self.folder})"
        )

    # ------------------------------------------------------------------ routing

    @torch.no_grad()
    def route(self, *, allowed: Allowed = None, **inputs: Any) -> Weights:
        """Routing weights of every row: (batch, expert), float32.

        Rows sum to 1, or to less where the input is unlike all experts' data. `routing` says more.
        Raises `RouterError` if the artifact has no router.
        """
        return self.routing(allowed=allowed, **inputs).weights

    @torch.no_grad()
    def routing(self, *, allowed: Allowed = None, **inputs: Any) -> Routed:
        """What the router says of every row: weights, calibrated probabilities, novelty.

        allowed: names of the experts that may be chosen, for all rows or a list of them per row

        Read under the shared expert, where `fit-router` chose to. Raises `RouterError` if the
        artifact has no router, `InputError` for names that no expert has.
        """
        if self.router is None:
            raise self._router_problem or RouterError("this model has no router")
        taken = tensors(inputs)
        return self.routed_from(self.router.read(self, taken), allowed)

    @torch.no_grad()
    def routed_from(self, features: Features, allowed: Allowed = None) -> Routed:
        """What the router makes of features, also of those that a forward with gradients gives.

        Raises `RouterError` where it makes nothing of them: NaN or infinity.
        """
        assert self.router is not None
        features = {key: found.to(self.device) for key, found in features.items()}
        batch = len(next(iter(features.values())))
        said = self.router(features, allowed_experts(allowed, self.experts, batch, self.device))
        finite = torch.isfinite(said.probabilities).all(dim=-1) & torch.isfinite(said.novelty)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0, 0])
            well = all(bool(torch.isfinite(found[row]).all()) for found in features.values())
            raise RouterError(
                f"router: expected finite weights, got NaN in row {row}, from features "
                f"({self.router.said}) that are {'finite' if well else 'NaN or infinity'}. Load "
                "the model with dtype=torch.float32 if its hidden states overflow, fit the router "
                "again (twinmerge fit-router), or give weights= or task=."
            )
        return said

    def decide(
        self,
        inputs: Mapping[str, Any],
        *,
        weights: Given = None,
        task: str | Sequence[str] | None = None,
        head: str | Sequence[str] | None = None,
        allowed: Allowed = None,
        top_k: int | None = None,
        threshold: float | None = None,
        plan: Way = "auto",
        lasts: bool = False,
        whole: bool = False,
        said: Routed | None = None,
    ) -> Decided:
        """What a call with these arguments runs with, and which way.

        said:  what the router says of these inputs, where that is known
        lasts: whether the weights hold for many forwards, as in a generation
        whole: whether the batch must not be cut only because that is cheaper
        """
        batch = batch_size(inputs)
        if allowed is not None and (task is not None or weights is not None):
            raise InputError(
                "allowed=: restricts what the router may choose, and task= or weights= leave it "
                "nothing to choose. Give one of them."
            )
        if task is not None:
            if weights is not None:
                raise InputError("give task= or weights=, not both: each sets the weights")
            chosen = self._indices(task, batch, "task")
            resolved = torch.eye(len(self.experts), device=self.device)[chosen]
            head = task if head is None else head
        elif weights is not None:
            resolved = self.as_weights(weights, batch)
        else:
            said = self.routing(allowed=allowed, **inputs) if said is None else said
            resolved = said.weights
        kept = drop(resolved, top_k, threshold)
        index = self._heads(resolved, kept.weights, head, batch, said)
        check_images(inputs, batch, kept.weights)
        tokens = 0.0
        whole = whole or inputs.get("labels") is not None  # one loss
        if not (whole or lasts or self.can_generate()):  # what generates may be asked for a cache
            tokens = tokens_of(inputs) / self.break_even
        routing, way = self.planner.plan(kept.weights, index, way=plan, lasts=lasts, tokens=tokens)
        return Decided(routing, kept.weights, index, kept.dropped, way, said)

    def _heads(
        self,
        weights: Weights,
        kept: Weights,
        head: str | Sequence[str] | None,
        batch: int,
        said: Routed | None,
    ) -> Int[Tensor, " batch"]:
        """Whose head answers each row: the highest of the weights that it runs with.

        Of all its weights where none is kept; what the router finds likeliest where it gives none.
        A weight of zero is none.
        """
        if head is not None:
            return self._indices(head, batch, "head")
        if said is not None:
            weights = torch.where(said.new[:, None], said.probabilities, weights)
        empty = (weights == 0).all(dim=-1)
        if self.has_heads and bool(empty.any()):
            row = int(empty.nonzero()[0, 0])
            raise InputError(
                f"weights: row {row} is all zero (the shared expert), so no expert's head "
                f"follows from it. Say whose head answers: head= one of {list(self.experts)}."
            )
        return highest(torch.where((kept == 0).all(dim=-1, keepdim=True), weights, kept))

    def _indices(self, names: Any, batch: int, what: str) -> Int[Tensor, " batch"]:
        return expert_indices(names, self.experts, batch, what, self.device)

    def as_weights(self, weights: Given, batch: int) -> Weights:
        """Weights as a caller writes them, for `batch` rows: (batch, expert), float32."""
        return as_weights(weights, self.experts, batch, self.device)

    def weights_for(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        weights: Given = None,
        task: str | Sequence[str] | None = None,
        allowed: Allowed = None,
        top_k: int | None = None,
        threshold: float | None = None,
        **named: Any,
    ) -> Weights:
        """The weights that a call with these arguments runs with: (batch, expert).

        inputs, named: what the task model takes, as one mapping or by name
        """
        inputs = {**(inputs or {}), **named}
        check_names(inputs, inspect.signature(self.model.forward).parameters)
        given = {"weights": weights, "task": task, "allowed": allowed}
        return self.decide(inputs, **given, top_k=top_k, threshold=threshold).weights

    # ------------------------------------------------------------------ running

    def forward(
        self,
        *unnamed: Any,
        weights: Given = None,
        task: str | Sequence[str] | None = None,
        head: str | Sequence[str] | None = None,
        allowed: Allowed = None,
        top_k: int | None = None,
        threshold: float | None = None,
        plan: Way = "auto",
        **inputs: Any,
    ) -> TwinOutput:
        """Route, then answer: every row with its own weights, in one forward.

        weights:   (batch, expert) or (expert,) or {name: weight}: the router is not asked
        task:      one name or one per row: all weight on that expert, and its head
        head:      one name or one per row: whose head answers; default the highest weight's of
                   those that are left
        allowed:   the experts that the router may choose from: names, or a list of them per row
        top_k:     weights but each row's k largest become zero; what is left is not scaled up
        threshold: weights below it become zero, likewise; both say in `dropped` what they dropped
        plan:      which way to run, see `runtime.plan`; all are exact
        inputs:    what the task model takes, as its tokenizer or processor makes it; the output is
                   a `TwinOutput` also with `return_dict=False`

        With a `past_key_values` of an earlier call it runs with that call's weights; `top_k` and
        `threshold` must not change these. Raises `InputError` for unknown names, wrong shapes and
        a cache of other weights, `RouterError` without a router, `UnsupportedModel` for texts and
        images of several weightings that are compared with each other (CLIP).
        """
        if unnamed:
            raise by_position(unnamed)
        check_names(inputs, inspect.signature(self.model.forward).parameters)
        if inputs.get("labels") is not None and self.has_heads:
            raise InputError(
                "labels=: no loss is defined where experts have heads of their own. Compute it "
                "from `logits` and `expert`."
            )
        cache = brought(inputs)
        if cache is not None and allowed is not None and filled(cache):
            raise InputError(
                "allowed=: restricts what the router may choose, and a cache has its weights "
                "already. Leave one of them out."
            )
        if cache is not None:
            rows = batch_size(inputs)
            known = cached_weights(self, cache, rows, weights, task, top_k, threshold)
            if weights is None and task is None:
                weights = known  # those that were asked for are the same
        given = {"weights": weights, "task": task, "head": head, "allowed": allowed}
        options = {"top_k": top_k, "threshold": threshold, "plan": plan}
        return self._run(self.model, inputs, given, options)

    def get_text_features(self, **inputs: Any) -> TwinOutput:
        """The text tower's features, of a model of two towers (CLIP); else as `forward`."""
        return self._tower("get_text_features", inputs)

    def get_image_features(self, **inputs: Any) -> TwinOutput:
        """The image tower's features, of a model of two towers (CLIP); else as `forward`."""
        return self._tower("get_image_features", inputs)

    def _tower(self, method: str, inputs: dict[str, Any]) -> TwinOutput:
        call = getattr(self.model, method, None)
        if call is None:
            raise InputError(f"{type(self.model).__name__} has no {method}(); call the model.")
        check_names(inputs, inspect.signature(call).parameters)
        given = {name: inputs.pop(name, None) for name in ("weights", "task", "head", "allowed")}
        options = {name: inputs.pop(name, None) for name in ("top_k", "threshold")}
        return self._run(call, inputs, given, options | {"plan": inputs.pop("plan", "auto")})

    def _run(
        self,
        call: Callable[..., Any],
        inputs: dict[str, Any],
        given: dict[str, Any],
        options: dict[str, Any],
    ) -> TwinOutput:
        batch_size(inputs)  # before the router reads, which may be on the way
        self._check_checkpointing()
        if False in (inputs.get("return_dict"), getattr(self.model.config, "return_dict", None)):
            inputs = inputs | {"return_dict": True}  # a tuple does not say which are the logits
        routes, problem = given["weights"] is None and given["task"] is None, None
        try:
            if routes and options["plan"] != "split" and self._on_the_way(inputs):
                return self._run_routing(call, inputs, given, options)
            decided = self.decide(inputs, **given, **options)
            if decided.way != "split":
                with routed(decided.routing):
                    return _output(self, call(**inputs), decided)
        except NotRowWise as seen:  # in no dry run
            if options["plan"] != "auto" or brought(inputs) is not None:
                raise
            problem, options = seen, options | {"plan": "split"}
            decided = self.decide(inputs, **given, **options)
        cut = groups(decided.routing, decided.weights)
        if len(cut) == 1:
            with routed(cut[0].routing):
                return _output(self, call(**inputs), decided)
        towers = ("get_text_features", "get_image_features")
        if call is self.model and all(hasattr(self.model, t) for t in towers):
            raise UnsupportedModel(
                f"{type(self.model).__name__} compares every text with every image, which is not "
                "defined for rows of other weights. Call get_text_features / get_image_features, "
                "or pass one weighting for the whole batch."
            )
        for name in ("use_cache", "use_mems"):  # a cache cannot be put together
            if name in inspect.signature(self.model.forward).parameters:
                inputs = {name: False} | inputs
        output = run_split(call, inputs, cut, len(decided.weights), heads=self.has_heads)
        if problem is not None and call is self.model:
            self.planner.noted(problem)
        return _output(self, output, decided)

    def _check_checkpointing(self) -> None:
        if not torch.is_grad_enabled():
            return
        modules = (each for each in self.model.modules() if each.training)
        if any(getattr(module, "gradient_checkpointing", False) for module in modules):
            raise UnsupportedModel(
                f"{type(self.model).__name__}: gradient checkpointing runs layers again after the "
                "forward, where no row's weights are known. Switch it off in model.model, or run "
                "under torch.no_grad()."
            )

    def _on_the_way(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the router can read its features off the forward that it routes.

        No expert may differ before its layer, and the forward must number its tokens as a forward
        for features does. A compiled one goes through without a stop.
        """
        if self.router is None or self.planner.mixes_rows or not self.router.reads_hidden_states:
            return False
        if self.router.last > self.untouched_layers:
            return False
        if self.model._compiled_call_impl is not None:
            return False  # a compiled graph is not left on the way
        mask = inputs.get("attention_mask")
        unpadded = mask is None or inputs.get("position_ids") is not None or bool(mask.all())
        return unpadded or not self.can_generate()

    def _run_routing(
        self,
        call: Callable[..., Any],
        inputs: dict[str, Any],
        given: dict[str, Any],
        options: dict[str, Any],
    ) -> TwinOutput:
        """One forward that decides its own weights where the router reads."""
        found: list[Decided] = []
        with routed(None) as cell:
            reading = self._routes(cell, inputs, given, options, found)
            with reading:
                output = call(**inputs)
        return _output(self, output, found[0])

    def _routes(
        self,
        cell: Cell,
        inputs: dict[str, Any],
        given: dict[str, Any],
        options: dict[str, Any],
        found: list[Decided],
    ) -> AbstractContextManager[None]:
        """Within it, a forward fills `cell` as soon as the router's layers are known."""
        assert self.router is not None

        def then(features: Features) -> None:
            said = self.routed_from(features, given["allowed"])
            found.append(self.decide(inputs, head=given["head"], **options, whole=True, said=said))
            cell.routing = found[0].routing

        return self.features.watching(inputs, self.router.wanted, then)

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        weights: Given = None,
        task: str | Sequence[str] | None = None,
        allowed: Allowed = None,
        prompt_cache: PromptCache | None = None,
        **options: Any,
    ) -> Any:
        """`transformers`' generate, with the weights decided once, from the prompt.

        They stay as they are while tokens are added, so the key-value cache stays valid.

        weights, task, allowed: as in `forward`
        prompt_cache:  what `prefill` made of a prefix of the prompts; runs with its weights
        options:       everything that `generate` takes; `top_k` is that of sampling. For few
                       experts per row, give `weights=model.weights_for(prompt, top_k=1)`

        A cache that is returned (`return_dict_in_generate=True`) remembers its weights, and a call
        with it as `past_key_values=` runs with these. Raises `InputError` if the task model cannot
        generate, and for a cache made with other weights than the call asks for.
        """
        given = {"weights": weights, "task": task, "allowed": allowed}
        return generate(self, inputs, **given, prompt_cache=prompt_cache, **options)

    def prefill(
        self,
        *,
        input_ids: Int[Tensor, "row seq"],
        attention_mask: Int[Tensor, "row seq"] | None = None,
        weights: Given = None,
        task: str | Sequence[str] | None = None,
        allowed: Allowed = None,
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> PromptCache:
        """Run a prompt, or a prefix that many share, and keep it for `generate(prompt_cache=)`.

        The weights are decided here, from the prefix unless given, and hold for all that goes on
        from it; `allowed`, `top_k` and `threshold` as in `forward`. One row serves any number of
        prompts, else there is one for each.
        """
        return prefill(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            weights=weights,
            task=task,
            allowed=allowed,
            top_k=top_k,
            threshold=threshold,
        )

    def merged(
        self, weights: Tensor | Mapping[str, float] | Sequence[float], *, head: str | None = None
    ) -> PreTrainedModel:
        """One weighting for all inputs, merged densely: a plain transformers model.

        weights: (expert,) or {name: weight}; head: whose head, default that of the highest weight.
        For many weightings in a row use `runtime.export.DenseMerge`.
        """
        from .export import DenseMerge

        return DenseMerge(self).at(self.as_weights(weights, 1)[0], head)

    def pipeline(self, task: str, **options: Any) -> Any:
        """`transformers.pipeline(task, model=self, **options)` with the artifact's tokenizer.

        Tasks: those of `pipelines.TASKS`. Labels are those of the row's own expert. The pipeline
        also takes `weights=`, `head=` and, when called, `task=`.
        """
        from .pipelines import make

        return make(self, task, **options)

    def explain(self, text: Any, **options: Any) -> Explanation:
        """Why one text (or a pair, or a `data.Chat`) is answered as it is, and what would be else.

        Routing, novelty, the nearest routing examples, and the answers as routed, as forced
        (`task=`, `weights=`, `allowed=`, `head=`), of each expert, the shared expert and the base.
        All options are those of `runtime.explain.explain`.
        """
        from .explain import explain

        return explain(self, text, **options)

    # ------------------------------------------------------------------ saving

    @classmethod
    def from_pretrained(cls, folder: Path | str, **options: Any) -> TwinModel:
        """`twinmerge.load`: a folder or hub id; options are those of `load`."""
        from .load import load

        if "torch_dtype" in options:
            raise InputError("torch_dtype=: is called dtype= here, as in transformers 5.")
        return load(folder, **options)

    def save_pretrained(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write the artifact to another folder, which appears when it is whole.

        Files are copied and compared with the manifest's digests; the router is written as it is in
        memory. What is stored is the artifact, in the dtypes that it has on disk, whatever dtype
        the model runs in. `overwrite` replaces an artifact, never anything else. To the folder
        that it came from nothing is written. Raises `OutputError` if the place is taken or full,
        `CorruptArtifact` if the files were changed since the model was loaded.
        """
        from .saving import save

        return save(self, folder, overwrite=overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the artifact, as `save_pretrained` writes it, in one commit; its address.

        repo_id:  `org/name`; made if it is not there
        revision: a branch; made if it is not there

        Weight files in the repository that this artifact does not have are deleted. Raises
        `OutputError` if the hub refuses, is out of reach, or there is no token.
        """
        from .saving import push

        return push(
            self,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )

    # ------------------------------------------------------------------ answers in words

    def answers(self, output: TwinOutput) -> list[Answer]:
        """The rows of a classification or regression output, in words.

        Raises `InputError` unless the model gives one answer for a row.
        """
        if not isinstance(output, TwinOutput):
            came = type(output).__name__
            raise InputError(f"answers: expected the output of a call of this model, got a {came}.")
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


def _give_padding(tokenizer: Any, config: Any) -> None:
    """A tokenizer without a padding token (Llama, GPT-2) gets the model's, else the end token."""
    if tokenizer.pad_token_id is None:
        known = getattr(config, "pad_token_id", None)
        token = tokenizer.eos_token if known is None else tokenizer.convert_ids_to_tokens(known)
        if token is not None:
            tokenizer.pad_token = token


def _output(twin: TwinModel, output: Any, decided: Decided) -> TwinOutput:
    values = list(output.values()) if isinstance(output, Mapping) else output
    if any(isinstance(value, PerRow) for value in tree_flatten(values)[0]):
        raise NotRowWise("an output never met the batch")
    cache = given_back(output)
    if cache is not None:
        tag(twin, cache, decided.weights)
    return TwinOutput(
        logits=getattr(output, "logits", None),
        weights=decided.weights,
        expert=decided.expert,
        model_output=output,
        dropped=decided.dropped,
        routed=decided.routed,
        plan=decided.way,
    )
