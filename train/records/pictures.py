"""Measures how the pipeline uses a step's time: the bubble of every step, pictures of chosen steps.

Ranks share the wall clock: each reports when its program began, and the steps' times count from then on. Between hosts
that is as good as their clocks agree. A device's first mark stands for the host's time at its launch, because the
device is idle then.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import distributed as dist

from comm.groups import make_group
from dualpipe.build import Alternatives, by_makespan
from dualpipe.draw.entry import TimedSchedule, size, time_schedule
from dualpipe.draw.svg import svg
from dualpipe.draw.text import html
from dualpipe.draw.trace import trace
from dualpipe.ir import Schedule
from dualpipe.passes import ungroup
from dualpipe.runtime.execute import Execution
from dualpipe.runtime.measured import (
    LaneSpan,
    Measured,
    RankBusyTime,
    SpanLane,
    measured_costs,
    rank_busy_time,
    rank_spans,
    step_lanes,
)
from train.files.rank_files import replace_text
from train.files.secrets import redact
from train.plan import excluded_schedules
from train.replica import Replica
from train.schedule.measured import MeasuredRun, RunFacts, drawn, step_times, try_to_write
from train.world import World

LOGGER = logging.getLogger("train")
SVG_NAME = "schedule.svg"
TRACE_NAME = "trace.json"
PAGE_NAME = "schedule.html"


class PipelineTimeline:
    """The measured times of this rank, and the gathering of those of the whole pipeline with data index 0."""

    def __init__(self, world: World, name: str, folder: Path) -> None:
        """Creates a group for the pipeline that is drawn. All ranks call it at the same point."""
        self._name = name
        self._folder = folder
        self._lanes: dict[int, tuple[SpanLane | None, ...]] = {}
        self._alternatives: dict[int, Alternatives] = {}
        self._group = make_group(world.layout.pipeline_group(0), world.timeout_seconds)

    def use(self, replica: Replica, execution: Execution) -> RankBusyTime:
        """Returns when this rank was busy in a step that the replica ran."""
        num_micro_batches = replica.schedule.num_micro_batches
        if num_micro_batches not in self._lanes:
            self._lanes[num_micro_batches] = step_lanes(replica.train_program)
        return rank_busy_time(self._lanes[num_micro_batches], execution.spans, execution.origin_seconds)

    def draw(self, replica: Replica, execution: Execution, step: int) -> bool:
        """Draws a step into the run's folder; returns True on rank 0, which writes. All ranks call it."""
        if self._group is None:
            return False
        schedule = replica.schedule
        if replica.config.pairing == "sequential":
            schedule = ungroup(schedule)
        rank = replica.world.pipeline_index
        groups = schedule.ranks[rank]
        mine = rank_spans(groups, replica.train_program, execution.spans, execution.origin_seconds)
        gathered: list[tuple[LaneSpan, ...]] | None = [()] * schedule.num_ranks if rank == 0 else None
        with replica.world.log.collective("pipeline", self._group, "gather of times"):
            dist.gather_object(mine, gathered, dst=0, group=self._group)
        if gathered is None:
            return False
        title = f"{redact(self._name)}, step {step}: {schedule.kind}, {size(schedule)}"
        try:
            measured = Measured(ranks=tuple(gathered))
            others = self._alternatives_of(replica)
            self._write_times(replica, schedule, measured, step)
            write_pictures(self._folder, title, schedule, measured, others)
        except OSError as error:  # the folder was deleted or the disk is full, which must not end the run
            LOGGER.warning("%s cannot be drawn: %s", SVG_NAME, error)
            return False
        return True

    def _write_times(self, replica: Replica, drawn_schedule: Schedule, measured: Measured, step: int) -> None:
        """Writes the times of the model's parts, from which `launch.plan` predicts steps."""
        config = replica.config
        batch = replica.config.batch
        mesh = replica.world.layout.parallelism
        facts = RunFacts(
            model=config.model,
            precision=config.precision.kind,
            device=replica.world.device.type,
            expert=mesh.expert,
            tokens=batch.micro_sequences * batch.sequence_length_tokens // mesh.context,
            cut=replica.cut,
            context=mesh.context,
        )
        times = step_times(config.model, drawn_schedule, replica.cut, measured)
        try_to_write(self._folder, MeasuredRun(measured=drawn(times, facts, step), schedule=replica.schedule))

    def _alternatives_of(self, replica: Replica) -> Alternatives:
        """Returns the other schedules for the replica's size. They are built for its first picture."""
        num_micro_batches = replica.schedule.num_micro_batches
        if num_micro_batches not in self._alternatives:
            model = replica.config.model
            excluded = excluded_schedules(model, replica.schedule.num_ranks)
            change = ungroup if replica.config.pairing == "sequential" else None
            self._alternatives[num_micro_batches] = Alternatives(excluded, change, model.num_layers)
        return self._alternatives[num_micro_batches]


def write_pictures(
    folder: Path, title: str, schedule: Schedule, measured: Measured, alternatives: Alternatives | None = None
) -> TimedSchedule:
    """Writes the planned and measured times as SVG, page and trace, each file completely or not at all.

    The plan is a simulation of `schedule`, which was run, with the measured times of its operations. The page compares
    `alternatives` with it under the same costs.
    """
    costs = measured_costs(schedule, measured)
    shown = time_schedule(schedule, costs, measured=measured)
    replace_text(folder / SVG_NAME, svg(schedule, shown.simulation, measured, title, bound=shown.bound) + "\n")
    replace_text(folder / TRACE_NAME, trace(schedule, shown.simulation, costs, measured, seconds_per_unit=1.0) + "\n")
    others = [] if alternatives is None else alternatives.timed(schedule, costs)
    replace_text(folder / PAGE_NAME, html(by_makespan([shown, *others]), title) + "\n")
    return shown


def window_slots(use: RankBusyTime, pipeline: int, num_pipelines: int) -> list[float]:
    """Returns the negated start and the end in this rank's slots, else -inf, for a maximum."""
    slots = [-float("inf")] * (2 * num_pipelines)
    slots[2 * pipeline : 2 * pipeline + 2] = [-use.start_seconds, use.end_seconds]
    return slots


def bubble_of(used_seconds: float, slots: Sequence[float], ranks_per_pipeline: int) -> float:
    """Returns the idle share of all ranks' time, over all pipelines.

    Time lasts from a pipeline's first rank to its last one. `slots` is the maximum over ranks of their `window_slots`,
    `used_seconds` the sum of their busy times.
    """
    total = ranks_per_pipeline * pipeline_seconds(slots)
    return max(0.0, 1.0 - used_seconds / total) if total > 0 else 0.0


def pipeline_seconds(slots: Sequence[float]) -> float:
    """Returns the sum of all pipelines' times from the maximum of all `window_slots`."""
    return sum(end + negated for negated, end in zip(slots[::2], slots[1::2], strict=True))
