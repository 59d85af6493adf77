"""`transformers.pipeline(...)` of a TwinModel: every row answered by its own expert's head.

The stock pipelines read label names off one configuration, and a TwinModel has one per expert. So
a row's output is handed to the stock code cut to the head that answered it, together with that
expert's configuration: what comes is what the expert's own pipeline would say of these logits.

transformers builds a pipeline of the class that its table of tasks names. `register` puts classes
there that build a stock pipeline for every other model, so that the plain
`transformers.pipeline("text-classification", model=twin, tokenizer=twin.tokenizer)` is right.
"""

# The stock pipelines override Pipeline's methods with other parameters; ours cannot but do so too.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline
from transformers.pipelines.feature_extraction import FeatureExtractionPipeline
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline
from transformers.pipelines.text_classification import TextClassificationPipeline
from transformers.pipelines.text_generation import TextGenerationPipeline
from transformers.pipelines.token_classification import TokenClassificationPipeline

from ..errors import InputError
from .arguments import check_names
from .model import TwinModel

CHOICES = ("weights", "task", "head")
"""Arguments of a TwinModel's call that a pipeline takes too, when it is made or when it is called.

In `transformers.pipeline(task, ...)` the word `task` is taken: give it to the pipeline's call."""


class _TwinPipeline(Pipeline):
    """What all have in common. `stock` is the class that every other model gets."""

    stock: type[Pipeline]

    @property
    def twin(self) -> TwinModel:
        model: Any = self.model
        return model

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, TwinModel) and issubclass(cls, TextGenerationPipeline):
            if not model.can_generate():  # on which the stock pipeline stumbles before it checks
                raise _other_kind("text-generation", model)
        if model is None or isinstance(model, TwinModel):  # None: a copy is made
            return super().__new__(cls)
        return cls.stock(*args, **kwargs)  # of another class: Python does not call our __init__

    def check_model_type(self, supported_models: Any) -> None:
        """The stock check goes by the class's name, and only warns. Ours: by the task model's.

        Raises `InputError` for a task model of another kind.
        """
        known = supported_models
        if not isinstance(known, list):  # {configuration: name of its class, or several}
            names = ([each] if isinstance(each, str) else each for each in known.values())
            known = [name for several in names for name in several]
        if type(self.twin.model).__name__ not in known:
            raise _other_kind(self.task, self.twin)

    def _sanitize_parameters(self, **given: Any) -> tuple[dict, dict, dict]:
        check_names(given, ())
        chosen = {name: given.pop(name) for name in CHOICES if name in given}
        for (
            name,
            value,
        ) in chosen.items():  # which rows come in which batch, only transformers knows
            if name != "weights" and not isinstance(value, str | None):
                raise InputError(f"{name}=: a pipeline takes one name for all rows, got {value!r}.")
            if name == "weights" and value is not None and not isinstance(value, Mapping | str):
                if torch.as_tensor(value).ndim > 1:
                    raise InputError(
                        "weights=: a pipeline takes one weighting for all rows, got one for each. "
                        "Call the model."
                    )
        pre, forward, post = super()._sanitize_parameters(**given)  # type: ignore[safe-super]
        return pre, {**forward, **chosen}, post

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """The artifact, which has tokenizer and processor in it."""
        self.model.save_pretrained(save_directory, **kwargs)


def _other_kind(task: str, twin: TwinModel) -> InputError:
    return InputError(
        f"pipeline({task!r}): expected a task model of that kind, this artifact's is a "
        f"{type(twin.model).__name__}. Make the pipeline of its own task, or call the model"
        f"{' (model.generate)' if twin.can_generate() else ''}."
    )


def _stock(pipeline: _TwinPipeline, config: Any) -> Any:
    """A stock pipeline with the same settings, for a model known by its configuration alone."""
    seen: Any = object.__new__(pipeline.stock)
    vars(seen).update(vars(pipeline), model=SimpleNamespace(config=config))
    return seen


def _head_config(twin: TwinModel, index: int, widest: int) -> SimpleNamespace:
    """What the configuration of one expert says of its labels.

    widest: outputs of the batch, which are this expert's own only where all heads are alike
    """
    name = twin.experts[index]
    count = twin.outputs[name] or widest
    labels = twin.labels[name] or [f"LABEL_{i}" for i in range(count)]
    kind = twin.manifest.experts[index].config.get("problem_type")
    if len(labels) == 1 and kind != "multi_label_classification":
        kind = "regression"  # else the stock pipeline squeezes the value into 0 to 1
    return SimpleNamespace(
        id2label=dict(enumerate(labels)), num_labels=len(labels), problem_type=kind
    )


class _Classification(_TwinPipeline):
    """One answer per row. Every answer also says `expert` and `weight`, as `Answer` does."""

    def _forward(self, model_inputs: Any, **chosen: Any) -> dict[str, Tensor]:
        output = self.model(**model_inputs, **chosen)
        return {"logits": output.logits, "weights": output.weights, "expert": output.expert}

    def postprocess(self, model_outputs: Any, **parameters: Any) -> Any:
        index = int(model_outputs["expert"][0])
        logits = model_outputs["logits"]
        config = _head_config(self.twin, index, logits.shape[-1])
        own = {"logits": logits[..., : config.num_labels]}
        found = _stock(self, config).postprocess(own, **parameters)
        by: dict[str, Any] = {"expert": self.twin.experts[index]}
        by["weight"] = float(model_outputs["weights"][0, index])
        return [each | by for each in found] if isinstance(found, list) else found | by


