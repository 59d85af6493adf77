"""Generation: transformers' own `generate`, with the weights decided once per request.

The router reads the prompt, and the weights hold for every token of the answer. So a key-value
cache, which is valid only for the weights that it was made with, stays valid (`caches`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import InputError
from .arguments import Allowed, Given, Weights
from .caches import (
    CACHE,
    RECURRENT,
    PromptCache,
    brought,
    cached_weights,
    check_origin,
    check_same,
    filled,
    given_back,
    rows_alone,
    tag,
)
from .forward import on_the_way
from .per_row import NotRowWise
from .plan import groups
from .router.features import Features
from .routing import Routing, routed
from .split import picked

if TYPE_CHECKING:
    from .model import TwinModel

# What a prompt may consist of, and the router may read.
_PROMPT = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_features",
    "input_values",
    "attention_mask",
    "position_ids",
    "token_type_ids",
)
_CONTENT = _PROMPT[:5]


# ---------------------------------------------------------------------------------- the two calls


@torch.no_grad()
def generate(
    twin: TwinModel,
    inputs: Tensor | None = None,
    *,
    weights: Given = None,
    task: str | Sequence[str] | None = None,
    allowed: Allowed = None,
    prompt_cache: PromptCache | None = None,
    **options: Any,
) -> Any:
    """See `TwinModel.generate`."""
    _check_generates(twin, options)
    name = _main_input(twin)
    _check_types(inputs, prompt_cache, options)
    if inputs is not None:
        if options.get(name) is not None:
            raise InputError(f"expected the prompt once, got it by position and as {name}=.")
        options[name] = inputs
    prompt = _prompt(twin, options)
    read = [prompt[key] for key in _CONTENT if key in prompt]
    encoded = options.get("encoder_outputs")
    batch = len(read[0] if read else encoded[0] if encoded is not None else "1")
    times = max(_option(twin, options, key) or 1 for key in ("num_beams", "num_return_sequences"))
    _check_speculation(twin, prompt_cache, options)
    if allowed is not None and (prompt_cache is not None or brought(options) is not None):
        raise InputError(
            "allowed=: restricts what the router may choose, and a cache has its weights already. "
            "Leave one of them out."
        )
    if prompt_cache is not None:
        return _go_on(twin, prompt_cache, weights, task, batch, times, options)
    known = cached_weights(twin, brought(options), batch * times, weights, task)
    if known is not None:
        return _run(twin, rows_alone(batch), known[::times], None, times, options)
    if not read:
        if weights is None and task is None:
            raise InputError(
                f"generate: expected a prompt ({name}=) for the router to read. Without one, say "
                "what to run with: weights= or task=."
            )
        prompt = rows_alone(batch)  # transformers starts from the begin token
    elif weights is None and task is None and _on_the_way(twin, options):
        return _routing(twin, prompt, allowed, times, options)
    return _run(twin, prompt, weights, task, times, options, allowed)


@torch.no_grad()
def prefill(
    twin: TwinModel,
    *,
    input_ids: Int[Tensor, "row seq"],
    attention_mask: Int[Tensor, "row seq"] | None = None,
    weights: Given = None,
    task: str | Sequence[str] | None = None,
    allowed: Allowed = None,
    top_k: int | None = None,
    threshold: float | None = None,
) -> PromptCache:
    """See `TwinModel.prefill`."""
    _check_generates(twin, {})
    _check_types(None, None, {"input_ids": input_ids})
    if _encodes(twin):
        raise InputError(
            f"{type(twin.model).__name__}: an encoder reads a prompt as a whole, so the cache of a "
            "prefix serves no longer prompt. Call generate with the whole prompts."
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    given = {"input_ids": input_ids, "attention_mask": mask}
    asked = {"weights": weights, "task": task, "allowed": allowed}
    decided = twin.decide(given, **asked, top_k=top_k, threshold=threshold)
    cut = groups(decided.routing, decided.weights) if decided.way == "split" else ()
    if len(cut) > 1:
        raise InputError(
            f"{type(twin.model).__name__} runs one weighting at a time, so the rows of a prefix "
            f"must have one: got {len(cut)} in {len(mask)} rows. Call prefill once for each."
        )
    prompt = twin.features.completed(given) | {"use_cache": True}
    with routed(cut[0].routing if cut else decided.routing):
        output = twin.model(**prompt)
    cache = getattr(output, CACHE, None)
    if cache is None:
        raise InputError(f"{type(twin.model).__name__} gave no {CACHE}: it has none to keep.")
    tag(twin, cache, decided.weights)
    return PromptCache(cache, decided.weights.clone(), input_ids.clone(), mask.clone())


def _run(
    twin: TwinModel,
    prompt: dict[str, Any],
    weights: Given,
    task: str | Sequence[str] | None,
    times: int,
    options: dict[str, Any],
    allowed: Allowed = None,
) -> Any:
    """transformers' generate, in groups of rows where the model needs that."""
    lasts = _lasts(twin, prompt, times, options)
    decided = twin.decide(prompt, weights=weights, task=task, allowed=allowed, lasts=lasts)
    problem = None
    if decided.way != "split":
        try:
            return _generated(twin, decided.routing, decided.weights, times, options)
        except NotRowWise as seen:  # in no dry run
            problem = seen
    cut = groups(decided.routing, decided.weights)
    if len(cut) == 1:
        return _generated(twin, cut[0].routing, decided.weights, times, options)
    _check_groups(twin, options)
    parts = []
    for group in cut:
        own = _options_of(twin, group.rows, len(decided.weights), times, options)
        tokens = _generated(twin, group.routing, decided.weights[group.rows], times, own)
        parts.append((group.rows, tokens))
    if problem is not None:
        twin.planner.noted(problem)
    return _together(parts, _padding(twin, options))


