"""Finds ranks of a step that can wait for each other in a cycle under the rules of docs/nccl.md.

Every execution obeys the needs of the traces, and a collective ends after it has started on all its ranks. If nothing
else delays an operation and the graph of these has no cycle, ranks make progress in every order of threads, streams and
ranks. Settings decide what else can delay an operation:

- threads that launch on one stream decide its order by a race
- streams that share a hardware queue run in the order of their launches
- with `NCCL_LAUNCH_ORDER_IMPLICIT`, an operation starts after all that its device launched before
- an operation that finds no free SM waits for the end of others
- a call that holds a lock delays all other threads: a launch into a full queue, the creation of a communicator, the
  loading of a kernel, a wait with the interpreter's lock

Each is assumed to happen whenever the order of the rank's own calls allows it, so a cycle may need an order that other
ranks prevent. What no rule describes is not found: NCCL itself demands more, one order of all operations of a device.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from verify.nccl.trace import HOST, DeviceOperation, Trace

_MOST_LINES = 12
Peers = Mapping[DeviceOperation, Mapping[int, DeviceOperation]]
"""The operations of all ranks that belong to the collective of an operation, by rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRules:
    """Properties of a device and its environment.

    Attributes:
        sms: streaming multiprocessors.
        queues: hardware queues onto which streams are mapped (`CUDA_DEVICE_MAX_CONNECTIONS`).
        orders_starts: whether NCCL orders operations by their launches (`NCCL_LAUNCH_ORDER_IMPLICIT`).
    """

    sms: int
    queues: int
    orders_starts: bool


def find_cycle(traces: Sequence[Trace], rules: DeviceRules) -> list[str]:
    """Returns operations that wait for each other, one a line, or nothing if all ranks make progress."""
    peers = _match(traces)
    for operation, matched in peers.items():
        assert operation.communicator is not None
        if absent := set(operation.communicator.members) - set(matched):
            return [f"{operation} waits for rank {min(absent)}, which never starts it"]
    cycle = _fixed_cycle(traces, peers) or _possible_cycle(traces, peers, rules)
    lines = [f"{operation} waits for" for operation in cycle[:_MOST_LINES]]
    more = len(cycle) - _MOST_LINES
    return [*lines, *([f"{more} more operations, which wait for"] if more > 0 else []), *map(str, cycle[:1])]


def _match(traces: Sequence[Trace]) -> Peers:
    """Finds the operations of each collective on all ranks: those of equal names, in their order."""
    matched: dict[tuple[str, str, int], dict[int, DeviceOperation]] = defaultdict(dict)
    for trace in traces:
        number: dict[tuple[str, str], int] = defaultdict(int)
        for operation in trace.operations:
            if operation.communicator is not None:
                name = operation.communicator.name, operation.name
                matched[*name, number[name]][trace.rank] = operation
                number[name] += 1
    return {operation: by_rank for by_rank in matched.values() for operation in by_rank.values()}


def _fixed_cycle(traces: Sequence[Trace], peers: Peers) -> list[DeviceOperation]:
    """Returns a cycle of what always waits."""
    needs: list[list[int]] = []
    offsets = {}
    for trace in traces:
        offset = offsets[trace.rank] = len(needs)
        needs += [[offset + node for node in needed] for needed in trace.needs]
    owners = {offsets[trace.rank] + o.end: o for trace in traces for o in trace.operations}
    for node, operation in owners.items():
        needs[node] += [offsets[rank] + other.start for rank, other in peers.get(operation, {}).items()]
    waiting = _unreachable(needs)
    if not waiting:
        return []
    path = [min(waiting)]
    while len(set(path)) == len(path):
        path.append(next(node for node in needs[path[-1]] if node in waiting))
    named = [owners[node] for node in path[path.index(path[-1]) + 1 :] if node in owners]
    # Collectives explain a cycle; computations between them are left out.
    return [operation for operation in named if operation in peers] or named


def _unreachable(needs: Sequence[Sequence[int]]) -> set[int]:
    """Returns the nodes that never happen because they need each other."""
    left = [len(needed) for needed in needs]
    dependents: list[list[int]] = [[] for _ in needs]
    for node, needed in enumerate(needs):
        for other in needed:
            dependents[other].append(node)
    ready = [node for node, number in enumerate(left) if not number]
    while ready:
        for node in dependents[ready.pop()]:
            left[node] -= 1
            if not left[node]:
                ready.append(node)
    return {node for node, number in enumerate(left) if number}


def _possible_cycle(traces: Sequence[Trace], peers: Peers, rules: DeviceRules) -> list[DeviceOperation]:
    """Returns a short cycle that some order of launches allows."""
    delays = {trace.rank: _Delays(trace, rules) for trace in traces}
    if not any(delay.delayed for delay in delays.values()):
        return []
    known: dict[DeviceOperation, list[DeviceOperation]] = {}

    def waits(operation: DeviceOperation) -> list[DeviceOperation]:
        """Returns the operations of other ranks, or of copies of this one, that may delay a start."""
        if operation not in known:
            known[operation] = [
                other
                for awaited in delays[operation.rank].awaited(operation)
                for rank, other in peers[awaited].items()
                if rank != operation.rank or (awaited.communicator is not None and awaited.communicator.spans_copies)
            ]
        return known[operation]

    finished: set[DeviceOperation] = set()
    for root in peers:
        path = {root: iter(waits(root))} if root not in finished else {}
        while path:
            operation = next(reversed(path))
            following = next(path[operation], None)
            if following is None:
                finished.add(operation)
                del path[operation]
            elif following in path:
                return _shortest_cycle(following, waits)
            elif following not in finished:
                path[following] = iter(waits(following))
    return []


