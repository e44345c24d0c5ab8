"""Runs requests in worker processes that are killed at a deadline, callable from any thread.

Signals and timers interrupt only a main thread, and no library that computes in C. A killed process always ends.
"""

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
_LARGEST_REPLY = 2**20


class WorkerTimeoutError(Exception):
    """A request that did not end before its deadline. Its worker was killed."""


class WorkerDiedError(Exception):
    """A worker that ended during a request, for example because its memory is limited."""


@dataclass(frozen=True, slots=True)
class WorkerProgram:
    """A Python file that prints a line when it is ready, then answers each line of JSON with one.

    Attributes:
        path: the file. It runs by itself, so that it imports nothing that it does not need.
        arguments: its command-line arguments.
    """

    path: Path
    arguments: tuple[str, ...] = ()


class WorkerPool:
    """Worker processes of one program, started when they are first needed."""

    def __init__(self, program: WorkerProgram, size: int, seconds: float) -> None:
        """Starts no process yet.

        Args:
            program: what each worker runs.
            size: maximum number of workers; further requests wait for a free one.
            seconds: deadline of a request, which does not count the wait for a worker and its start.
        """
        self._program, self._seconds = program, seconds
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._free.put(None)
        self._size = size
        self._lock = threading.Lock()
        self.num_restarts = 0

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns the reply of a worker.

        Raises:
            WorkerTimeoutError: there was no reply before the deadline.
            WorkerDiedError: the worker ended, or could not start.
        """
        worker = self._free.get()
        try:
            if worker is None or not worker.is_alive():
                worker = _Worker(self._program)
            return worker.request(message, self._seconds)
        except BaseException:
            if worker is not None:
                worker.kill()
                worker = None
            with self._lock:
                self.num_restarts += 1
            raise
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """Kills all workers, after the requests in progress."""
        for _ in range(self._size):
            worker = self._free.get()
            if worker is not None:
                worker.kill()


class _Worker:
    """A process, used by one thread at a time."""

    def __init__(self, program: WorkerProgram) -> None:
        """Starts the process and waits until it is ready."""
        self._buffer = b""
        # A separate session, so that Ctrl-C reaches this process alone and the kill reaches the worker's children.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(program.path), *program.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        )
        try:
            self._read_line(time.monotonic() + START_SECONDS)
        except BaseException as error:
            self.kill()
            if isinstance(error, WorkerTimeoutError):
                raise WorkerDiedError(f"the worker was not ready after {START_SECONDS:g} s") from error
            raise

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def request(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Sends a message and returns the reply."""
        deadline = time.monotonic() + seconds
        assert self._process.stdin is not None
        data = json.dumps(message).encode() + b"\n"
        descriptor = self._process.stdin.fileno()
        os.set_blocking(descriptor, False)
        while data:
            self._wait(lambda left: select.select([], [descriptor], [], left)[1], deadline)
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerDiedError(f"the worker ended: {error}") from error
        reply: dict[str, Any] = json.loads(self._read_line(deadline))
        return reply

    def kill(self) -> None:
        """Kills the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()

    def _read_line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            self._wait(lambda left: select.select([descriptor], [], [], left)[0], deadline)
            data = os.read(descriptor, 65536)
            if not data or len(self._buffer) > _LARGEST_REPLY:
                raise WorkerDiedError(f"the worker ended during a request, with code {self._process.wait()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _wait(self, is_ready: Callable[[float], list[int]], deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or not is_ready(left):
            raise WorkerTimeoutError