def _lasts(twin: TwinModel, prompt: dict[str, Any], times: int, options: dict[str, Any]) -> bool:
    """Whether so many tokens come that one weighting for all of them is worth merging densely."""
    batch, seq = next(prompt[key] for key in _CONTENT if key in prompt).shape[:2]
    new = _option(twin, options, "max_new_tokens") or _option(twin, options, "max_length") or 20
    return batch * (seq + times * new) >= twin.break_even


def _generated(
    twin: TwinModel, routing: Routing, weights: Weights, times: int, options: dict[str, Any]
) -> Any:
    cache = brought(options)
    if cache is not None:  # filled while it runs, also if it stops half-way
        tag(twin, cache, weights.repeat_interleave(times, dim=0))
    if times > 1 and _encodes(twin):
        with routed(routing):
            options = options | _encoded(twin, options)
    with routed(_expanded(routing, times)):
        output = twin.model.generate(**options)  # type: ignore[operator]
    return _tagged(twin, output, weights, times)


def _expanded(routing: Routing, times: int) -> Routing:
    """Each row `times` times in a row, as `generate` expands a batch for beams and samples."""
    mix, head = routing.mix, routing.head
    if times == 1 or mix is None or mix.one:
        return routing
    head = None if head is None else head.repeat_interleave(times, dim=0)
    return Routing(mix.repeated(times), head, routing.batch * times)


def _encoded(twin: TwinModel, options: dict[str, Any]) -> dict[str, Any]:
    """What `generate` would have the encoder give: it runs before the batch is expanded."""
    if options.get("encoder_outputs") is not None:
        return {}
    encoder = twin.model.get_encoder()  # type: ignore[operator]
    taken = inspect.signature(encoder.forward).parameters
    given = {key: options[key] for key in _PROMPT if options.get(key) is not None and key in taken}
    for name in ("output_attentions", "output_hidden_states"):
        given[name] = _option(twin, options, name)
    return {"encoder_outputs": encoder(**given, return_dict=True)}


def _tagged(twin: TwinModel, output: Any, weights: Weights, times: int) -> Any:
    cache = given_back(output)
    if cache is not None:
        tag(twin, cache, weights.repeat_interleave(times, dim=0))
    return output


