"""Starts modules as worker processes, and ends processes with their parents. Imports no torch.

The command line of a worker is `-m base.workers PARENT MODULE ARGUMENTS`.
"""

import ctypes
import os
import runpy
import signal
import sys
import threading
from multiprocessing import connection, process

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 1.0


def worker_command(module: str, *arguments: str) -> list[str]:
    """Returns the command line of a worker, which ends with the thread that starts it."""
    return [sys.executable, "-P", "-m", "base.workers", str(os.getpid()), module, *arguments]


def end_with_parent(parent: int | None = None) -> None:
    """Ends this process with its parent, or if the parent is not the process `parent` any more.

    The kernel kills it, even if it is stopped; on other systems than Linux, a thread does. The thread also ends a fork
    of a fork server with the process that requested the fork, which the fork server outlives.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_kill_after, args=(parent or os.getppid(),), daemon=True).start()


def _kill_after(parent: int) -> None:
    """Kills this process when its parent ends, or the process that requested it from a fork server."""
    requester = process.parent_process()
    sentinels = [] if requester is None else [requester.sentinel]
    while os.getppid() == parent and not connection.wait(sentinels, _LOOK_SECONDS):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
