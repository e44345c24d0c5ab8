"""Measures how much exchange a DualPipe step hides, on network namespaces with rate-limited links.

Schedule, interpreter, pairing, phases, exchanges and transfers are those of training. Sleeps emulate computation, so
that a machine with few cores can run eight ranks.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass

import torch
from torch import distributed

from bench.blocks import SleepLog
from bench.contenders import Links
from bench.overlap_stage import EmulatedModel, EmulatedStage
from comm.config import AllToAllDispatchConfig, DispatchConfig, ParallelismConfig, TwoHopDispatchConfig
from comm.dispatch.build import DispatcherParts, build_dispatcher
from comm.dispatch.process_group import Observers
from comm.dispatch.registry import TokenSizes
from comm.dispatch.traffic import Traffic
from comm.groups import Groups
from comm.lane import Lane, ThreadLane
from comm.layout import Layout
from comm.transfers import PipelineTransport
from comm.watchdog.collective_log import CollectiveLog
from dualpipe.builder import build_schedule
from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import Pairing, compile_rank, run_key
from dualpipe.runtime.execute import Execution, execute
from dualpipe.runtime.program import Action, Program, Step
from tests.cluster.namespaces import Cluster
from tests.cluster.ranks_in_nodes import begin_together, run_in_nodes
from tests.inline_lane import InlineLane

NUM_NODES = 4
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlapPlan:
    """Pipeline of two ranks on four nodes of two ranks: each expert group lies on two nodes."""

    dispatch: DispatchConfig
    model: EmulatedModel
    num_micro_batches: int
    num_rounds: int

    @property
    def layout(self) -> Layout:
        return Layout(ParallelismConfig(pipeline=2, data=4, expert=4), ranks_per_node=2)


def two_hop_plan(num_micro_batches: int, num_rounds: int) -> OverlapPlan:
    """Returns a plan in which each token is sent once to the other node of its expert group."""
    config = TwoHopDispatchConfig(
        kind="two_hop", payload="full", max_nodes=2, node_cap="verify", chunks=2, partial_sums="rows"
    )
    model = EmulatedModel(blocks_per_stage=4, seconds=0.04, tokens=280, hidden=1024, num_experts=64, num_choices=8)
    return OverlapPlan(dispatch=config, model=model, num_micro_batches=num_micro_batches, num_rounds=num_rounds)


def all_to_all_plan(num_micro_batches: int, num_rounds: int) -> OverlapPlan:
    """Returns a plan with a copy for each of eight experts, half on the other node.

    Fewer tokens, as many rows.
    """
    config = AllToAllDispatchConfig(kind="all_to_all", payload="full", max_nodes=2, node_cap="verify")
    model = EmulatedModel(blocks_per_stage=3, seconds=0.045, tokens=104, hidden=1024, num_experts=64, num_choices=8)
    return OverlapPlan(dispatch=config, model=model, num_micro_batches=num_micro_batches, num_rounds=num_rounds)


@dataclass(frozen=True, slots=True)
class PairTimes:
    """Seconds of one F&B group on one rank, from its first step to its last."""

    total: float
    compute: float
    exchange: float
    transfer: float


@dataclass(frozen=True, slots=True)
class RankStep:
    """Step of one rank: seconds from the common start, and its pairs."""

    seconds: float
    pairs: tuple[PairTimes, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Measured seconds: medians over F&B pairs, ranks and rounds.

    Attributes:
        compute: computation of a pair; the minimum over both modes.
    """

    compute: float
    exchange: float
    in_sequence: float
    overlapped: float
    step_in_sequence: float
    step_overlapped: float

    @property
    def over_longer(self) -> float:
        """Time of the overlapped pair relative to the longer of computation and exchange."""
        return self.overlapped / max(self.compute, self.exchange)

    @property
    def hidden_share(self) -> float:
        return (self.compute + self.exchange - self.overlapped) / self.exchange


def measure_overlap(cluster: Cluster, plan: OverlapPlan) -> Overlap:
    """Alternates steps in sequence and overlapped steps."""
    layout = plan.layout
    ranks = run_in_nodes(cluster, layout.ranks_per_node, _measure_rank, plan, timeout_seconds=300.0)
    sequence, overlapped = ([steps for of in ranks for steps in of[name]] for name in ("sequence", "overlapped"))
    in_turn, at_once = (_typical_pair(steps) for steps in (sequence, overlapped))
    return Overlap(
        compute=min(in_turn.compute, at_once.compute),
        exchange=in_turn.exchange,
        in_sequence=in_turn.total,
        overlapped=at_once.total,
        step_in_sequence=statistics.median(step.seconds for step in sequence),
        step_overlapped=statistics.median(step.seconds for step in overlapped),
    )


def _typical_pair(steps: Sequence[RankStep]) -> PairTimes:
    pairs = [astuple(pair) for step in steps for pair in step.pairs]
    return PairTimes(*map(statistics.median, zip(*pairs, strict=True)))


