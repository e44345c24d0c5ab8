"""What holds for every test."""

import signal
import threading


def pytest_configure() -> None:
    """A run in the background of a shell inherits a Ctrl-C that is ignored, and so would commands under test."""
    is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if is_ignored and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
