"""Registers evaluation tasks by name, as a plugin file can, too. Imports no torch."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from infer.evaluate.protocol import EvaluationTask, TaskContext
from kernels.registry import Registry
from model.config import HeadKind


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTaskConfig:
    """Base class of the configurations of evaluation tasks."""


def path_of(config: Any) -> tuple[str, ...]:
    """Returns the file that the key `path` names, if there is one."""
    return (config.path,) if config.path else ()


@dataclass(frozen=True, slots=True)
class EvaluationTaskSpec:
    """A task that `tasks` can name.

    Attributes:
        version: changes with the meaning of the task's numbers.
        build: builds the task. It checks all files, and raises `EvaluationError`, `DataError` or `ScoringError`.
        files: returns the files that decide the results, given the configuration.
        required: keys of its configuration that must not be null.
    """

    summary: str
    config: type[EvaluationTaskConfig]
    build: Callable[[Any, TaskContext], EvaluationTask]
    _: KW_ONLY
    version: int
    files: Callable[[Any], tuple[str, ...]] = path_of
    heads: tuple[HeadKind, ...] = ("tokens",)
    required: tuple[str, ...] = ()


EVALUATION_TASKS: Registry[EvaluationTaskSpec] = Registry("tasks", ["infer.evaluate.tasks.table"])
