"""Compares the simulated time of a step with the measured one, for stages that sleep on two lanes.

Stages are uneven and have exchange, so schedules have groups of two and of three. Each stage has blocks of four phases:
computation, exchange, computation, exchange. Computations sleep on the main thread and exchanges on the thread of a
comm lane. Schedule, compiler, interpreter and transfers are those of training.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise

import torch

from bench.blocks import SleepLog
from bench.contenders import Links, PassingRun
from bench.measure import timed_step
from bench.planned_stages import uneven_costs
from comm.config import ParallelismConfig
from comm.lane import ThreadLane
from comm.layout import Layout
from comm.protocol import Work
from comm.transfers import PipelineTransport
from comm.watchdog.collective_log import CollectiveLog
from dualpipe.builder import build_schedule
from dualpipe.costs import CostModel, StageCosts, resampled
from dualpipe.ir import Group, Op, Schedule, linked_pairs
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.execute import Execution, execute
from dualpipe.runtime.measured import LaneSpan, Measured, rank_spans
from dualpipe.runtime.program import Lane, Program
from dualpipe.simulation import simulate
from tests.ranks import run_ranks

MOST_OVER = 0.03
_TIMEOUT_SECONDS = 120.0
Call = tuple[str, int, int, int]
"""F, I or W with direction, stage and micro-batch."""
_BLOCK: tuple[Lane, ...] = ("compute", "comm", "compute", "comm")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedCase:
    """Schedule of stages that sleep.

    Attributes:
        exchange: exchange of F, and of I, relative to the computation of F.
        slices: slices of each sequence, with links that hold two messages if there are several.
    """

    kind: str
    chunks: int
    exchange: float
    is_uneven: bool
    blocks: int
    slices: int = 1

    def costs(self, num_ranks: int, unit_seconds: float) -> CostModel:
        """Returns the costs of its stages; F of a mean stage of model/P computes for about `unit_seconds`."""
        uneven = uneven_costs(num_ranks, unit_seconds)
        stages = uneven.stages if self.is_uneven else (uneven.stages[1],) * num_ranks
        shares = [self.exchange * stage.forward for stage in stages]
        with_exchange = tuple(
            replace(stage, forward_exchange=share, backward_exchange=share)
            for stage, share in zip(stages, shares, strict=True)
        )
        costs = resampled(replace(uneven, stages=with_exchange), num_ranks * self.chunks)
        per_slice = tuple(
            StageCosts(**{name: value / self.slices for name, value in asdict(stage).items() if value is not None})
            for stage in costs.stages
        )
        return replace(costs, stages=per_slice, slices=self.slices, link_depth=min(2, self.slices))


CASES = (
    GroupedCase(kind="dualpipe_split", chunks=1, exchange=1.0, is_uneven=False, blocks=4),
    GroupedCase(kind="dualpipe_split", chunks=1, exchange=0.65, is_uneven=True, blocks=4),
    GroupedCase(kind="dualpipe_interleaved", chunks=2, exchange=0.65, is_uneven=True, blocks=2),
    GroupedCase(kind="dualpipe_interleaved", chunks=2, exchange=1.0, is_uneven=True, blocks=2),
    GroupedCase(kind="dualpipe_split", chunks=1, exchange=1.0, is_uneven=False, blocks=4, slices=2),
    GroupedCase(kind="dualpipe_split", chunks=1, exchange=0.65, is_uneven=True, blocks=4, slices=2),
)
"""All have four blocks of phases in model/P."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedStep:
    """Simulated seconds of a step, the measured ones of all rounds, and the number of groups of three."""

    case: GroupedCase
    triples: int
    simulated: float
    measured: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Measured time of the fastest round over the simulated time."""
        return min(self.measured) / self.simulated


def measure_grouped(
    num_ranks: int, num_micro_batches: int, unit_seconds: float, cases: Sequence[GroupedCase], num_rounds: int
) -> list[GroupedStep]:
    """Simulates and runs a step of every case, in interleaved rounds; micro-batches are whole sequences."""
    costs = [case.costs(num_ranks, unit_seconds) for case in cases]
    schedules = [
        build_schedule(case.kind, num_ranks, num_micro_batches * case.slices, model)
        for case, model in zip(cases, costs, strict=True)
    ]
    jobs = list(zip(cases, schedules, costs, strict=True))
    ranks = run_ranks(num_ranks, _run_rank, jobs, num_rounds, timeout_seconds=900.0)
    return [
        GroupedStep(
            case=case,
            triples=sum(len(group) > 2 for groups in schedule.ranks for group in groups),
            simulated=simulate(schedule, model).makespan,
            measured=tuple(max(seconds) for seconds in zip(*(of_rank[index] for of_rank in ranks), strict=True)),
        )
        for index, (case, schedule, model) in enumerate(jobs)
    ]


def grouped_text(steps: Sequence[GroupedStep]) -> str:
    """Formats a table of all cases."""
    lines = [
        f"A step of stages that sleep on two lanes: simulated and measured, target at most {1 + MOST_OVER:.2f}",
        f"{'schedule':27}{'exchange':>9}{'stages':>8}{'groups of 3':>12}{'simulated s':>12}{'least s':>9}{'ratio':>7}",
    ]
    for step in steps:
        sliced = f", {step.case.slices} slices" if step.case.slices > 1 else ""
        name, stages = f"{step.case.kind} {step.case.chunks}{sliced}", "uneven" if step.case.is_uneven else "equal"
        lines.append(
            f"{name:27}{step.case.exchange:9.2f}{stages:>8}{step.triples:12}"
            f"{step.simulated:12.3f}{min(step.measured):9.3f}{step.ratio:7.3f}"
        )
    return "\n".join(lines)


class _LaneRun(PassingRun):
    def __init__(self, stage: "_LaneStage", key: tuple[int, int, int]) -> None:
        super().__init__(stage.like_TD, self._sleep)
        self._stage = stage
        self._key = key
        self._pending: Work[None] | None = None

    def wait(self) -> None:
        assert self._pending is not None
        self._pending.wait()
        self._pending = None

    def offload(self) -> None:
        raise AssertionError("nothing is offloaded")

    release = reload = restore = offload

    def _sleep(self, kind: str, phase: int) -> None:
        stage = self._stage
        stage.calls.append((kind, *self._key))
        compute, exchange = stage.seconds[kind]
        if kind == "W" or stage.lanes[phase] == "compute":
            stage.log.sleep(kind, stage.share * compute)
        else:
            self._pending = stage.comm.submit(partial(stage.comm_log.sleep, "X", stage.share * exchange))


class _LaneStage:
    """Stage of blocks whose phases take equal shares of its costs."""

    def __init__(
        self,
        number: int,
        costs: StageCosts,
        blocks: int,
        comm: ThreadLane,
        logs: Sequence[SleepLog],
        like_TD: torch.Tensor,
        calls: list[Call],
    ) -> None:
        self.number = number
        self.calls = calls
        self.seconds = {
            "F": (costs.forward, costs.forward_exchange),
            "I": (costs.backward_input, costs.backward_exchange),
            "W": (costs.backward_weight, 0.0),
        }
        self.lanes = _BLOCK * blocks
        self.share = 1 / (2 * blocks)
        self.comm = comm
        self.log, self.comm_log = logs
        self.like_TD = like_TD

    def start(self, direction: int, micro_batch: int) -> _LaneRun:
        return _LaneRun(self, (direction, self.number, micro_batch))


class _Job:
    """A rank's program of a schedule, and the stages on which it runs."""

    def __init__(
        self,
        groups: Sequence[Group],
        program: Program,
        stages: Mapping[int, _LaneStage],
        links: Links,
        log: SleepLog,
        calls: list[Call],
    ) -> None:
        self.program = program
        self.log = log
        self._groups = groups
        self._calls = calls
        self.execution: Execution | None = None
        self._stages = stages
        self._links = links

    def run(self) -> None:
        self._calls.clear()
        self.execution = execute(self.program, self._stages, self._links)
        # Every call is one of the group whose turn it is: the order that ran is the planned one.
        turns = {
            (kind, *op[1:]): turn
            for turn, group in enumerate(self._groups)
            for op in group
            for kind in ("IW" if op.kind is Op.BACKWARD else op.kind.value)
        }
        assert set(self._calls) == set(turns)
        assert all(turns[earlier] <= turns[later] for earlier, later in pairwise(self._calls))


