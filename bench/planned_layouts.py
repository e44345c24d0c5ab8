"""Compares predicted and measured times of real training steps: order of layouts, and CPU time of ranks.

Rates come from one probe of one layout. All layouts run on the same ranks, in interleaved rounds.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from comm.config import ParallelismConfig
from comm.layout import Layout
from dualpipe.registry import ScheduleConfig
from model.phases import ComputePhase
from tests.ranks import run_ranks
from tests.tiny import MODEL, tiny_config, write_text
from tests.train.job import close_job, configured_schedule, open_job, open_loader
from train.config import TrainConfig
from train.core.step import train_step
from train.predict.cut import run_cut, with_cut
from train.predict.layer_times import LayerTimes
from train.predict.measured import TimesScope, layer_parameters
from train.predict.timing import EfficiencyConfig, MeasuredRates, RateSource, time_plan
from train.start import probe

LEAST_APART = 0.05
SECONDS_PER_SEQUENCE = 0.015
"""Time of F of a phase of computation that makes the noise of a busy machine small."""
_PASSES = {"forward": 1.0, "backward": 1.3, "weight": 0.7}
_TOKENS = 32
_MOST_LATE_SECONDS = 0.002


@dataclass(frozen=True, kw_only=True, slots=True)
class Layouts:
    """Layouts by name that use the same ranks, and the one whose ranks are probed."""

    configs: Mapping[str, TrainConfig]
    probed: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutTime:
    """Predicted seconds of a layout's step, and the measured ones of all rounds."""

    name: str
    predicted: float
    measured: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.measured)


def small_layouts(folder: Path) -> Layouts:
    """Returns six layouts of four ranks, for one model and one global batch."""
    write_text(folder)
    model = replace(MODEL, num_layers=6, num_dense_layers=1, mtp_depth=1)

    def config(pipeline: int, kind: str, micro: int, pairing: str = "overlapped") -> TrainConfig:
        data = 4 // pipeline
        base = tiny_config(
            folder,
            model=model,
            parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=data),
            schedule=ScheduleConfig(kind=kind, chunks=None, pairing=pairing),  # type: ignore[arg-type]
        )
        batch = replace(
            base.batch, global_sequences=16, micro_sequences=micro, sequence_length_tokens=_TOKENS, ramp=None
        )
        return replace(base, batch=batch, validation=replace(base.validation, sequences=0))

    return Layouts(
        configs={
            "pipeline 4, dualpipe_split, 1 sequence": config(4, "dualpipe_split", 1),
            "pipeline 4, 1f1b, 1 sequence": config(4, "1f1b", 1),
            "pipeline 4, 1f1b, 4 sequences": config(4, "1f1b", 4),
            "pipeline 4, dualpipe, 2 sequences": config(4, "dualpipe", 2),
            "pipeline 2, 1f1b, 4 sequences": config(2, "1f1b", 4),
            "pipeline 1, 1f1b, 4 sequences": config(1, "1f1b", 4),
        },
        probed="pipeline 2, 1f1b, 4 sequences",
    )


def measure_layouts(layouts: Layouts, num_rounds: int, seconds_per_sequence: float) -> list[LayoutTime]:
    """Probes one layout, predicts all, and runs a step of each in turn.

    Args:
        num_rounds: measured steps of each; each also has an unmeasured one.
        seconds_per_sequence: least time of F of a phase of computation, for each sequence of a micro-batch; 0: phases
            take as long as they compute.
    """
    ranks = run_ranks(
        layouts.configs[layouts.probed].parallelism.world_size,
        _run_rank,
        layouts,
        num_rounds,
        seconds_per_sequence,
        timeout_seconds=900.0,
    )
    times, outside, _ = ranks[0]
    rates = rates_of(layouts.configs[layouts.probed], times, outside)
    found = []
    for name, config in layouts.configs.items():
        steps = zip(*(of_rank[2][name] for of_rank in ranks), strict=True)
        found.append(
            LayoutTime(name=name, predicted=predicted_step(rates, config), measured=tuple(max(step) for step in steps))
        )
    return found


