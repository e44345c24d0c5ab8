"""Every schedule makes progress with every dispatcher under NCCL's rules; hazards and lost events are found."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import distributed

from comm.dispatch.build import build_dispatcher
from comm.dispatch.process_group import Observers
from comm.dispatch.traffic import Traffic
from dualpipe.builder import build_schedule
from dualpipe.costs import Costs, uniform
from dualpipe.ir import MOST_LINK_DEPTH, Message, Schedule, ScheduleError
from dualpipe.passes import split_backwards
from dualpipe.registry import SCHEDULES, check_size
from dualpipe.runtime.pairing import overlapped, sequential
from dualpipe.runtime.program import Action, Lane, Program, Step
from tests.comm.backends import Setting, emulated, make_parts
from tests.comm.contract import num_experts_for
from tests.dualpipe.random_schedules import offloaded
from tests.inline_lane import InlineLane
from tests.launch.test_config import build as build_run
from tests.ranks import run_ranks
from verify.nccl.calls import CallLog, Calls, log_calls, with_host_reads
from verify.nccl.check import check_streams, group_ctas
from verify.nccl.rules import DeviceRules, find_cycle
from verify.nccl.step import StepRecorder, StepShape, record_step
from verify.nccl.trace import Communicator, Event

RULES = DeviceRules(sms=132, queues=32, orders_starts=False)
CTAS = group_ctas(20)
NODES = (0, 0, 1, 1)
EQUAL = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=0.0, latency=0.0)
MOE: tuple[Lane, ...] = ("compute", "comm", "compute", "comm")
KINDS = [kind for kind, _ in SCHEDULES.items()]
DISPATCHER_KINDS = ("local", "all_to_all", "two_hop", "deepep")


def lanes_of(schedule: Schedule) -> dict[int, Sequence[Lane]]:
    """Returns a dense first stage, then stages of one or two layers, the last one with a head."""
    last = schedule.num_stages - 1
    lanes: dict[int, Sequence[Lane]] = {stage: MOE * (1 + stage % 2) for stage in range(schedule.num_stages)}
    lanes[0] = ("compute", "compute")
    lanes[last] = (*lanes[last], "compute")
    return lanes


def logged(rank: int, world_size: int, setting: Setting) -> Calls:
    """Returns the calls of a real dispatcher, with an emulation of a missing package."""
    log = CallLog()
    with emulated(setting):
        lane = InlineLane()
        group = distributed.group.WORLD
        assert group is not None
        hidden_size = setting.entry.contract.hidden_size
        observers = Observers(Traffic(), log)
        parts = make_parts(num_experts_for(world_size), setting.layout, group, lane, observers, hidden_size)
        dispatcher = build_dispatcher(setting.config, parts)
        rows_TD = torch.ones(1, 256, dtype=torch.bfloat16)
        calls = log_calls(dispatcher, log, lane, torch.tensor([[0, -1]]), rows_TD)
        dispatcher.close()
    return with_host_reads(calls)


@cache
def calls_of(kind: str) -> Calls:
    fields: dict[str, dict[str, object]] = {"two_hop": {"chunks": 2}, "balanced": {"balance": "exact"}}
    setting = Setting("all_to_all" if kind == "balanced" else kind, NODES, fields.get(kind, {}))
    calls = run_ranks(len(NODES), logged, setting)
    assert calls == calls[:1] * len(NODES)
    return calls[0]


def shape_of(schedule: Schedule, dispatcher: str = "all_to_all", **changes: Any) -> StepShape:
    is_local = dispatcher == "local"
    first = schedule.placement[0][0]
    last = schedule.placement[0][-1]
    shape = StepShape(
        schedule=schedule,
        pairing=overlapped,
        lanes=lanes_of(schedule),
        calls=None if is_local else calls_of(dispatcher),
        num_replicas=4,
        expert=1 if is_local else 4,
        context=2,
        gathers=True,
        recomputes=True,
        embedding=() if schedule.num_directions == 2 or first == last else (first, last),
        ctas=CTAS,
    )
    return replace(shape, **changes)


def scheduled(kind: str, num_ranks: int, chunks: int | None = None) -> Schedule:
    """Builds a schedule of the smallest number of micro-batches from two for each rank that the kind accepts."""
    chunks = chunks or SCHEDULES.get(kind).chunks[0]
    for num_micro_batches in range(2 * num_ranks, 3 * num_ranks + 2):
        try:
            check_size(kind, num_ranks, num_micro_batches)
        except ScheduleError:
            continue
        return build_schedule(kind, num_ranks, num_micro_batches, uniform(EQUAL, num_ranks, num_ranks * chunks))
    pytest.skip(f"{kind} has no schedule for {num_ranks} ranks")


def sizes() -> list[Any]:
    quick = [pytest.param(3), pytest.param(2)]
    rest = [pytest.param(size, marks=pytest.mark.exhaustive) for size in (1, 4, 5, 6, 7)]
    return [*quick, *rest, pytest.param(8, marks=[pytest.mark.long])]


@pytest.mark.parametrize("num_ranks", sizes())
@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_makes_progress_with_every_dispatcher(kind: str, num_ranks: int) -> None:
    """All interleavings of threads, streams and ranks are covered, and events order all uses of tensors."""
    schedule = scheduled(kind, num_ranks)
    for number, dispatcher in enumerate(DISPATCHER_KINDS if num_ranks < 8 else DISPATCHER_KINDS[:3]):
        # With three ranks, links of each depth.
        depth = MOST_LINK_DEPTH - number if num_ranks == 3 else 1
        traces = record_step(shape_of(replace(schedule, link_depth=depth), dispatcher))
        assert [problem for trace in traces for problem in trace.problems] == [], dispatcher
        assert find_cycle(traces, RULES) == [], dispatcher


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_deepep_on_eight_ranks_makes_progress(kind: str) -> None:
    assert find_cycle(record_step(shape_of(scheduled(kind, 8), "deepep")), RULES) == []


@pytest.mark.parametrize("dispatcher", [*DISPATCHER_KINDS, "balanced"])
def test_offload_several_chunks_slices_and_sequential_pairing_make_progress(dispatcher: str) -> None:
    moved = offloaded(split_backwards(scheduled("dualpipe", 2)), 1, share=1.0)
    sliced = build_schedule("dualpipe_interleaved", 2, 4, replace(uniform(EQUAL, 2, 4), slices=2, link_depth=3))
    for shape in (
        shape_of(moved, dispatcher),
        shape_of(sliced, dispatcher, pairing=sequential, num_replicas=8),
    ):
        traces = record_step(shape)
        assert [problem for trace in traces for problem in trace.problems] == []
        assert find_cycle(traces, RULES) == []


class PairedLinks(StepRecorder):
    """One communicator for all messages between two ranks."""

    def link(self, message: Message) -> Communicator:
        low, high = sorted((message.source, message.destination))
        return self.communicator("link", (low, high), f"pair {low}, {high}", spans=False)


class SharedEvent(StepRecorder):
    """Exchanges of both directions start as soon as their inputs exist, in no order (Megatron-LM#1810)."""

    def lane(self, step: Step) -> str:
        return f"comm {step.run.direction}"


class SumsOnExpertGroup(StepRecorder):
    """Sums of experts' gradients use the communicator of dispatch and combine."""

    def replicas(self, kind: str, stage: int) -> tuple[Communicator, ...]:
        return (self.communicator("expert", (self.index,)),) if kind == "expert_data" else super().replicas(kind, stage)


class LoadsOverStage(StepRecorder):
    """Router loads are summed over the ranks of a stage, whose communicator may still gather weights."""

    def sum_over_world(self, name: str, reads: Sequence[str] = ()) -> None:
        super().sum_over_world(name, reads)
        self.collective("main", self.units[0].communicators[0], f"{name} of a stage", [], [name])


class LocalOrder(StepRecorder):
    """Ranks sum the gradients of their stages in different orders."""

    def split_units(self) -> list[Any]:
        order = [stage for _, stage in self.shape.schedule.stages_of(self.index)]
        return sorted(super().split_units(), key=lambda unit: order.index(unit.readers[0]))


class OtherPairing(StepRecorder):
    """One rank of an expert group interleaves its operations in another way."""

    def program(self) -> Program:
        self.shape = replace(self.shape, pairing=sequential if self.copy else overlapped)
        return super().program()


class SkippedCollective(StepRecorder):
    """Rank 0 leaves out a sum."""

    def sum_over_world(self, name: str, reads: Sequence[str] = ()) -> None:
        if self.index or name != "metrics of the step":
            super().sum_over_world(name, reads)


class RunsAhead(StepRecorder):
    """The main thread does not wait until a lane has launched, so a full queue blocks the lane (nccl#1766)."""

    def __init__(self, shape: StepShape, rank: int) -> None:
        super().__init__(shape, rank)
        self.trace.finish = lambda done: self.trace.wait("compute", done[0])  # type: ignore[method-assign]


def late(kind: str) -> dict[str, Any]:
    return {"created_late": frozenset({kind})}


Plant = tuple[int, dict[str, Any], dict[str, Any], Callable[[StepShape, int], StepRecorder], str]
PLANTS: dict[str, Plant] = {
    "expert communicator created amid receives": (4, late("expert"), {}, StepRecorder, "creation of expert"),
    "created at the first optimizer step (ms-swift#9486)": (2, late("expert_data"), {}, StepRecorder, "creation of ex"),
    "sums of stages created in the schedule": (2, late("stage"), {}, StepRecorder, "creation of stage"),
    "links created by their first message": (2, late("link"), {}, StepRecorder, "creation of activation"),
    "more streams than hardware queues": (2, {}, {"queues": 8}, StepRecorder, "communicator stage"),
    "receives take all SMs": (2, {"ctas": {**CTAS, "link": 32}}, {}, StepRecorder, "communicator"),
    "collectives do not fit together": (2, {"ctas": dict.fromkeys(CTAS, 64)}, {}, StepRecorder, "communicator"),
    "a device with few SMs": (2, {}, {"sms": 40}, StepRecorder, "communicator"),
    "starts in the order of racing threads": (2, {}, {"orders_starts": True}, StepRecorder, "communicator world"),
    "one shared event (Megatron-LM#1810)": (4, {}, {}, SharedEvent, "communicator expert"),
    "both ways and kinds on one communicator": (2, {}, {}, PairedLinks, "communicator pair 0, 1"),
    "sums on the communicator of a lane": (4, {}, {}, SumsOnExpertGroup, "communicator expert"),
    "loads next to a gather of one communicator": (2, {}, {}, LoadsOverStage, "communicator stage"),
    "ranks sum gradients in different orders": (2, {}, {}, LocalOrder, "sum of gradients of stage"),
    "ranks pair operations differently": (2, {"copies": 2}, {}, OtherPairing, "communicator expert"),
    "a rank skips a collective": (2, {}, {}, SkippedCollective, "waits for rank 0, which never starts it"),
    "kernels loaded at their first launch": (2, {"loads_at_launch": True}, {}, StepRecorder, "communicator activation"),
    "the host runs ahead of lanes (nccl#1766)": (2, {"most_ahead": 10**6}, {}, RunsAhead, "gather of weights"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_hazard_is_rejected_with_its_cycle(name: str) -> None:
    num_ranks, changes, rules, recorder, part = PLANTS[name]
    lines = find_cycle(
        record_step(shape_of(scheduled("dualpipe", num_ranks), **changes), recorder), replace(RULES, **rules)
    )
    assert lines, "accepted"
    assert part in "\n".join(lines)
    assert all(line.startswith("rank ") and ", stream " in line and "communicator " in line for line in lines)
    assert len(lines) == 1 or lines[-1] == lines[0].removesuffix(" waits for")


def test_launches_far_ahead_alone_are_no_hazard() -> None:
    """The main thread waits until a lane has launched what its stream waits for, so a full queue blocks no lane."""
    shape = shape_of(scheduled("dualpipe", 4), most_ahead=10**6, launch_queue=300)
    assert find_cycle(record_step(shape), RULES) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "dispatcher"),
    [
        (offloaded(build_schedule("dualpipe", 2, 4), 1, share=1.0), "two_hop"),
        pytest.param(build_schedule("zb_v", 2, 4), "deepep", marks=pytest.mark.exhaustive),
        pytest.param(build_schedule("dualpipe_interleaved", 4, 8), "all_to_all", marks=pytest.mark.long),
    ],
    ids=["offload", "deepep", "interleaved"],
)
def test_every_lost_event_is_found_unless_others_imply_it(schedule: Schedule, dispatcher: str) -> None:
    shape = shape_of(schedule, dispatcher)
    whole = StepRecorder(shape, 0).record()
    assert whole.problems == []
    streams = set()
    for number, stream in enumerate(whole.waits):
        trace = StepRecorder(shape, 0, number).record()
        changed = [o for o in whole.operations if whole.before[o.start] != trace.before[o.start]]
        # Gathers of two stages run in turn on one communicator, so who waits for the second has waited for the first.
        if changed and not changed[0].name.startswith("clearing of"):
            assert trace.problems, f"{stream} does not wait for event {number}, which orders {changed[0]}"
            streams.add(stream)
    assert len(streams) >= 10, streams


class UnrecordedStream(StepRecorder):
    """Results of a lane are not recorded for the stream that reads them."""

    def __init__(self, shape: StepShape, rank: int) -> None:
        super().__init__(shape, rank)
        self.trace.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]


