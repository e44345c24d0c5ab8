"""Draws, simulates and compares pipeline schedules: `python -m launch.schedule`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dualpipe.builder import best_of_kind, choose, schedules_folder, survey
from dualpipe.builder import decode as decode_schedule
from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, time_schedule
from dualpipe.draw.svg import svg
from dualpipe.draw.text import decode_summary, grid, html, summary, table
from dualpipe.draw.trace import trace
from dualpipe.ir import Schedule, ScheduleError, to_json
from dualpipe.passes import ungroup
from dualpipe.registry import FALLBACK, SCHEDULES, ModelCosts, ScheduleConfig, candidates, check_size, check_slices
from dualpipe.simulate.bounds import Bound
from dualpipe.simulate.costs import CostModel, Costs
from dualpipe.simulate.timing import simulate
from dualpipe.validate import validate
from kernels.ranges import PositiveInt
from launch.command import command, plain_text, write_output
from launch.config.compose import compose
from train.config.decode import decode, encode

# From this number of ranks times micro-batches, the computation takes about half a second or more.
_LONG_WORK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleCommandConfig:
    """Configuration of the command. `conf/schedule.yaml` explains the keys."""

    schedule: ScheduleConfig
    program: Literal["train", "decode"]
    cohorts: PositiveInt | None
    num_ranks: int
    num_micro_batches: int
    costs: ModelCosts
    memory_cap: float | None
    format: Literal["text", "json", "svg", "html", "trace"]
    out: str
    cache_dir: str
    plugins: tuple[str, ...]

    def costs_of(self, num_stages: int) -> CostModel:
        """Returns the costs of each stage if the model is cut into `num_stages` stages."""
        costs = self.costs.of_stages(self.num_ranks, num_stages)
        return replace(costs, slices=self.schedule.slices, link_depth=self.schedule.link_depth)


def main(overrides: Sequence[str]) -> int:
    """Builds, validates and shows a schedule."""
    config = decode(ScheduleCommandConfig, compose("schedule", overrides))
    if config.num_ranks * config.num_micro_batches >= _LONG_WORK:
        size = f"{config.num_ranks} ranks and {config.num_micro_batches} micro-batches"
        print(f"computing schedules of {size}", file=sys.stderr, flush=True)
    write_output(_shown(config), config.out)
    return 0


def preview(overrides: Sequence[str]) -> str:
    """Returns the command's configuration as YAML."""
    return plain_text("schedule", encode(decode(ScheduleCommandConfig, compose("schedule", overrides))))


def _shown(config: ScheduleCommandConfig) -> str:
    """Returns the schedule that trains, or that decodes, in the configured format."""
    cache_dir = schedules_folder(config.cache_dir)
    kind = config.schedule.kind
    is_training = config.program == "train"
    rows: tuple[TimedSchedule | UnavailableSchedule, ...] = ()
    reason = ""
    if is_training:
        check_size(FALLBACK if kind == "auto" else kind, config.num_ranks, config.num_micro_batches)
        check_slices(kind, config.num_micro_batches, config.schedule.slices)
    if not is_training:
        schedule = _decode_schedule(config)
    elif kind == "auto":
        rows = _survey(config, cache_dir)
        choice = choose(rows, config.memory_cap)
        schedule = choice.schedule
        reason = choice.reason
    else:
        schedule = _best_of_kind(config, cache_dir).schedule
    # Building the schedule has kept the memory cap, by the costs of each stage.
    validate(schedule, forward_only=not is_training)
    costs = config.costs_of(schedule.num_stages)
    # A run executes the schedule without overlap if `pairing` is sequential.
    timed = ungroup(schedule) if is_training and config.schedule.pairing == "sequential" else schedule
    simulation = simulate(timed, costs)
    match config.format:
        case "json":
            return to_json(schedule)
        case "trace":
            return trace(timed, simulation, costs)
        case "text" if is_training:
            parts = [grid(timed, simulation), summary(timed, simulation, _summed(config, costs), config.memory_cap), ""]
            parts += [table(rows or _survey(config, cache_dir))]
            return "\n".join([*parts, *([f"auto: {reason}"] if reason else [])])
        case "text":
            return "\n".join([grid(schedule, simulation), decode_summary(schedule, simulation)])
        case "html" if is_training:
            rows = rows or _survey(config, cache_dir)
            return html(sorted(rows, key=lambda row: _kind(row) != schedule.kind))
        case "svg" if is_training:
            return svg(timed, simulation, bound=time_schedule(timed, costs, config.memory_cap).bound)
    work = max(sum(costs.compute_of(op) for group in groups for op in group) for groups in schedule.ranks)
    bound = Bound(value=work, reason="the computation of the busiest rank")
    if config.format == "svg":
        return svg(schedule, simulation, bound=bound)
    return html([TimedSchedule(schedule=schedule, costs=costs, simulation=simulation, bound=bound)])


def _decode_schedule(config: ScheduleCommandConfig) -> Schedule:
    """Builds the schedule that decodes. By default, 2 cohorts for each rank are in flight."""
    num_ranks = config.num_ranks
    num_micro_batches = config.num_micro_batches
    for name, value in (("num_ranks", num_ranks), ("num_micro_batches", num_micro_batches)):
        if value < 1:
            raise ScheduleError(f"{name}: program=decode needs at least 1, has {value}; nearest: 1")
    spec = SCHEDULES.get(FALLBACK if config.schedule.kind == "auto" else config.schedule.kind)
    placement = spec.placement(num_ranks, spec.chunk_choices(config.schedule.chunks)[0])
    cohorts = config.cohorts or 2 * num_ranks // len(placement)
    rounds, rest = divmod(num_micro_batches, cohorts * len(placement))
    if rest or not rounds:
        total = cohorts * len(placement)
        nearest = " or ".join(str(total * count) for count in (rounds, rounds + 1) if count)
        raise ScheduleError(
            f"num_micro_batches: program=decode with {total} cohorts needs a multiple of them, has "
            f"{num_micro_batches}; nearest: {nearest}"
        )
    return decode_schedule(placement, cohorts, rounds)


def _best_of_kind(config: ScheduleCommandConfig, cache_dir: Path) -> TimedSchedule:
    """Builds the configured kind with the configured number of chunks, or with the best one."""
    return best_of_kind(
        config.schedule.kind,
        config.num_ranks,
        config.num_micro_batches,
        lambda kind, num_stages: config.costs_of(num_stages),
        config.memory_cap,
        cache_dir,
        config.schedule.chunks,
    )


def _summed(config: ScheduleCommandConfig, costs: CostModel) -> Costs | CostModel:
    """Returns the costs of model/P if all stages are equal, for which there are published formulas."""
    is_plain = not config.costs.stages and not config.costs.weights
    return config.costs if is_plain else costs


def _survey(config: ScheduleCommandConfig, cache_dir: Path) -> tuple[TimedSchedule | UnavailableSchedule, ...]:
    """Times the configured kind, and those that `auto` considers with whole sequences."""
    is_extra = config.schedule.kind != "auto" and config.schedule.kind not in candidates()
    configured = (_best_of_kind(config, cache_dir),) if is_extra else ()
    return configured + survey(
        config.num_ranks,
        config.num_micro_batches,
        lambda kind, num_stages: config.costs_of(num_stages),
        config.memory_cap,
        cache_dir,
        chunks=config.schedule.chunks,
    )


def _kind(row: TimedSchedule | UnavailableSchedule) -> str:
    return row.schedule.kind if isinstance(row, TimedSchedule) else row.kind


if __name__ == "__main__":
    sys.exit(command("schedule", main, preview))
