"""Provides stages that only add and track tensors, and ranks as threads, to test the interpreter."""

import queue
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualpipe.builder import build_schedule
from dualpipe.generate.dualpipe import dualpipe_v
from dualpipe.generate.zb1p import zb1p
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.ir import Message, Schedule
from dualpipe.runtime.compile import Pairing, compile_rank
from dualpipe.runtime.execute import Execution, HostClock, execute
from dualpipe.runtime.pairing import overlapped, sequential
from dualpipe.runtime.program import Lane, PendingReceive, Program
from tests.dualpipe.random_schedules import bidirectional, looped, offloaded, random_schedule, straight, v_shaped

BLOCK: tuple[Lane, ...] = ("compute", "comm", "compute", "comm")
PAIRINGS = [overlapped, sequential]
PLACEMENTS = [straight(4), v_shaped(1), v_shaped(3), bidirectional(1), bidirectional(3), bidirectional(4), looped(3, 2)]
RANDOM = [random_schedule(placement, 5, 1) for placement in PLACEMENTS]
PUBLISHED = [
    *(build_schedule("dualpipe", *sizes) for sizes in ((2, 4), (4, 8), (6, 16))),
    *(build_schedule("1f1b", *sizes) for sizes in ((1, 2), (3, 5))),
    *(dualpipe_v(*sizes) for sizes in ((1, 2), (3, 7))),
    *(zb_v(*sizes) for sizes in ((1, 3), (3, 7), (4, 3))),
    *(zb1p(*sizes) for sizes in ((1, 3), (3, 7))),
]
OFFLOADED = [
    *(offloaded(random_schedule(placement, 5, 0), seed) for seed, placement in enumerate(PLACEMENTS)),
    offloaded(build_schedule("dualpipe", 4, 8), 1),
    offloaded(build_schedule("1f1b", 3, 5), 2, share=1.0),
]
SCHEDULES = PUBLISHED + RANDOM + OFFLOADED


def name_of(schedule: object) -> str | None:
    if not isinstance(schedule, Schedule):
        return None
    shape = f"{schedule.num_directions}x{schedule.num_stages}"
    return f"{schedule.kind}-{schedule.num_ranks}-{schedule.num_micro_batches}-{shape}"


def lanes_of(stage: int, num_stages: int) -> tuple[Lane, ...]:
    """Returns the lanes of a stage: embedding and dense block first, head last, blocks in between."""
    blocks = BLOCK * (1 + stage % 2) if stage else ("compute", "compute")
    return (*blocks, "compute") if stage == num_stages - 1 else blocks


def lower(schedule: Schedule, rank: int, pairing: Pairing) -> Program:
    lanes = {stage: lanes_of(stage, schedule.num_stages) for _, stage in schedule.stages_of(rank)}
    return compile_rank(schedule, rank, lanes, pairing)


@dataclass
class Journal:
    """Tensors that one rank's runs keep. Tensors in `ended` must be freed before the rank's next action."""

    ended: list[weakref.ref[Tensor]] = field(default_factory=list)
    kept: dict[object, list[weakref.ref[Tensor]]] = field(default_factory=dict)
    peak: int = 0

    def look(self) -> None:
        """Checks freed tensors; called before every action of the rank."""
        assert all(tensor() is None for tensor in self.ended), "a tensor is kept after its last use"
        self.ended.clear()
        alive = [key for key, tensors in self.kept.items() if any(tensor() is not None for tensor in tensors)]
        self.peak = max(self.peak, len(alive))

    def end(self, *tensors: Tensor) -> None:
        self.ended += map(weakref.ref, tensors)

    def keep(self, key: object, tensor: Tensor) -> None:
        self.kept.setdefault(key, []).append(weakref.ref(tensor))


