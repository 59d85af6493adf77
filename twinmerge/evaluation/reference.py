"""The experts themselves, as plain task models: what a merged model is measured against."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from ..checkpoint import Checkpoint, open_expert
from ..data import batches
from ..errors import CheckpointError, RecipeError
from ..recipe import Recipe
from ..runtime.attach import named_tensors
from ..runtime.load import model_class, quiet, task_config
from ..runtime.model import TwinModel
from ..runtime.names import Place, places
from .metrics import metric
from .score import Prepared, TaskScore, guesses_of


def expert_model(
    model: TwinModel, name: str, recipe: Recipe, *, base: str | None = None
) -> PreTrainedModel:
    """One expert of an artifact, from its own checkpoint, as a plain transformers model.

    recipe: the one that the artifact was built from; base: instead of its base

    Raises `CheckpointError` if its folder is gone or does not fill the model, `RecipeError` if the
    recipe has no such expert.
    """
    recipe = recipe.located()
    record = next(e for e in model.manifest.experts if e.name == name)
    entry = next((e for e in recipe.models if e.name == name), None)
    if entry is None:
        raise RecipeError(
            f"the recipe has no expert '{name}', the artifact does. Give the recipe that "
            f"{model.folder} was built from."
        )
    opened = Checkpoint.open(base or recipe.base_model)
    expert = open_expert(name, entry.model, opened)
    try:
        config = task_config(model.folder, record)
        cls = model_class(model.manifest)
        with quiet():
            plain = cls.from_config(config) if cls.__name__.startswith("Auto") else cls(config)
        known = dict(named_tensors(plain))
        shapes = {own: expert.info(own).shape for own in expert.names()}
        found = places(plain, plain.base_model_prefix, shapes)
        found |= {head: Place(head) for head in expert.head_names() if head in known}
        with torch.no_grad():
            for own, place in found.items():
                known[place.parameter][place.index].copy_(expert.read(own))
        filled = {id(known[place.parameter]) for place in found.values()}
        lacking = [n for n, p in plain.named_parameters() if id(p) not in filled]
        if lacking:
            raise CheckpointError(
                f"expert '{name}': its checkpoint has nothing for {', '.join(lacking[:3])}."
            )
        plain.config.pad_token_id = model.config.pad_token_id  # what its rows are padded with
        return plain.eval()
    finally:
        expert.close()
        opened.close()


@torch.no_grad()
def score_plain(
    model: TwinModel, plain: PreTrainedModel, name: str, task: Prepared, *, batch_size: int = 32
) -> TaskScore:
    """Score one plain model on the prepared rows of one expert's task."""
    names = model.labels[name]
    guesses = [0.0] * len(task.encoded)
    seconds = 0.0
    for indices, batch in batches(model.tokenizer, task.encoded, batch_size):
        started = time.perf_counter()
        logits = plain(**batch).logits
        seconds += time.perf_counter() - started
        for index, guess in zip(indices, guesses_of(logits, names), strict=True):
            guesses[index] = guess
    return TaskScore(
        score=metric(task.task.metric)(task.truth, guesses),
        metric=task.task.metric,
        rows=len(task.encoded),
        routing_accuracy=None,
        truncated=task.encoded.truncated,
        seconds=seconds,
    )
