"""From a folder to a running model."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from ..artifact.format import ROUTER, ExpertRecord, Manifest
from ..artifact.reader import Artifact
from ..errors import (
    ArtifactError,
    CorruptArtifact,
    InputError,
    RouterError,
    UnsupportedModel,
    first_line,
)
from .attach import COUNTER, attach_factors, attach_heads, differs
from .devices import DeviceMap, dispatch, usable
from .dryrun import dry_run
from .heads import head_roots
from .model import TwinModel
from .names import Place, places
from .pipelines import register
from .router.encoder import ENCODER, TextEncoder
from .router.novelty import Novelty
from .router.router import Router
from .router.scorers import empty
from .saving import fetch


def load(
    folder: Path | str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    check: bool = True,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: Path | str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    cache_dir: Path | str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> TwinModel:
    """Open an artifact as a model that routes and answers.

    folder:     what `twinmerge merge` wrote; or a hub id, `org/name` or `org/name@revision`
    dtype:      to run in, or its name; default (and "auto") as stored
    device:     to run on
    check:      compare all files with the manifest's digests first
    device_map: several devices instead: {module: device}, "auto", "balanced", ... (needs
                accelerate); max_memory and offload_folder as in transformers
    attn_implementation:  "sdpa", "eager", ...; default transformers' choice
    revision, cache_dir, token, local_files_only:  of the hub

    The model comes in evaluation mode. An artifact without a router loads; `route` then raises
    `RouterError`, and calls need `task=` or `weights=`. Raises `ArtifactError` and its kinds for
    what is wrong with the folder, `UnsupportedModel` for layers that cannot be run exactly,
    `InputError` for a dtype or device map that does not fit.
    """
    dtype = _dtype(dtype)
    device = usable(device)
    if device_map is not None and device != torch.device("cpu"):
        raise InputError(f"give device= or device_map=, not both: got {device} and {device_map}.")
    found = fetch(
        folder,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    artifact = Artifact(found, check=check)
    manifest = artifact.manifest
    model = load_shared(artifact, dtype, attn_implementation)
    names = body_places(model, manifest)
    heads = [record.name for record in manifest.tensors if record.kind == "head"]
    roots = head_roots(heads, {place.parameter for place in names.values()}) if heads else {}
    attach_factors(model, artifact, names)
    if roots:
        skeletons = {e.name: _skeleton(artifact, e, manifest.model_class) for e in manifest.experts}
        attach_heads(model, skeletons, artifact, roots)
    model.eval().requires_grad_(False)
    found_rows = dry_run(model, len(manifest.experts))
    problem: RouterError | None = None
    router: Router | None = None
    try:
        router = load_router(artifact)
    except RouterError as error:
        problem = error
    twin = TwinModel(model, manifest, artifact.folder.absolute(), router, problem)
    twin.planner.mixes_rows = found_rows.mixes_rows
    twin.untouched_layers = found_rows.untouched
    _settle_padding(twin)
    twin.eval().requires_grad_(False)
    register()
    if device_map is None:
        return twin.to(device)
    main = dispatch(model, device_map, max_memory, offload_folder)
    if twin.router is not None:
        twin.router.to(main)
    twin._main_device = main
    twin.planner.keep = 0  # what is kept merged would stay on the devices that offload
    return twin


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """By name, too; None is as stored."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    named = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise InputError(
            f"dtype={dtype!r}: expected a float dtype or its name: 'auto', 'float32', 'bfloat16' "
            "or 'float16'. Factors are stored in int8 or int4 by the recipe's exclusive section."
        )
    return named