def _shortest_cycle(
    root: DeviceOperation, waits: Callable[[DeviceOperation], list[DeviceOperation]]
) -> list[DeviceOperation]:
    """Returns a shortest cycle through an operation that waits for itself."""
    sources: dict[DeviceOperation, DeviceOperation] = {}
    pending = deque([root])
    while root not in sources:
        operation = pending.popleft()
        for other in waits(operation):
            if other not in sources:
                sources[other] = operation
                pending.append(other)
    cycle = [sources[root]]
    while cycle[-1] is not root:
        cycle.append(sources[cycle[-1]])
    return cycle[::-1]


class _Delays:
    """What can delay operations of one rank in addition to what always does."""

    def __init__(self, trace: Trace, rules: DeviceRules) -> None:
        self._trace = trace
        self._collectives = [operation for operation in trace.operations if operation.communicator is not None]
        threads: dict[str, set[str]] = defaultdict(set)
        for operation in trace.operations:
            threads[operation.stream].add(operation.thread)
        self._raced = {stream for stream, launching in threads.items() if len(launching) > 1 and stream != HOST}
        self._share_queues = len(threads) > rules.queues
        self._orders_starts = rules.orders_starts and len({o.thread for o in self._collectives}) > 1
        self._lacks_sms = most_resident_ctas(trace) >= rules.sms
        self._by_start = {operation.start: operation for operation in trace.operations}
        self._known: dict[int, tuple[int, int]] = {}

    @cached_property
    def delayed(self) -> int:
        """The bits of the starts that something may delay."""
        if self._raced or self._share_queues or self._orders_starts or self._lacks_sms:
            return sum(1 << start for start in self._by_start)
        return sum(1 << start for start in self._by_start if any(self._delaying(start)))

    def awaited(self, operation: DeviceOperation) -> list[DeviceOperation]:
        """Returns the collectives whose end the start of an operation may wait for."""
        trace = self._trace
        reached = trace.before[operation.start] | 1 << operation.start
        later = resident = followed = 0
        while fresh := reached & self.delayed & ~followed:
            # In an order of launches that delays the operation, what is launched after it delays nothing.
            later = later or sum(
                1 << other.end | 1 << other.start
                for other in trace.operations
                if other is operation or trace.is_before(operation.host, other.host)
            )
            followed |= fresh
            for start in _bits_of(fresh):
                launched, held = self._delaying(start)
                resident |= held
                for node in _bits_of(launched & ~reached & ~later):
                    reached |= trace.before[node] | 1 << node
        return [other for other in self._collectives if (reached | resident) >> other.end & 1]

    def _delaying(self, start: int) -> tuple[int, int]:
        """Returns nodes that delay an operation if they are launched before it, and ends that free SMs."""
        if start not in self._known:
            operation = self._by_start[start]
            is_before = self._trace.is_before
            launched = held = 0
            for call, thread, end in self._trace.lasting:
                if thread != operation.thread and not is_before(operation.host, call):
                    launched |= 1 << end
            is_ordered = self._orders_starts and operation.communicator is not None
            if self._raced or self._share_queues or is_ordered or operation.stream == HOST:
                for other in self._trace.operations:
                    if other is operation or is_before(operation.host, other.host):
                        continue
                    is_shared = other.stream in self._raced if other.stream == operation.stream else self._share_queues
                    launched |= (is_shared or operation.stream == HOST) << other.end
                    launched |= (is_ordered and other.communicator is not None) << other.start
            for other in self._collectives if self._lacks_sms else ():
                if other.stream != operation.stream and not is_before(operation.end, other.start):
                    held |= 1 << other.end
            self._known[start] = launched, held
        return self._known[start]


def _bits_of(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def most_resident_ctas(trace: Trace) -> int:
    """Returns a bound of the SMs that collectives of one rank occupy at once.

    Communicators that never run at the same time count once, with the largest of them.
    """
    by_communicator: dict[str, list[DeviceOperation]] = defaultdict(list)
    for operation in trace.operations:
        if operation.communicator is not None:
            by_communicator[operation.communicator.name].append(operation)
    chains: list[list[DeviceOperation]] = []
    for operations in by_communicator.values():
        for index, chain in enumerate(chains):
            merged = sorted([*chain, *operations], key=lambda operation: operation.start)
            if all(trace.is_before(a.end, b.start) for a, b in pairwise(merged)):
                chains[index] = merged
                break
        else:
            chains.append(operations)
    return sum(max(o.communicator.ctas for o in chain if o.communicator is not None) for chain in chains)
