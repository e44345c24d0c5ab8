"""Writes and reads what a run measured: `probe.json` and `measured.json`. No torch here."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dualpipe.ir import Schedule, from_json, to_json
from dualpipe.validate import validate_passes
from kernels.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from model.config import ModelConfig, cut_at
from train.config.decode import decode, encode
from train.config.errors import ConfigError
from train.planner.config import PositiveShare, layer_parameters
from train.planner.measured.phases import PhaseTimes, StepTimes
from train.schedule.layer_times import LayerTimes, PartTimes

PROBE_NAME, MEASURED_NAME = "probe.json", "measured.json"
LOGGER = logging.getLogger("train")
_MOST_BYTES = 2**27
_SCHEDULE_KEY = "schedule"


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredTimes:
    """What a run measured of its model's parts.

    Fields that `MeasuredRates` has too mean the same there.

    `probe` is measured before the first step, one phase at a time, and has no phases; `step` while a step was drawn.
    Steps count from 1; the probe's is 0. `cut` lists the layers of each stage.
    """

    kind: Literal["probe", "step"]
    step: NonNegativeInt
    device: Literal["cpu", "cuda"]
    precision: str
    layer_parameters: PositiveInt
    expert: PositiveInt
    tokens: PositiveInt
    cut: tuple[NonNegativeInt, ...]
    dense: PartTimes
    moe: PartTimes
    embedding: PartTimes
    head: PartTimes
    mtp: PartTimes
    alone: PositiveShare
    latency_seconds: NonNegativeFloat
    phases: tuple[PhaseTimes, ...]
    context: PositiveInt = 1

    @property
    def cut_ranges(self) -> tuple[range, ...]:
        """The layers of each stage."""
        return cut_at(self.cut)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRun:
    """The times that a run measured, and the schedule that it follows."""

    measured: MeasuredTimes
    schedule: Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What the times of a run hold for.

    Tokens are those of a micro-batch on a rank. `expert` ranks share experts, and `context` ranks each sequence.
    """

    model: ModelConfig
    precision: str
    device: str
    expert: int
    tokens: int
    cut: Sequence[range]
    context: int = 1


def probed(times: LayerTimes, facts: RunFacts) -> MeasuredTimes:
    """Returns the record of a probe, which measures one phase at a time."""
    return drawn(StepTimes(times=times, alone=1.0, phases=()), facts, 0)


def drawn(measured: StepTimes, facts: RunFacts, step: int) -> MeasuredTimes:
    """Returns the record of a step that was drawn; step 0 is the probe."""
    times = measured.times
    return MeasuredTimes(
        kind="step" if step else "probe",
        step=step,
        device="cuda" if facts.device == "cuda" else "cpu",
        precision=facts.precision,
        layer_parameters=layer_parameters(facts.model),
        expert=facts.expert,
        tokens=facts.tokens,
        cut=tuple(map(len, facts.cut)),
        dense=times.dense,
        moe=times.moe,
        embedding=times.embedding,
        head=times.head,
        mtp=times.mtp,
        alone=measured.alone,
        latency_seconds=times.latency,
        phases=measured.phases,
        context=facts.context,
    )


def try_to_write(folder: Path, run: MeasuredRun) -> None:
    """Writes the record into a run's existing folder, in place of an earlier one. An error is only logged."""
    path = folder / (PROBE_NAME if run.measured.kind == "probe" else MEASURED_NAME)
    values = {**encode(run.measured), _SCHEDULE_KEY: json.loads(to_json(run.schedule))}
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        LOGGER.warning("%s cannot be written: %s", path.name, error)


def read_measured(path: Path) -> MeasuredRun | None:
    """Reads a record; None if there is no such file.

    Raises:
        ConfigError: it is not a record of a run.
    """
    if not path.is_file():
        return None
    shown = f"rates: {str(path)!r}"
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"{shown} must have at most {_MOST_BYTES} bytes, has {path.stat().st_size}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or _SCHEDULE_KEY not in values:
            raise ValueError(f"the key {_SCHEDULE_KEY} is missing")
        schedule = from_json(json.dumps(values.pop(_SCHEDULE_KEY)))
        validate_passes(schedule)
        measured = decode(MeasuredTimes, values)
        if len(measured.cut) != schedule.num_stages:
            raise ValueError(f"cut: must list {schedule.num_stages} stages, lists {len(measured.cut)}")
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{shown} must be what a run measured, is not: {reason}") from error
    return MeasuredRun(measured=measured, schedule=schedule)
