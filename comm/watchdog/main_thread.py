"""Samples the main thread of a rank from another thread, to see whether it computes or waits."""

import sys
import threading
import time
from pathlib import Path
from types import FrameType

from comm.watchdog.collective_log import Collective, CollectiveLog

_ROOT = Path(__file__).resolve().parents[2]
_BUSY_SECONDS = 0.5


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
        self._frame, self._instruction = frame, instruction

    def waits(self, log: CollectiveLog) -> list[tuple[Collective, float]]:
        """Returns the collectives that are waited for, with seconds, the longest first.

        In a phase, only the time of the current call counts.
        """
        still = time.monotonic() - self._still_since if self._frame is not None else 0.0
        waits = [(each, min(seconds, still) if each.is_phase else seconds) for each, seconds in log.awaited()]
        return sorted(waits, key=lambda wait: -wait[1])

    def is_busy(self, log: CollectiveLog) -> bool:
        """Returns whether the thread computes.

        A wait for a lane does not count: the lane's thread logs its own wait.
        """
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
