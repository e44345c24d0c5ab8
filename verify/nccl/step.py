"""Records a step of every pipeline rank on the threads and streams of CUDA.

A step begins after the norm of the step before it, when the host has waited for everything. First the updates of the
weights run, next to the first forwards, and the step ends with its norm and the next updates. Ranks that differ only in
their data, context or expert index launch the same, so one represents all.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from dualpipe.ir import Message, Schedule
from dualpipe.runtime.compile import Pairing, compile_rank
from dualpipe.runtime.program import (
    MOST_AHEAD,
    PHASE_KERNELS,
    Action,
    Lane,
    Program,
    RunKey,
    Step,
    first_use_order,
    reduction_order,
    with_reductions,
)
from verify.nccl.calls import Calls
from verify.nccl.trace import Communicator, Event, Trace

LAUNCH_QUEUE = 1000
"""Kernels that CUDA queues before a launch blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """What decides a step's operations.

    Attributes:
        lanes: lane of each phase of every stage.
        calls: what each method of the dispatcher does; None if it needs no lane.
        num_replicas: ranks at one pipeline index, data x context.
        gathers: whether an update gathers weights, as the optimizer's state is sharded.
        embedding: pipeline indices that hold the embedding if they have a communicator for it, else empty.
        ctas: most SMs of an operation, by kind of communicator.
        created_late: kinds of communicators that their first operation creates.
        loads_at_launch: whether a kernel is loaded at its first launch in the step (`CUDA_MODULE_LOADING=LAZY`).
        copies: 1, or 2 to record two ranks at each pipeline index.
    """

    schedule: Schedule
    pairing: Pairing
    lanes: Mapping[int, Sequence[Lane]]
    calls: Calls | None
    num_replicas: int
    expert: int
    context: int
    gathers: bool
    recomputes: bool
    embedding: tuple[int, ...]
    ctas: Mapping[str, int]
    most_ahead: int = MOST_AHEAD
    launch_queue: int = LAUNCH_QUEUE
    created_late: frozenset[str] = frozenset()
    loads_at_launch: bool = False
    copies: int = 1


@dataclass(frozen=True, slots=True)
class _Unit:
    """Parameters that are reduced and updated together: those of a stage, or the embedding."""

    name: str
    readers: tuple[int, ...]
    communicators: tuple[Communicator, ...]


@dataclass(slots=True)
class _Run:
    """Tensors of a micro-batch in a stage, and what waits for its exchange or copy."""

    value: str = ""
    gradient: str = ""
    kept: list[str] = field(default_factory=list)
    complete: Callable[[], None] = lambda: None
    copied: Event = ()


