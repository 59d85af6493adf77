"""A model over several devices, by accelerate: blocks here and there, what is left over on disk.

Layers are put in on the CPU first, so a device map names the task model's own modules. A layer's
factors are buffers of its module and go where it goes; of a module on disk they stay in memory.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError, MissingExtra, first_line
from .routing import routed

DeviceMap = str | Mapping[str, int | str | torch.device]
BALANCED = ("auto", "balanced", "balanced_low_0", "sequential")
"""Words that have accelerate decide, as in transformers."""


def dispatch(
    model: nn.Module,
    device_map: DeviceMap,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: Path | str | None = None,
) -> torch.device:
    """Spread the model over devices; where its inputs are expected.

    Raises `InputError` for a map that does not fit the model, `MissingExtra` without accelerate.
    """
    try:
        import accelerate
        from accelerate.utils import check_device_map, set_module_tensor_to_device
    except ImportError:
        raise MissingExtra(
            "device_map=: accelerate is not installed. Run pip install 'twinmerge[devices]', or "
            "name one device: device=."
        ) from None
    known = {path for path, _ in model.named_modules()}
    if isinstance(device_map, str) and device_map not in BALANCED:
        device_map = {"": _device(device_map)}
    if isinstance(device_map, str):
        placed = _infer(model, device_map, max_memory)
    else:
        placed = dict(device_map)
        for name in placed:
            if name not in known:
                raise InputError(
                    f"device_map=: {type(model).__name__} has no module {name!r}. "
                    f"Its parts: {', '.join(path for path, _ in model.named_children())}."
                )
        try:
            check_device_map(model, placed)
        except ValueError as problem:
            raise InputError(f"device_map=: {problem}") from None
    placed = _plain({name: _device(device) for name, device in placed.items()}, model)
    kept: str | None = None
    if "disk" in placed.values():
        if offload_folder is None:
            raise InputError(
                "device_map=: some modules go to disk. Say where: offload_folder=, or allow more "
                "memory with max_memory=."
            )
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
        # A folder of this model's own: accelerate takes what an older one left for ours.
        kept = tempfile.mkdtemp(prefix="twinmerge-", dir=offload_folder)
        weakref.finalize(model, shutil.rmtree, kept, ignore_errors=True)
    main: Any = next((device for device in placed.values() if device not in ("disk", "cpu")), "cpu")
    for name, device in placed.items():
        if name not in known and device != "disk":  # a tensor: accelerate moves modules only
            set_module_tensor_to_device(model, name, device)
    with _quiet():
        accelerate.dispatch_model(
            model,
            placed,
            main_device=main,
            offload_dir=kept,
            # They read weights of modules inside them without calling these.
            preload_module_classes=sorted(_layers(model)),
        )
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            _unrouted(module._hf_hook)
    # transformers' pipelines take the first for the one that inputs go to.
    first = sorted(placed.items(), key=lambda item: item[1] != main)
    model.hf_device_map = dict(first)  # type: ignore[assignment]
    return torch.device(main)


def usable(device: int | str | torch.device, name: str = "device") -> torch.device:
    """A device that torch can compute on here, or an `InputError` that calls it `name`."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found).add(1)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, TypeError) as problem:
        raise InputError(f"{name} {device}: cannot be used here ({first_line(problem)}).") from None
    return found


def _device(named: int | str | torch.device) -> Any:
    """A device that is there. "cpu" and "disk" are words, which accelerate compares."""
    if named == "disk":
        return named
    device = usable(named)
    return "cpu" if device.type == "cpu" else device


def _plain(placed: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The same map without "" for all the rest, which accelerate does not find on disk."""
    rest = placed.get("")
    if rest is None or set(placed.values()) == {"cpu"}:
        return placed
    placed = {name: device for name, device in placed.items() if name}

    def fill(module: nn.Module, path: str) -> None:
        inside = f"{path}." if path else ""
        if path in placed:
            return
        if path and not any(name.startswith(inside) for name in placed):
            placed[path] = rest
            return
        for name, _ in module.named_parameters(recurse=False):
            placed.setdefault(inside + name, rest)
        for name, child in module.named_children():
            fill(child, inside + name)

    fill(model, "")
    return placed


def _infer(model: nn.Module, how: str, max_memory: Mapping[int | str, int | str] | None) -> dict:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = _not_split(model)
    memory = None if max_memory is None else dict(max_memory)
    if how != "sequential":
        memory = get_balanced_memory(
            model, memory, no_split_module_classes=whole, low_zero=how == "balanced_low_0"
        )
    return dict(infer_auto_device_map(model, memory, no_split_module_classes=whole))


def _not_split(model: nn.Module) -> list[str]:
    """Names of the classes whose instances stay in one piece: blocks, and layers with factors."""
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    return sorted(blocks | _layers(model))


def _layers(model: nn.Module) -> set[str]:
    """Names of the classes that have factors."""
    return {type(module).__name__ for module in model.modules() if hasattr(module, "twin_mixers")}


def _unrouted(hook: Any) -> None:
    """Have the hook see parameters as they are: under a routing they read as mixed."""
    for name in ("pre_forward", "post_forward"):
        setattr(hook, name, _as_shared(getattr(hook, name)))


def _as_shared(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        with routed(None):
            return call(*args, **kwargs)

    return called


@contextmanager
def _quiet() -> Iterator[None]:
    """Without accelerate's report of what is on disk: the caller asked for it."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
