"""What a rank's main thread does, as another thread of the process sees it from time to time."""

import sys
import threading
import time
from pathlib import Path
from types import FrameType

from comm.watchdog.collective_log import Collective, CollectiveLog

_ROOT = Path(__file__).resolve().parents[2]
_BUSY_SECONDS = 0.5


class MainThread:
    """Looks at the thread's innermost frame. A call that lasts keeps its frame, at one and the same instruction."""

    def __init__(self) -> None:
        thread = threading.main_thread().ident
        assert thread is not None
        self._thread = thread
        self._frame: FrameType | None = None
        self._instruction = -1
        self._still_since = time.monotonic()

    def look(self, log: CollectiveLog) -> None:
        """Samples the frame, several times a second; keeps it, and what it holds, only during a phase."""
        if not any(collective.is_phase for collective, _ in log.awaited()):
            self._frame = None
            return
        frame = sys._current_frames().get(self._thread)
        instruction = -1 if frame is None else frame.f_lasti
        if frame is not self._frame or instruction != self._instruction:
            self._still_since = time.monotonic()
        self._frame, self._instruction = frame, instruction

    def waits(self, log: CollectiveLog) -> list[tuple[Collective, float]]:
        """Returns what is awaited and for how long, the longest first; in a phase, for how long one call lasts."""
        still = time.monotonic() - self._still_since if self._frame is not None else 0.0
        waits = [(each, min(seconds, still) if each.is_phase else seconds) for each, seconds in log.awaited()]
        return sorted(waits, key=lambda wait: -wait[1])

    def is_busy(self, log: CollectiveLog) -> bool:
        """Returns whether it computes, and neither waits for others nor for a lane, whose own wait is then logged."""
        frame = sys._current_frames().get(self._thread)
        if frame is not None and frame.f_globals.get("__name__") == "comm.lane" and frame.f_code.co_name == "wait":
            return False
        if not log.is_waiting(self._thread):
            return True
        waits = self.waits(log)
        return all(collective.is_phase and seconds < _BUSY_SECONDS for collective, seconds in waits)

    @property
    def place(self) -> str:
        """The innermost line of this program that it is in."""
        frame = sys._current_frames().get(self._thread)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_ROOT) and "site-packages" not in path.parts:
                return f"{path.relative_to(_ROOT)}, line {frame.f_lineno}, {frame.f_code.co_name}"
            frame = frame.f_back
        return "an unknown place"