class StepRecorder:
    """Recorder of one rank's step."""

    def __init__(self, shape: StepShape, rank: int, dropped: int | None = None) -> None:
        self.shape = shape
        self.trace = Trace(rank, shape.launch_queue, dropped, loads_at_launch=shape.loads_at_launch)
        self.copy, self.index = divmod(rank, shape.schedule.num_ranks)
        self.held = sorted({stage for _, stage in shape.schedule.stages_of(self.index)})
        self.units = self.split_units()
        self._runs: dict[RunKey, _Run] = {}
        self._receives: dict[Message, Event] = {}
        self._sends: list[tuple[str, Event]] = []
        self._ahead: deque[Event] = deque()
        self._complete: set[int] = set()
        self._reducing: list[list[Event]] = []
        self._updating: list[tuple[_Unit, list[Event]]] = []
        for name in [f"{kind} of {unit.name}" for unit in self.units for kind in ("weights", "gradients")]:
            self.trace.allocate(name, "compute")

    def record(self) -> Trace:
        """Records the whole step, and the first forward of the next one."""
        # If communicators or kernels are missing, this is the first step of a run, and no update precedes it.
        if not self.shape.created_late and not self.shape.loads_at_launch:
            self.update()
        self.sum_over_world("sum of router loads")
        self.sum_over_world("metrics of the step")
        for step in self.program().steps:
            self.perform(step)
        for tensor, sent in self._sends:
            self.trace.wait("compute", sent)
            self.trace.free("main", [tensor])
        self.trace.synchronize("main", self.trace.event("compute"))
        self.sum_over_world("sum of losses")
        self.norm()
        self.update()
        for _, done in self._updating:
            self.trace.finish(done)
        weights = [f"weights of {unit.name}" for unit in self.units]
        self.trace.launch("main", "compute", "forward of the next step", reads=weights)
        return self.trace

    def program(self) -> Program:
        """Returns the program of the passes."""
        lanes = {stage: self.shape.lanes[stage] for stage in self.held}
        return with_reductions(compile_rank(self.shape.schedule, self.index, lanes, self.shape.pairing))

    def communicator(self, kind: str, indices: Sequence[int], name: str = "", *, spans: bool = True) -> Communicator:
        """Returns the communicator of the ranks at some pipeline indices, of all copies if it `spans` them."""
        shape = self.shape
        copies = range(shape.copies) if spans else (self.copy,)
        return Communicator(
            name or f"{kind} of pipeline ranks {', '.join(map(str, indices))}",
            tuple(copy * shape.schedule.num_ranks + index for copy in copies for index in indices),
            shape.ctas[kind],
            spans_copies=spans and shape.copies < shape.num_replicas,
            is_open=kind not in shape.created_late,
        )

    def link(self, message: Message) -> Communicator:
        """Returns the communicator of a message: one for each direction and kind between two ranks."""
        name = f"{message.kind} {message.source}->{message.destination}" + f" of copy {self.copy}" * (self.copy > 0)
        return self.communicator("link", (message.source, message.destination), name, spans=False)

    def replicas(self, kind: str, stage: int) -> tuple[Communicator, ...]:
        """Returns the communicator of the ranks with the same parameters of a stage if there are several."""
        indices = sorted({row[stage] for row in self.shape.schedule.placement})
        shared = self.shape.num_replicas // (self.shape.expert if kind == "expert_data" else 1)
        return (self.communicator(kind, indices, spans=shared > 1),) if len(indices) * shared > 1 else ()

    def split_units(self) -> list[_Unit]:
        """Returns the rank's units in the order of their reductions, which is equal on all ranks."""
        units = [
            _Unit(f"stage {stage}", (stage,), self.replicas("stage", stage) + self.replicas("expert_data", stage))
            for stage in self.held
        ]
        if self.index in self.shape.embedding:
            ends = (0, self.shape.schedule.num_stages - 1)
            units.append(_Unit("embedding", ends, (self.communicator("embedding", self.shape.embedding),)))
        order = reduction_order(self.shape.schedule)
        return sorted(units, key=lambda unit: (max(map(order.index, unit.readers)), len(unit.readers)))

    def update(self) -> None:
        """Starts the updates, in the order of the stages' first use."""
        order = first_use_order(self.shape.schedule)
        for unit in sorted(self.units, key=lambda unit: (min(map(order.index, unit.readers)), len(unit.readers))):
            weights = f"weights of {unit.name}"
            gradients = f"gradients of {unit.name}"
            with self.trace.job("reduction") as done:
                self._reduce("update", unit, [gradients], [weights])
                for communicator in unit.communicators if self.shape.gathers else ():
                    self.collective("reduction", communicator, f"gather of weights of {unit.name}", [], [weights])
                self._reduce("clearing", unit, [], [gradients])
            self._updating.append((unit, done))

    def reduce(self, stage: int) -> None:
        """Starts the sums of all units that are complete, in the order of the units."""
        self._complete.add(stage)
        while len(self._reducing) < len(self.units):
            if not self._complete.issuperset(set(self.held).intersection(self.units[len(self._reducing)].readers)):
                return
            self._start_sum()

    def _start_sum(self) -> None:
        unit = self.units[len(self._reducing)]
        gradients = f"gradients of {unit.name}"
        with self.trace.job("reduction") as done:
            self._reduce("local norm", unit, [gradients], [])
            for communicator in unit.communicators:
                self.collective("reduction", communicator, f"sum of gradients of {unit.name}", [], [gradients])
            self._reduce("squares", unit, [gradients], [f"squares of {unit.name}"])
        self._reducing.append(done)

    def _reduce(self, name: str, unit: _Unit, reads: Sequence[str], writes: Sequence[str]) -> None:
        self.trace.launch("reduction", "reduction", f"{name} of {unit.name}", reads=reads, writes=writes)

    def norm(self) -> None:
        """Completes all sums, and waits for the global norm."""
        while len(self._reducing) < len(self.units):
            self._start_sum()
        for done in self._reducing:
            self.trace.finish(done)
        squares = [f"squares of {unit.name}" for unit in self.units]
        self.sum_over_world("sum of squares", squares)
        self.trace.free("main", squares)
        self._reducing = []

    def sum_over_world(self, name: str, reads: Sequence[str] = ()) -> None:
        """Sums numbers over all ranks, and waits for them on the host."""
        indices = range(self.shape.schedule.num_ranks)
        self.trace.launch("main", "compute", f"numbers of {name}", reads=reads, writes=[name])
        if len(indices) * self.shape.num_replicas > 1:
            self.collective("main", self.communicator("world", indices, "world"), name, [], [name])
        self.trace.launch("main", "compute", f"copy of {name}", reads=[name])
        self.trace.synchronize("main", self.trace.event("compute"))

    def collective(
        self, thread: str, communicator: Communicator, name: str, reads: Sequence[str], writes: Sequence[str]
    ) -> None:
        """Runs a collective for which the thread's stream waits."""
        stream = "compute" if thread == "main" else thread
        self.trace.wait(stream, self.trace.start_collective(thread, stream, communicator, name, reads, writes))

    def perform(self, step: Step) -> None:
        """Records a step of the program as the interpreter runs it."""
        match step.action:
            case Action.RECEIVE | Action.ACCEPT | Action.SEND:
                assert step.message is not None
                self._transfer(step, step.message)
            case Action.FORWARD | Action.BACKWARD | Action.WEIGHT:
                is_exchange = self.shape.lanes[step.run.stage][step.phase] == "comm" and self.shape.calls is not None
                (self._exchange if is_exchange else self._compute)(step, self._run(step.run))
                self._ahead.append(self.trace.event("compute"))
                if len(self._ahead) > self.shape.most_ahead:
                    self.trace.synchronize("main", self._ahead.popleft())
            case Action.WAIT:
                self._run(step.run).complete()
            case Action.OFFLOAD | Action.RELEASE | Action.RELOAD | Action.RESTORE:
                self._copy(step, self._run(step.run))
            case Action.FINISH:
                self.trace.free("main", self._runs.pop(step.run).kept)
            case Action.REDUCE:
                self.reduce(step.run.stage)

    def _run(self, key: RunKey) -> _Run:
        """Returns a run. Its first use waits until the weights of its stage are updated."""
        if key not in self._runs:
            self._runs[key] = _Run()
            while any(key.stage in unit.readers for unit, _ in self._updating):
                self.trace.finish(self._updating.pop(0)[1])
        return self._runs[key]

    def _transfer(self, step: Step, message: Message) -> None:
        trace = self.trace
        tensor = f"tensor of {message}"
        is_local = message.source == message.destination
        if step.action is Action.RECEIVE:
            link = self.link(message)
            self._receives[message] = trace.start_collective("main", "compute", link, str(message), [], [tensor])
            return
        run = self._run(step.run)
        name = "gradient" if message.kind == "gradient" else "value"
        if step.action is Action.ACCEPT:
            trace.wait("compute", self._receives.pop(message, ()))
            run.kept.append(tensor)
            setattr(run, name, tensor)
        elif is_local:
            trace.launch("main", "compute", f"use of {message}", reads=[getattr(run, name)], writes=[tensor])
        else:
            sent = getattr(run, name)
            run.kept.remove(sent)
            link = self.link(message)
            self._sends.append((sent, trace.start_collective("main", "compute", link, str(message), [sent], [])))

    def _compute(self, step: Step, run: _Run) -> None:
        name = f"{step.action.value} of {_text(step)}"
        lanes = self.shape.lanes[step.run.stage]
        if lanes[step.phase] == "comm":
            self.trace.synchronize("main", self.trace.event("compute"))  # the counts of a local plan
        weights, gradients = (
            [f"{kind} of {unit.name}" for unit in self.units if step.run.stage in unit.readers]
            for kind in ("weights", "gradients")
        )
        launch = partial(self.trace.launch, "main", "compute", name, kernels=PHASE_KERNELS)
        if step.action is Action.WEIGHT:
            launch(reads=run.kept, writes=gradients)
            return
        is_forward = step.action is Action.FORWARD
        launch(reads=[*weights, *(filter(None, [run.value]) if is_forward else run.kept)], writes=[name])
        # Attention, before a dispatch or in a dense layer, needs the tokens of the other context ranks.
        if self.shape.context > 1 and (step.phase == 0 or lanes[step.phase - 1] != "comm"):
            context = self.communicator("context", (self.index,))
            self.collective("main", context, f"context of {name}", [name], [f"context of {name}"])
            self.trace.launch("main", "compute", f"attention of {name}", reads=[f"context of {name}"], writes=[name])
            self.trace.free("main", [f"context of {name}"])
        setattr(run, "value" if is_forward else "gradient", name)
        run.kept.append(name)

    def _exchange(self, step: Step, run: _Run) -> None:
        """Starts the exchange of a phase on the lane. The exchanges of a stage dispatch and combine in turn."""
        is_dispatch = self.shape.lanes[step.run.stage][: step.phase].count("comm") % 2 == 0
        is_forward = step.action is Action.FORWARD
        name = "value" if is_forward else "gradient"
        sent = getattr(run, name)
        if is_forward and is_dispatch:
            self._job("plan", step, sent)
        method = ("dispatch" if is_dispatch else "combine") + "_backward" * (not is_forward)
        jobs = [self._job(method, step, sent)]
        if self.shape.recomputes and method == "combine_backward":
            jobs.append(self._job("dispatch_again", step, run.kept[0]))

        def complete() -> None:
            for done, result in jobs:
                self.trace.finish(done)
                self.trace.record_stream(result, "compute")
                run.kept.append(result)
            # A dispatch keeps its rows for the shared experts. The lane's function alone held other rows.
            if method != "dispatch" and sent in run.kept:
                run.kept.remove(sent)
                self.trace.free("main", [sent])
            setattr(run, name, jobs[0][1])

        run.complete = complete

    def lane(self, step: Step) -> str:
        """Returns the lane of an exchange."""
        return "comm"

    def _job(self, method: str, step: Step, sent: str) -> tuple[list[Event], str]:
        """Submits a method of the dispatcher to the lane; returns when it has run, and its result."""
        trace = self.trace
        lane = self.lane(step)
        name = f"{method} of {_text(step)}"
        result = f"result of {name}"
        tensors = [f"rows of {name}"]
        started: dict[str, Event] = {}
        assert self.shape.calls is not None
        with trace.job(lane) as done:
            trace.launch(lane, lane, f"packing for {name}", reads=[sent], writes=tensors)
            for call in self.shape.calls[method]:
                rows = f"{call.name}: {_text(step)}"
                match call.action:
                    case "start" if call.on_lane:
                        group = self.communicator(call.group, (self.index,))
                        started[rows] = (trace.launch(lane, lane, rows, group, reads=tensors, writes=[rows]).end,)
                    case "start":
                        group = self.communicator(call.group, (self.index,))
                        started[rows] = trace.start_collective(lane, lane, group, rows, tensors, [rows])
                    case "wait":
                        trace.wait(lane, started[rows])
                        # A method may run a collective twice: its second result is read in place of the first.
                        tensors = list(dict.fromkeys([*tensors, rows]))
                    case "read" | "hold":
                        trace.synchronize(lane, trace.event(lane), holds_gil=call.action == "hold")
            trace.launch(lane, lane, f"unpacking of {name}", reads=tensors, writes=[result])
            trace.free(lane, tensors)
            if method == "plan":
                trace.free(lane, [result])
        return done, result

    def _copy(self, step: Step, run: _Run) -> None:
        trace = self.trace
        if step.action in (Action.RELEASE, Action.RESTORE):
            trace.wait("compute", run.copied)
            if step.action is Action.RELEASE:
                trace.free("main", run.kept)
            return
        is_out = step.action is Action.OFFLOAD
        for tensor in () if is_out else run.kept:
            trace.allocate(tensor, "compute")
        stream = "to-host" if is_out else "from-host"
        trace.wait(stream, trace.event("compute"))
        reads, writes = (run.kept, []) if is_out else ([], run.kept)
        name = f"{step.action.value} of {_text(step)}"
        run.copied = (trace.launch("main", stream, name, reads=reads, writes=writes).end,)


def record_step(shape: StepShape, recorder: Callable[[StepShape, int], StepRecorder] = StepRecorder) -> list[Trace]:
    """Records the step of every rank."""
    return [recorder(shape, rank).record() for rank in range(shape.schedule.num_ranks * shape.copies)]


def _text(step: Step) -> str:
    run = step.run
    phase = f", phase {step.phase}" if step.phase >= 0 else ""
    return f"stage {run.stage}, direction {run.direction}, micro-batch {run.micro_batch}{phase}"