def _on_the_way(twin: TwinModel, options: dict[str, Any]) -> bool:
    """Whether the prompt's own pass can route: then the router costs no pass.

    `generate` numbers the prompt's tokens as a forward for features does, padded or not.
    """
    if brought(options) is not None:
        return False
    if any(options.get(key) is not None for key in ("assistant_model", "encoder_outputs")):
        return False
    return _option(twin, options, "prefill_chunk_size") is None and on_the_way(twin, {})


def _routing(
    twin: TwinModel,
    prompt: dict[str, Any],
    allowed: Allowed,
    times: int,
    options: dict[str, Any],
) -> Any:
    """Generate, and decide the weights where the router reads in the pass of the prompt."""
    encodes = _encodes(twin)
    expanded = 1 if encodes else times  # a decoder's pass has the rows already expanded
    seen = {key: value.repeat_interleave(expanded, dim=0) for key, value in prompt.items()}
    router, found = twin.router, []
    assert router is not None

    def then(features: Features) -> None:
        own = {key: each[::expanded] for key, each in features.items()}
        said = twin.routed_from(own, allowed)
        lasts = _lasts(twin, prompt, times, options)
        found.append(twin.decide(prompt, said=said, lasts=lasts))
        cell.routing = _expanded(found[0].routing, expanded)

    try:
        with (
            routed(None) as cell,
            twin.features.watching(seen, router.wanted, then),
        ):
            if encodes and times > 1:
                options = options | _encoded(twin, options)
                cell.routing = _expanded(found[0].routing, times)
            output = twin.model.generate(**options)  # type: ignore[operator]
    except NotRowWise:  # seen in no dry run, and now once more where the weights are known
        return _run(twin, prompt, found[0].weights, None, times, options)
    return _tagged(twin, output, found[0].weights, times)


def _go_on(
    twin: TwinModel,
    prefix: PromptCache,
    weights: Given,
    task: str | Sequence[str] | None,
    batch: int,
    times: int,
    options: dict[str, Any],
) -> Any:
    """Generate after a prefix: its tokens are not run again."""
    ids = options.get("input_ids")
    if ids is None or brought(options) is not None or "inputs_embeds" in options:
        raise InputError(
            f"prompt_cache=: expected whole prompts as input_ids=, and no {CACHE}= or "
            f"inputs_embeds= beside it, got {', '.join(sorted(options))}."
        )
    check_origin(twin, prefix.cache, "prompt_cache")
    rows = len(prefix.input_ids)
    if rows not in (1, batch):
        raise InputError(
            f"prompt_cache=: holds {rows} rows, the prompts are {batch}. Expected one row for all, "
            "or one for each."
        )
    resolved = prefix.weights.expand(batch, -1)
    if weights is not None or task is not None:
        check_same(twin, resolved, twin.weights_for(rows_alone(batch), weights=weights, task=task))
    mask = options.get("attention_mask")
    mask = _mask_of(twin, options, ids) if mask is None else mask
    before, before_mask = (t.expand(batch, -1) for t in (prefix.input_ids, prefix.attention_mask))
    rest = []
    for row in range(batch):
        content = ids[row][mask[row].bool()]
        rest.append(_after(content, before[row][before_mask[row].bool()], row))
    cache = copy.deepcopy(prefix.cache)
    if min(len(each) for each in rest) == 0:
        # A row has nothing after the prefix: its last token runs again, for what comes after it.
        if not bool(before_mask[:, -1].all()) or not getattr(cache, "is_croppable", False):
            raise InputError(
                "prompt_cache=: expected a token after the prefix in every row; this model's cache "
                "cannot be cut by one. Prefill a shorter prefix."
            )
        cache.crop(-1)
        rest = [torch.cat([known[-1:], each]) for known, each in zip(before, rest, strict=True)]
        before, before_mask = before[:, :-1], before_mask[:, :-1]
    copies = batch * times // rows
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    # Padding goes between prefix and rest: the cache begins in the first column.
    longest = max(len(each) for each in rest)
    if any(len(each) < longest for each in rest) and any(getattr(cache, "is_sliding", ())):
        raise InputError(
            f"prompt_cache=: {type(twin.model).__name__} attends to a window of columns, in which "
            "padding between prefix and prompt would count. Give prompts of one length at a time."
        )
    tail = ids.new_full((batch, longest), _padding(twin, options))
    tail_mask = mask.new_zeros(batch, longest)
    for row, each in enumerate(rest):
        tail[row, longest - len(each) :] = each
        tail_mask[row, longest - len(each) :] = 1
    whole = torch.cat([before, tail], dim=1)
    own = options | {
        "input_ids": whole,
        "attention_mask": torch.cat([before_mask.to(mask), tail_mask], dim=1),
        CACHE: cache,
    }
    output = _run(twin, rows_alone(batch), resolved, None, times, own)
    return _with_prompts(output, ids, whole.shape[1])


