"""Derives rates from what a run has recorded, and compares its plan with its steps. No torch here."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from base.decode import encode
from base.refusal import ConfigError
from dualpipe.ir import Schedule
from dualpipe.registry import FALLBACK
from infer.cohorts import AnsweredPrompt, CohortSizes, forecast_rounds
from infer.config import ENGINE_COUNTS
from train.config import TrainConfig
from train.files.json_lines import METRICS_NAME
from train.files.run_files import read_status
from train.predict.cut import run_placement, with_cut
from train.predict.layer_times import LayerTimes, PartTimes
from train.predict.measured import MEASURED_NAME, PARTS, PROBE_NAME, MeasuredRun, read_measured
from train.predict.memory import JobMemory, predict_memory
from train.predict.timing import EfficiencyConfig, MeasuredRates, RateSource, RolloutRates, TimedPlan, time_plan
from train.report.source import RecordedStep, typical_steps

_VARIED = 1.25
"""Least ratio of tokens per visit of two rollouts whose times show the time of a token."""
_LAST = 20
"""Steps at the end of a run on which the factor of the steps before them is checked."""
_COMPARED = {
    "step_seconds": "step",
    "bubble_seconds": "bubble",
    "exposed_exchange_seconds": "exposed exchange",
    "outside_seconds": "outside the passes",
    "memory_bytes": "largest peak memory",
    "sampling_seconds": "sampling",
    "rounds": "rounds of sampling",
    "rows_per_visit": "rows per visit",
}
COMPARED_HEADER = ("", "predicted", "measured", "measured / predicted")
_GB = 1e9
_NOT_ON_CPU = "not compared: on a CPU, the resident set also holds Python and torch, so it is no check"


def _median(steps: Sequence[RecordedStep], name: str) -> float:
    numbers: list[float] = [getattr(step, name) for step in steps]
    return median(numbers)


def run_rates(folder: Path, config: TrainConfig | None = None) -> MeasuredRates:
    """Returns what a run measured, as rates; those of its rollouts need its configuration.

    The probe's times are preferred, because a plan made before the run would have used them. Without a probe, they are
    those of the last step that the run has drawn.
    """
    probe = read_measured(folder / PROBE_NAME)
    drawn = read_measured(folder / MEASURED_NAME)
    measured = _require_measured(probe or drawn, folder).measured
    # The probe measures computation without exchange next to it.
    alone = 1.0 if drawn is None else drawn.measured.measured.alone
    times = measured.measured.times
    origin = f"{folder}/{MEASURED_NAME}, step {measured.step}"
    if measured.is_probe:
        origin = f"{folder}/{PROBE_NAME}"
        parts = {name: _overlapped_times(getattr(times, name), alone) for name in PARTS}
        times = LayerTimes(**parts, latency_seconds=times.latency_seconds)
    steps = typical_steps(folder)
    rollouts = None
    sampling = 0.0
    if config is not None and config.rollout is not None and (recorded := read_sampled(folder, config)):
        rollouts = _rollout_rates(recorded, config)
        sampling = median(rollout.seconds for rollout in recorded) / config.rollout.updates
    overlap = "not measured: no step was drawn"
    outside = "not measured: no step is recorded"
    if drawn is not None:
        overlap = f"{folder}/{MEASURED_NAME}, step {drawn.measured.step}"
    if steps:
        outside = f"{folder}/{METRICS_NAME}, median of {len(steps)} steps"
    return MeasuredRates(
        kind="measured",
        scope=measured.scope,
        times=times,
        alone=alone,
        optimizer_seconds=max(0.0, _median(steps, "outside") - sampling) if steps else 0.0,
        rollouts=rollouts,
        sources=(
            RateSource(keys=("scope", "times"), text=f"{origin}, on {measured.device}"),
            RateSource(keys=("alone",), text=overlap),
            RateSource(keys=("optimizer_seconds",), text=outside),
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledRollout:
    """A rollout of a journal: its prompts, what the engine counted, and how long it sampled."""

    prompts: tuple[AnsweredPrompt, ...]
    counts: Mapping[str, float]
    seconds: float

    @property
    def accepted_share(self) -> float:
        """Drafts that were accepted, over those that were offered."""
        return self.counts["drafts_accepted"] / max(1, self.counts["drafts_offered"])


def read_sampled(folder: Path, config: TrainConfig) -> list[SampledRollout]:
    """Returns the last rollouts of a run's journals, of one draw if there are any.

    The first one, with a cold sampler, is left out if there are others.
    """
    paths = sorted((folder / "rollouts").glob("step-*.jsonl"))
    rollouts = [rollout for path in paths[-_LAST:] if (rollout := _sampled(path, config)) is not None]
    warm = rollouts[1:] if len(rollouts) == len(paths) > 1 else rollouts
    return [rollout for rollout in warm if rollout.counts["draws"] == 1] or warm


def _sampled(path: Path, config: TrainConfig) -> SampledRollout | None:
    """Reads a journal; None if it is not whole, or has no counts of a pipelined engine."""
    assert config.rollout is not None
    try:
        header, *groups, _ = (json.loads(line) for line in path.read_bytes().splitlines())
        prompts = tuple(
            AnsweredPrompt(
                prompt=len(group["tokens"]),
                answers=tuple(len(sample["tokens"]) for sample in group["samples"]),
                limit=min(config.rollout.max_new_tokens, config.model.max_position_tokens - len(group["tokens"])),
                is_trained=not group["dropped"],
            )
            for group in groups
        )
        counts = {name: float(header["counts"][name]) for name in (*ENGINE_COUNTS, "draws")}
        rollout = SampledRollout(prompts=prompts, counts=counts, seconds=float(header["seconds"]["sampling"]))
        return rollout if min(counts["rounds"], counts["visits"]) > 0 and prompts else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rollout_rates(rollouts: Sequence[SampledRollout], config: TrainConfig) -> RolloutRates:
    """Fits the time of a visit, and of a token if rollouts differ enough in their tokens per visit."""
    placement = run_placement(config, FALLBACK if config.schedule.kind == "auto" else config.schedule.kind)
    sizes = CohortSizes.within(config.batch.micro_sequences * config.rank_sequence_tokens)
    tokens = []
    visits = []
    for rollout in rollouts:
        counts = rollout.counts
        read = counts["passes"] * (2 if counts["drafts_offered"] else 1)
        tokens.append((read + sum(each.prompt - 1 for each in rollout.prompts)) / counts["visits"])
        forecast = forecast_rounds(rollout.prompts, placement, config.parallelism.data, sizes)
        # A round is a cohort's way through all stages, or as many visits as the busiest rank has.
        way = max(1.0, forecast.cohorts * len(placement) / config.parallelism.pipeline)
        visits.append(rollout.seconds / counts["rounds"] / way)
    slope = 0.0
    if max(tokens) > _VARIED * min(tokens):
        slope = max(0.0, float(np.polyfit(tokens, visits, 1)[0]))
    return RolloutRates(
        visit_seconds=max(0.0, float(np.median(np.array(visits) - slope * np.array(tokens)))),
        token_seconds=slope,
        tokens_per_pass=1 + median(rollout.accepted_share for rollout in rollouts),
        prompts=rollouts[-1].prompts,
    )


def _require_measured(run: MeasuredRun | None, folder: Path) -> MeasuredRun:
    if run is None:
        raise ConfigError(
            f"rates: a run's folder must hold {PROBE_NAME} or {MEASURED_NAME}, {str(folder)!r} holds neither; nearest "
            f"valid: a run with schedule=auto, which measures at its start, or one that has drawn a step: at its end, "
            f"or with track.picture_every_steps=10"
        )
    return run


def _overlapped_times(part: PartTimes, alone: float) -> PartTimes:
    """Returns the times next to another operation of a part that was measured alone."""
    exchanges = {"forward_exchange": part.forward_exchange, "backward_exchange": part.backward_exchange}
    return replace(part * (1 / alone), **exchanges)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A predicted number, the measured one, and measured over predicted; None if the prediction is 0."""

    predicted: float
    measured: float
    factor: float | None

    @classmethod
    def of(cls, predicted: float, measured: float) -> "Compared":
        """Returns both numbers with their factor."""
        return cls(predicted=predicted, measured=measured, factor=measured / predicted if predicted > 0 else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class LastSteps:
    """Seconds of a run's last steps: predicted by the factor of those before them, and the median."""

    count: int
    predicted: float
    measured: float
    difference: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A run's plan and its recorded steps of the largest batch: medians over steps and means over ranks.

    With sequential pairing, the plan counts exposed exchange as computation. `memory_bytes` is without the reserve.
    """

    run: str
    num_steps: int
    step_seconds: Compared
    bubble_seconds: Compared
    exposed_exchange_seconds: Compared | None
    outside_seconds: Compared
    memory_bytes: Compared | None
    memory_note: str | None
    cores_note: str | None
    factor: float
    last_steps: LastSteps | None

    def values(self) -> dict[str, Any]:
        """Returns the comparison in its public form."""
        values: dict[str, Any] = encode(self)
        if self.exposed_exchange_seconds is None:
            del values["exposed_exchange_seconds"]
        return values


def compare(config: TrainConfig, timed: TimedPlan, memory: JobMemory | None, folder: Path) -> Comparison:
    """Compares a plan with the recorded steps of its run.

    Raises:
        ConfigError: the run has recorded no step of its largest batch.
    """
    steps = typical_steps(folder)
    if not steps or steps[-1].sequences != config.batch.global_sequences:
        raise ConfigError(
            f"run: must have recorded a step of {config.batch.global_sequences:,} sequences in metrics.jsonl, "
            f"{str(folder)!r} has not; nearest valid: rates={folder}, which plans without a comparison"
        )
    step = _median(steps, "step")
    simulation = timed.simulation
    num_ranks = timed.schedule.num_ranks
    exposed = Compared.of(sum(simulation.exposed) / num_ranks, _median(steps, "exposed_exchange"))
    outside = timed.time.optimizer if config.rollout is None else timed.time.without_factor - simulation.makespan
    peak = None
    if memory is not None:
        predicted = max(rank.total - rank.reserve for rank in memory.ranks)
        peak = Compared.of(predicted, max(recorded.peak_memory_bytes for recorded in steps))
    return Comparison(
        run=str(folder),
        num_steps=len(steps),
        step_seconds=Compared.of(timed.time.step, step),
        bubble_seconds=Compared.of(sum(simulation.idle) / num_ranks, _median(steps, "bubble")),
        exposed_exchange_seconds=None if config.schedule.pairing == "sequential" else exposed,
        outside_seconds=Compared.of(outside, _median(steps, "outside")),
        memory_bytes=peak,
        memory_note=_NOT_ON_CPU if peak is None else None,
        cores_note=_shared_cores(folder) if peak is None else None,
        factor=step / timed.time.without_factor,
        last_steps=_last_steps(steps),
    )


def _shared_cores(folder: Path) -> str | None:
    status = read_status(folder)
    if status is None or not 0 < (status.num_cores or 0) < (status.num_local_ranks or 0):
        return None
    return (
        f"{status.num_local_ranks} ranks share {status.num_cores} cores of {status.host}: operations take longer while "
        f"more ranks compute, and the prediction has one time for each"
    )


def _last_steps(steps: Sequence[RecordedStep]) -> LastSteps | None:
    before = steps[:-_LAST]
    last = steps[-_LAST:]
    if len(before) < _LAST // 2:
        return None
    predicted = _median(before, "step")
    measured = _median(last, "step")
    return LastSteps(count=len(last), predicted=predicted, measured=measured, difference=measured / predicted - 1)


def compared_run(config: TrainConfig, folder: Path) -> Comparison:
    """Predicts a run from its own measurements, and compares.

    Raises:
        ConfigError: the run has measured nothing yet, or a file is not what a run writes.
    """
    rates = run_rates(folder)
    config, schedule, device = with_measured_schedule(config, folder)
    timed = time_plan(rates, EfficiencyConfig(unexplained=1.0), config, schedule=schedule)
    return compare(config, timed, None if device == "cpu" else predict_memory(config), folder)


def with_measured_schedule(config: TrainConfig, folder: Path) -> tuple[TrainConfig, Schedule | None, str]:
    """Returns a run with the schedule and the cut of its newest record, that schedule, and the device.

    The schedule is None if the record is of another batch size of a ramp.
    """
    run = _require_measured(read_measured(folder / MEASURED_NAME) or read_measured(folder / PROBE_NAME), folder)
    schedule = run.schedule
    mesh = config.parallelism
    if schedule.num_ranks != mesh.pipeline or sum(run.measured.cut) != config.model.num_layers:
        raise ConfigError(
            f"run: its measurements must be of {mesh.pipeline} pipeline ranks and {config.model.num_layers} layers, as "
            f"its configuration is, are of {schedule.num_ranks} and {sum(run.measured.cut)}"
        )
    named = replace(config.schedule, kind=schedule.kind, chunks=schedule.num_stages // schedule.num_ranks)
    config = with_cut(replace(config, schedule=named), run.measured.cut_ranges)
    is_whole = schedule.num_micro_batches == config.num_micro_batches
    return config, schedule if is_whole else None, run.measured.device


def comparison_rows(compared: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yields the cells of a table with the columns `COMPARED_HEADER`."""
    short = compared["step_seconds"]["measured"] < 1
    for key, name in _COMPARED.items():
        if (values := compared.get(key)) is None:
            continue
        unit, digits, suffix = (1.0, 2, "") if key in ("rounds", "rows_per_visit") else (1.0, 3, "s")
        if key == "memory_bytes":
            unit, digits, suffix = _GB, 3, "GB"
        elif short and suffix:
            unit, digits, suffix = 1e-3, 1, "ms"
        predicted, measured = (f"{values[side] / unit:,.{digits}f} {suffix}" for side in ("predicted", "measured"))
        yield name, predicted, measured, "-" if values["factor"] is None else f"{values['factor']:.3f}"


def comparison_notes(compared: Mapping[str, Any]) -> Iterator[str]:
    """Yields lines about shared cores, the memory, the factor and the last steps."""
    if compared["cores_note"]:
        yield compared["cores_note"]
    if compared["memory_note"]:
        yield f"peak memory: {compared['memory_note']}"
    yield f"factor that closes the gap of the step: efficiency.unexplained={compared['factor']:.4g}"
    if (last := compared["last_steps"]) is not None:
        yield (
            f"last {last['count']} steps: {100 * last['difference']:+.1f} % against the prediction with the factor of "
            f"the steps before them"
        )
