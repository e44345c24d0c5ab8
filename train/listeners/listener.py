"""Defines what listens to a training loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.loader import Loader
from data.prepare import Prepared
from train.callbacks import Callbacks
from train.config import TrainConfig
from train.files.status import StatusFile
from train.guard.recovery import Skipped
from train.learner import Learner
from train.records.reporter import Reporter
from train.replica import Replica
from train.step import StepResult


@dataclass(frozen=True, slots=True)
class Done:
    """The outcome of a step that updated the weights."""

    result: StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class RunParts:
    """What the parts of a training loop share; rank 0 calls the callbacks."""

    config: TrainConfig
    learner: Learner
    prepared: Prepared
    loader: Loader
    reporter: Reporter
    status: StatusFile
    callbacks: Callbacks

    def is_due(self, num_done: int, every_steps: int) -> bool:
        """Returns whether the number of steps done is a multiple of `every_steps`, or all steps are done."""
        return num_done == self.config.task.steps or (every_steps > 0 and num_done % every_steps == 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """The end of a step."""

    num_done: int
    outcome: Done | Skipped
    replica: Replica


class Listener:
    """What a training loop calls after steps. All ranks have the same ones, and call them together."""

    def __init__(self, parts: RunParts) -> None:
        """Stores the arguments."""
        self._parts = parts

    def is_due(self, num_done: int) -> bool:
        """Returns whether it runs after this number of steps."""
        raise NotImplementedError

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Does its work, and returns what it adds to the record of the step."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes what it opened, after the last step."""
