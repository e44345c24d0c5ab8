"""Starts modules as worker processes: `-m base.workers PARENT MODULE ARGUMENTS`. Imports no torch."""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def worker_command(module: str, *arguments: str) -> list[str]:
    """Returns the command line of a worker, which ends with the thread that starts it."""
    return [sys.executable, "-P", "-m", "base.workers", str(os.getpid()), module, *arguments]


def _end_with_parent(parent: int) -> None:
    """Makes the kernel kill this process with its parent, even if it is stopped. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


if __name__ == "__main__":
    _end_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
