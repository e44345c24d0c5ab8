"""Records a step of every pipeline rank: updates, passes, reductions and norm, on the threads and streams of CUDA.

A step begins after the norm of the step before it, when the host has waited for everything: first the updates of the
weights run, next to the first forwards, and it ends with the norm and the next updates. Ranks that differ only in their
data, context or expert index launch the same, so one of them represents all.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from comm.dispatch.registry import Call
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
from train.streams.trace import Communicator, Event, Trace

LAUNCH_QUEUE = 1000
"""Kernels that CUDA queues before a launch blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """What decides a step's operations.

    Attributes:
        lanes: lane of each phase, of every stage.
        calls: what each method of the dispatcher does on its lane, or on the main thread if `dispatch_is_local`.
        num_replicas: ranks at one pipeline index, data x context.
        gathers: whether an update gathers weights, as the optimizer's state is sharded.
        embedding: pipeline indices that hold the embedding, if they have a communicator of their own for it.
        ctas: SMs of an operation, by kind of communicator.
        created_late: kinds of communicators that their first operation creates.
        copies: 1, or 2 to record two ranks at each pipeline index.
    """

    schedule: Schedule
    pairing: Pairing
    lanes: Mapping[int, Sequence[Lane]]
    calls: Mapping[str, Sequence[Call]]
    dispatch_is_local: bool
    num_replicas: int
    expert: int
    context: int
    gathers: bool
    recomputes: bool
    embedding: tuple[int, ...]
    ctas: Mapping[str, int]
    most_ahead: int | None = MOST_AHEAD
    launch_queue: int = LAUNCH_QUEUE
    created_late: frozenset[str] = frozenset()
    copies: int = 1


def record_step(shape: StepShape, recorder: "type[StepRecorder] | None" = None) -> list[Trace]:
    """Records the step of every rank."""
    ranks = range(shape.schedule.num_ranks * shape.copies)
    return [(recorder or StepRecorder)(shape, rank).record() for rank in ranks]


@dataclass(frozen=True, slots=True)
class _Unit:
    """Parameters that are reduced and updated together, those of one stage or the embedding."""

    name: str
    readers: tuple[int, ...]
    dense: Communicator | None
    experts: Communicator | None
    reduction: tuple[int, int]
    first_use: tuple[int, int]


@dataclass(slots=True)
class _Run:
    """Tensors of a micro-batch in a stage."""

    value: str = ""
    gradient: str = ""
    kept: list[str] = field(default_factory=list)
    outputs: dict[int, str] = field(default_factory=dict)  # gradient of each phase's output, for its weights
    complete: Callable[[], None] | None = None
    copied: Event | None = None