def _settle_padding(twin: TwinModel) -> None:
    """One padding id for a decoder that classifies: the tokenizer's.

    Such a model reads its answer off the last token that is not padding, and finds it by
    `config.pad_token_id`. Bases of this kind name none, experts name one or another.
    """
    try:
        own = json.loads((twin.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    classifies = type(twin.model).__name__.endswith("ForSequenceClassification")
    if not classifies or own.get("pad_token_id") is not None:
        return
    try:
        tokenizer = twin.tokenizer
    except InputError:
        return  # inputs will come as numbers, padded with the experts' own id
    if tokenizer.pad_token_id is not None:
        twin.config.pad_token_id = tokenizer.pad_token_id


def load_router(artifact: Artifact) -> Router:
    """The fitted router.

    Raises `RouterError` if there is none, it does not belong here, or its files cannot be read.
    """
    encoder = novelty = None
    try:
        tensors = artifact.router()
        fitted = artifact.manifest.router
        assert fitted is not None, "artifact.router() checks it"
        if fitted.encoder is not None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(artifact.folder)
            encoder = TextEncoder(artifact.folder / ENCODER, tokenizer, fitted.pooling)
    except (CorruptArtifact, InputError, OSError) as problem:
        raise RouterError(
            f"{artifact.folder}: its router cannot be read ({first_line(problem)}). "
            "Run 'twinmerge fit-router' again."
        ) from None
    experts = len(fitted.experts)
    if fitted.novelty is not None:
        width = fitted.width // max(len(fitted.layers), 1)
        widths = dict.fromkeys(fitted.novelty.layers, width)
        look = fitted.novelty
        novelty = Novelty(widths, experts, look.threshold, look.pooling)
    router = Router(
        empty(fitted.kind, fitted.width, experts, fitted.hidden),
        fitted.layers,
        kind=fitted.kind,
        pooling=fitted.pooling,
        encoder=encoder,
        temperature=fitted.temperature,
        sharpness=fitted.sharpness,
        novelty=novelty,
    )
    try:
        router.load_tensors(tensors)
    except (KeyError, RuntimeError, ValueError) as problem:
        raise RouterError(
            f"{artifact.folder / ROUTER}: its tensors are not those of a router of kind "
            f"{fitted.kind} and width {fitted.width} ({first_line(problem)}). "
            "Run 'twinmerge fit-router' again."
        ) from None
    return router.eval()


def load_shared(
    artifact: Artifact,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The shared expert as the experts' task model, heads not filled in yet.

    Raises `CorruptArtifact` or `UnsupportedModel` if a weight of the body finds no place.
    """
    manifest = artifact.manifest
    cls = model_class(manifest)
    config = task_config(artifact.folder, manifest.experts[0])
    more = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with quiet():
            model, info = cls.from_pretrained(
                artifact.folder,
                config=config,
                dtype=dtype or "auto",
                output_loading_info=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # a head of the base's own; the body is checked below
                **more,
            )
    except (ImportError, ValueError) as problem:
        if not more:
            raise
        raise InputError(f"attn_implementation={attn_implementation!r}: {problem}") from None
    heads = {record.name for record in manifest.tensors if record.kind == "head"}
    changed = {record.name for record in manifest.tensors if differs(record)}
    missing = sorted(k for k in info["missing_keys"] if k not in heads and not k.endswith(COUNTER))
    lost = [name for name in sorted(info["unexpected_keys"]) if name in changed]
    mismatched = sorted({key for key, *_ in info.get("mismatched_keys") or []} - heads)
    if missing or mismatched:
        names = missing or mismatched
        raise CorruptArtifact(
            f"{artifact.folder}: the shared expert lacks {', '.join(names[:3])} that "
            f"{type(model).__name__} needs. Was the base a model of another class?"
        )
    if lost:
        raise UnsupportedModel(
            f"{artifact.folder}: {type(model).__name__} has no place for {', '.join(lost[:3])} "
            f"({len(lost)} in all). The installed transformers ({transformers.__version__}) may "
            "name this model's weights otherwise."
        )
    return model


def model_class(manifest: Manifest) -> Any:
    """The task model's class in transformers."""
    cls = getattr(transformers, manifest.model_class, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise UnsupportedModel(
            f"{manifest.model_class}: transformers {transformers.__version__} has no such model "
            "class. Upgrade transformers; remote code is not run."
        )
    return cls


def task_config(folder: Path, expert: ExpertRecord) -> Any:
    """The base's configuration with one expert's labels."""
    try:
        # transformers' reader: it writes infinite numbers in a way of its own.
        own, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
        own = getattr(PreTrainedConfig, "_decode_special_floats", lambda found: found)(own)
    except (OSError, ValueError) as problem:
        raise ArtifactError(f"{folder / 'config.json'}: {problem}. Rebuild the artifact.") from None
    own.update(expert.config)
    if expert.outputs is not None:
        known = {int(key): value for key, value in (expert.config.get("id2label") or {}).items()}
        own["id2label"] = {i: known.get(i, f"LABEL_{i}") for i in range(expert.outputs)}
        own["label2id"] = {label: i for i, label in own["id2label"].items()}
    own.pop("num_labels", None)
    model_type = own.pop("model_type")
    with quiet():
        return AutoConfig.for_model(model_type, **own)


def _skeleton(artifact: Artifact, expert: ExpertRecord, name: str) -> nn.Module:
    """The task model of one expert's configuration, without memory."""
    cls = model_class(artifact.manifest)
    config = task_config(artifact.folder, expert)
    with torch.device("meta"), quiet():
        return cls.from_config(config) if name.startswith("Auto") else cls(config)


def body_places(model: PreTrainedModel, manifest: Manifest) -> dict[str, Place]:
    """Base tensor name -> where it lives in the task model, for all that is merged."""
    body = {r.name: r.shape for r in manifest.tensors if r.kind in ("matrix", "vector", "tied")}
    return places(model, model.base_model_prefix, body)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' report of heads that are filled in right after."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.CRITICAL)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        hf_logging.set_verbosity(before)
        if bars:
            hf_logging.enable_progress_bar()
