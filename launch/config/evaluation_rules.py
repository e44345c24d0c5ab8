"""Checks the evaluations of a run before any process starts."""

from infer.evaluate.lines import checked_file
from infer.evaluate.registry import EVALUATION_TASKS
from train.config import TrainConfig
from train.config.errors import ConfigError


def check_evaluation(config: TrainConfig) -> None:
    """Rejects tasks that the model cannot do, and files that do not exist."""
    tasks = config.evaluation.tasks
    for name in tasks.tasks:
        spec = EVALUATION_TASKS.get(name)
        if config.model.head not in spec.heads:
            raise ConfigError(
                f"evaluation.tasks: {name} needs a model with model.head={' or '.join(spec.heads)}, task.kind="
                f"{config.task.kind} has {config.model.head}; nearest valid: evaluation.tasks=[]"
            )
        settings = tasks.settings[name]
        for key in spec.required:
            if not getattr(settings, key):
                raise ConfigError(
                    f"evaluation.{name}.{key}: a value is needed if evaluation.tasks has {name}, is "
                    f"{getattr(settings, key)}; write evaluation.{name}.{key}=FILE"
                )
        for path in spec.files(settings):
            checked_file(f"evaluation.{name}", path)
