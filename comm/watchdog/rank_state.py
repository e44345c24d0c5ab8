"""Describes the state of a rank: what it waits for, and whether its main thread computes."""

import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Self

from comm.watchdog.collective_log import Collective, CollectiveLog
from comm.watchdog.ranks import RankSet
from comm.watchdog.wire import MAX_NAME_CHARACTERS, Name, printable

_ROOT = Path(__file__).resolve().parents[2]
_BUSY_SECONDS = 0.5
_MAX_WAITS = 8
_MAX_GROUPS = 64
_MAX_LINE_CHARACTERS = 256
_MAX_WAIT_CHARACTERS = 512


class MainThread:
    """Sampler of the main thread's innermost frame. A long call keeps its frame at the same instruction."""

    def __init__(self) -> None:
        thread = threading.main_thread().ident
        assert thread is not None
        self._thread = thread
        self._frame: FrameType | None = None
        self._instruction = -1
        self._still_since = time.monotonic()

    def sample(self, log: CollectiveLog) -> None:
        """Samples the frame. Keeps a reference to it, and so to its locals, only during a phase."""
        if not any(collective.is_phase for collective, _ in log.awaited()):
            self._frame = None
            return
        frame = sys._current_frames().get(self._thread)
        instruction = -1 if frame is None else frame.f_lasti
        if frame is not self._frame or instruction != self._instruction:
            self._still_since = time.monotonic()
        self._frame = frame
        self._instruction = instruction

    def waits(self, log: CollectiveLog) -> list[tuple[Collective, float]]:
        """Returns the awaited collectives, the longest wait first; in a phase, only the current call counts."""
        still = time.monotonic() - self._still_since if self._frame is not None else 0.0
        waits = [
            (collective, min(seconds, still) if collective.is_phase else seconds)
            for collective, seconds in log.awaited()
        ]
        return sorted(waits, key=lambda wait: -wait[1])

    def is_busy(self, log: CollectiveLog) -> bool:
        """Returns whether the thread computes. A wait for a lane does not count: its thread logs its own wait."""
        frame = sys._current_frames().get(self._thread)
        if frame is not None and frame.f_globals.get("__name__") == "comm.lane" and frame.f_code.co_name == "wait":
            return False
        if not log.is_waiting(self._thread):
            return True
        waits = self.waits(log)
        return all(collective.is_phase and seconds < _BUSY_SECONDS for collective, seconds in waits)

    @property
    def place(self) -> str:
        """Innermost line of this program that the thread executes."""
        frame = sys._current_frames().get(self._thread)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_ROOT) and "site-packages" not in path.parts:
                return f"{path.relative_to(_ROOT)}, line {frame.f_lineno}, {frame.f_code.co_name}"
            frame = frame.f_back
        return "an unknown place"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Collective that a rank waits for, or waited for when it failed."""

    text: Annotated[str, _MAX_WAIT_CHARACTERS]
    group: Name
    number: int
    ranks: RankSet
    seconds: float

    @classmethod
    def of(cls, collective: Collective, seconds: float) -> Self:
        """Describes the collective for a message."""
        return cls(
            text=printable(str(collective), _MAX_WAIT_CHARACTERS),
            group=printable(collective.group, MAX_NAME_CHARACTERS),
            number=collective.number,
            ranks=collective.ranks,
            seconds=seconds,
        )

    def is_of(self, other: "Wait") -> bool:
        """Returns whether both waits are for the same collective."""
        return (self.group, self.number) == (other.group, other.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """State of a rank, as it reports it to other watchdogs."""

    waits: Annotated[tuple[Wait, ...], _MAX_WAITS]  # collectives that it waits for, the longest wait first
    started: Annotated[Mapping[str, int], _MAX_GROUPS]  # number of collectives started in each group
    is_busy: bool  # whether its main thread computes; else the thread waits
    place: Annotated[str, _MAX_LINE_CHARACTERS]  # line of the program that its main thread executes
    last: Annotated[str, _MAX_WAIT_CHARACTERS]  # the collective that it started last
    idle_seconds: float  # time since that start

    @classmethod
    def of(cls, log: CollectiveLog, thread: MainThread) -> Self:
        """Builds the state from a rank's log and its main thread."""
        now = time.time()
        waits = [Wait.of(*wait) for wait in (*thread.waits(log), *log.failed())]
        waits = sorted(waits, key=lambda wait: -wait.seconds)[:_MAX_WAITS]
        recent = log.recent()
        started = {printable(name, MAX_NAME_CHARACTERS): group.started for name, group in log.progress().items()}
        # Groups that this rank waits for come first if there are too many, then those started last.
        names = [*(wait.group for wait in waits if wait.group in started), *reversed(started)]
        return cls(
            waits=tuple(waits),
            started={name: started[name] for name in list(dict.fromkeys(names))[:_MAX_GROUPS]},
            is_busy=thread.is_busy(log),
            place=printable(thread.place, _MAX_LINE_CHARACTERS),
            last=printable(str(recent[-1][1]), _MAX_WAIT_CHARACTERS) if recent else "nothing",
            # The wall clock can go backwards.
            idle_seconds=max(0.0, now - recent[-1][0]) if recent else 0.0,
        )

    @classmethod
    def of_reached(cls, wait: Wait, *, is_waiting: bool) -> Self:
        """Returns the state of a rank that has started the collective and does not compute."""
        return cls(
            waits=(wait,) if is_waiting else (),
            started={wait.group: wait.number + 1},
            is_busy=False,
            place="",
            last="",
            idle_seconds=0.0,
        )

    def has_reached(self, wait: Wait) -> bool:
        """Returns whether the rank has started the collective."""
        return self.started.get(wait.group, 0) > wait.number
