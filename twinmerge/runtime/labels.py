"""A configuration that does not name one expert's labels as if they were everybody's."""

from __future__ import annotations

from typing import Any

from ..errors import InputError

OF_A_HEAD = ("id2label", "label2id", "num_labels", "problem_type")


class NoOneLabel(InputError, AttributeError):
    """Labels were asked of a model whose experts have different ones.

    An `AttributeError` too, so that `hasattr` and `getattr` with a default work as always.
    """


class PerExpertConfig:
    """The task model's configuration, but for its labels, which belong to one expert.

    Code that is made for plain models reads label names there; it gets an error instead of wrong
    names. Everything else is read from, and written to, the configuration itself.
    """

    def __init__(self, config: Any, experts: tuple[str, ...]) -> None:
        self.__dict__.update(_config=config, _experts=experts)

    def __getattr__(self, name: str) -> Any:
        if name in OF_A_HEAD:
            raise NoOneLabel(
                f"config.{name}: the experts {', '.join(self._experts)} have labels of their own, "
                "so there is no one answer. Read model.labels and output.expert, or ask "
                "model.answers(output). For a pipeline: model.pipeline(task), or "
                "transformers.pipeline(task, model=model) without another pipeline_class."
            )
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    @property
    def __class__(self) -> type:  # type: ignore[override]  # what isinstance() asks
        return type(self._config)

    def __reduce__(self) -> tuple[Any, ...]:
        return PerExpertConfig, (self._config, self._experts)

    def __repr__(self) -> str:
        return repr(self._config)
