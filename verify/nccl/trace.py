"""Records what one rank launches on its streams, what waits for what, and who uses which tensor.

A node is something that happens once: a host call returns, or an operation of the device starts or ends. It needs
nodes of its rank that happen before it in every execution, all of which were recorded earlier.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

Event = tuple[int, ...]
"""Nodes after which a stream or a host thread may continue."""

HOST = "host"
"""Stream of what a host thread itself runs: the creation of a communicator, the loading of a kernel."""

_OF_RUN = re.compile(r", direction \d+, micro-batch \d+")


@dataclass(frozen=True, slots=True)
class Communicator:
    """Communicator of NCCL. Its operations run in order on a stream of the same name.

    Attributes:
        members: ranks of the model that take part; with `spans_copies`, also ranks that one of them represents.
        ctas: most SMs that one of its operations occupies.
        is_open: whether it exists before the step; else its first operation creates it.
    """

    name: str
    members: tuple[int, ...]
    ctas: int
    spans_copies: bool
    is_open: bool


@dataclass(slots=True, eq=False)
class DeviceOperation:
    """Operation on a stream, with the nodes of its launch, start and end."""

    rank: int
    thread: str
    stream: str
    name: str
    communicator: Communicator | None
    host: int
    start: int
    end: int

    def __str__(self) -> str:
        by = "" if self.communicator is None else f" (communicator {self.communicator.name})"
        return f"rank {self.rank}, stream {self.stream}, {self.name}{by}"


@dataclass(slots=True)
class _Uses:
    """Last uses of a tensor.

    The allocator waits for `streams` before it uses the memory again, and waited for `free` before this use.
    """

    streams: set[str]
    free: Event
    write: DeviceOperation | None = None
    reads: dict[str, DeviceOperation] = field(default_factory=dict)  # by stream, since the last write


class Trace:
    """One rank's step. `problems` are uses of tensors that no event orders."""

    def __init__(
        self, rank: int, launch_queue: int, dropped: int | None = None, *, loads_at_launch: bool = False
    ) -> None:
        """Starts a trace for a device that queues `launch_queue` kernels, without the event `dropped`.

        With `loads_at_launch`, the first launch of a kernel in the step loads it.
        """
        self.rank = rank
        self.needs: list[Event] = []
        self.before: list[int] = []  # bits of the nodes that happen before a node
        self.operations: list[DeviceOperation] = []
        self.lasting: list[tuple[int, str, int]] = []  # node and thread of a call that stops other threads, and its end
        self.problems: list[str] = []
        self.waits: list[str] = []  # streams that wait for events
        self._queue = launch_queue
        self._dropped = dropped
        self._threads: dict[str, int] = {}
        self._streams: dict[str, Event] = defaultdict(tuple)
        self._last: dict[str, DeviceOperation] = {}
        self._launched: list[tuple[int, DeviceOperation]] = []  # number of kernels up to an operation
        self._opened: set[Communicator] = set()
        self._loaded: set[str] | None = set() if loads_at_launch else None
        self._uses: dict[str, _Uses] = {}

    def _node(self, needs: Iterable[int]) -> int:
        bits = 0
        for node in needs:
            bits |= self.before[node] | 1 << node
        self.needs.append(tuple(needs))
        self.before.append(bits)
        return len(self.before) - 1

    def is_before(self, first: int, second: int) -> bool:
        """Returns whether a node happens before another in every execution."""
        return bool(self.before[second] >> first & 1)

    def host(self, thread: str, needs: Event = ()) -> int:
        """Adds a call of a host thread, which returns after `needs`."""
        previous = (self._threads[thread],) if thread in self._threads else ()
        self._threads[thread] = self._node((*previous, *needs))
        return self._threads[thread]

    def launch(
        self,
        thread: str,
        stream: str,
        name: str,
        communicator: Communicator | None = None,
        *,
        kernels: int = 0,
        reads: Sequence[str] = (),
        writes: Sequence[str] = (),
    ) -> DeviceOperation:
        """Launches an operation. The launch blocks while `kernels` and those before them do not fit the queue."""
        kernel = _OF_RUN.sub("", name)
        if self._loaded is not None and communicator is None and kernel not in self._loaded:
            self._loaded.add(kernel)
            self._wait_for_device(thread, f"loading of {kernel}")
        total = kernels + (self._launched[-1][0] if self._launched else 0)
        full = next((o.end for at, o in reversed(self._launched) if kernels and total - at >= self._queue), None)
        host = self.host(thread)
        if full is not None and not self.is_before(full, host):
            self.lasting.append((host, thread, full))
            host = self.host(thread, (full,))
        # Two threads that launch on one stream decide its order by a race, unless something orders their calls.
        last = self._last.get(stream)
        is_ordered = last is None or self.is_before(last.host, host)
        start = self._node((host, *(self._streams[stream] if is_ordered else ())))
        operation = DeviceOperation(self.rank, thread, stream, name, communicator, host, start, self._node((start,)))
        self._streams[stream] = (operation.end,)
        self._last[stream] = operation
        self.operations.append(operation)
        if kernels:
            self._launched.append((total, operation))
        for tensor in (*reads, *writes):
            self._use(operation, tensor, is_write=tensor in writes)
        return operation

    def start_collective(
        self,
        thread: str,
        stream: str,
        communicator: Communicator,
        name: str,
        reads: Sequence[str],
        writes: Sequence[str],
    ) -> Event:
        """Starts a collective or transfer behind a stream, which does not wait; returns its end."""
        if not communicator.is_open and communicator not in self._opened:
            self._opened.add(communicator)
            self._wait_for_device(thread, f"creation of {communicator.name}", communicator)
        for tensor in writes:
            if tensor not in self._uses:
                self.allocate(tensor, stream)
        self.wait(communicator.name, self.event(stream))
        return (self.launch(thread, communicator.name, name, communicator, reads=reads, writes=writes).end,)

    def _wait_for_device(self, thread: str, name: str, communicator: Communicator | None = None) -> None:
        """Blocks a host thread, and launches of others, until the device has run everything launched before.

        The creation of a communicator then waits for all its members (nccl#1082).
        """
        call = self.host(thread)
        start = self._node((call, *(o.end for o in self.operations if self.is_before(o.host, call))))
        operation = DeviceOperation(self.rank, thread, HOST, name, communicator, call, start, self._node((start,)))
        self.operations.append(operation)
        self.lasting.append((call, thread, operation.end))
        self.host(thread, (operation.end,))

    def event(self, stream: str) -> Event:
        """Records an event after everything launched on a stream so far."""
        return self._streams[stream]

    def wait(self, stream: str, event: Event) -> None:
        """Makes later operations of a stream wait for an event."""
        if not set(event) <= set(self._streams[stream]):
            self.waits.append(stream)
            if len(self.waits) - 1 != self._dropped:
                self._streams[stream] += event

    @contextmanager
    def job(self, lane: str) -> Iterator[list[Event]]:
        """Submits what is recorded inside to the thread and stream `lane`; `finish` takes the yielded list."""
        self.host(lane, (self.host("main"),))
        self.wait(lane, self.event("compute"))
        done: list[Event] = []
        yield done
        done += [self.event(lane), (self._threads[lane],)]

    def finish(self, done: Sequence[Event]) -> None:
        """Waits for a job: the main thread until it has been launched, and its stream until it has run."""
        after, launched = done
        self.host("main", launched)
        self.wait("compute", after)

    def synchronize(self, thread: str, event: Event, *, holds_gil: bool = False) -> None:
        """Blocks a host thread until the device has passed an event; with the GIL, all threads."""
        call = self.host(thread)
        if holds_gil:
            self.lasting += [(call, thread, node) for node in event]
        self.host(thread, event)

    def allocate(self, tensor: str, stream: str) -> None:
        """Allocates a tensor from the memory of a stream, which earlier work of the stream may still use."""
        self._uses[tensor] = _Uses({stream}, self.event(stream))

    def record_stream(self, tensor: str, stream: str) -> None:
        """Makes the allocator wait for a stream before it uses the memory again, as in torch."""
        self._uses[tensor].streams.add(stream)

    def free(self, thread: str, tensors: Iterable[str]) -> None:
        """Frees tensors. What the host launches later on the stream of the memory may overwrite them."""
        host = self.host(thread)
        for tensor in tensors:
            uses = self._uses.pop(tensor)
            ended = self.before[host]
            for node in (node for stream in uses.streams for node in self._streams[stream]):
                ended |= self.before[node] | 1 << node
            for operation in (uses.write, *uses.reads.values()):
                if operation is not None and not ended >> operation.end & 1:
                    self.problems.append(f"{operation} may use {tensor} after thread {thread} frees it")

    def _use(self, operation: DeviceOperation, tensor: str, *, is_write: bool) -> None:
        if is_write and tensor not in self._uses:
            self._uses[tensor] = _Uses({operation.stream}, ())
        uses = self._uses[tensor]
        for other in (uses.write, *(uses.reads.values() if is_write else ())):
            if other not in (None, operation) and not self.is_before(other.end, operation.start):
                self.problems.append(f"{operation} uses {tensor} without an event after {other}")
        if not all(self.is_before(node, operation.start) for node in uses.free):
            self.problems.append(f"{operation} uses {tensor} without an event after the last use of its memory")
        if is_write:
            uses.write = operation
            uses.reads = {}
        else:
            uses.reads[operation.stream] = operation
