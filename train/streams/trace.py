"""Records what one rank's host threads launch on its streams, what waits for what, and who uses which tensor.

A node is something that happens once: a host call returns, or an operation of the device starts or ends. `needs` lists
the nodes that happened before in every execution. Nodes are numbered as the program reaches them, so a node only needs
earlier ones of its rank.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

HOST = "host"
"""Stream of operations that a host thread itself runs: the creation of communicators."""


@dataclass(frozen=True, slots=True)
class Communicator:
    """Communicator of NCCL. Its operations run in order on a stream of the same name.

    Attributes:
        members: ranks of the model that take part.
        ctas: most SMs that one of its operations occupies.
        spans_copies: whether further ranks take part that launch the same as a member, so the model leaves them out.
        is_open: whether it exists before the step; else its first operation creates it.
    """

    name: str
    members: tuple[int, ...]
    ctas: int
    spans_copies: bool = False
    is_open: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass(slots=True, eq=False)
class DeviceOperation:
    """Operation on a stream, or the creation of a communicator, with its nodes."""

    rank: int
    thread: str
    stream: str
    name: str
    communicator: Communicator | None
    host: int
    start: int
    end: int

    def __str__(self) -> str:
        by = "" if self.communicator is None else f", communicator {self.communicator}"
        return f"rank {self.rank}, stream {self.stream}, {self.name}{by}"


@dataclass(slots=True)
class _Accesses:
    """Operations that used a tensor since it was allocated, and the streams for which its memory waits when freed."""

    streams: set[str]
    write: DeviceOperation | None = None  # the last one
    reads: dict[str, DeviceOperation] = field(default_factory=dict)  # the last one of each stream since then

    def __iter__(self) -> Iterator[DeviceOperation]:
        yield from () if self.write is None else (self.write,)
        yield from self.reads.values()


@dataclass(frozen=True, slots=True)
class Event:
    """Nodes after which a stream or a host thread may continue."""

    nodes: tuple[int, ...]


class Trace:
    """One rank's step. `problems` are uses of tensors that no event orders."""

    def __init__(self, rank: int, launch_queue: int, dropped: int | None = None) -> None:
        """Starts an empty trace.

        Args:
            launch_queue: kernels that the host can launch ahead of the device.
            dropped: number of the event for which no stream waits; None: streams wait for all.
        """
        self.rank = rank
        self.needs: list[tuple[int, ...]] = []
        self.before: list[int] = []  # bits of the nodes of this rank that happen before a node
        self.operations: list[DeviceOperation] = []
        self.lasting: list[tuple[int, str, int]] = []  # host node, thread and end of a call that stops other threads
        self.problems: list[str] = []
        self.num_events = 0
        self._queue = launch_queue
        self._dropped = dropped
        self._host: dict[str, int] = {}
        self._streams: dict[str, tuple[int, ...]] = defaultdict(tuple)
        self._of_stream: dict[str, list[DeviceOperation]] = defaultdict(list)
        self._launched: list[tuple[int, int]] = []  # kernels up to an operation of the main thread, and its end
        self._opened: set[Communicator] = set()
        self._tensors: dict[str, _Accesses] = {}

    def _node(self, needs: Iterable[int]) -> int:
        needed = tuple(dict.fromkeys(needs))
        bits = 0
        for node in needed:
            bits |= self.before[node] | 1 << node
        self.needs.append(needed)
        self.before.append(bits)
        return len(self.needs) - 1

    def is_before(self, first: int, second: int) -> bool:
        """Returns whether one node of this rank happens before another in every execution."""
        return bool(self.before[second] >> first & 1)

    def host(self, thread: str, needs: Iterable[int] = ()) -> int:
        """Adds a call of a host thread, which returns after all `needs`."""
        previous = (self._host[thread],) if thread in self._host else ()
        self._host[thread] = self._node((*previous, *needs))
        return self._host[thread]

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
        """Launches an operation on a stream; `kernels` of the main thread fill the queue of launches."""
        host = self._launch_host(thread, kernels)
        # Two threads that launch on one stream decide its order by a race, unless something orders their calls.
        last = self._of_stream[stream][-1:]
        is_ordered = all(self.is_before(operation.host, host) for operation in last)
        start = self._node((host, *(self._streams[stream] if is_ordered else ())))
        end = self._node((start,))
        operation = DeviceOperation(self.rank, thread, stream, name, communicator, host, start, end)
        if self._launched and self._launched[-1][1] < 0:
            self._launched[-1] = (self._launched[-1][0], end)
        self._streams[stream] = (end,)
        self._of_stream[stream].append(operation)
        self.operations.append(operation)
        self._use(operation, reads, writes)
        return operation

    def _launch_host(self, thread: str, kernels: int) -> int:
        if not kernels:
            return self.host(thread)
        total = kernels + (self._launched[-1][0] if self._launched else 0)
        full = next((end for at, end in reversed(self._launched) if total - at >= self._queue), None)
        host = self.host(thread)
        if full is not None and not self.is_before(full, host):
            self.lasting.append((host, thread, full))
            host = self.host(thread, [full])
        self._launched.append((total, -1))
        return host

    def start_collective(
        self,
        thread: str,
        stream: str,
        communicator: Communicator,
        name: str,
        reads: Sequence[str],
        writes: Sequence[str],
    ) -> DeviceOperation:
        """Starts a collective or transfer after what `stream` holds, without waiting for it."""
        if not communicator.is_open and communicator not in self._opened:
            self._opened.add(communicator)
            self._create(thread, communicator)
        for tensor in writes:
            if tensor not in self._tensors:
                self.allocate(tensor, stream)
        self.wait(communicator.name, self.event(stream))
        return self.launch(thread, communicator.name, name, communicator, reads=reads, writes=writes)

    def _create(self, thread: str, communicator: Communicator) -> None:
        """Creates a communicator: the host waits for the device, then for all members (nccl#1082)."""
        call = self.host(thread)
        running = [operation.end for operation in self.operations if self.is_before(operation.host, call)]
        start = self._node((call, *running))
        end = self._node((start,))
        name = f"creation of {communicator}"
        self.operations.append(DeviceOperation(self.rank, thread, HOST, name, communicator, call, start, end))
        self.lasting.append((call, thread, end))
        self.host(thread, [end])

    def event(self, stream: str) -> Event:
        """Records an event after everything launched on a stream so far."""
        return Event(self._streams[stream])

    def wait(self, stream: str, event: Event) -> None:
        """Makes later operations of a stream wait for an event, unless that one is dropped."""
        if set(event.nodes) <= set(self._streams[stream]):
            return
        self.num_events += 1
        if self.num_events - 1 != self._dropped:
            self._streams[stream] = (*self._streams[stream], *event.nodes)

    @contextmanager
    def job(self, lane: str, thread: str = "main", stream: str = "compute") -> Iterator[list[Event]]:
        """Submits what is recorded inside to the thread and stream `lane`; `finish` takes the yielded list."""
        self.host(lane, [self.host(thread)])
        self.wait(lane, self.event(stream))
        done: list[Event] = []
        yield done
        done += [self.event(lane), Event((self._host[lane],))]

    def finish(self, done: Sequence[Event], thread: str = "main", stream: str = "compute") -> None:
        """Waits for a job: the host until it has been launched, and the stream until it has run."""
        after, launched = done
        self.host(thread, launched.nodes)
        self.wait(stream, after)

    def synchronize(self, thread: str, event: Event, *, holds_gil: bool = False) -> None:
        """Blocks a host thread, or with the interpreter's lock all of them, until the device has passed an event."""
        call = self.host(thread)
        if holds_gil:
            self.lasting += [(call, thread, node) for node in event.nodes]
        self.host(thread, event.nodes)

    def allocate(self, tensor: str, stream: str) -> None:
        """Allocates a tensor from the memory of a stream."""
        self._tensors[tensor] = _Accesses({stream})

    def record_stream(self, tensor: str, stream: str) -> None:
        """Makes the allocator wait for a stream before it uses the tensor's memory again, as torch's call does."""
        self._tensors[tensor].streams.add(stream)

    def free(self, thread: str, tensors: Iterable[str]) -> None:
        """Frees tensors; operations that the host launches later on the stream of the memory may overwrite them."""
        host = self.host(thread)
        for tensor in tensors:
            accesses = self._tensors.pop(tensor)
            ended = self.before[host]
            for node in (node for stream in accesses.streams for node in self._streams[stream]):
                ended |= self.before[node] | 1 << node
            for operation in accesses:
                if not ended >> operation.end & 1:
                    self._report(f"{operation} may use {tensor} after {thread} frees it")

    def _use(self, operation: DeviceOperation, reads: Sequence[str], writes: Sequence[str]) -> None:
        for tensor in reads:
            accesses = self._tensors[tensor]
            self._require([] if accesses.write is None else [accesses.write], operation, tensor)
            accesses.reads[operation.stream] = operation
        for tensor in writes:
            accesses = self._tensors.setdefault(tensor, _Accesses({operation.stream}))
            self._require(accesses, operation, tensor)
            accesses.write = operation
            accesses.reads = {}

    def _require(self, earlier: Iterable[DeviceOperation], operation: DeviceOperation, tensor: str) -> None:
        for other in earlier:
            if other is not operation and not self.is_before(other.end, operation.start):
                self._report(f"{operation} uses {tensor} without an event after {other}")

    def _report(self, problem: str) -> None:
        self.problems.append(problem)
