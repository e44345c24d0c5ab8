"""Laws of lowering and pairing, and the interpreter on stages that only add, one thread per rank."""

import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dualpipe.compile import compile_rank
from dualpipe.execute import Execution, execute
from dualpipe.generate.select import build
from dualpipe.ir import Op, Schedule
from dualpipe.pairing import Atom, overlapped, sequential
from dualpipe.passes import forward_only
from dualpipe.program import Action, Program, RunKey, Step
from dualpipe.protocols import Lane, Receipt
from dualpipe.transfers import Message, transfers

BLOCK: tuple[Lane, ...] = ("compute", "comm", "compute", "comm")
LANES: tuple[Lane, ...] = (*BLOCK, *BLOCK)
SCHEDULES = [build("dualpipe", 2, 4), build("dualpipe", 4, 8), build("dualpipe", 6, 16), build("1f1b", 3, 5)]
PAIRINGS = [overlapped, sequential]


def lower(schedule: Schedule, rank: int, pairing: object) -> Program:
    lanes = {stage: LANES for _, stage in schedule.stages_of(rank)}
    return compile_rank(schedule, rank, lanes, pairing)  # type: ignore[arg-type]


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_program_runs_every_phase_of_every_operation_once(schedule: Schedule, pairing: object) -> None:
    for rank, groups in enumerate(schedule.ranks):
        expected: Counter[tuple[Action, RunKey, int]] = Counter()
        for op in (op for group in groups for op in group):
            run = RunKey(op.direction, op.stage, op.micro_batch)
            for phase, lane in enumerate(LANES):
                if op.kind is Op.FORWARD:
                    expected[Action.FORWARD, run, phase] += 1
                if op.kind in (Op.BACKWARD, Op.BACKWARD_INPUT):
                    expected[Action.BACKWARD, run, phase] += 1
                if op.kind in (Op.BACKWARD, Op.BACKWARD_WEIGHT) and lane == "compute":
                    expected[Action.WEIGHT, run, phase] += 1
        steps = lower(schedule, rank, pairing).steps
        phased = (Action.FORWARD, Action.BACKWARD, Action.WEIGHT)
        assert Counter((step.action, step.run, step.phase) for step in steps if step.action in phased) == expected


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_exchange_is_completed_before_its_run_goes_on(schedule: Schedule, pairing: object) -> None:
    for rank in range(schedule.num_ranks):
        under_way: set[RunKey] = set()
        done: dict[RunKey, list[int]] = defaultdict(list)
        for step in lower(schedule, rank, pairing).steps:
            if step.action is Action.WAIT:
                under_way.remove(step.run)
            elif step.action in (Action.FORWARD, Action.BACKWARD):
                assert step.run not in under_way
                if LANES[step.phase] == "comm":
                    under_way.add(step.run)
                if step.action is Action.BACKWARD:
                    done[step.run].append(step.phase)
            elif step.action is Action.WEIGHT:
                assert step.phase in done[step.run]
            elif step.action in (Action.SEND, Action.FINISH):
                assert step.run not in under_way
        assert not under_way


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_links_carry_messages_in_the_order_of_the_schedule(schedule: Schedule, pairing: object) -> None:
    programs = [lower(schedule, rank, pairing) for rank in range(schedule.num_ranks)]
    sent: dict[object, list[Message]] = defaultdict(list)
    received: dict[object, list[Message]] = defaultdict(list)
    for program in programs:
        posted: set[Message] = set()
        for step in program.steps:
            if step.message is None:
                continue
            if step.action is Action.SEND:
                sent[step.message.link].append(step.message)
            elif step.action is Action.RECEIVE:
                received[step.message.link].append(step.message)
                posted.add(step.message)
            else:
                assert step.message in posted
    assert sent == received
    planned = {message for rank in transfers(schedule) for message in rank.all_sends}
    assert planned == {message for messages in sent.values() for message in messages}


def atoms_of(name: str, lanes: Sequence[Lane]) -> list[Atom]:
    run = RunKey(0, 0, ord(name))
    return [
        Atom(lane, (Step(Action.FORWARD, run, phase),), phase > 0 and lanes[phase - 1] == "comm")
        for phase, lane in enumerate(lanes)
    ]


def test_overlapped_pair_computes_one_under_the_exchange_of_the_other() -> None:
    forward: tuple[Lane, ...] = BLOCK * 3
    backward: tuple[Lane, ...] = tuple(reversed(BLOCK)) * 3
    order = overlapped([atoms_of("f", forward), atoms_of("b", backward)])
    names = [chr(atom.steps[0].run.micro_batch) for atom in order]
    for name, lanes in (("f", forward), ("b", backward)):
        phases = [atom.steps[0].phase for atom, owner in zip(order, names, strict=True) if owner == name]
        assert phases == list(range(len(lanes)))
    hidden = 0
    for index, atom in enumerate(order):
        if atom.lane == "comm":
            until = next((later for later in range(index + 1, len(order)) if names[later] == names[index]), len(order))
            hidden += any(order[later].lane == "compute" for later in range(index + 1, until))
    # Twelve exchanges; the last of each member has nothing left to hide under in its own pair.
    assert hidden >= 11


