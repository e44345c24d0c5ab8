"""Runs requests in worker processes that are killed at a deadline, callable from any thread.

Signals and timers interrupt only a main thread, and no library that computes in C. A killed process always ends.
"""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infer.scoring.score import ScoringError

START_SECONDS = 120.0
MAX_FAILURES = 5
"""Number of failures for each worker of a pool, without a reply between them, after which the pool is given up."""
_LARGEST_REPLY = 2**20
_EXIT_SECONDS = 1.0


class WorkerTimeoutError(Exception):
    """A request that did not end before its deadline. Its worker was killed."""


class WorkerDiedError(Exception):
    """A worker that ended during a request, for example because its memory is limited."""


class WorkerStartError(WorkerDiedError):
    """A worker that could not start."""


@dataclass(frozen=True, slots=True)
class WorkerProgram:
    """A Python file that prints a line of JSON when it is ready, then answers each line of JSON with one.

    Its first line has the field `error` if it cannot start.

    Attributes:
        path: the file. It runs by itself, so that it imports nothing that it does not need.
        arguments: its command-line arguments.
        environment: environment variables that it receives in addition to those that make it repeatable.
    """

    path: Path
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class WorkerPool:
    """Worker processes of one program, started when they are first needed."""

    def __init__(
        self, program: WorkerProgram, size: int, seconds: float, *, name: str, counts_timeouts: bool = False
    ) -> None:
        """Starts no process yet.

        Args:
            size: maximum number of workers; further requests wait for a free one.
            seconds: deadline of a request, which does not count the wait for a worker and its start.
            name: of the scorer, for errors.
            counts_timeouts: whether a missed deadline is a fault of the program, as a death is, rather than of an
                answer, so that too many in a row end the pool.
        """
        self._program, self._seconds, self._name = program, seconds, name
        self._counts_timeouts = counts_timeouts
        self._free: queue.LifoQueue[_Place] = queue.LifoQueue()
        for number in range(size, 0, -1):
            self._free.put(_Place(number))
        self._size = size
        self._lock = threading.Lock()
        self._num_failures = 0
        self._last_failure = ""
        self.num_restarts = 0

    def start(self) -> None:
        """Starts one worker, if none runs.

        Raises:
            WorkerStartError: it could not start.
        """
        place = self._free.get()
        try:
            place.start(self._program)
        finally:
            self._free.put(place)

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns the reply of a worker. A worker that fails is killed, and the next request replaces it.

        Raises:
            WorkerTimeoutError: there was no reply before the deadline.
            WorkerDiedError: the worker ended, or could not start.
            ScoringError: the workers died so often in a row that another one would die as well.
        """
        place = self._free.get()
        try:
            self._check_failures()
            worker = place.start(self._program)
            reply = worker.request(message, self._seconds)
        except ScoringError:
            raise
        except BaseException as error:
            place.kill()
            text = f"did not reply within {self._seconds:g} s" if isinstance(error, WorkerTimeoutError) else str(error)
            reason = f"worker {place.number} {text}"
            self._count_failure(error, reason)
            if isinstance(error, WorkerTimeoutError | WorkerDiedError):
                raise type(error)(reason) from error
            raise
        finally:
            self._free.put(place)
        with self._lock:
            self._num_failures = 0
        return reply

    def _count_failure(self, error: BaseException, reason: str) -> None:
        with self._lock:
            self.num_restarts += 1
            self._num_failures += self._counts_timeouts or not isinstance(error, WorkerTimeoutError)
            self._last_failure = reason
        self._check_failures()

    def _check_failures(self) -> None:
        limit = MAX_FAILURES * self._size
        if self._num_failures >= limit:
            raise ScoringError(
                f"reward.parts, kind {self._name}: its workers failed {limit} times without an answer between, "
                f"the last time: {self._last_failure}"
            )

    def close(self) -> None:
        """Kills all workers, after the requests in progress."""
        for _ in range(self._size):
            self._free.get().kill()


class _Place:
    """A numbered place for a worker, used by one thread at a time."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._worker: _Worker | None = None

    def start(self, program: WorkerProgram) -> "_Worker":
        """Returns the worker that runs here, or starts one."""
        if self._worker is None or not self._worker.is_alive():
            self.kill()
            self._worker = _Worker(program)
        return self._worker

    def kill(self) -> None:
        """Kills the worker, if there is one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


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
            env={"PATH": os.defpath, **program.environment, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        )
        try:
            ready = self._read_reply(time.monotonic() + START_SECONDS)
        except BaseException as error:
            self.kill()
            if isinstance(error, WorkerTimeoutError):
                raise WorkerStartError(f"was not ready after {START_SECONDS:g} s") from error
            if isinstance(error, WorkerDiedError):
                raise WorkerStartError(str(error)) from error
            raise
        if "error" in ready:
            self.kill()
            raise WorkerStartError(ready["error"])

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
                raise WorkerDiedError(f"ended: {error.strerror}") from error
        return self._read_reply(deadline)

    def kill(self) -> None:
        """Kills the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()

    def _read_reply(self, deadline: float) -> dict[str, Any]:
        line = self._read_line(deadline)
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise WorkerDiedError(f"printed no object of JSON: {line[:60]!r}")
        return reply

    def _read_line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            self._wait(lambda left: select.select([descriptor], [], [], left)[0], deadline)
            data = os.read(descriptor, 65536)
            if not data or len(self._buffer) > _LARGEST_REPLY:
                raise WorkerDiedError(self._end())
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _end(self) -> str:
        """Returns how a process ended whose output is closed."""
        try:
            code = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output, or printed too much"
        return f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"

    def _wait(self, is_ready: Callable[[float], list[int]], deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or not is_ready(left):
            raise WorkerTimeoutError