def _after(content: Tensor, prefix: Tensor, row: int) -> Tensor:
    """The tokens of a prompt after the prefix."""
    if len(content) < len(prefix) or not torch.equal(content[: len(prefix)], prefix):
        raise InputError(
            f"prompt_cache=: row {row} does not begin with the {len(prefix)} tokens of the prefix. "
            "Tokenize the whole prompts, and prefill what they have in common token by token."
        )
    return content[len(prefix) :]


def _with_prompts(output: Any, ids: Tensor, width: int) -> Any:
    """The output with the prompts as they were given, padding at their left."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    given = ids.repeat_interleave(len(sequences) // len(ids), dim=0)
    sequences = torch.cat([given, sequences[:, width:]], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output["sequences"] = sequences
    return output


# ----------------------------------------------------------------------------------- the arguments


def _check_generates(twin: TwinModel, options: dict[str, Any]) -> None:
    if not twin.can_generate():
        raise InputError(f"{type(twin.model).__name__} cannot generate; call the model instead.")
    helper = options.get("assistant_model")
    if helper is not None and not hasattr(helper, "generation_config"):
        raise InputError(
            f"assistant_model=: expected a transformers model, got {type(helper).__name__}."
        )
    if isinstance(helper, type(twin)):
        raise InputError(
            "assistant_model=: expected a plain transformers model, got a TwinModel. Give "
            "model.merged(weights), or a small model of the same tokenizer."
        )


def _check_types(inputs: Any, prompt_cache: Any, options: Mapping[str, Any]) -> None:
    for given, value in (("by position", inputs), ("as input_ids=", options.get("input_ids"))):
        if value is not None and not isinstance(value, Tensor):
            raise InputError(
                f"generate: expected the prompt as a tensor (batch first), got a "
                f"{type(value).__name__} {given}. Tokenize text first: model.generate("
                "**model.tokenizer(texts, return_tensors='pt', padding=True))."
            )
    if prompt_cache is not None and not isinstance(prompt_cache, PromptCache):
        raise InputError(
            f"prompt_cache=: expected what model.prefill() made, got a "
            f"{type(prompt_cache).__name__}. A cache of a forward goes in as {CACHE}=."
        )
    for name in ("threshold", "plan", "head"):
        if name in options:
            advice = "A generation has no task heads." if name == "head" else _DECIDED
            raise InputError(f"{name}=: no option of generate. {advice}")


def _check_speculation(
    twin: TwinModel, prompt_cache: PromptCache | None, options: Mapping[str, Any]
) -> None:
    """transformers' assisted generation miscounts the tokens of a cache that is brought along."""
    guesses = [n for n in ("assistant_model", "prompt_lookup_num_tokens") if options.get(n)]
    cache = brought(options)
    if guesses and (prompt_cache is not None or (cache is not None and filled(cache))):
        name = "prompt_cache" if prompt_cache is not None else CACHE
        raise InputError(
            f"{guesses[0]}= with {name}=: transformers gives other tokens than without a cache. "
            "Leave one of them out."
        )