@dataclass
class AddingRun:
    """Adds the stage's number on the way forward; gradients double. Exchanges complete in `wait` alone."""

    stage: int
    num_stages: int
    value: Tensor
    weights: list[int]
    gradient: Tensor | None = None
    pending: bool = False

    def set_input(self, hidden: Tensor, /) -> None:
        self.value = hidden

    def output(self) -> Tensor:
        return self.value

    def set_output_gradient(self, gradient: Tensor, /) -> None:
        self.gradient = gradient

    def input_gradient(self) -> Tensor:
        assert self.gradient is not None
        return self.gradient

    def forward(self, phase: int) -> None:
        assert not self.pending
        self.pending = LANES[phase] == "comm"
        self.value = self.value + (self.stage + 1) * 10.0**phase

    def backward(self, phase: int) -> None:
        assert not self.pending
        self.pending = LANES[phase] == "comm"
        if self.gradient is None:
            assert self.stage == self.num_stages - 1
            self.gradient = self.value.clone()
        self.gradient = self.gradient * 2

    def weight(self, phase: int) -> None:
        self.weights.append(phase)

    def wait(self) -> None:
        assert self.pending
        self.pending = False


class AddingStage:
    """Makes runs, and keeps what they leave behind."""

    def __init__(self, number: int, num_stages: int) -> None:
        self.lanes = LANES
        self.number = number
        self.num_stages = num_stages
        self.runs: dict[tuple[int, int], AddingRun] = {}

    def start(self, direction: int, micro_batch: int) -> AddingRun:
        run = AddingRun(self.number, self.num_stages, torch.tensor([float(micro_batch), float(direction)]).double(), [])
        self.runs[direction, micro_batch] = run
        return run


class QueueTransport:
    """One queue per link between the threads of a test."""

    def __init__(self, queues: dict[object, "queue.Queue[tuple[Message, Tensor]]"]) -> None:
        self._queues = queues

    def post_receive(self, message: Message, /) -> Receipt:
        transport = self

        class Due:
            def wait(self) -> Tensor:
                came, tensor = transport._queues[message.link].get(timeout=20)
                assert came == message
                return tensor

        return Due()

    def send(self, message: Message, tensor: Tensor, /) -> None:
        self._queues[message.link].put((message, tensor))

    def flush(self) -> None:
        return


def run_threads(schedule: Schedule, pairing: object) -> tuple[list[dict[int, AddingStage]], list[Execution]]:
    queues: dict[object, queue.Queue[tuple[Message, Tensor]]] = defaultdict(queue.Queue)
    held = [
        {stage: AddingStage(stage, schedule.num_stages) for _, stage in schedule.stages_of(rank)}
        for rank in range(schedule.num_ranks)
    ]
    results: dict[int, Execution] = {}

    def work(rank: int) -> None:
        program = lower(schedule, rank, pairing)
        results[rank] = execute(program, held[rank], QueueTransport(queues))  # type: ignore[arg-type]

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(schedule.num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(results) == schedule.num_ranks
    return held, [results[rank] for rank in range(schedule.num_ranks)]


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_interpreter_carries_values_and_gradients_through_all_stages(schedule: Schedule, pairing: object) -> None:
    held, executions = run_threads(schedule, pairing)
    last = schedule.num_stages - 1
    per_stage = sum(10.0**phase for phase in range(len(LANES)))
    for direction in range(schedule.num_directions):
        for micro_batch in schedule.micro_batches_of(direction):
            end = held[schedule.rank_of(direction, last)][last].runs[direction, micro_batch]
            added = per_stage * sum(range(1, last + 2))
            assert end.value.tolist() == [micro_batch + added, direction + added]
            start = held[schedule.rank_of(direction, 0)][0].runs[direction, micro_batch]
            assert start.gradient is not None
            assert torch.equal(start.gradient, end.value * 2.0 ** (len(LANES) * (last + 1)))
    computations = [phase for phase, lane in enumerate(LANES) if lane == "compute"]
    for stages in held:
        for stage in stages.values():
            assert all(sorted(run.weights) == computations for run in stage.runs.values())
    if schedule.kind == "dualpipe":
        assert max(execution.peak_runs for execution in executions) == schedule.num_ranks + 1


def test_forward_only_program_keeps_nothing() -> None:
    schedule = forward_only(build("dualpipe", 4, 8))
    held, executions = run_threads(schedule, overlapped)
    assert all(execution.peak_runs <= 2 for execution in executions)
    for stages in held:
        for stage in stages.values():
            assert all(run.gradient is None and not run.weights for run in stage.runs.values())
