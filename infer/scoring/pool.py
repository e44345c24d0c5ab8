"""Runs scorers with deadlines: calls in threads, which are abandoned, or in killable processes.

Signals and timers interrupt only a main thread, and no library that computes in C. A killed process always ends. A
thread that hangs is replaced by another one, and its result is ignored.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infer.scoring.score import ScoringError, failure

START_SECONDS = 120.0
MAX_FAILURES = 5
"""Number of failures for each worker of a pool, without a reply between them, after which the pool is given up."""
_LARGEST_REPLY = 2**20
_EXIT_SECONDS = 1.0
LONGEST_DETAIL = 300


class WorkerTimeoutError(Exception):
    """A request that did not end before its deadline. Its worker was killed."""


class WorkerDiedError(Exception):
    """A worker that ended during a request, for example because its memory is limited."""


class WorkerStartError(WorkerDiedError):
    """A worker that could not start."""


@dataclass(frozen=True, slots=True)
class WorkerProgram:
    """A Python file that prints a line of JSON when it is ready, then answers each line of JSON with one.

    Its first line has the field `error` if it cannot start. It runs alone, with variables that make it repeatable.
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
            counts_timeouts: whether a missed deadline is a fault of the program, as a death is, rather than of an
                answer, so that too many in a row end the pool.
        """
        self._size = size
        self._seconds = seconds
        self._name = name
        self._counts_timeouts = counts_timeouts
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for number in range(size, 0, -1):
            self._free.put(_Worker(number, program))
        self._lock = threading.Lock()
        self._num_failures = 0
        self._last_failure = ""
        self.num_restarts = 0

    def start(self) -> None:
        """Starts one worker, if none runs, or raises `WorkerStartError`."""
        worker = self._free.get()
        try:
            worker.start()
        finally:
            self._free.put(worker)

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns the reply of a worker. A worker that fails is killed, and its next request starts another.

        Raises:
            WorkerTimeoutError, WorkerDiedError: there was no reply before the deadline, or the worker ended.
            ScoringError: the workers died so often in a row that another one would die as well.
        """
        worker = self._free.get()
        try:
            self._check_failures()
            worker.start()
            reply = worker.request(message, self._seconds)
        except ScoringError:
            raise
        except BaseException as error:
            worker.kill()
            text = f"did not reply within {self._seconds:g} s" if isinstance(error, WorkerTimeoutError) else str(error)
            reason = f"worker {worker.number} {text}"
            with self._lock:
                self.num_restarts += 1
                self._num_failures += self._counts_timeouts or not isinstance(error, WorkerTimeoutError)
                self._last_failure = reason
            self._check_failures()
            if isinstance(error, WorkerTimeoutError | WorkerDiedError):
                raise type(error)(reason) from error
            raise
        finally:
            self._free.put(worker)
        with self._lock:
            self._num_failures = 0
        return reply

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


