"""Waits for guests: reads their output while they run, and kills them with all their processes.

Guests that are late are to blame if they slept longer than they waited for a processor. The kernel counts the waiting
of each thread (`/proc/PID/task/TID/schedstat`), so a sleeping program differs from one that a busy machine delays.
"""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from score.sandbox import StartedGuest

OUTPUT_BYTES = 2**16
_KILLED = 137  # exit code of SIGKILL, as bubblewrap reports it
_POLL_SECONDS = 0.1  # between looks at the processor time
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_COUNTS_DELAYS = os.path.exists("/proc/self/schedstat")


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of a process on a processor, of children that it waited for, and waiting for one."""

    process: float
    children: float
    delay: float


@dataclass(slots=True)
class Guest:
    """A guest while it runs, and then how it ended.

    Its outputs are by file descriptor, each at most `OUTPUT_BYTES`. One that prints more `is_flooded` and killed.
    """

    started: StartedGuest
    cpu_limit: float
    is_running: bool = True
    has_begun: bool = False  # whether its interpreter ran, which a broken sandbox prevents
    inner: int | None = None  # file descriptor of the first process in the namespace
    inner_pid: int = 0
    announced: bytes = b""
    outputs: dict[int, bytearray] = field(default_factory=dict)
    is_flooded: bool = False
    has_overrun: bool = False
    cpu_seconds: float = 0.0
    times: dict[int, _Times] = field(default_factory=dict)
    lost_seconds: float = 0.0  # processor time of processes that ended without being waited for

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The outermost process."""
        return self.started.process

    @property
    def code(self) -> int | None:
        """The exit code, as bubblewrap reports a signal, or None if the guest was killed from outside."""
        code = self.process.returncode
        return None if self.is_running else 128 - code if code < 0 else code

    @property
    def stdout(self) -> bytes:
        """The standard output."""
        output, _ = self.outputs.values()
        return bytes(output)

    @property
    def stderr(self) -> bytes:
        """The standard error."""
        _, output = self.outputs.values()
        return bytes(output)

    @property
    def is_out_of_cpu(self) -> bool:
        """Whether the guest was killed by its limit of processor time."""
        has_used_all = self.cpu_seconds >= self.cpu_limit
        return self.has_overrun or (has_used_all and self.code in (None, _KILLED))

    def measure(self) -> float:
        """Updates the processor time. Returns how long threads waited for a processor since then."""
        old = self.times
        self.times = _read_times(self.process.pid)
        gone = sum(times.process + times.children for pid, times in old.items() if pid not in self.times)
        reported = sum(times.children - old[pid].children for pid, times in self.times.items() if pid in old)
        self.lost_seconds += max(0.0, gone - max(0.0, reported))
        alive = sum(times.process + times.children for times in self.times.values())
        self.cpu_seconds = max(self.cpu_seconds, alive + self.lost_seconds)
        return sum(max(0.0, new.delay - old[pid].delay if pid in old else new.delay) for pid, new in self.times.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """How guests that ran together ended.

    `is_late`: the time was over before the last one ended. `has_slept`: all slept longer than they waited for a
    processor.
    """

    guests: tuple[Guest, ...]
    is_late: bool
    has_slept: bool


@dataclass(slots=True)
class _Activity:
    """How long guests together slept, and how long they waited for a processor while none of them had one."""

    measured_at: float
    cpu_seconds: float = 0.0
    slept: float = 0.0
    delayed: float = 0.0

    def measure(self, guests: Sequence[Guest]) -> None:
        """Adds the time since the last call."""
        delay = sum(guest.measure() for guest in guests if guest.is_running)
        cpu_seconds = sum(guest.cpu_seconds for guest in guests)
        now = time.monotonic()
        idle = max(0.0, now - self.measured_at - (cpu_seconds - self.cpu_seconds))
        self.delayed += min(idle, delay)
        self.slept += idle - min(idle, delay)
        self.measured_at = now
        self.cpu_seconds = cpu_seconds


def wait_for_guests(guests: Sequence[StartedGuest], cpu_limits: Sequence[float], wall_seconds: float) -> Finished:
    """Waits until the last guest ends, one exceeds a limit, or time is over. Then kills the others.

    When it returns, no process of the guests exists. A limit of processor time holds for all processes of a guest.
    """
    watched = [Guest(guest, limit) for guest, limit in zip(guests, cpu_limits, strict=True)]
    activity = _Activity(time.monotonic())
    selector = selectors.DefaultSelector()
    try:
        for guest in watched:
            _register(selector, guest)
        is_late = _watch(selector, watched, activity, time.monotonic() + wall_seconds)
    finally:
        # The last one does not learn of the end of the others.
        for guest in reversed(watched):
            _end(guest)
        selector.close()
    has_slept = _COUNTS_DELAYS and activity.slept > activity.delayed
    return Finished(guests=tuple(watched), is_late=is_late, has_slept=has_slept)


def _register(selector: selectors.BaseSelector, guest: Guest) -> None:
    for pipe in (guest.process.stdout, guest.process.stderr):
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        guest.outputs[pipe.fileno()] = bytearray()
        selector.register(pipe.fileno(), selectors.EVENT_READ, (guest, "output"))
    os.set_blocking(guest.started.info, False)
    selector.register(guest.started.info, selectors.EVENT_READ, (guest, "info"))
    exited = os.pidfd_open(guest.process.pid)
    selector.register(exited, selectors.EVENT_READ, (guest, "exit"))


def _watch(selector: selectors.BaseSelector, watched: Sequence[Guest], activity: _Activity, deadline: float) -> bool:
    """Handles events until it is time to kill. Returns whether the deadline has passed."""
    try:
        while watched[-1].is_running and not any(guest.is_flooded or guest.has_overrun for guest in watched):
            left = deadline - time.monotonic()
            if left <= 0:
                return True
            for key, _ in selector.select(min(left, _POLL_SECONDS)):
                guest, kind = key.data
                if kind == "exit":
                    guest.is_running = False
                    selector.unregister(key.fd)
                    os.close(key.fd)
                elif not (_read_output(guest, key.fd) if kind == "output" else _read_info(guest)):
                    selector.unregister(key.fd)
            if time.monotonic() - activity.measured_at >= _POLL_SECONDS:
                activity.measure(watched)
            for guest in watched:
                guest.has_overrun = guest.is_running and guest.cpu_seconds > guest.cpu_limit
        return False
    finally:
        for key in list(selector.get_map().values()):
            if key.data[1] == "exit":
                os.close(key.fd)


def _read_output(guest: Guest, descriptor: int) -> bool:
    """Reads what there is, up to the limit. Returns whether more may follow."""
    try:
        data = os.read(descriptor, 65536)
    except BlockingIOError:
        return True
    output = guest.outputs[descriptor]
    output += data[: OUTPUT_BYTES - len(output)]
    guest.is_flooded |= len(data) > 0 and len(output) >= OUTPUT_BYTES
    return bool(data)


def _read_info(guest: Guest) -> bool:
    """Reads which process is the first in the namespace. Returns whether more may follow."""
    try:
        data = os.read(guest.started.info, 4096)
    except BlockingIOError:
        return True
    guest.announced += data
    if guest.inner is None and b"child-pid" in guest.announced and b"," in guest.announced.partition(b"child-pid")[2]:
        digits = guest.announced.partition(b"child-pid")[2].partition(b",")[0]
        guest.inner_pid = int(bytes(byte for byte in digits if 48 <= byte <= 57))
        with suppress(ProcessLookupError):
            guest.inner = os.pidfd_open(guest.inner_pid)
    return bool(data)


def _end(guest: Guest) -> None:
    """Kills a guest and waits until all its processes are gone."""
    while guest.inner is None and guest.is_running and _read_info(guest):
        # bubblewrap has not announced the process yet: it is still starting.
        if guest.process.poll() is not None:
            break
        time.sleep(0.005)
    if guest.is_running:
        guest.measure()
    for pid in guest.times if guest.inner_pid == guest.process.pid else ():
        # Without a namespace, nothing else ends the processes that a program started.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if guest.inner is not None:
        # The kernel ends every process of a namespace with its first one, which is gone only after all others.
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(guest.inner, signal.SIGKILL)
        _is_readable(guest.inner, 10)
        os.close(guest.inner)
    _reap(guest)
    if guest.inner_pid == guest.process.pid:
        _kill_orphans(guest)
    guest.has_begun = os.fstat(guest.started.mark).st_size > 0
    guest.started.close()
    for descriptor in guest.outputs:
        _has_ended(guest, descriptor)
    for pipe in (guest.process.stdout, guest.process.stderr):
        assert pipe is not None
        pipe.close()


def _reap(guest: Guest) -> None:
    """Waits for the outermost process, and kills it if it does not follow its child."""
    deadline = time.monotonic() + 1
    while True:
        pid, status, usage = os.wait4(guest.process.pid, os.WNOHANG)
        if pid:
            guest.process.returncode = os.waitstatus_to_exitcode(status)
            guest.cpu_seconds = max(guest.cpu_seconds, usage.ru_utime + usage.ru_stime)
            return
        if time.monotonic() > deadline:
            guest.process.kill()
        time.sleep(0.001)


def _kill_orphans(guest: Guest) -> None:
    """Kills processes that a program left between two looks at its children, if they hold an output of it."""
    left_open = [descriptor for descriptor in guest.outputs if not _has_ended(guest, descriptor)]
    outputs = {f"pipe:[{os.fstat(descriptor).st_ino}]" for descriptor in left_open}
    # A process that this one forked meanwhile holds them, too.
    for entry in os.scandir("/proc") if outputs else ():
        with suppress(OSError, ValueError):
            pid = int(entry.name)
            if not _is_below(pid, os.getpid()) and any(
                os.readlink(held.path) in outputs for held in os.scandir(f"{entry.path}/fd")
            ):
                os.kill(pid, signal.SIGKILL)


def _is_below(pid: int, ancestor: int) -> bool:
    """Returns whether a process is another one or was started by it or by one below it."""
    while pid > 1 and pid != ancestor:
        pid = int(_read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[1])
    return pid == ancestor


def _has_ended(guest: Guest, descriptor: int) -> bool:
    """Reads what there is of an output. Returns whether no process can write to it."""
    while is_open := _read_output(guest, descriptor):
        if guest.is_flooded or not _is_readable(descriptor, 0):
            break
    return not is_open


def _is_readable(descriptor: int, seconds: float) -> bool:
    """Waits until there is data or the end of it, and returns whether there is."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _read_times(pid: int) -> dict[int, _Times]:
    """Returns the times of a process and of all below it, by process id."""
    times: dict[int, _Times] = {}
    waiting = [pid]
    while waiting:
        process = waiting.pop()
        with suppress(OSError, ValueError):
            ticks = list(map(int, _read(f"/proc/{process}/stat").rpartition(b")")[2].split()[11:15]))
            delay = 0
            for thread in os.listdir(f"/proc/{process}/task"):
                with suppress(OSError):
                    delay += int(_read(f"/proc/{process}/task/{thread}/schedstat").split()[1])
                with suppress(OSError):
                    # Each thread has its children.
                    waiting += map(int, _read(f"/proc/{process}/task/{thread}/children").split())
            times[process] = _Times(sum(ticks[:2]) / _CLOCK_TICKS, sum(ticks[2:]) / _CLOCK_TICKS, delay / 1e9)
    return times