def predicted_step(rates: MeasuredRates, config: TrainConfig) -> float:
    """Returns the planned time of a layout's step, with the schedule and the cut that its ranks use."""
    schedule = configured_schedule(config)
    listed = with_cut(config, run_cut(config, schedule.placement))
    return time_plan(rates, EfficiencyConfig(unexplained=1.0), listed, schedule=schedule).time.step


def rates_of(config: TrainConfig, times: LayerTimes, outside_seconds: float) -> MeasuredRates:
    return MeasuredRates(
        kind="measured",
        scope=TimesScope(
            precision=config.precision.kind,
            layer_parameters=layer_parameters(config.model),
            expert=config.parallelism.expert,
            tokens=config.batch.micro_sequences * config.batch.sequence_length_tokens,
        ),
        times=times,
        alone=1.0,
        optimizer_seconds=outside_seconds,
        sources=(RateSource(keys=("all",), text="probe"),),
    )


def ordered_pairs(times: Sequence[LayoutTime]) -> tuple[int, int]:
    """Returns how many pairs whose medians differ by over 5 % are predicted in the right order, and their number."""
    right = total = 0
    for one, other in combinations(times, 2):
        if max(one.median, other.median) > (1 + LEAST_APART) * min(one.median, other.median):
            total += 1
            right += (one.predicted < other.predicted) == (one.median < other.median)
    return right, total


def layouts_text(times: Sequence[LayoutTime]) -> str:
    right, total = ordered_pairs(times)
    lines = [
        "A step of six layouts of four ranks, whose computation sleeps: predicted from one probe, and measured",
        f"{'layout':42}{'predicted s':>12}{'median s':>10}{'least s':>9}{'measured / predicted':>22}",
        *(
            f"{each.name:42}{each.predicted:12.3f}{each.median:10.3f}{min(each.measured):9.3f}"
            f"{each.median / each.predicted:22.2f}"
            for each in sorted(times, key=lambda each: each.predicted)
        ),
        f"{right} of {total} pairs that differ by more than 5 % are ordered correctly",
    ]
    return "\n".join(lines)


@contextmanager
def _sleeping(seconds: list[float]) -> Iterator[None]:
    """Makes every phase of computation take at least its share of `seconds[0]`, by sleeping after it.

    What a sleep is late is subtracted from the next one, as in `SleepLog`.
    """
    kept = {name: getattr(ComputePhase, name) for name in _PASSES}
    late = [0.0]

    def slow(method: Callable[..., Any], share: float) -> Callable[..., Any]:
        def taking(phase: Any, *values: Any) -> Any:
            started = time.perf_counter()
            result = method(phase, *values)
            time.sleep(max(0.0, share * seconds[0] - late[0] - (time.perf_counter() - started)))
            late[0] = min(max(0.0, late[0] + time.perf_counter() - started - share * seconds[0]), _MOST_LATE_SECONDS)
            return result

        return taking

    for name, share in _PASSES.items():
        setattr(ComputePhase, name, slow(kept[name], share))
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(ComputePhase, name, method)


def _run_rank(
    rank: int, world_size: int, layouts: Layouts, num_rounds: int, seconds_per_sequence: float
) -> tuple[LayerTimes, float, dict[str, list[float]]]:
    """Returns the probe's times, the seconds of a step outside its passes, and those of every layout's steps."""
    least, probed = [0.0], layouts.configs[layouts.probed]
    found: dict[str, list[float]] = {name: [] for name in layouts.configs}
    outside = []
    with _sleeping(least):
        least[0] = seconds_per_sequence * probed.batch.micro_sequences
        layout = Layout(probed.parallelism, probed.cluster.ranks_per_node)
        times = probe.measure(probed, layout, torch.device("cpu"))
        jobs = {name: (open_job(config), open_loader(config)) for name, config in layouts.configs.items()}
        for turn in range(1 + num_rounds):
            for name, (learner, loader) in jobs.items():
                config = layouts.configs[name]
                least[0] = seconds_per_sequence * config.batch.micro_sequences
                dist.barrier()
                result = train_step(learner, config.task, loader, turn)
                if turn:
                    found[name].append(result.seconds)
                    outside += [result.update_seconds] * (name == layouts.probed)
        dist.barrier()
        for learner, _ in jobs.values():
            close_job(learner)
    return times, statistics.median(outside), found