@contextmanager
def _open_jobs(rank: int, num_ranks: int, parts: Sequence[tuple[Schedule, CostModel, int]]) -> Iterator[list[_Job]]:
    """Opens the links of a rank and compiles its programs of schedules, given their costs and blocks of a stage."""
    layout = Layout(ParallelismConfig(pipeline=num_ranks, data=1, expert=1), ranks_per_node=num_ranks)
    pairs = sorted({pair for schedule, _, _ in parts for pair in linked_pairs(schedule)})
    logs, like_TD = (SleepLog(), SleepLog()), torch.zeros(1, 8)
    transport = PipelineTransport(layout, pairs, torch.device("cpu"), _TIMEOUT_SECONDS, CollectiveLog())
    with transport, ThreadLane("comm") as comm:
        links, jobs, calls = Links(transport, like_TD), list[_Job](), list[Call]()
        for schedule, costs, blocks in parts:
            held = sorted({stage for _, stage in schedule.stages_of(rank)})
            stages = {
                stage: _LaneStage(stage, costs.stages[stage], blocks, comm, logs, like_TD, calls) for stage in held
            }
            lanes: Mapping[int, Sequence[Lane]] = dict.fromkeys(held, _BLOCK * blocks)
            program = compile_rank(schedule, rank, lanes, pairing.overlapped)
            jobs.append(_Job(schedule.ranks[rank], program, stages, links, logs[0], calls))
        yield jobs


def _run_rank(
    rank: int, num_ranks: int, cases: Sequence[tuple[GroupedCase, Schedule, CostModel]], num_rounds: int
) -> list[list[float]]:
    with _open_jobs(rank, num_ranks, [(schedule, costs, case.blocks) for case, schedule, costs in cases]) as jobs:
        found: list[list[float]] = [[] for _ in jobs]
        for _ in range(num_rounds):
            for seconds, job in zip(found, jobs, strict=True):
                seconds.append(timed_step(job.run, job.log).seconds)
    return found


def measure_spans(schedule: Schedule, costs: CostModel, blocks: int) -> Measured:
    """Runs a step whose stages sleep, and returns the spans of all ranks."""
    ranks = run_ranks(schedule.num_ranks, _record_rank, schedule, costs, blocks, timeout_seconds=900.0)
    return Measured(ranks=tuple(ranks))


def _record_rank(rank: int, num_ranks: int, schedule: Schedule, costs: CostModel, blocks: int) -> tuple[LaneSpan, ...]:
    with _open_jobs(rank, num_ranks, [(schedule, costs, blocks)]) as (job,):
        timed_step(job.run, job.log)
        assert job.execution is not None
        return rank_spans(schedule.ranks[rank], job.program, job.execution.spans, job.execution.origin_seconds)
