"""Defines the configuration of evaluation tasks, of `launch.evaluate` and of a run. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from infer.evaluate.config import EvaluationTaskConfig
from infer.evaluate.registry import EVALUATION_TASKS
from train.config.decode import decode, encode
from train.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class _Names:
    tasks: tuple[Annotated[str, EVALUATION_TASKS], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTasksConfig:
    """Evaluation tasks, and the configuration of each registered task that has one, by name."""

    tasks: tuple[str, ...]
    settings: Mapping[str, EvaluationTaskConfig]

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], place: str = "") -> "EvaluationTasksConfig":
        """Decodes the key `tasks` and a group of keys for each task.

        Args:
            values: plain values.
            place: dotted key of the values, for errors.

        Raises:
            ConfigError: an unknown task, a task that is named twice, or a key that is not valid.
        """
        prefix = f"{place}." if place else ""
        names = decode(_Names, {"tasks": values.get("tasks")}, place).tasks
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{prefix}tasks: must name a task once, is {list(names)}; nearest valid: one {name}")
        settings = {
            name: decode(spec.config, values.get(name, {}), f"{prefix}{name}")
            for name, spec in EVALUATION_TASKS.items()
            if name in values or name in names
        }
        return cls(tasks=names, settings=settings)

    def to_plain(self) -> dict[str, Any]:
        """Returns the values that `from_plain` reads."""
        return {"tasks": list(self.tasks), **{name: encode(each) for name, each in self.settings.items()}}
