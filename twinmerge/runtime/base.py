"""The base that the experts were tuned from, as a task model: what it would answer untuned.

It is in no artifact, only named there. A base has no task head, so it is given one expert's.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError, TwinMergeError, first_line
from .attach import COUNTER
from .heads import HeadSwitch
from .load import model_class, quiet, task_config
from .model import TwinModel


def load_base(
    twin: TwinModel, head: str | None = None, reference: str | Path | None = None
) -> PreTrainedModel:
    """The base of an artifact, on the model's device and in its dtype.

    head:      the expert whose head it gets, where experts have heads
    reference: its folder or hub id; default what the manifest names. Nothing is downloaded

    Raises `InputError`, in one line, if it is not on this disk or does not fill the model.
    """
    named, todo = (
        str(reference or twin.manifest.base),
        "Say where it is with --base FOLDER (base=).",
    )
    index = 0 if head is None else twin.experts.index(head)
    folder, revision = named, None
    if not Path(named).exists():
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(@[^\s@]+)?", named):
            raise InputError(f"the base {named} is not there. {todo}")
        folder, _, given = named.partition("@")
        revision = given or None
    try:
        config = task_config(twin.folder, twin.manifest.experts[index])
        with quiet():
            model, info = model_class(twin.manifest).from_pretrained(
                folder,
                config=config,
                dtype=twin.dtype,
                revision=revision or "main",
                output_loading_info=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # a head of the base's own; the body is checked below
            )
    except TwinMergeError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as problem:
        raise InputError(
            f"the base {named} cannot be opened here ({first_line(problem)}). {todo}"
        ) from None
    heads = {record.name for record in twin.manifest.tensors if record.kind == "head"}
    lacking = {k for k in info["missing_keys"] if not k.endswith(COUNTER)}
    lacking |= {key for key, *_ in info.get("mismatched_keys") or []}
    if lacking - heads:
        raise InputError(
            f"the base {named} is another model: it has no {min(lacking - heads)} as "
            f"{type(model).__name__} needs it. {todo}"
        )
    for path, switch in twin.model.named_modules():
        if isinstance(switch, HeadSwitch):
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, copy.deepcopy(switch.heads[index]))
    model.config.pad_token_id = twin.config.pad_token_id
    nn.Module.to(model, twin.device)
    return model.eval().requires_grad_(False)
