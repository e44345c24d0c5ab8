"""Follows a rank's program and counts the bytes that are alive after and inside each of its steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from dualpipe.runtime.program import Action, Program, RunKey, Step
from dualpipe.transfers import Link
from model.account.sizes import PhaseBytes
from train.memory.account import PipelineBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveBytes:
    """The bytes that are alive after a step, and at the peak inside it."""

    after: PipelineBytes
    peak: PipelineBytes


@dataclass(slots=True)
class _Run:
    """One micro-batch in one stage.

    Attributes:
        phases: sizes of the stage's phases.
        held: bytes of values or gradients between its phases.
        routing: bytes of index tensors.
        pending: step of the exchange that is running, if any.
        inside: bytes that this exchange takes while it runs.
    """

    phases: Sequence[PhaseBytes]
    held: int = 0
    routing: int = 0
    pending: Step | None = None
    inside: int = 0

    @property
    def kept(self) -> int:
        """The bytes that are kept from F to I."""
        return sum(phase.kept for phase in self.phases)


@dataclass(slots=True)
class _Rank:
    """The bytes of all micro-batches on a rank, and of its messages, with the peak of what was observed.

    `sent` holds the last message of each link, which is sent while the rank continues; `sending` is their sum.
    """

    activations: int = 0
    waiting: int = 0
    routing: int = 0
    held: int = 0
    exchanging: int = 0
    receiving: int = 0
    sending: int = 0
    sent: dict[Link, int] = field(default_factory=dict)
    peak: PipelineBytes = field(default_factory=PipelineBytes)
    most: int = -1

    def alive(self, inside: int) -> PipelineBytes:
        return PipelineBytes(
            activations=self.activations,
            pending=self.waiting,
            exchange=self.routing,
            transfers=self.held + self.receiving + self.sending,
            inside=inside + self.exchanging,
        )

    def observe(self, inside: int = 0) -> None:
        """Counts the bytes that are alive, with those inside a step, towards the peak."""
        kept = self.activations + self.waiting + self.routing + self.held
        total = kept + self.receiving + self.sending + self.exchanging + inside
        # Most steps are no peak, and an object for each of them would take most of a prediction's time.
        if total > self.most:
            self.most, self.peak = total, self.alive(inside)

    def forget_peak(self) -> None:
        """Starts a peak with what is alive now."""
        self.most = -1
        self.observe()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSizes:
    """Sizes of the runs of one rank for each slice of a sequence; micro-batch m is slice m % slices.

    Attributes:
        stages: sizes of the phases of each stage on the rank, by slice.
        messages: bytes of a hidden state or its gradient between two stages, by slice.
    """

    stages: Sequence[Mapping[int, Sequence[PhaseBytes]]]
    messages: Sequence[int]

    def phases(self, run: RunKey) -> Sequence[PhaseBytes]:
        """Returns the sizes of a run's phases."""
        return self.stages[run.micro_batch % len(self.stages)][run.stage]

    def message(self, step: Step) -> int:
        """Returns the bytes of a step's message."""
        return self.messages[step.run.micro_batch % len(self.messages)]


def find_peaks(program: Program, sizes: RunSizes, *, keeps_sent: bool) -> tuple[PipelineBytes, PipelineBytes]:
    """Returns the peak of a program, and the peak from its first reduction on.

    Args:
        keeps_sent: whether a message stays on the device until the next one is sent over the same link.
    """
    before, most, is_reducing, rank = PipelineBytes(), 0, False, _Rank()
    for step in _follow(program, sizes, rank, keeps_sent=keeps_sent):
        if step.action is Action.REDUCE and not is_reducing:
            is_reducing, before, most = True, rank.peak, rank.most
            rank.forget_peak()
    if not is_reducing:
        return rank.peak, PipelineBytes()
    return before if most >= rank.most else rank.peak, rank.peak


