"""Compares the CPU time of quickstart's ranks in a step with the CPU time that a probe predicts.

CPU time does not depend on how many ranks share a core, so it can be compared on any machine.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import distributed as dist

from comm.layout import Layout
from dualpipe.costs import CostModel
from dualpipe.ir import Group
from launch.config.run import compose_run
from model.config import cut_at
from tests.ranks import run_ranks
from tests.train.job import close_job, open_job, open_loader
from train.config import TrainConfig
from train.core.replica import StepBatch
from train.core.step import accumulate, rates_of
from train.predict.fit import fitted_config
from train.predict.layer_times import LayerTimes, stage_costs
from train.predict.timing import planning_schedule
from train.start import probe

MOST_OFF = 0.15


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuTime:
    """Predicted and measured CPU seconds of the passes of one pipeline rank."""

    pipeline_rank: int
    predicted: float
    measured: float

    @property
    def difference(self) -> float:
        """How much more the rank took than predicted, as a share."""
        return self.measured / self.predicted - 1


def quickstart(*overrides: str) -> TrainConfig:
    """Returns the configuration of quickstart with the cut that it uses."""
    return fitted_config(compose_run(["experiment=quickstart", "validation.sequences=0", *overrides]))


def measure_cpu(config: TrainConfig, num_steps: int) -> list[CpuTime]:
    """Probes CPU time, runs steps, and compares the medians of each pipeline rank."""
    ranks = run_ranks(config.parallelism.world_size, _run_rank, config, num_steps, timeout_seconds=600.0)
    times: LayerTimes = ranks[0][0]
    schedule = planning_schedule(config, config.num_micro_batches)
    costs = stage_costs(times, config, cut_at(config.parallelism.cut.layers))
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    found = []
    for index in range(config.parallelism.pipeline):
        members = [rank for rank in range(len(ranks)) if layout.pipeline_index(rank) == index]
        measured = statistics.median(seconds for rank in members for seconds in ranks[rank][1])
        found.append(CpuTime(pipeline_rank=index, predicted=_work(schedule.ranks[index], costs), measured=measured))
    return found


def cpu_text(times: Sequence[CpuTime]) -> str:
    """Formats a table of all ranks."""
    lines = [
        f"CPU time of quickstart's passes: probe and steps, target within {100 * MOST_OFF:.0f} %",
        f"{'pipeline rank':14}{'predicted s':>12}{'measured s':>12}{'measured over predicted':>25}",
        *(
            f"{each.pipeline_rank:<14}{each.predicted:12.3f}{each.measured:12.3f}{each.difference:+25.1%}"
            for each in times
        ),
    ]
    return "\n".join(lines)


def _work(groups: Sequence[Group], costs: CostModel) -> float:
    """Returns the computation and exchange of a rank's operations."""
    return sum(costs.compute_of(op) + costs.exchange_of(op) for group in groups for op in group)


def _run_rank(rank: int, world_size: int, config: TrainConfig, num_steps: int) -> tuple[LayerTimes, list[float]]:
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    with patch.object(probe, "_now", lambda device: time.process_time()):
        times = probe.measure(config, layout, torch.device("cpu"))
    learner, loader = open_job(config), open_loader(config)
    found = []
    for step in range(1 + num_steps):
        rates = rates_of(config.task, config.optim, loader.sizes, step)
        dist.barrier()
        began = time.process_time()
        accumulate(learner, config.task, StepBatch((partial(loader.batch, step),)), rates)
        found.append(time.process_time() - began)
        learner.optimizer.discard()
    dist.barrier()
    close_job(learner)
    return times, found[1:]
