"""Defines what listens to a training loop, and the pictures of steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.loader import Loader
from data.prepare import Prepared
from train.callbacks import Callbacks
from train.config import TrainConfig
from train.files.json_lines import try_append_event
from train.files.status import StatusFile
from train.guard.recovery import Skipped
from train.learner import Learner
from train.records.reporter import Reporter
from train.records.step_record import PAGE_NAME, SVG_NAME, TRACE_NAME, PipelineTimeline
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
        self._parts = parts

    def is_due(self, num_done: int) -> bool:
        """Returns whether it runs after this number of steps."""
        raise NotImplementedError

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Does its work, and returns what it adds to the record of the step."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes what it opened, after the last step."""


class Pictures(Listener):
    """The pictures of steps that updated the weights."""

    def __init__(self, parts: RunParts, timeline: PipelineTimeline) -> None:
        super().__init__(parts)
        self._timeline = timeline

    def is_due(self, num_done: int) -> bool:
        """Implements `Listener.is_due`."""
        return self._parts.is_due(num_done, self._parts.config.track.picture_every_steps)

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Implements `Listener.run`."""
        step = moment.num_done
        outcome = moment.outcome
        if isinstance(outcome, Done) and self._timeline.draw(moment.replica, outcome.result.execution, step):
            self._parts.reporter.say(
                f"step {step:>5}  planned and measured time in {SVG_NAME}, {PAGE_NAME}, {TRACE_NAME}"
            )
        return {}


class MissingVerdicts(Listener):
    """Reports, once in a run, why the first answer without a verdict has none."""

    def __init__(self, parts: RunParts) -> None:
        super().__init__(parts)
        self._has_reported = False

    def is_due(self, num_done: int) -> bool:
        """Implements `Listener.is_due`."""
        return not self._has_reported

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Implements `Listener.run`."""
        rollouts = moment.outcome.result.rollouts if isinstance(moment.outcome, Done) else None
        reason = (rollouts or {}).get("no_verdict_reason")
        if reason is not None:
            self._has_reported = True
            self._parts.reporter.say(f"step {moment.num_done:>5}  an answer has no verdict: {reason}")
            if self._parts.learner.world.rank == 0:
                try_append_event(Path(self._parts.config.out_dir), "no_verdict", moment.num_done, reason)
        return {}