def iterate_live_bytes(program: Program, sizes: RunSizes, *, keeps_sent: bool) -> Iterator[LiveBytes]:
    """Yields the bytes that are alive after and inside each step of a program.

    Args:
        keeps_sent: whether a message stays on the device until the next one is sent over the same link.
    """
    rank = _Rank()
    for _ in _follow(program, sizes, rank, keeps_sent=keeps_sent):
        yield LiveBytes(after=rank.alive(0), peak=rank.peak)
        rank.most = -1


def _follow(program: Program, sizes: RunSizes, rank: _Rank, *, keeps_sent: bool) -> Iterator[Step]:
    """Applies the steps of a program to a rank, and yields each of them when it is done."""
    runs = dict[RunKey, _Run]()
    for step in program.steps:
        if step.run not in runs and step.action not in (Action.RECEIVE, Action.REDUCE):
            runs[step.run] = _Run(sizes.phases(step.run))
        _perform(step, rank, runs, sizes.message(step), keeps_sent=keeps_sent)
        # The peak inside a step is counted on top of what was alive before it. It may be below what is alive after it.
        rank.observe()
        yield step


def _perform(step: Step, rank: _Rank, runs: dict[RunKey, _Run], message_bytes: int, *, keeps_sent: bool) -> None:
    """Applies a step, and observes the bytes that are alive inside it, if it is a phase."""
    match step.action:
        case Action.RECEIVE:
            rank.receiving += message_bytes
        case Action.ACCEPT:
            _accept(step, rank, runs[step.run], message_bytes)
        case Action.SEND:
            _send(step, rank, runs[step.run], message_bytes, keeps_sent=keeps_sent)
        case Action.FORWARD | Action.BACKWARD:
            _pass(step, rank, runs[step.run])
        case Action.WAIT:
            run = runs[step.run]
            assert run.pending is not None
            rank.exchanging -= run.inside
            _settle(run.pending, rank, run)
            run.pending = None
        case Action.WEIGHT:
            phase = runs[step.run].phases[step.phase]
            rank.observe(phase.weight_peak)
            rank.waiting -= phase.waiting
        case Action.RELEASE:
            rank.activations -= runs[step.run].kept
        case Action.RELOAD:
            rank.activations += runs[step.run].kept
        case Action.OFFLOAD | Action.RESTORE | Action.REDUCE:
            pass
        case Action.FINISH:
            run = runs.pop(step.run)
            rank.routing -= run.routing
            rank.held -= run.held
        case _ as other:
            assert_never(other)


def _pass(step: Step, rank: _Rank, run: _Run) -> None:
    phase = run.phases[step.phase]
    inside = phase.forward_peak if step.action is Action.FORWARD else phase.backward_peak
    rank.observe(inside)
    if phase.lane == "comm":
        run.pending, run.inside = step, inside
        rank.exchanging += inside
    else:
        _settle(step, rank, run)


def _settle(step: Step, rank: _Rank, run: _Run) -> None:
    """Applies the change of live bytes at the end of a phase."""
    phase = run.phases[step.phase]
    if step.action is Action.FORWARD:
        made = phase.values
        rank.activations += phase.kept
        rank.routing += phase.routing
        run.routing += phase.routing
    else:
        made = phase.gradients
        rank.activations += phase.restored - phase.recomputed - phase.kept
        rank.waiting += phase.waiting + phase.carried
    rank.held += made - run.held
    run.held = made


def _accept(step: Step, rank: _Rank, run: _Run, message_bytes: int) -> None:
    assert step.message is not None
    # A message from the rank to itself is counted like one that has arrived.
    rank.receiving -= message_bytes
    rank.held += message_bytes - run.held
    run.held = message_bytes


def _send(step: Step, rank: _Rank, run: _Run, message_bytes: int, *, keeps_sent: bool) -> None:
    message = step.message
    assert message is not None
    rank.held -= run.held
    run.held = 0
    if message.source == message.destination:
        rank.receiving += message_bytes
    elif keeps_sent:
        rank.sending += message_bytes - rank.sent.get(message.link, 0)
        rank.sent[message.link] = message_bytes