class TwinTextClassification(_Classification, TextClassificationPipeline):
    """`TextClassificationPipeline` with each row's own labels; a regression's value as it is."""

    stock = TextClassificationPipeline


class TwinImageClassification(_Classification, ImageClassificationPipeline):
    """`ImageClassificationPipeline` with each row's own labels."""

    stock = ImageClassificationPipeline


class TwinTokenClassification(_TwinPipeline, TokenClassificationPipeline):
    """`TokenClassificationPipeline` with each row's own labels.

    A text that is cut into pieces is routed piece by piece, so one text may have labels of several
    experts. The stock code sees one long list of labels, of all experts after each other, and -inf
    for those that a piece's head does not have.
    """

    stock = TokenClassificationPipeline

    def _forward(self, model_inputs: Any, **chosen: Any) -> dict[str, Any]:
        kept = {name: model_inputs.pop(name, None) for name in _OF_THE_TEXT}
        output = self.model(**model_inputs, **chosen)
        return {
            "logits": self._spread(output.logits, output.expert),
            **kept,
            **model_inputs,
        }

    def _spread(self, logits: Tensor, expert: Tensor) -> Tensor:
        widths = self._widths(logits.shape[-1])
        out = logits.new_full((*logits.shape[:-1], sum(widths)), float("-inf"))
        for row, index in enumerate(expert.tolist()):
            start = sum(widths[:index])
            out[row, :, start : start + widths[index]] = logits[row, :, : widths[index]]
        return out

    def _widths(self, widest: int) -> list[int]:
        return [count or widest for count in self.twin.outputs.values()]

    def postprocess(self, all_outputs: Any, **parameters: Any) -> Any:
        twin = self.twin
        widest = all_outputs[0]["logits"].shape[-1] // len(twin.experts)
        names = [
            label
            for index in range(len(twin.experts))
            for label in _head_config(twin, index, widest).id2label.values()
        ]
        seen = _stock(self, SimpleNamespace(id2label=dict(enumerate(names))))
        return seen.postprocess(all_outputs, **parameters)


_OF_THE_TEXT = (
    "special_tokens_mask",
    "offset_mapping",
    "sentence",
    "is_last",
    "word_ids",
    "word_to_chars_map",
)
"""What the stock pipeline keeps beside a model's inputs."""


class _Features(_TwinPipeline):
    """The task model's first output: hidden states, or logits where it has a head."""

    def _forward(self, model_inputs: Any, **chosen: Any) -> Any:
        output = self.model(**model_inputs, **chosen).model_output
        pooled = getattr(output, "pooler_output", None)
        return {0: output[0]} | ({} if pooled is None else {"pooler_output": pooled})


class TwinFeatureExtraction(_Features, FeatureExtractionPipeline):
    """`FeatureExtractionPipeline` of rows that are routed."""

    stock = FeatureExtractionPipeline


class TwinImageFeatures(_Features, ImageFeatureExtractionPipeline):
    """`ImageFeatureExtractionPipeline` of rows that are routed."""

    stock = ImageFeatureExtractionPipeline


class TwinTextGeneration(_TwinPipeline, TextGenerationPipeline):
    """`TextGenerationPipeline`; weights are decided once per row, from its prompt."""

    stock = TextGenerationPipeline


TASKS: dict[str, type[_TwinPipeline]] = {
    "text-classification": TwinTextClassification,
    "token-classification": TwinTokenClassification,
    "image-classification": TwinImageClassification,
    "feature-extraction": TwinFeatureExtraction,
    "image-feature-extraction": TwinImageFeatures,
    "text-generation": TwinTextGeneration,
}


def register() -> None:
    """Have `transformers.pipeline` build our classes for a TwinModel; others get the stock ones.

    Leaves alone what somebody else registered. Does nothing the second time.
    """
    for task, ours in TASKS.items():
        entry = PIPELINE_REGISTRY.supported_tasks.get(task)
        if entry is None:
            continue
        stock = f"{ours.stock.__module__}.{ours.stock.__qualname__}"  # a path since 5.20
        if entry["impl"] in (ours.stock, stock):
            entry["impl"] = ours


def make(twin: TwinModel, task: str, **options: Any) -> Pipeline:
    """`transformers.pipeline(task, model=twin, ...)` with the artifact's tokenizer or processor."""
    from transformers import pipeline

    task = {"sentiment-analysis": "text-classification", "ner": "token-classification"}.get(
        task, task
    )
    cls = options.get("pipeline_class") or TASKS.get(task)
    if cls is None:
        raise InputError(
            f"pipeline({task!r}): expected one of {', '.join(TASKS)}. For another task call the "
            "model, or model.merged(weights) for a plain one."
        )
    if cls._load_tokenizer:
        options.setdefault("tokenizer", twin.tokenizer)
    if cls._load_image_processor and "image_processor" not in options:
        options["image_processor"] = twin.image_processor
    if twin.hf_device_map is None and options.get("device") is None:
        options["device"] = twin.device  # transformers would move it to the first GPU
    return pipeline(task, model=twin, **{"pipeline_class": cls, **options})  # type: ignore
