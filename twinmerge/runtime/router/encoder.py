"""A small encoder of its own for the router: text -> features.

Any encoder that transformers opens, such as a sentence-transformers model: for a base that is slow,
or whose early layers say little about the task. It is copied into the artifact, which stays one
folder. It reads text, so the tokens that the model is given are turned back into text first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from ...data import known_positions
from ...errors import InputError, first_line
from .features import Pooling, pooled

ENCODER = "router-encoder"
"""Its folder within the artifact."""


class TextEncoder(nn.Module):
    """Tokens of the base -> features (batch, width), float32, on the model's device."""

    def __init__(
        self, folder: Path | str, tokenizer: Any, pooling: Pooling, max_tokens: int | None = None
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__()
        try:
            self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
            self._own = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, SafetensorError) as problem:
            gone = Path(folder).is_absolute() and not Path(folder).is_dir()
            why = "there is no such folder" if gone else first_line(problem)
            raise InputError(
                f"router encoder {folder}: cannot be opened ({why}). Expected a "
                "folder or hub id of an encoder with its tokenizer, such as "
                "sentence-transformers/all-MiniLM-L6-v2."
            ) from None
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise InputError(
                f"router encoder {folder}: expected an encoder, got a model with a decoder "
                f"({type(self.model).__name__}). One of few layers will do, such as "
                "sentence-transformers/all-MiniLM-L6-v2."
            )
        if self._own.pad_token_id is None:
            raise InputError(
                f"router encoder {folder}: expected a tokenizer with a padding token, got one "
                "without. Set pad_token in its folder (tokenizer_config.json)."
            )
        self._base = tokenizer
        self.pooling: Pooling = pooling
        self.max_tokens = min(max_tokens or 512, known_positions(self.model))
        self.cut = 0
        """Texts read so far that were longer than `max_tokens`, of which it read the beginning."""
        self.requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Model and tokenizer, as transformers opens them."""
        self.model.save_pretrained(folder)
        self._own.save_pretrained(folder)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Any]) -> Float[Tensor, "batch width"]:
        """Raises `InputError` without `input_ids`: there is no text in anything else."""
        ids = inputs.get("input_ids")
        if ids is None:
            raise InputError(
                "the router has an encoder of its own, which reads text: expected input_ids. Give "
                "weights= or task= with other inputs."
            )
        mask = inputs.get("attention_mask")
        rows = [row if mask is None else row[mask[i].bool()] for i, row in enumerate(ids)]
        texts = self._base.batch_decode([row.tolist() for row in rows], skip_special_tokens=True)
        lengths = [len(each) for each in self._own(texts, verbose=False)["input_ids"]]
        self.cut += sum(length > self.max_tokens for length in lengths)
        batch = self._own(
            texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        device = next(self.model.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items()}
        hidden = self.model(**batch).last_hidden_state
        return pooled(hidden, batch.get("attention_mask"), self.pooling)
