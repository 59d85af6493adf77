"""One call: decided before the forward, or on its way where no expert differs before the router.

Where rows of other weights cannot share a forward, each weighting has its own (`split`). A call is
a task model's method with its inputs, what sets the weights (`given`: weights, task, head, allowed)
and how it runs (`options`: top_k, threshold, plan).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten

from ..errors import InputError, UnsupportedModel
from .arguments import batch_size, check_names
from .caches import brought, cached_weights, filled, given_back, tag
from .output import Decided, TwinOutput
from .per_row import NotRowWise, PerRow
from .plan import groups
from .router.features import Features
from .routing import Cell, routed
from .split import run_split

if TYPE_CHECKING:
    from .model import TwinModel


def forward(
    twin: TwinModel, inputs: dict[str, Any], given: dict[str, Any], options: dict[str, Any]
) -> TwinOutput:
    """See `TwinModel.forward`."""
    check_names(inputs, inspect.signature(twin.model.forward).parameters)
    if inputs.get("labels") is not None and twin.has_heads:
        raise InputError(
            "labels=: no loss is defined where experts have heads of their own. Compute it "
            "from `logits` and `expert`."
        )
    cache = brought(inputs)
    if cache is not None and given["allowed"] is not None and filled(cache):
        raise InputError(
            "allowed=: restricts what the router may choose, and a cache has its weights "
            "already. Leave one of them out."
        )
    if cache is not None:
        weights, task = given["weights"], given["task"]
        top_k, threshold = options["top_k"], options["threshold"]
        rows = batch_size(inputs)
        known = cached_weights(twin, cache, rows, weights, task, top_k, threshold)
        if weights is None and task is None:
            given = given | {"weights": known}  # those that were asked for are the same
    return _run(twin, twin.model, inputs, given, options)


def tower(twin: TwinModel, method: str, inputs: dict[str, Any]) -> TwinOutput:
    """A method of a model of two towers (CLIP) that reads one of them."""
    call = getattr(twin.model, method, None)
    if call is None:
        raise InputError(f"{type(twin.model).__name__} has no {method}(); call the model.")
    check_names(inputs, inspect.signature(call).parameters)
    given = {name: inputs.pop(name, None) for name in ("weights", "task", "head", "allowed")}
    options = {name: inputs.pop(name, None) for name in ("top_k", "threshold")}
    return _run(twin, call, inputs, given, options | {"plan": inputs.pop("plan", "auto")})


def _run(
    twin: TwinModel,
    call: Callable[..., Any],
    inputs: dict[str, Any],
    given: dict[str, Any],
    options: dict[str, Any],
) -> TwinOutput:
    batch_size(inputs)  # before the router reads, which may be on the way
    _check_checkpointing(twin)
    if False in (inputs.get("return_dict"), getattr(twin.model.config, "return_dict", None)):
        inputs = inputs | {"return_dict": True}  # a tuple does not say which are the logits
    routes, problem = given["weights"] is None and given["task"] is None, None
    try:
        if routes and options["plan"] != "split" and on_the_way(twin, inputs):
            return _run_routing(twin, call, inputs, given, options)
        decided = twin.decide(inputs, **given, **options)
        if decided.way != "split":
            with routed(decided.routing):
                return _output(twin, call(**inputs), decided)
    except NotRowWise as seen:  # in no dry run
        if options["plan"] != "auto" or brought(inputs) is not None:
            raise
        problem, options = seen, options | {"plan": "split"}
        decided = twin.decide(inputs, **given, **options)
    cut = groups(decided.routing, decided.weights)
    if len(cut) == 1:
        with routed(cut[0].routing):
            return _output(twin, call(**inputs), decided)
    towers = ("get_text_features", "get_image_features")
    if call is twin.model and all(hasattr(twin.model, t) for t in towers):
        raise UnsupportedModel(
            f"{type(twin.model).__name__} compares every text with every image, which is not "
            "defined for rows of other weights. Call get_text_features / get_image_features, "
            "or pass one weighting for the whole batch."
        )
    for name in ("use_cache", "use_mems"):  # a cache cannot be put together
        if name in inspect.signature(twin.model.forward).parameters:
            inputs = {name: False} | inputs
    output = run_split(call, inputs, cut, len(decided.weights), heads=twin.has_heads)
    if problem is not None and call is twin.model:
        twin.planner.noted(problem)
    return _output(twin, output, decided)


def _check_checkpointing(twin: TwinModel) -> None:
    if not torch.is_grad_enabled():
        return
    modules = (each for each in twin.model.modules() if each.training)
    if any(getattr(module, "gradient_checkpointing", False) for module in modules):
        raise UnsupportedModel(
            f"{type(twin.model).__name__}: gradient checkpointing runs layers again after the "
            "forward, where no row's weights are known. Switch it off in model.model, or run "
            "under torch.no_grad()."
        )


def on_the_way(twin: TwinModel, inputs: Mapping[str, Any]) -> bool:
    """Whether the router can read its features off the forward that it routes.

    No expert may differ before its layer, and the forward must number its tokens as a forward
    for features does. A compiled one goes through without a stop.
    """
    if twin.router is None or twin.planner.mixes_rows or not twin.router.reads_hidden_states:
        return False
    if twin.router.last > twin.untouched_layers:
        return False
    if twin.model._compiled_call_impl is not None:
        return False  # a compiled graph is not left on the way
    mask = inputs.get("attention_mask")
    unpadded = mask is None or inputs.get("position_ids") is not None or bool(mask.all())
    return unpadded or not twin.can_generate()


def _run_routing(
    twin: TwinModel,
    call: Callable[..., Any],
    inputs: dict[str, Any],
    given: dict[str, Any],
    options: dict[str, Any],
) -> TwinOutput:
    """One forward that decides its own weights where the router reads."""
    found: list[Decided] = []
    with routed(None) as cell:
        reading = _routes(twin, cell, inputs, given, options, found)
        with reading:
            output = call(**inputs)
    return _output(twin, output, found[0])


def _routes(
    twin: TwinModel,
    cell: Cell,
    inputs: dict[str, Any],
    given: dict[str, Any],
    options: dict[str, Any],
    found: list[Decided],
) -> AbstractContextManager[None]:
    """Within it, a forward fills `cell` as soon as the router's layers are known."""
    assert twin.router is not None

    def then(features: Features) -> None:
        said = twin.routed_from(features, given["allowed"])
        found.append(twin.decide(inputs, head=given["head"], **options, whole=True, said=said))
        cell.routing = found[0].routing

    return twin.features.watching(inputs, twin.router.wanted, then)


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