_DECIDED = (
    "Its weights are decided once: give weights=model.weights_for(prompt, top_k=..., "
    "threshold=...)."
)


def _encodes(twin: TwinModel) -> bool:
    return bool(getattr(twin.model.config, "is_encoder_decoder", False))


def _main_input(twin: TwinModel) -> str:
    """What transformers takes the first argument of generate for."""
    model: Any = twin.model
    own = model.main_input_name
    return getattr(model.get_encoder(), "main_input_name", own) if _encodes(twin) else own


def _option(twin: TwinModel, options: dict[str, Any], name: str) -> Any:
    """An option of generate: as given, else of the configuration given, else of the model's."""
    sources = (options.get("generation_config"), twin.model.generation_config)
    values = (options.get(name), *(getattr(source, name, None) for source in sources))
    found = next((value for value in values if value is not None), None)
    return found.tolist() if isinstance(found, Tensor) else found


def _prompt(twin: TwinModel, options: dict[str, Any]) -> dict[str, Any]:
    """What the router may read, with the mask that transformers would think of."""
    prompt = {key: options[key] for key in _PROMPT if options.get(key) is not None}
    ids = prompt.get("input_ids")
    if ids is not None and "attention_mask" not in prompt and not _encodes(twin):
        prompt["attention_mask"] = _mask_of(twin, options, ids)
    return prompt


def _mask_of(twin: TwinModel, options: dict[str, Any], ids: Tensor) -> Tensor:
    """All but padding, if the padding token says so: where it is in use and no end token."""
    pad, ends = (_option(twin, options, name) for name in ("pad_token_id", "eos_token_id"))
    marks = ends if isinstance(ends, list) else [ends]
    if pad is None or pad in marks:
        return torch.ones_like(ids)
    return (ids != pad).to(ids.dtype)


def _padding(twin: TwinModel, options: dict[str, Any]) -> int:
    pad, ends = (_option(twin, options, name) for name in ("pad_token_id", "eos_token_id"))
    first = ends[0] if isinstance(ends, list) else ends
    return int(pad if pad is not None else first if first is not None else 0)


# -------------------------------------------------------- models that run one weighting at a time


def _check_groups(twin: TwinModel, options: dict[str, Any]) -> None:
    config = options.get("generation_config")
    for name in ("return_dict_in_generate", CACHE, RECURRENT, "streamer"):
        if options.get(name) or getattr(config, name, None):
            raise InputError(
                f"{name}=: {type(twin.model).__name__} runs one weighting at a time, so rows of "
                "different weights are generated one after the other. Give rows of one weighting, "
                f"or leave {name}= out."
            )


def _options_of(
    twin: TwinModel, rows: Tensor, batch: int, times: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The options for some rows of the batch."""
    own = {}
    for name, value in options.items():
        per_row = isinstance(value, Tensor) and value.ndim > 1  # else ids of special tokens
        per_row = per_row or name == "encoder_outputs"
        own[name] = picked(value, rows, batch, name) if per_row else value
    allowed = options.get("prefix_allowed_tokens_fn")
    if allowed is not None:  # it is called with a row's number, that of a sample where these are
        each = times if (_option(twin, options, "num_beams") or 1) == 1 else 1
        numbers = (rows[:, None] * each + torch.arange(each, device=rows.device)).flatten().tolist()
        own["prefix_allowed_tokens_fn"] = lambda place, ids: allowed(numbers[place], ids)
    return own


def _together(parts: list[tuple[Tensor, Tensor]], padding: int) -> Tensor:
    """The sequences of all groups, in the order of the rows, padded on the right."""
    longest = max(tokens.shape[1] for _, tokens in parts)
    each = len(parts[0][1]) // len(parts[0][0])
    total = sum(len(rows) for rows, _ in parts)
    out = parts[0][1].new_full((total, each, longest), padding)
    for rows, tokens in parts:
        out[rows, :, : tokens.shape[1]] = tokens.view(len(rows), each, -1)
    return out.flatten(0, 1)