class AddingRun:
    """Run that adds 10^phase times the stage's number in the forward; gradients double.

    Only `wait` ends exchanges.

    Like a model's run, it drops its references to outputs, keeps an activation of each phase until its end, and drops
    its input after the first phase.
    """

    def __init__(self, stage: "AddingStage", key: tuple[int, int], value: Tensor) -> None:
        self.stage = stage
        self.key = key
        self.value: Tensor | None = value if stage.number == 0 else None
        self.gradient: Tensor | None = None
        self.activations: list[Tensor] = []
        self.weights: list[int] = []
        self.pending = False
        self.host: list[list[float]] = []

    def set_input(self, hidden: Tensor, /) -> None:
        self.stage.journal.look()
        self.value = hidden

    def output(self) -> Tensor:
        self.stage.journal.look()
        assert self.value is not None
        assert not self.pending
        value, self.value = self.value, None
        return value

    def set_output_gradient(self, gradient: Tensor, /) -> None:
        self.stage.journal.look()
        self.gradient = gradient

    def input_gradient(self) -> Tensor:
        self.stage.journal.look()
        assert self.gradient is not None
        assert not self.pending
        gradient, self.gradient = self.gradient, None
        return gradient

    def forward(self, phase: int) -> None:
        self._start(phase)
        assert self.value is not None
        if phase == 0:
            self.stage.journal.end(self.value)
        activation = self.value.clone()
        self.stage.journal.keep((self.stage.number, self.key), activation)
        self.activations.append(activation)
        self.value = self.value + (self.stage.number + 1) * 10.0**phase
        if phase == len(self.stage.lanes) - 1:
            self.stage.outputs[self.key] = self.value.tolist()
            if self.stage.is_last:
                self.gradient, self.value = self.value, None

    def backward(self, phase: int) -> None:
        self._start(phase)
        assert self.gradient is not None
        if phase == len(self.stage.lanes) - 1:
            self.stage.journal.end(self.gradient)
        self.gradient = self.gradient * 2
        if phase == 0:
            self.stage.gradients[self.key] = self.gradient.tolist()

    def weight(self, phase: int) -> None:
        self.stage.journal.look()
        self.weights.append(phase)
        self.stage.weights[self.key] = self.weights
        if len(self.weights) == self.stage.lanes.count("compute"):
            self.stage.journal.end(*self.activations)

    def wait(self) -> None:
        self.stage.journal.look()
        assert self.pending
        self.pending = False

    def offload(self) -> None:
        self.stage.journal.look()
        assert not self.pending
        self.host = [activation.tolist() for activation in self.activations]

    def release(self) -> None:
        self.stage.journal.look()
        self.stage.journal.end(*self.activations)
        self.activations = []

    def reload(self) -> None:
        self.stage.journal.look()
        assert not self.activations
        for numbers in self.host:
            activation = torch.tensor(numbers, dtype=torch.float64)
            self.stage.journal.keep((self.stage.number, self.key), activation)
            self.activations.append(activation)

    def restore(self) -> None:
        self.stage.journal.look()
        assert [activation.tolist() for activation in self.activations] == self.host
        self.host = []

    def _start(self, phase: int) -> None:
        self.stage.journal.look()
        assert not self.pending
        assert not self.host
        self.pending = self.stage.lanes[phase] == "comm"


class AddingStage:
    """Stage that makes runs and records their results by (direction, micro-batch)."""

    def __init__(self, number: int, num_stages: int, journal: Journal) -> None:
        self.lanes = lanes_of(number, num_stages)
        self.number = number
        self.is_last = number == num_stages - 1
        self.journal = journal
        self.outputs: dict[tuple[int, int], list[float]] = {}
        self.gradients: dict[tuple[int, int], list[float]] = {}
        self.weights: dict[tuple[int, int], list[int]] = {}

    def start(self, direction: int, micro_batch: int) -> AddingRun:
        self.journal.look()
        value = torch.tensor([float(micro_batch), float(direction)], dtype=torch.float64)
        return AddingRun(self, (direction, micro_batch), value)


Queues = dict[object, "queue.Queue[tuple[Message, Tensor]]"]


class QueueTransport:
    """Transport with one queue per link between the threads of a test. It sends copies."""

    def __init__(self, queues: Queues, journal: Journal) -> None:
        self._queues = queues
        self._journal = journal

    def post_receive(self, message: Message, /) -> PendingReceive:
        assert message.source != message.destination
        return Due(message, self._queues[message.link])

    def send(self, message: Message, tensor: Tensor, /) -> None:
        assert message.source != message.destination
        self._queues[message.link].put((message, tensor.clone()))
        self._journal.end(tensor)

    def flush(self) -> None:
        self._journal.look()


class Due:
    """Pending receive of a message from a queue."""

    def __init__(self, message: Message, messages: "queue.Queue[tuple[Message, Tensor]]") -> None:
        self._message = message
        self._messages = messages

    def wait(self) -> Tensor:
        came, tensor = self._messages.get(timeout=20)
        assert came == self._message
        return tensor


@dataclass
class Ran:
    """Results of one rank's thread."""

    stages: dict[int, AddingStage]
    journal: Journal
    execution: Execution


class LaneClock(HostClock):
    """Clock of a lane that, as a device at worst, ends its work only when the host waits for it."""

    def __init__(self) -> None:
        self.num_waits = 0
        self.is_running = False
        self._num_marks = 0
        self._last_waited = 0.0

    def mark(self) -> float:
        self.is_running = True
        self._num_marks += 1
        return float(self._num_marks)

    def wait(self, mark: float) -> None:
        assert mark > self._last_waited, "the host waits for marks in their order"
        self._last_waited = mark
        self.num_waits += 1

    def drain(self) -> None:
        self.is_running = False


def run_threads(schedule: Schedule, pairing: Pairing, clocks: Sequence[HostClock] | None = None) -> list[Ran]:
    """Runs the schedule on adding stages with one thread per rank. Raises the error of a thread."""
    queues: Queues = defaultdict(queue.Queue)
    results: dict[int, Ran] = {}
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        journal = Journal()
        held = {stage for _, stage in schedule.stages_of(rank)}
        stages = {stage: AddingStage(stage, schedule.num_stages, journal) for stage in held}
        try:
            program = lower(schedule, rank, pairing)
            transport = QueueTransport(queues, journal)
            clock = None if clocks is None else clocks[rank]
            results[rank] = Ran(stages, journal, execute(program, stages, transport, clock))
        except BaseException as error:
            errors.append(error)

    _run_all([lambda rank=rank: work(rank) for rank in range(schedule.num_ranks)])  # type: ignore[misc]
    if errors:
        raise errors[0]
    assert len(results) == schedule.num_ranks
    return [results[rank] for rank in range(schedule.num_ranks)]


def _run_all(functions: Sequence[Callable[[], Any]]) -> None:
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
