"""Chooses the number of chunks of a run's schedule by simulation. No torch here."""

from dataclasses import replace

from dualpipe.build import build
from dualpipe.generate.cache import schedules_folder
from dualpipe.ir import ScheduleError
from dualpipe.registry import SCHEDULES
from dualpipe.simulate.simulate import simulate
from model.config import CutError
from train.config import TrainConfig
from train.schedule.cut import run_chunks
from train.schedule.nominal import nominal_costs

_MOST_PER_RANK = 8
_LEAST_GAIN = 0.01
"""Fraction of a step that more chunks must save, as each transfer and exchange also takes a fixed time."""


def with_chunks(config: TrainConfig) -> TrainConfig:
    """Returns the configuration with the number of chunks that is the fastest in simulation, if null.

    More chunks are chosen only if they save 1 % of a step. With `schedule=auto` the run chooses after it has measured.
    If no number is possible, as in an invalid configuration, it stays as it is, and its checks say why.
    """
    kind = config.schedule.kind
    if kind == "auto" or run_chunks(config) is not None:
        return config
    pipeline, layers = config.parallelism.pipeline, config.model.num_layers
    possible = [chunks for chunks in SCHEDULES.get(kind).chunk_choices(None) if pipeline * chunks <= layers]
    if len(possible) < 2:
        return config
    named = {chunks: replace(config, schedule=replace(config.schedule, chunks=chunks)) for chunks in possible}
    makespans = {chunks: _makespan(choice) for chunks, choice in named.items()}
    best = possible[0]
    for chunks in possible[1:]:
        if makespans[chunks] < makespans[best] * (1 - _LEAST_GAIN):
            best = chunks
    return config if makespans[best] == float("inf") else named[best]


def _makespan(config: TrainConfig) -> float:
    """Returns the simulated time of a step, or of a shorter one if it has many micro-batches."""
    kind, pipeline = config.schedule.kind, config.parallelism.pipeline
    try:
        count = config.num_micro_batches
        most = _MOST_PER_RANK * pipeline
        count = count if count <= most else most + count % pipeline
        costs = nominal_costs(config, kind)
        cache = schedules_folder(config.data.cache_dir)
        return simulate(build(kind, pipeline, count, costs, config.memory_cap, cache), costs).makespan
    except (ScheduleError, CutError, ZeroDivisionError):
        return float("inf")
