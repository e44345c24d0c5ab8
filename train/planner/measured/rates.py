"""Derives the rates of a plan from the folder of a run. No torch here."""

from dataclasses import astuple
from pathlib import Path

from train.config.errors import ConfigError
from train.planner.config import MeasuredRates, RateSource
from train.planner.measured.phases import PARTS
from train.planner.measured.record import MEASURED_NAME, PROBE_NAME, MeasuredRun, MeasuredTimes, read_measured
from train.planner.measured.steps import RecordedStep, median_of, typical_steps
from train.schedule.layer_times import PartTimes, part_times

_EXCHANGES = ("forward_exchange", "backward_exchange")


def run_rates(folder: Path) -> MeasuredRates:
    """Returns what a run measured, as rates.

    The probe's times are preferred, because a plan made before the run would have used them. Without a probe, they are
    those of the last step that the run has drawn.

    Raises:
        ConfigError: the run has measured nothing yet, or a file is not what a run writes.
    """
    probe, drawn = read_measured(folder / PROBE_NAME), read_measured(folder / MEASURED_NAME)
    run = _required(probe or drawn, folder)
    # The probe measures computation without exchange next to it.
    alone = 1.0 if drawn is None else drawn.measured.alone
    is_probe = run.measured.kind == "probe"
    parts = {name: getattr(run.measured, name) for name in PARTS}
    if is_probe:
        parts = {name: _overlapped(part, alone) for name, part in parts.items()}
    steps = typical_steps(folder)
    return MeasuredRates(
        kind="measured",
        precision=run.measured.precision,
        layer_parameters=run.measured.layer_parameters,
        expert=run.measured.expert,
        tokens=run.measured.tokens,
        context=run.measured.context,
        **parts,
        alone=alone,
        latency_seconds=run.measured.latency_seconds,
        optimizer_seconds=median_of(steps, "outside") if steps else 0.0,
        sources=_sources(folder, run.measured, None if drawn is None else drawn.measured, steps),
    )


def followed_run(folder: Path) -> MeasuredRun:
    """Returns what a run has recorded of the schedule and the cut that it follows, the newest first.

    Raises:
        ConfigError: as in `run_rates`.
    """
    return _required(read_measured(folder / MEASURED_NAME) or read_measured(folder / PROBE_NAME), folder)


def _required(run: MeasuredRun | None, folder: Path) -> MeasuredRun:
    if run is None:
        raise ConfigError(
            f"rates: a run's folder must hold {PROBE_NAME} or {MEASURED_NAME}, {str(folder)!r} holds neither; nearest "
            f"valid: a run with schedule=auto, which measures at its start, or one that has drawn a step: at its end, "
            f"or with track.picture_every_steps=10"
        )
    return run


def _overlapped(part: PartTimes, alone: float) -> PartTimes:
    """Returns the times next to another operation of a part that was measured alone."""
    values = zip(PartTimes.__dataclass_fields__, astuple(part), strict=True)
    return part_times(seconds if name in _EXCHANGES else seconds / alone for name, seconds in values)


def _sources(
    folder: Path, measured: MeasuredTimes, drawn: MeasuredTimes | None, steps: tuple[RecordedStep, ...]
) -> tuple[RateSource, ...]:
    place = f"{folder}/{PROBE_NAME}" if measured.kind == "probe" else f"{folder}/{MEASURED_NAME}, step {measured.step}"
    overlap = f"{folder}/{MEASURED_NAME}, step {drawn.step}" if drawn is not None else "not measured: no step was drawn"
    outside = f"{folder}/metrics.jsonl, median of {len(steps)} steps" if steps else "not measured: no step is recorded"
    return (
        RateSource(keys=("tokens", *PARTS, "latency_seconds"), text=f"{place}, on {measured.device}"),
        RateSource(keys=("alone",), text=overlap),
        RateSource(keys=("optimizer_seconds",), text=outside),
    )
