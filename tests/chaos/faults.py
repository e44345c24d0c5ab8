"""Faults that a run must survive, drawn by a seed over everything that its ranks were seen to do."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from comm.exit_codes import EXIT_HANG, EXIT_LOST, EXIT_OTHER, EXIT_PREEMPTED

Kind = Literal["SIGKILL", "SIGTERM", "SIGUSR1", "SIGSTOP", "full disk", "torn file", "flipped bit"]
Begin = Literal["new", "half"]
Traces = Mapping[tuple[str, Begin], Sequence[Sequence["Moment"]]]
"""By layout and beginning, what each rank does in a run that is left alone, in order."""

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
"""In turn; whether it is the command that is hit, and no rank."""

DAMAGES: tuple[Kind, ...] = ("torn file", "flipped bit")
ASKS: tuple[Kind, ...] = ("SIGTERM", "SIGUSR1")

STOPPED_SECONDS = 20.0
"""`cluster.timeout_seconds` where a rank is stopped."""

_AGREEMENT = "sum of targets"
"""In which ranks hear of each other's signals, if they came before it began."""

_DEADLINES: dict[Kind, float] = {
    "SIGKILL": 15.0,
    "SIGTERM": 30.0,
    "SIGUSR1": 30.0,
    "SIGSTOP": STOPPED_SECONDS + 12.0,
    "full disk": 60.0,  # it is noticed at the next write
    "torn file": 15.0,
    "flipped bit": 15.0,
}


@dataclass(frozen=True, slots=True)
class Moment:
    """What a rank is about to do, and whether on its main thread."""

    name: str
    is_main: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What happens to a run when its rank `rank` comes to the `count`-th moment called `name`.

    Attributes:
        hits_command: the signal goes to the command that started the ranks.
        begin: of the run that is hit: a new one, or one that goes on from its third step.
        restarts: `cluster.max_restarts`.
        share: from 0 to 1: of a file, where it is damaged; of a checkpoint, how much a full disk still takes.
        expected: exit codes of the run that is hit.
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
        """From the fault to the end of the last rank."""
        return _DEADLINES[self.kind]

    @property
    def whom(self) -> str:
        """For people."""
        return "command" if self.hits_command else f"rank {self.rank}"


def draw(traces: Traces, number: int, seed: int, kinds: Sequence[tuple[Kind, bool]] = KINDS) -> list[Fault]:
    """So many faults, the first of them the same whatever the number.

    A moment's name is drawn first and then which of its turns, so that what happens once in a run is hit as often as
    what happens a hundred times.
    """
    rng = random.Random(seed)
    return [_draw_one(rng, index, *kinds[index % len(kinds)], traces) for index in range(number)]


def _draw_one(rng: random.Random, index: int, kind: Kind, hits_command: bool, traces: Traces) -> Fault:
    # Damage is to what the run goes on from, so there must be something.
    begin: Begin = "half" if kind in DAMAGES else rng.choice(("new", "half"))
    layout = rng.choice(sorted({layout for layout, _ in traces}))
    trace = traces[layout, begin]
    rank = rng.randrange(len(trace))
    name = rng.choice(sorted({moment.name for moment in trace[rank]}))
    places = [place for place, moment in enumerate(trace[rank]) if moment.name == name]
    turn = rng.randrange(len(places))
    # A command that is killed starts nothing again, and one that is asked does not either.
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
    """The documented exit codes; of two, the second is that of a run that was over before the fault could matter."""
    if restarts:
        return (0,)
    if kind == "full disk":
        return EXIT_OTHER, 0
    if kind == "SIGSTOP":
        return (EXIT_HANG,)
    if kind in ASKS:
        agreements = sum(moment.name == _AGREEMENT for moment in trace[place + 1 :])
        if not hits_command and trace[place].is_main:
            return (EXIT_PREEMPTED,) if agreements else (0,)
        # It takes a moment until the rank hears of it.
        return (EXIT_PREEMPTED, 0)
    return (137,) if hits_command else (EXIT_LOST,)
