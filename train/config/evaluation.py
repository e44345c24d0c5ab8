"""Defines the configuration of evaluation tasks, of `launch.evaluate` and of a run. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from infer.evaluate.registry import EVALUATION_TASKS, EvaluationTaskConfig
from kernels.ranges import NonNegativeInt
from train.config.decode import decode, encode
from train.config.errors import ConfigError

_Names = tuple[Annotated[str, EVALUATION_TASKS], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTasksConfig:
    """Evaluation tasks, and pairs of a registered task's name and its configuration."""

    tasks: tuple[str, ...]
    configured: tuple[tuple[str, EvaluationTaskConfig], ...] = ()

    @property
    def settings(self) -> dict[str, EvaluationTaskConfig]:
        """The configuration of each registered task that has one, by name."""
        return dict(self.configured)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "EvaluationTasksConfig":
        """Decodes the key `tasks` and a group of keys for each task."""
        names: tuple[str, ...] = decode(_Names, values.get("tasks"), "tasks")
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"tasks: must name a task once, is {list(names)}; nearest valid: one {name}")
        configured = tuple(
            (name, decode(spec.config, values.get(name, {}), name))
            for name, spec in EVALUATION_TASKS.items()
            if name in values or name in names
        )
        return cls(tasks=names, configured=configured)

    def to_plain(self) -> dict[str, Any]:
        """Returns the values that `from_plain` reads."""
        return {"tasks": list(self.tasks), **{name: encode(each) for name, each in self.settings.items()}}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Interval:
    every_steps: NonNegativeInt


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEvaluationConfig:
    """Evaluations during training."""

    every_steps: int
    tasks: EvaluationTasksConfig

    @classmethod
    def from_plain(cls, values: object) -> "RunEvaluationConfig":
        """Decodes the keys `every_steps` and `tasks`, and a group of keys for each task."""
        if not isinstance(values, Mapping):
            raise ValueError(f"must hold keys and values, is {values!r}")
        known = ("tasks", *EVALUATION_TASKS.names())
        own = {key: value for key, value in values.items() if key not in known}
        tasks = EvaluationTasksConfig.from_plain({key: values[key] for key in known if key in values})
        return cls(every_steps=decode(_Interval, own).every_steps, tasks=tasks)

    def to_plain(self) -> dict[str, Any]:
        """Returns the values that `from_plain` reads."""
        return {"every_steps": self.every_steps, **self.tasks.to_plain()}


NO_EVALUATION = RunEvaluationConfig(every_steps=0, tasks=EvaluationTasksConfig(tasks=()))
