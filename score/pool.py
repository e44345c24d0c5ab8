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

from score.score import ScoringError, failure

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

    def start(self) -> None:
        """Starts one worker, if none runs, or raises `WorkerStartError`."""
        worker = self._free.get()
        try:
            worker.start()
        except BaseException:
            worker.kill()
            raise
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
        except BaseException as error:
            worker.kill()
            if not isinstance(error, WorkerTimeoutError | WorkerDiedError):
                raise
            reason = f"worker {worker.number} {error}"
            with self._lock:
                self._num_failures += self._counts_timeouts or isinstance(error, WorkerDiedError)
                self._last_failure = reason
            self._check_failures()
            raise type(error)(reason) from error
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
        """Starts the process, if none runs, and waits until it is ready. Kill it if that fails."""
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
        except TimeoutError:
            raise WorkerStartError(f"was not ready after {START_SECONDS:g} s") from None
        except WorkerDiedError as error:
            raise WorkerStartError(str(error)) from error
        if "error" in ready:
            raise WorkerStartError(ready["error"])

    def request(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Returns the reply to a message. Kill the process if this fails."""
        assert self._socket is not None
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)  # of all data together
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # the missing reply says how the process ended
                self._socket.sendall(json.dumps(message).encode() + b"\n")
            return self._read_reply(deadline)
        except TimeoutError:
            raise WorkerTimeoutError(f"did not reply within {seconds:g} s") from None

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
        """Returns the next reply; raises TimeoutError, also if only a part of it is here at the deadline."""
        assert self._socket is not None
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            data = b""
            with suppress(ConnectionResetError):  # it ended before it had read a message
                data = self._socket.recv(65536)
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

    def _end(self) -> str:
        """Returns how a process ended, after its output was closed."""
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
    waiting = deque(range(len(calls)))
    began: dict[int, float] = {}  # of running calls. Whoever removes one, its thread or this one, decides its result.
    returned: queue.SimpleQueue[tuple[int, object]] = queue.SimpleQueue()

    def work() -> None:
        with suppress(IndexError):  # no call is left
            while True:
                number = waiting.popleft()
                began[number] = time.monotonic()
                result = _result(kind, calls[number])
                if began.pop(number, None) is None:
                    return  # abandoned; another thread took its place
                returned.put((number, result))

    def start_thread() -> None:
        # A daemon, so that a call that hangs does not keep the process from ending.
        threading.Thread(target=work, name="scoring", daemon=True).start()

    for _ in range(min(num_threads, len(calls))):
        start_thread()
    results: dict[int, object] = {}
    num_abandoned = 0
    try:
        while len(results) < len(calls):
            with suppress(queue.Empty):
                oldest = min(began.copy().values(), default=time.monotonic())
                left = None if seconds is None else max(0.0, oldest + seconds - time.monotonic())
                number, result = returned.get(timeout=left)
                if isinstance(result, ScoringError):
                    raise result
                results[number] = result
                num_abandoned = 0
                continue
            for number, start in began.copy().items():
                if time.monotonic() - start >= (seconds or 0.0) and began.pop(number, None) is not None:
                    results[number] = failure(
                        "unknown", f"{kind}: call {number + 1} gave no score within {seconds:g} s"
                    )
                    num_abandoned += 1
                    start_thread()
            if num_abandoned >= 2 * num_threads and len(results) < len(calls):
                rule = f"must score an answer within {seconds:g} s"
                row = f"does not for {2 * num_threads} answers in a row"
                raise ScoringError(f"reward.parts, kind {kind}: {rule}, {row}")
    finally:
        waiting.clear()
    return [results[number] for number in range(len(calls))]


def _result(kind: str, call: Callable[[], object]) -> object:
    """Returns what a call returns, the error that ends all calls, or the failure of this one."""
    try:
        return call()
    except ScoringError as error:
        return error
    except Exception as error:
        return failure("error", f"{kind}: {type(error).__name__}: {error}"[:LONGEST_DETAIL])