class _Worker:
    """A numbered worker, used by one thread at a time. Its process starts when it is needed."""

    def __init__(self, number: int, program: WorkerProgram) -> None:
        self.number = number
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._buffer = b""

    def start(self) -> None:
        """Starts the process, if none runs, and waits until it is ready."""
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        self._socket, child = socket.socketpair()
        with child:
            # A separate session, so that Ctrl-C reaches this process alone and the kill reaches the worker's children.
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(self._program.path), *self._program.arguments],
                stdin=child.fileno(),
                stdout=child.fileno(),
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={"PATH": os.defpath, **self._program.environment, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            )
        try:
            ready = self._read_reply(time.monotonic() + START_SECONDS)
            if "error" in ready:
                raise WorkerDiedError(ready["error"])
        except BaseException as error:
            self.kill()
            if isinstance(error, WorkerTimeoutError):
                raise WorkerStartError(f"was not ready after {START_SECONDS:g} s") from error
            if isinstance(error, WorkerDiedError):
                raise WorkerStartError(str(error)) from error
            raise

    def request(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._socket is not None
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)  # of all data together
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError:
            raise WorkerTimeoutError from None
        except OSError as error:
            raise WorkerDiedError(f"ended: {error.strerror}") from error
        return self._read_reply(deadline)

    def kill(self) -> None:
        """Kills the process, if there is one, and its children."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._process = None
        self._socket = None
        self._buffer = b""

    def _read_reply(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = self._receive(deadline)
            if not data or len(self._buffer) > _LARGEST_REPLY:
                raise WorkerDiedError(self._end())
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise WorkerDiedError(f"printed no object of JSON: {line[:60]!r}")
        return reply

    def _receive(self, deadline: float) -> bytes:
        """Returns some data, or none if the worker closed its output."""
        assert self._socket is not None
        left = deadline - time.monotonic()
        if left <= 0:
            raise WorkerTimeoutError
        self._socket.settimeout(left)
        try:
            return self._socket.recv(65536)
        except TimeoutError:
            raise WorkerTimeoutError from None
        except ConnectionResetError:  # it ended before it had read a message
            return b""

    def _end(self) -> str:
        """Returns how a process ended whose output is closed."""
        assert self._process is not None
        try:
            code = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output, or printed too much"
        return f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def score_in_threads(
    kind: str, calls: Sequence[Callable[[], object]], num_threads: int, seconds: float | None
) -> list[object]:
    """Returns what calls return, in order, or a failure for those abandoned `seconds` after their start.

    Raises:
        ScoringError: a call raised it, or twice as many calls as threads were abandoned and none returned in between.
    """
    run = _Run(kind, calls)
    try:
        for _ in range(min(num_threads, len(calls))):
            run.start_thread()
        return run.wait(seconds, max_abandoned=2 * num_threads)
    finally:
        run.stop()


class _Run:
    """Calls of a scorer that are waiting, running or done. One lock guards all fields."""

    def __init__(self, kind: str, calls: Sequence[Callable[[], object]]) -> None:
        self._kind = kind
        self._calls = calls
        self._changed = threading.Condition()
        self._waiting = deque(range(len(calls)))
        self._running: dict[int, tuple[int, float]] = {}
        self._results: dict[int, object] = {}
        self._num_threads = 0
        self._num_abandoned = 0
        self._fatal_error: ScoringError | None = None

    def start_thread(self) -> None:
        """Starts a thread. It is a daemon, so that one that hangs does not keep the process from ending."""
        self._num_threads += 1
        threading.Thread(target=self._work, args=(self._num_threads,), name="scoring", daemon=True).start()

    def wait(self, seconds: float | None, max_abandoned: int) -> list[object]:
        """Returns all results, and abandons calls that take too long."""
        with self._changed:
            while True:
                if self._fatal_error is not None:
                    raise self._fatal_error
                if len(self._results) == len(self._calls):
                    return [self._results[number] for number in range(len(self._calls))]
                if self._num_abandoned >= max_abandoned:
                    raise ScoringError(
                        f"reward.parts, kind {self._kind}: must score an answer within {seconds:g} s, does not for "
                        f"{max_abandoned} answers in a row"
                    )
                left = None if seconds is None else self._abandon_late(seconds)
                if left is None or left > 0:
                    self._changed.wait(left)

    def stop(self) -> None:
        """Lets no further call start."""
        with self._changed:
            self._waiting.clear()

    def _abandon_late(self, seconds: float) -> float:
        """Abandons calls that are late. Returns the time until the next one would be."""
        now = time.monotonic()
        for number, (thread, began) in list(self._running.items()):
            if now - began >= seconds:
                del self._running[number]
                detail = f"{self._kind}: thread {thread} gave no score within {seconds:g} s"
                self._results[number] = failure("unknown", detail)
                self._num_abandoned += 1
                self.start_thread()
        if len(self._results) == len(self._calls):
            return 0.0
        return seconds - max((now - began for _, began in self._running.values()), default=0.0)

    def _work(self, thread: int) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    return
                number = self._waiting.popleft()
                self._running[number] = thread, time.monotonic()
                self._changed.notify()
            fatal_error = None
            try:
                result = self._calls[number]()
            except Exception as error:
                fatal_error = error if isinstance(error, ScoringError) else None
                result = failure("error", f"{self._kind}: {type(error).__name__}: {error}"[:LONGEST_DETAIL])
            with self._changed:
                if number not in self._running:
                    return  # abandoned; another thread took its place
                del self._running[number]
                self._results[number] = result
                self._num_abandoned = 0
                self._fatal_error = fatal_error or self._fatal_error
                self._changed.notify()