class StepRecorder:
    """Recorder of one rank's step."""

    def __init__(self, shape: StepShape, rank: int, dropped: int | None = None) -> None:
        self.shape = shape
        self.index = rank % shape.schedule.num_ranks
        self.trace = Trace(rank, shape.launch_queue, dropped)
        self._first = rank - self.index  # rank of the first pipeline index in this copy
        self._runs: dict[RunKey, _Run] = {}
        self._receives: dict[Message, Event] = {}
        self._sends: list[tuple[str, Event]] = []
        self._ahead: deque[Event] = deque()
        self._units = self._split_units()
        self._complete: set[int] = set()
        self._reducing: list[list[Event]] = []
        self._updating: list[tuple[_Unit, list[Event]]] = []
        for unit in self._units:
            for kind in ("weights", "gradients"):
                self.trace.allocate(f"{kind} of {unit.name}", "compute")

    def record(self) -> Trace:
        """Records the whole step."""
        # The step that creates communicators is the first one, before which there is no update.
        if not self.shape.created_late:
            self.update()
        self.reduce_over_world("sum of router loads")
        self.reduce_over_world("metrics of the step")
        for step in self.program().steps:
            self.perform(step)
        self._flush()
        self.reduce_over_world("sum of losses")
        self.norm()
        self.update()
        return self.trace

    def program(self) -> Program:
        """Returns the program of the passes."""
        shape = self.shape
        held = {stage: shape.lanes[stage] for _, stage in shape.schedule.stages_of(self.index)}
        return with_reductions(compile_rank(shape.schedule, self.index, held, shape.pairing))

    def communicator(self, kind: str, indices: Sequence[int], *, spans: bool = True, name: str = "") -> Communicator:
        """Returns the communicator of the ranks at some pipeline indices, of all copies if it `spans` them."""
        shape = self.shape
        num_ranks = shape.schedule.num_ranks
        firsts = range(0, shape.copies * num_ranks, num_ranks) if spans else (self._first,)
        return Communicator(
            name=name or f"{kind} of pipeline ranks {', '.join(map(str, indices))}",
            members=tuple(first + index for first in firsts for index in indices),
            ctas=shape.ctas[kind],
            spans_copies=spans and shape.copies < shape.num_replicas,
            is_open=kind not in shape.created_late,
        )

    def link(self, message: Message) -> Communicator:
        """Returns the communicator of a message: one for each direction and kind between two ranks."""
        name = f"{message.kind} {message.source}->{message.destination}"
        if self.shape.copies > 1:
            name += f" of copy {self._first // self.shape.schedule.num_ranks}"
        return self.communicator("link", (message.source, message.destination), spans=False, name=name)

    def replicas(self, kind: str, stage: int) -> Communicator | None:
        """Returns the communicator of the ranks with the same parameters of a stage, or None if it is one rank."""
        indices = sorted({row[stage] for row in self.shape.schedule.placement})
        shared = self.shape.num_replicas // (self.shape.expert if kind == "expert_data" else 1)
        return self.communicator(kind, indices, spans=shared > 1) if len(indices) * shared > 1 else None

    def _split_units(self) -> list[_Unit]:
        schedule = self.shape.schedule
        ends = (0, schedule.num_stages - 1)
        held = {stage for _, stage in schedule.stages_of(self.index)}
        parts = {(stage,): f"stage {stage}" for stage in sorted(held)}
        if self.index in self.shape.embedding:
            parts[ends] = "embedding"
        reduction = reduction_order(schedule)
        first_use = first_use_order(schedule)
        units = []
        for readers, name in parts.items():
            is_stage = len(readers) == 1
            units.append(
                _Unit(
                    name,
                    readers,
                    self.replicas("stage", readers[0])
                    if is_stage
                    else self.communicator("embedding", self.shape.embedding),
                    self.replicas("expert_data", readers[0]) if is_stage else None,
                    (max(map(reduction.index, readers)), len(readers)),
                    (min(map(first_use.index, readers)), len(readers)),
                )
            )
        return sorted(units, key=lambda unit: unit.reduction)

    def _of_stage(self, kind: str, stage: int) -> list[str]:
        return [f"{kind} of {unit.name}" for unit in self._units if stage in unit.readers]

    # The optimizer

    def update(self) -> None:
        """Starts the updates, in the order of the stages' first use."""
        for unit in sorted(self._units, key=lambda unit: unit.first_use):
            gradients = f"gradients of {unit.name}"
            weights = f"weights of {unit.name}"
            with self.trace.job("reduction") as done:
                self._reduction(f"update of {unit.name}", reads=[gradients], writes=[weights])
                if self.shape.gathers:
                    self._reduce_unit(unit, "gather of weights", weights)
                self._reduction(f"clearing of {unit.name}", reads=[], writes=[gradients])
            self._updating.append((unit, done))

    def reduce(self, stage: int) -> None:
        """Starts the sums of all units that are complete, in the order of the units."""
        self._complete.add(stage)
        held = {stage for _, stage in self.shape.schedule.stages_of(self.index)}
        while len(self._reducing) < len(self._units):
            if not self._complete.issuperset(held.intersection(self._units[len(self._reducing)].readers)):
                return
            self._start_sum()

    def _start_sum(self) -> None:
        unit = self._units[len(self._reducing)]
        gradients = f"gradients of {unit.name}"
        with self.trace.job("reduction") as done:
            self._reduction(f"local norm of {unit.name}", reads=[gradients], writes=[])
            self._reduce_unit(unit, "sum of gradients", gradients)
            self._reduction(f"squares of {unit.name}", reads=[gradients], writes=[f"squares of {unit.name}"])
        self._reducing.append(done)

    def _reduction(self, name: str, reads: Sequence[str], writes: Sequence[str]) -> None:
        self.trace.launch("reduction", "reduction", name, reads=reads, writes=writes)

    def _reduce_unit(self, unit: _Unit, name: str, tensor: str) -> None:
        for communicator in (unit.dense, unit.experts):
            if communicator is not None:
                self.collective("reduction", "reduction", communicator, f"{name} of {unit.name}", [], [tensor])

    def norm(self) -> None:
        """Completes all sums, and waits for the global norm."""
        while len(self._reducing) < len(self._units):
            self._start_sum()
        for done in self._reducing:
            self.trace.finish(done)
        squares = [f"squares of {unit.name}" for unit in self._units]
        self.trace.launch("main", "compute", "norm", reads=squares, writes=["norm"])
        self.reduce_over_world("sum of squares", tensor="norm")
        self.trace.free("main", squares)
        self._reducing = []

    def reduce_over_world(self, name: str, tensor: str = "numbers") -> None:
        """Sums numbers over all ranks, and waits for them on the host."""
        schedule = self.shape.schedule
        if schedule.num_ranks * self.shape.num_replicas == 1:
            return
        world = self.communicator("world", range(schedule.num_ranks), name="world")
        self.trace.launch("main", "compute", f"numbers for {name}", reads=[], writes=[tensor])
        self.collective("main", "compute", world, name, [], [tensor])
        self.trace.launch("main", "compute", f"copy of {name}", reads=[tensor], writes=[])
        self.trace.synchronize("main", self.trace.event("compute"))

    def collective(
        self,
        thread: str,
        stream: str,
        communicator: Communicator,
        name: str,
        reads: Sequence[str],
        writes: Sequence[str],
    ) -> None:
        """Runs a collective for which the current stream waits."""
        operation = self.trace.start_collective(thread, stream, communicator, name, reads, writes)
        self.trace.wait(stream, Event((operation.end,)))

    # The passes

    def perform(self, step: Step) -> None:
        """Records a step of the program as the interpreter runs it."""
        run = step.run
        match step.action:
            case Action.RECEIVE:
                self._post(step)
            case Action.ACCEPT:
                self._accept(step)
            case Action.SEND:
                self._send(step)
            case Action.FORWARD | Action.BACKWARD | Action.WEIGHT:
                self._phase(step)
            case Action.WAIT:
                complete = self._run(run).complete
                assert complete is not None
                complete()
            case Action.OFFLOAD | Action.RELEASE | Action.RELOAD | Action.RESTORE:
                self._copy(step)
            case Action.FINISH:
                self.trace.free("main", self._runs.pop(run).kept)
            case Action.REDUCE:
                self.reduce(run.stage)

    def _run(self, key: RunKey) -> _Run:
        """Returns a run. Its first use waits until the weights of its stage are updated."""
        if key not in self._runs:
            self._runs[key] = _Run()
            while any(key.stage in unit.readers for unit, _ in self._updating):
                self.trace.finish(self._updating.pop(0)[1])
        return self._runs[key]

    def _post(self, step: Step) -> None:
        message = step.message
        assert message is not None
        tensor = f"received {message}"
        self.trace.allocate(tensor, "compute")
        operation = self.trace.start_collective("main", "compute", self.link(message), str(message), [], [tensor])
        self._receives[message] = Event((operation.end,))

    def _accept(self, step: Step) -> None:
        message = step.message
        assert message is not None
        run = self._run(step.run)
        if message.source == message.destination:
            tensor = f"kept {message}"
        else:
            tensor = f"received {message}"
            self.trace.wait("compute", self._receives.pop(message))
        run.kept.append(tensor)
        if message.kind == "gradient":
            run.gradient = tensor
        else:
            run.value = tensor

    def _send(self, step: Step) -> None:
        message = step.message
        assert message is not None
        run = self._run(step.run)
        tensor = run.gradient if message.kind == "gradient" else run.value
        if message.source == message.destination:
            # Both ends are on this rank: the tensor itself.
            self.trace.launch("main", "compute", f"keep {message}", reads=[tensor], writes=[f"kept {message}"])
            return
        run.kept.remove(tensor)
        operation = self.trace.start_collective("main", "compute", self.link(message), str(message), [tensor], [])
        self._sends.append((tensor, Event((operation.end,))))

    def _flush(self) -> None:
        for tensor, sent in self._sends:
            self.trace.wait("compute", sent)
            self.trace.free("main", [tensor])
        self.trace.synchronize("main", self.trace.event("compute"))

    def _phase(self, step: Step) -> None:
        is_comm = self.shape.lanes[step.run.stage][step.phase] == "comm"
        if is_comm and not self.shape.dispatch_is_local:
            self._exchange(step)
        else:
            self._compute(step, f"{step.action.value} of {_text(step.run)}, phase {step.phase}")
            if is_comm:
                self._run(step.run).complete = lambda: None
        if self.shape.most_ahead is not None:
            self._ahead.append(self.trace.event("compute"))
            if len(self._ahead) > self.shape.most_ahead:
                self.trace.synchronize("main", self._ahead.popleft())

    def _compute(self, step: Step, name: str) -> None:
        run = self._run(step.run)
        weights = self._of_stage("weights", step.run.stage)
        lanes = self.shape.lanes[step.run.stage]
        if lanes[step.phase] == "comm":
            self.trace.synchronize("main", self.trace.event("compute"))  # counts of a local plan
        result = f"result of {name}"
        launch = partial(self.trace.launch, "main", "compute", kernels=PHASE_KERNELS)
        match step.action:
            case Action.FORWARD:
                launch(name, reads=[*weights, *([run.value] if run.value else [])], writes=[result])
                run.value = result
                run.kept.append(result)
            case Action.BACKWARD:
                run.outputs[step.phase] = run.gradient
                gradient = [run.gradient] if run.gradient else []
                launch(name, reads=[*weights, *gradient, *run.kept], writes=[result])
                run.gradient = result
                run.kept.append(result)
            case Action.WEIGHT:
                output = run.outputs.pop(step.phase, "")
                reads = [*run.kept, *([output] if output in run.kept else [])]
                launch(name, reads=reads, writes=self._of_stage("gradients", step.run.stage))
                return
        # Attention, before a dispatch or in a dense block, needs the tokens of the other context ranks.
        if self.shape.context > 1 and lanes[step.phase - 1 : step.phase] != ("comm",):
            self._context(step, run, name)

    def _context(self, step: Step, run: _Run, name: str) -> None:
        context = self.communicator("context", (self.index,))
        tensor = run.value if step.action is Action.FORWARD else run.gradient
        self.collective("main", "compute", context, f"context of {name}", [tensor], [f"context of {name}"])
        self.trace.launch("main", "compute", f"attention of {name}", reads=[f"context of {name}"], writes=[tensor])
        self.trace.free("main", [f"context of {name}"])

    def _exchange(self, step: Step) -> None:
        """Starts the exchange of a phase on the lane. Phases on it dispatch and combine in turn."""
        run = self._run(step.run)
        before = self.shape.lanes[step.run.stage][: step.phase]
        is_dispatch = before.count("comm") % 2 == 0
        jobs = []
        match step.action, is_dispatch:
            case Action.FORWARD, True:
                self._job("plan", step, run.value)
                jobs = [self._job("dispatch", step, run.value)]
            case Action.FORWARD, False:
                jobs = [self._job("combine", step, run.value)]
            case Action.BACKWARD, True:
                jobs = [self._job("dispatch_backward", step, run.gradient)]
            case _:
                jobs = [self._job("combine_backward", step, run.gradient)]
                if self.shape.recomputes:
                    attended = run.kept[0]
                    jobs.append(self._job("dispatch_again", step, attended))
        run.complete = partial(self._complete_exchange, run, step, jobs, is_dispatch=is_dispatch)

    def _complete_exchange(
        self, run: _Run, step: Step, jobs: Sequence[tuple[list[Event], str]], *, is_dispatch: bool
    ) -> None:
        for done, result in jobs:
            self.trace.finish(done)
            self.trace.record_stream(result, "compute")
            run.kept.append(result)
        is_forward = step.action is Action.FORWARD
        sent = run.value if is_forward else run.gradient
        # A dispatch keeps its rows for the shared experts. Other rows were held by the lane's function alone.
        if not (is_forward and is_dispatch) and sent in run.kept:
            run.kept.remove(sent)
            self.trace.free("main", [sent])
        if is_forward:
            run.value = jobs[0][1]
        else:
            run.gradient = jobs[0][1]

    def _job(self, method: str, step: Step, sent: str) -> tuple[list[Event], str]:
        """Submits a method of the dispatcher to the lane, and returns when it ends and its result."""
        trace = self.trace
        name = f"{method} of {_text(step.run)}, phase {step.phase}"
        result = f"result of {name}"
        started: dict[str, Event] = {}
        arrived: list[str] = []
        packed = f"rows of {name}"
        with trace.job(lane := self.lane(step)) as done:
            trace.launch(lane, lane, f"packing for {name}", reads=[sent], writes=[packed])
            for call in self.shape.calls[method]:
                match call.action:
                    case "start":
                        rows = f"{call.name} of {name}"
                        end = self.start(lane, call, rows, [packed, *arrived])
                        started[call.name] = Event((end,))
                    case "wait":
                        trace.wait(lane, started[call.name])
                        arrived.append(f"{call.name} of {name}")
                    case "read":
                        trace.synchronize(lane, trace.event(lane))
                    case "hold":
                        trace.synchronize(lane, trace.event(lane), holds_gil=True)
            trace.launch(lane, lane, f"unpacking of {name}", reads=[packed, *arrived], writes=[result])
            trace.free(lane, [packed, *arrived])
            if method == "plan":
                trace.free(lane, [result])
        return done, result

    def lane(self, step: Step) -> str:
        """Returns the lane of exchanges."""
        return "comm"

    def start(self, lane: str, call: Call, rows: str, reads: Sequence[str]) -> int:
        """Starts a collective of the dispatcher, and returns its end."""
        group = self.communicator(call.group, (self.index,))
        if call.on_lane:
            return self.trace.launch(lane, lane, rows, group, reads=reads, writes=[rows]).end
        return self.trace.start_collective(lane, lane, group, rows, reads, [rows]).end

    def _copy(self, step: Step) -> None:
        run = self._run(step.run)
        trace = self.trace
        match step.action:
            case Action.OFFLOAD:
                trace.wait("to-host", trace.event("compute"))
                copied = trace.launch("main", "to-host", f"copy of {_text(step.run)} to the host", reads=run.kept)
                run.copied = Event((copied.end,))
            case Action.RELEASE:
                assert run.copied is not None
                trace.wait("compute", run.copied)
                trace.free("main", run.kept)
            case Action.RELOAD:
                for tensor in run.kept:
                    trace.allocate(tensor, "compute")
                trace.wait("from-host", trace.event("compute"))
                name = f"copy of {_text(step.run)} to the device"
                run.copied = Event((trace.launch("main", "from-host", name, writes=run.kept).end,))
            case _:
                assert run.copied is not None
                trace.wait("compute", run.copied)


def _text(run: RunKey) -> str:
    return f"stage {run.stage}, direction {run.direction}, micro-batch {run.micro_batch}"
