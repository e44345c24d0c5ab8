"""Defines what all configurations of evaluation tasks share, and errors. Imports no torch."""

from dataclasses import dataclass


class EvaluationError(ValueError):
    """Invalid evaluation. The message states the key, the rule, the value and the nearest valid choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTaskConfig:
    """Base class of the configurations of evaluation tasks."""


def needed_path(key: str, path: str | None, example: str) -> str:
    """Returns the path of a task's file.

    Args:
        key: configuration key of the path.
        example: what the file has, for the error.

    Raises:
        EvaluationError: there is no path.
    """
    if not path:
        raise EvaluationError(f"{key}: a value is needed, is {path!r}; write {key}=FILE, with {example}")
    return path
