"""SIGTERM of a rank: noted on the main thread, reported to the watchdog, and passed to the handler that was there."""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

# After SIGTERM: a job that is preempted still starts, to agree on it; a job that lost a rank never does.
_LATECOMER_SECONDS = 3.0


class Termination:
    """Whether SIGTERM arrived, and when. An instance is the signal's handler after `install`."""

    def __init__(self) -> None:
        self._plain = signal.getsignal(signal.SIGTERM)
        self._since: float | None = None

    def install(self, wakeup_file: int) -> Callable[[], None]:
        """Handles SIGTERM from now on; returns what restores the earlier handler.

        Args:
            wakeup_file: gets the signal's number as a byte, even while the main thread is inside a collective.
        """
        signal.signal(signal.SIGTERM, self)
        plain_file = signal.set_wakeup_fd(wakeup_file, warn_on_full_buffer=False)

        def restore() -> None:
            signal.set_wakeup_fd(plain_file)
            signal.signal(signal.SIGTERM, self._plain)

        return restore

    def __call__(self, number: int, frame: FrameType | None) -> Any:
        """Notes the signal and passes it on."""
        self._since = self._since or time.monotonic()
        if callable(self._plain):
            self._plain(number, frame)

    @property
    def is_last(self) -> bool:
        """Whether no other handler was there before."""
        return not callable(self._plain)

    @property
    def is_pressing(self) -> bool:
        """Whether SIGTERM arrived so long ago that there is no use in waiting for absent ranks."""
        patience = 0.0 if self.is_last else _LATECOMER_SECONDS
        return self._since is not None and time.monotonic() - self._since >= patience
