"""TwinModel: one model that routes every input to what it needs, and answers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..artifact.format import Manifest
from ..errors import InputError, RouterError
from . import words
from .arguments import (
    Allowed,
    Given,
    Weights,
    as_weights,
    by_position,
    check_names,
    tensors,
)
from .caches import PromptCache
from .cost import plan_costs
from .deciding import decide, routed_from
from .forward import forward, tower
from .generate import generate, prefill
from .heads import HeadSwitch
from .labels import PerExpertConfig
from .output import Answer, Decided, TwinOutput
from .plan import Planner, Way
from .processors import open_image_processor, open_tokenizer
from .router.energies import EnergyReader
from .router.features import FeatureReader, Features
from .router.router import Routed, Router
from .router.store import of_router

if TYPE_CHECKING:
    from .explain import Explanation


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
            self._tokenizer = open_tokenizer(self)
        return self._tokenizer

    @cached_property
    def image_processor(self) -> Any:
        """The base's image processor, loaded from the artifact when first asked for."""
        return open_image_processor(self)

    @property
    def labels(self) -> dict[str, list[str] | None]:
        """Label names by expert, in the order of its logits; None for a regression or no head."""
        return words.labels(self)

    @property
    def outputs(self) -> dict[str, int | None]:
        """How many outputs each expert's head has: 1 for a regression, None without a head."""
        return words.outputs(self)

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
        return routed_from(self, features, allowed)

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
        given = {"weights": weights, "task": task, "head": head, "allowed": allowed}
        options = {"top_k": top_k, "threshold": threshold, "plan": plan}
        return decide(self, inputs, **given, **options, lasts=lasts, whole=whole, said=said)

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
        given = {"weights": weights, "task": task, "head": head, "allowed": allowed}
        options = {"top_k": top_k, "threshold": threshold, "plan": plan}
        return forward(self, inputs, given, options)

    def get_text_features(self, **inputs: Any) -> TwinOutput:
        """The text tower's features, of a model of two towers (CLIP); else as `forward`."""
        return tower(self, "get_text_features", inputs)

    def get_image_features(self, **inputs: Any) -> TwinOutput:
        """The image tower's features, of a model of two towers (CLIP); else as `forward`."""
        return tower(self, "get_image_features", inputs)

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
        return words.answers(self, output)
