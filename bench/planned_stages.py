"""Compares the simulated time of a step with the measured one, for stages that sleep and differ.

Schedule, compiler, interpreter and transfers are those of training.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bench.blocks import SleepLog
from bench.contenders import Links, PassingStage, Step
from bench.measure import timed_step
from comm.config import ParallelismConfig
from comm.layout import Layout
from comm.transfers import PipelineTransport
from comm.watchdog.collective_log import CollectiveLog
from dualpipe.builder import build_schedule
from dualpipe.costs import CostModel, StageCosts, resampled
from dualpipe.ir import Schedule, linked_pairs
from dualpipe.registry import SCHEDULES
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.execute import execute
from dualpipe.simulation import simulate
from tests.ranks import run_ranks

KINDS = ("dualpipe", "dualpipe_split", "dualpipe_v", "zb_v", "v_half", "1f1b", "interleaved_1f1b")
MOST_OFF = 0.05
_TIMEOUT_SECONDS = 60.0
_WORK = (0.6, 1.0, 1.0, 1.25, 1.0, 0.8, 1.0, 1.5)
"""Relative work of the stages of eight ranks: a light first one, a heavy last one, as with embedding and heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """Predicted seconds of a step, and the measured ones of all rounds."""

    kind: str
    predicted: float
    measured: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.measured)

    @property
    def difference(self) -> float:
        """How much longer the median step took than predicted, as a share."""
        return self.median / self.predicted - 1


def uneven_costs(num_ranks: int, unit_seconds: float) -> CostModel:
    """Returns costs of uneven stages with I longer and W shorter than F, without exchange.

    Args:
        unit_seconds: seconds of F of a stage with the relative work 1.
    """
    stages = tuple(
        StageCosts(
            forward=work * unit_seconds,
            backward_input=1.3 * work * unit_seconds,
            backward_weight=0.7 * work * unit_seconds,
            forward_exchange=0.0,
            backward_exchange=0.0,
            activation=1.0,
        )
        for work in _WORK[:num_ranks]
    )
    return CostModel(stages=stages, latency=0.0)


def measure_planned(
    num_ranks: int, num_micro_batches: int, unit_seconds: float, kinds: Sequence[str], num_rounds: int
) -> list[PlannedStep]:
    """Simulates and runs a step of every kind, in interleaved rounds."""
    base = uneven_costs(num_ranks, unit_seconds)
    costs = {kind: resampled(base, SCHEDULES.get(kind).num_stages(num_ranks)) for kind in kinds}
    schedules = {kind: build_schedule(kind, num_ranks, num_micro_batches, costs[kind]) for kind in kinds}
    ranks = run_ranks(num_ranks, _run_rank, schedules, costs, num_rounds, timeout_seconds=600.0)
    return [
        PlannedStep(
            kind=kind,
            predicted=simulate(schedules[kind], costs[kind]).makespan,
            measured=tuple(max(seconds) for seconds in zip(*(of_rank[kind] for of_rank in ranks), strict=True)),
        )
        for kind in kinds
    ]


def planned_text(steps: Sequence[PlannedStep]) -> str:
    """Formats a table of all kinds."""
    lines = [
        f"A step of sleeping, uneven stages: predicted and measured, target within {100 * MOST_OFF:.0f} %",
        f"{'schedule':20}{'predicted s':>12}{'median s':>10}{'least s':>9}{'median over predicted':>23}",
        *(
            f"{step.kind:20}{step.predicted:12.3f}{step.median:10.3f}{min(step.measured):9.3f}{step.difference:+22.1%} "
            for step in steps
        ),
    ]
    return "\n".join(lines)


def _uneven_stage(costs: StageCosts, log: SleepLog, like_TD: torch.Tensor) -> PassingStage:
    """Returns a stage whose F, I and W sleep as long as its costs say."""
    seconds = {"F": costs.forward, "I": costs.backward_input, "W": costs.backward_weight}
    return PassingStage(like_TD, lambda kind, phase: log.sleep(kind, seconds[kind]))


def _run_rank(
    rank: int, num_ranks: int, schedules: Mapping[str, Schedule], costs: Mapping[str, CostModel], num_rounds: int
) -> dict[str, list[float]]:
    layout = Layout(ParallelismConfig(pipeline=num_ranks, data=1, expert=1), ranks_per_node=num_ranks)
    pairs = sorted({pair for schedule in schedules.values() for pair in linked_pairs(schedule)})
    log, like_TD = SleepLog(), torch.zeros(1, 8)
    with PipelineTransport(layout, pairs, torch.device("cpu"), _TIMEOUT_SECONDS, CollectiveLog()) as transport:
        links, steps = Links(transport, like_TD), dict[str, Step]()
        for kind, schedule in schedules.items():
            held = {stage for _, stage in schedule.stages_of(rank)}
            stages = {stage: _uneven_stage(costs[kind].stages[stage], log, like_TD) for stage in held}
            program = compile_rank(schedule, rank, dict.fromkeys(held, ("compute",)), pairing.overlapped)
            steps[kind] = partial(execute, program, stages, links)  # type: ignore[arg-type, assignment]
        for step in steps.values():
            step()
        found: dict[str, list[float]] = {kind: [] for kind in steps}
        for _ in range(num_rounds):
            for kind, step in steps.items():
                found[kind].append(timed_step(step, log).seconds)
    return found