class FreedAtOnce(StepRecorder):
    """The lane does not hold what its functions captured."""

    def _job(self, method: str, step: Step, sent: str) -> tuple[list[Event], str]:
        job = super()._job(method, step, sent)
        if method in ("combine", "dispatch_backward"):
            self.trace.free("main", [sent])
            self._run(step.run).kept.remove(sent)
        return job


class ReleasedEarly(StepRecorder):
    """An offloaded activation is freed before its copy has ended."""

    def perform(self, step: Step) -> None:
        if step.action is Action.RELEASE:
            self._run(step.run).copied = ()
        super().perform(step)


@pytest.mark.parametrize("recorder", [UnrecordedStream, FreedAtOnce, ReleasedEarly])
def test_memory_that_is_freed_too_early_is_found(recorder: type[StepRecorder]) -> None:
    shape = shape_of(offloaded(build_schedule("dualpipe", 2, 4), 1, share=1.0))
    assert any("frees it" in problem for trace in record_step(shape, recorder) for problem in trace.problems)


def test_configured_run_is_checked_with_its_hardware_queues() -> None:
    config = build_run("parallelism=four_ranks", "cluster=h100")
    calls = calls_of(config.dispatch.kind)
    assert check_streams(config, calls, {}) == check_streams(config, calls, {"CUDA_DEVICE_MAX_CONNECTIONS": "32"})
    assert check_streams(config, calls, {}).problem == ""
    assert check_streams(config, calls, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}).problem.startswith("rank ")
    on_gloo = replace(config, cluster=replace(config.cluster, backend="gloo"))
    assert check_streams(on_gloo, calls, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}).problem == ""