def _measure_rank(rank: int, world_size: int, plan: OverlapPlan) -> dict[str, list[RankStep]]:
    layout = plan.layout
    groups = Groups(layout, mirrored=True, timeout_seconds=_TIMEOUT_SECONDS)
    schedule = build_schedule("dualpipe", layout.parallelism.pipeline, plan.num_micro_batches)
    transport = PipelineTransport(layout, [(0, 1)], torch.device("cpu"), _TIMEOUT_SECONDS, CollectiveLog())
    with ExitStack() as stack:
        stack.enter_context(transport)
        lane = stack.enter_context(ThreadLane("comm"))
        contenders = {
            "sequence": _Contender(plan, layout, groups, schedule, transport, InlineLane(), pairing.sequential),
            "overlapped": _Contender(plan, layout, groups, schedule, transport, lane, pairing.overlapped),
        }
        for contender in contenders.values():
            contender.warm_up()
        found: dict[str, list[RankStep]] = {name: [] for name in contenders}
        for _ in range(plan.num_rounds):
            for name, contender in contenders.items():
                found[name].append(contender.step())
    return found


class _Contender:
    """Stages and program of one rank."""

    def __init__(
        self,
        plan: OverlapPlan,
        layout: Layout,
        groups: Groups,
        schedule: Schedule,
        transport: PipelineTransport,
        lane: Lane,
        order: Pairing,
    ) -> None:
        model = plan.model
        observers = Observers(Traffic(), CollectiveLog())
        parts = DispatcherParts(
            num_experts=model.num_experts,
            layout=layout,
            group=groups.expert,
            lane=lane,
            observers=observers,
            timeout_seconds=_TIMEOUT_SECONDS,
            tokens=TokenSizes(max_tokens=model.tokens, hidden_size=model.hidden, num_choices=model.num_choices),
        )
        dispatcher = build_dispatcher(plan.dispatch, parts)
        self._rank = layout.pipeline_index(groups.rank)
        self._schedule = schedule
        self._stages = {
            stage: EmulatedStage(model, stage, dispatcher, model.ids(groups.rank, 2, 2), SleepLog())
            for _, stage in schedule.stages_of(self._rank)
        }
        lanes = {number: stage.lanes for number, stage in self._stages.items()}
        self._program = compile_rank(schedule, self._rank, lanes, order)
        self._lanes = lanes
        self._links = Links(transport, torch.empty(1, model.tokens, model.hidden, dtype=torch.bfloat16))

    def warm_up(self) -> None:
        """Runs one micro-batch through one stage, for one-time initialization."""
        stage = next(iter(self._stages.values()))
        run = stage.start(0, 0)
        for phase, lane in enumerate(stage.lanes):
            run.forward(phase)
            if lane == "comm":
                run.wait()

    def step(self) -> RankStep:
        """Runs the program from a common start."""
        start = begin_together()
        execution = execute(self._program, self._stages, self._links)
        seconds = time.monotonic() - start
        distributed.barrier()
        pairs = [group for group in self._schedule.ranks[self._rank] if is_pair(group)]
        return RankStep(seconds, tuple(self._pair_times(group, execution) for group in pairs))

    def _pair_times(self, group: Group, execution: Execution) -> PairTimes:
        found, spans = steps_of(self._program, group), execution.spans
        sums = {"compute": 0.0, "exchange": 0.0, "transfer": 0.0}
        for index in found:
            step = self._program.steps[index]
            begin, end = spans[index]
            match step.action:
                case Action.FORWARD | Action.BACKWARD:
                    lane = self._lanes[step.run.stage][step.phase]
                    sums["compute" if lane == "compute" else "exchange"] += end - begin
                case Action.WEIGHT:
                    sums["compute"] += end - begin
                case Action.WAIT:
                    sums["exchange"] += end - begin
                case Action.ACCEPT:
                    sums["transfer"] += end - begin
                case _:
                    pass
        total = spans[found[-1]][1] - spans[found[0]][0]
        return PairTimes(total, **sums)


def is_pair(group: Group) -> bool:
    """Returns whether a group is one F and one B."""
    return [op.kind for op in group] == [Op.FORWARD, Op.BACKWARD]


def steps_of(program: Program, group: Group) -> range:
    """Returns the positions in a program of the steps of an F&B group, which are consecutive."""
    forward, backward = (_passage(program, op) for op in group)
    found = range(min(forward[0], backward[0]), max(forward[-1], backward[-1]) + 1)
    assert len(found) == len(forward) + len(backward)
    return found


def _passage(program: Program, op: Operation) -> list[int]:
    """Returns the positions of an operation's steps, except posted receives."""
    key = run_key(op)
    own = [index for index, step in enumerate(program.steps) if step.run == key and step.action is not Action.RECEIVE]
    back = next(place for place, index in enumerate(own) if _is_of_backward(program.steps[index]))
    return own[:back] if op.kind is Op.FORWARD else own[back:]


def _is_of_backward(step: Step) -> bool:
    arrives = step.action is Action.ACCEPT and step.message is not None and step.message.kind == "gradient"
    return arrives or step.action is Action.BACKWARD
