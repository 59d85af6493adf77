"""The base's processors, opened from the artifact: its tokenizer, its image processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError, first_line

if TYPE_CHECKING:
    from .model import TwinModel


def open_tokenizer(twin: TwinModel) -> Any:
    """With a token to pad with. Raises `InputError` if the artifact holds no tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(twin.folder)
    except (OSError, ValueError, KeyError) as problem:
        advice = "Give tokenized inputs instead of text."
        if "image" in str(twin.input_modalities):
            advice = "It reads images: see model.image_processor."
        raise InputError(
            f"{twin.folder}: holds no tokenizer that transformers can open "
            f"({first_line(problem)}). {advice}"
        ) from None
    _give_padding(tokenizer, twin.config)
    return tokenizer


def _give_padding(tokenizer: Any, config: Any) -> None:
    """A tokenizer without a padding token (Llama, GPT-2) gets the model's, else the end token."""
    if tokenizer.pad_token_id is None:
        known = getattr(config, "pad_token_id", None)
        token = tokenizer.eos_token if known is None else tokenizer.convert_ids_to_tokens(known)
        if token is not None:
            tokenizer.pad_token = token


def open_image_processor(twin: TwinModel) -> Any:
    """Raises `InputError` if the artifact holds no image processor."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(twin.folder)
    except (OSError, ValueError, KeyError, ImportError) as problem:
        raise InputError(
            f"{twin.folder}: holds no image processor that transformers can open "
            f"({first_line(problem)}). Give pixel_values prepared as for the "
            "base, to a pipeline: image_processor=."
        ) from None
