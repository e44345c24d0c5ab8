"""Draws faults that a run must survive, at random moments of the recorded activity of its ranks."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from comm.exits import EXIT_HANG, EXIT_LOST, EXIT_OTHER, EXIT_PREEMPTED

Kind = Literal["SIGKILL", "SIGTERM", "SIGUSR1", "SIGSTOP", "full disk", "torn file", "flipped bit"]
Begin = Literal["new", "half"]
Traces = Mapping[tuple[str, Begin], Sequence[Sequence["Moment"]]]
"""Ordered moments of each rank in an uninterrupted run, by layout and start."""

KINDS: tuple[tuple[Kind, bool], ...] = (
    ("SIGKILL", False),
    ("SIGTERM", False),
    ("SIGUSR1", False),
    ("SIGSTOP", False),
    ("full disk", False),
    ("torn file", False),
    ("flipped bit", False),
    ("SIGKILL", True),
    ("SIGTERM", True),
    ("SIGUSR1", True),
)
"""Kinds of faults in turn, and whether they hit the command instead of a rank."""

DAMAGES: tuple[Kind, ...] = ("torn file", "flipped bit")
PREEMPTIONS: tuple[Kind, ...] = ("SIGTERM", "SIGUSR1")

STOPPED_SECONDS = 20.0
"""`cluster.timeout_seconds` of runs in which a rank is stopped."""

_AGREEMENT = "sum of targets"
"""Collective in which ranks agree on earlier signals."""

_DEADLINES: dict[Kind, float] = {
    "SIGKILL": 15.0,
    "SIGTERM": 30.0,
    "SIGUSR1": 30.0,
    "SIGSTOP": STOPPED_SECONDS + 12.0,
    "full disk": 60.0,  # detected at the next write
    "torn file": 15.0,
    "flipped bit": 15.0,
}


@dataclass(frozen=True, slots=True)
class Moment:
    """Next action of a rank, and whether it runs on the main thread."""

    name: str
    is_main: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Fault of a run when rank `rank` reaches the `count`-th moment called `name`.

    Attributes:
        hits_command: whether the signal is sent to the command that started the ranks.
        begin: whether the run is new or resumes after its third step.
        share: from 0 to 1: position of the damage in a file, or part of a checkpoint that still fits on a full disk.
    """

    index: int
    kind: Kind
    hits_command: bool
    layout: str
    begin: Begin
    rank: int
    name: str
    count: int
    restarts: int
    share: float
    expected: tuple[int, ...]

    @property
    def deadline_seconds(self) -> float:
        """Maximum seconds from the fault to the end of the last rank."""
        return _DEADLINES[self.kind]

    @property
    def target(self) -> str:
        return "command" if self.hits_command else f"rank {self.rank}"


def draw(traces: Traces, number: int, seed: int, kinds: Sequence[tuple[Kind, bool]] = KINDS) -> list[Fault]:
    """Draws `number` faults. The first ones do not depend on the number.

    The name of a moment is drawn first and then its count, so that rare moments are hit as often as frequent ones.
    """
    rng = random.Random(seed)
    return [_draw_one(rng, index, *kinds[index % len(kinds)], traces) for index in range(number)]


def _draw_one(rng: random.Random, index: int, kind: Kind, hits_command: bool, traces: Traces) -> Fault:
    # Damage needs a checkpoint from which the run resumes.
    begin: Begin = "half" if kind in DAMAGES else rng.choice(("new", "half"))
    layout = rng.choice(sorted({layout for layout, _ in traces}))
    trace = traces[layout, begin]
    rank = rng.randrange(len(trace))
    name = rng.choice(sorted({moment.name for moment in trace[rank]}))
    places = [place for place, moment in enumerate(trace[rank]) if moment.name == name]
    turn = rng.randrange(len(places))
    # A killed or preempted command restarts nothing.
    restarts = rng.randrange(2) if kind in ("SIGKILL", "SIGSTOP", *DAMAGES) and not hits_command else 0
    return Fault(
        index=index,
        kind=kind,
        hits_command=hits_command,
        layout=layout,
        begin=begin,
        rank=rank,
        name=name,
        count=turn + 1,
        restarts=restarts,
        share=rng.random(),
        expected=_expected(kind, hits_command, restarts, trace[rank], places[turn]),
    )


def _expected(kind: Kind, hits_command: bool, restarts: int, trace: Sequence[Moment], place: int) -> tuple[int, ...]:
    """Returns the documented exit codes; the second means that the run ended before the fault mattered."""
    if restarts:
        return (0,)
    if kind == "full disk":
        return EXIT_OTHER, 0
    if kind == "SIGSTOP":
        return (EXIT_HANG,)
    if kind in PREEMPTIONS:
        agreements = sum(moment.name == _AGREEMENT for moment in trace[place + 1 :])
        if not hits_command and trace[place].is_main:
            return (EXIT_PREEMPTED,) if agreements else (0,)
        # The signal may reach the rank after the last agreement.
        return (EXIT_PREEMPTED, 0)
    return (137,) if hits_command else (EXIT_LOST,)
