"""Draws planned and measured time, and reports answers without a verdict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.files.json_lines import try_append_event
from train.listeners.listener import Done, Listener, Moment, RunParts
from train.records.pictures import PAGE_NAME, SVG_NAME, TRACE_NAME, PipelineTimeline


class Pictures(Listener):
    """The pictures of steps that updated the weights."""

    def __init__(self, parts: RunParts, timeline: PipelineTimeline) -> None:
        """Stores the arguments."""
        super().__init__(parts)
        self._timeline = timeline

    def is_due(self, num_done: int) -> bool:
        """Implements `Listener.is_due`."""
        return self._parts.is_due(num_done, self._parts.config.track.picture_every_steps)

    def run(self, moment: Moment) -> Mapping[str, Any]:
        """Implements `Listener.run`."""
        step, outcome = moment.num_done, moment.outcome
        if isinstance(outcome, Done) and self._timeline.draw(moment.replica, outcome.result.execution, step):
            self._parts.reporter.say(
                f"step {step:>5}  planned and measured time in {SVG_NAME}, {PAGE_NAME}, {TRACE_NAME}"
            )
        return {}


class MissingVerdicts(Listener):
    """Reports, once in a run, why the first answer without a verdict has none."""

    def __init__(self, parts: RunParts) -> None:
        """Stores the arguments."""
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
