"""Measures contenders in interleaved runs on the same ranks."""

import time
from dataclasses import dataclass

import torch
from torch import distributed

from bench.blocks import SleepLog, Workload
from bench.contenders import ALONE, OWN_KINDS, Step, alone_step, open_transport, own_step, torch_step
from dualpipe.builder import build_schedule
from dualpipe.costs import Costs, uniform
from dualpipe.ir import Schedule
from dualpipe.registry import SCHEDULES
from tests.ranks import run_ranks

_START_DELAY_SECONDS = 0.01
COSTS = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=0.0, latency=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Contenders and numbers of steps. Each contender also has one unmeasured step."""

    contenders: tuple[str, ...]
    num_ranks: int
    num_micro_batches: int
    num_rounds: int
    workload: Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSample:
    """One step of one rank.

    It has the seconds from the common start to its end, the CPU seconds of all threads, and sleeps by kind with their
    seconds."""

    seconds: float
    cpu_seconds: float
    sleeps: dict[str, int]
    slept_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    ranks: tuple[RankSample, ...]

    @property
    def seconds(self) -> float:
        """Seconds from the common start to the last rank's end."""
        return max(rank.seconds for rank in self.ranks)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all ranks."""
        return sum(rank.cpu_seconds for rank in self.ranks)


def measure(plan: Plan) -> dict[str, list[Sample]]:
    """Runs A B C A B C ... and returns each contender's samples in the order of rounds."""
    schedules = {
        kind: make_schedule(kind, plan.num_ranks, plan.num_micro_batches)
        for kind in OWN_KINDS
        if kind in plan.contenders
    }
    per_rank = run_ranks(plan.num_ranks, _measure_rank, plan, schedules, timeout_seconds=600.0)
    return {
        name: [Sample(ranks=ranks) for ranks in zip(*(samples[name] for samples in per_rank), strict=True)]
        for name in plan.contenders
    }


def make_schedule(kind: str, num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns the project's schedule for stages whose F, I and W take one unit of model/`num_ranks` each."""
    costs = uniform(COSTS, num_ranks, SCHEDULES.get(kind).num_stages(num_ranks))
    return build_schedule(kind, num_ranks, num_micro_batches, costs)


def _measure_rank(rank: int, num_ranks: int, plan: Plan, schedules: dict[str, Schedule]) -> dict[str, list[RankSample]]:
    log = SleepLog()
    with open_transport(num_ranks) as transport:
        steps: dict[str, Step] = {}
        for name in plan.contenders:
            if name == ALONE:
                steps[name] = alone_step(plan.num_micro_batches, plan.workload, log)
            elif name in OWN_KINDS:
                steps[name] = own_step(schedules[name], rank, plan.workload, transport, log)
            else:
                steps[name] = torch_step(name, rank, num_ranks, plan.num_micro_batches, plan.workload, log)
        for step in steps.values():
            step()
        samples: dict[str, list[RankSample]] = {name: [] for name in plan.contenders}
        for _ in range(plan.num_rounds):
            for name, step in steps.items():
                samples[name].append(timed_step(step, log))
    return samples


def timed_step(step: Step, log: SleepLog) -> RankSample:
    log.clear()
    # The ranks share a clock and start at a time that rank 0 chose.
    start = torch.tensor([time.monotonic() + _START_DELAY_SECONDS], dtype=torch.float64)
    distributed.broadcast(start, 0)
    time.sleep(max(0.0, start.item() - time.monotonic()))
    cpu = time.process_time()
    step()
    end = time.monotonic()
    cpu = time.process_time() - cpu
    distributed.barrier()
    return RankSample(
        seconds=end - start.item(), cpu_seconds=cpu, sleeps=dict(log.counts), slept_seconds=log.slept_seconds
    )
