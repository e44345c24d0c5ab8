"""Proves that the ranks of a step make progress under the rules of NCCL and CUDA, or returns what waits in a cycle.

Every execution obeys the `needs` of the traces. If nothing else can delay an operation, an acyclic graph of them is a
proof for all interleavings of threads, streams and ranks. What else can delay an operation depends on the settings:

- threads that launch on one stream decide its order by a race
- streams that share a hardware queue run in the order of their launches
- with `NCCL_LAUNCH_ORDER_IMPLICIT`, an operation starts after all that its device launched before
- an operation that finds no free SMs waits for the end of others
- a call that holds a lock delays all other threads: a launch into a full queue, the creation of a communicator, a wait
  with the interpreter's lock

A rank is stuck in a collective if any of these can delay its start. Each is assumed to happen whenever the order of the
rank's threads allows it, so a proof is sound, and a reported cycle may need an unlikely order.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from train.streams.trace import HOST, DeviceOperation, Trace

_MOST_LINES = 16


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


@dataclass(frozen=True, slots=True)
class _Peers:
    """Operations of all ranks that belong to one collective, by rank."""

    by_rank: Mapping[int, DeviceOperation]
    spans_copies: bool  # whether ranks that the model represents by one take part


def find_cycle(traces: Sequence[Trace], rules: DeviceRules) -> list[str]:
    """Returns operations that wait for each other, one a line, or nothing if all ranks make progress."""
    peers = _match(traces)
    for operation, matched in peers.items():
        assert operation.communicator is not None
        if absent := set(operation.communicator.members) - set(matched.by_rank):
            return [f"{operation}: waits for rank {min(absent)}, which never starts it"]
    return _fixed_cycle(traces, peers) or _possible_cycle(traces, peers, rules)


def _match(traces: Sequence[Trace]) -> dict[DeviceOperation, _Peers]:
    """Finds for each collective its operations on all ranks: those of equal names, in their order."""
    found: dict[tuple[str, str, int], dict[int, DeviceOperation]] = defaultdict(dict)
    for trace in traces:
        number: dict[tuple[str, str], int] = defaultdict(int)
        for operation in trace.operations:
            if operation.communicator is not None:
                name = operation.communicator.name, operation.name
                found[*name, number[name]][trace.rank] = operation
                number[name] += 1
    result = {}
    for by_rank in found.values():
        for operation in by_rank.values():
            assert operation.communicator is not None
            result[operation] = _Peers(by_rank, operation.communicator.spans_copies)
    return result


def _fixed_cycle(traces: Sequence[Trace], peers: Mapping[DeviceOperation, _Peers]) -> list[str]:
    """Returns a cycle of what always waits. Collectives end after they have started on all ranks."""
    offsets = {}
    total = 0
    for trace in traces:
        offsets[trace.rank] = total
        total += len(trace.needs)
    needs: list[list[int]] = [[] for _ in range(total)]
    for trace in traces:
        offset = offsets[trace.rank]
        for node, needed in enumerate(trace.needs):
            needs[offset + node] = [offset + other for other in needed]
    owners: dict[int, DeviceOperation] = {}
    for trace in traces:
        for operation in trace.operations:
            owners[offsets[trace.rank] + operation.end] = operation
            if operation in peers:
                others = peers[operation].by_rank
                needs[offsets[trace.rank] + operation.end] += [offsets[rank] + o.start for rank, o in others.items()]
    waiting = _unreachable(needs)
    if not waiting:
        return []
    node = min(waiting)
    path: list[int] = []
    seen: dict[int, int] = {}
    while node not in seen:
        seen[node] = len(path)
        path.append(node)
        node = next(other for other in needs[node] if other in waiting)
    # A communicator's operations are what people know; computations between them are left out.
    named = [owners[node] for node in path[seen[node] :] if node in owners]
    return _lines([operation for operation in named if operation.communicator is not None] or named)


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


def _possible_cycle(traces: Sequence[Trace], peers: Mapping[DeviceOperation, _Peers], rules: DeviceRules) -> list[str]:
    """Returns a cycle that some order of threads allows."""
    delays = {trace.rank: _Delays(trace, rules) for trace in traces}
    if not any(delay.exist for delay in delays.values()):
        return []
    waits: dict[DeviceOperation, list[DeviceOperation]] = {}
    for trace in traces:
        delay = delays[trace.rank]
        for operation in trace.operations:
            if operation in peers:
                waits[operation] = [
                    other
                    for awaited in delay.awaited(operation)
                    for rank, other in peers[awaited].by_rank.items()
                    if rank != trace.rank or peers[awaited].spans_copies
                ]
    return _lines(_shortest_cycle(waits))


class _Delays:
    """What can delay operations of one rank in addition to what always does."""

    def __init__(self, trace: Trace, rules: DeviceRules) -> None:
        self._trace = trace
        self._rules = rules
        self._collectives = [operation for operation in trace.operations if operation.communicator is not None]
        threads: dict[str, set[str]] = defaultdict(set)
        for operation in trace.operations:
            threads[operation.stream].add(operation.thread)
        self._raced = {stream for stream, launching in threads.items() if len(launching) > 1 and stream != HOST}
        self._share_queues = len(threads) > rules.queues
        self._lack_sms = most_resident_ctas(trace) >= rules.sms
        starters = {operation.thread for operation in self._collectives}
        self._order_starts = rules.orders_starts and len(starters) > 1
        self._depend_on_launches = bool(self._raced or self._share_queues or self._order_starts)
        self._delaying = {o.start: (self._by_launches(o), self._by_residents(o)) for o in trace.operations}
        self._delayed = sum(1 << start for start, delaying in self._delaying.items() if any(delaying))

    @property
    def exist(self) -> bool:
        """Whether anything can be delayed."""
        return bool(self._delayed)

    def awaited(self, operation: DeviceOperation) -> list[DeviceOperation]:
        """Returns the collectives whose end the start of an operation may wait for."""
        trace = self._trace
        reached = trace.before[operation.start] | 1 << operation.start
        later = resident = followed = 0
        while fresh := reached & self._delayed & ~followed:
            # In an order of launches that delays the operation, what is launched after it delays nothing.
            later = later or sum(
                1 << other.end | 1 << other.start
                for other in trace.operations
                if other is operation or trace.is_before(operation.host, other.host)
            )
            followed |= fresh
            for start in bits_of(fresh):
                launched, held = self._delaying[start]
                resident |= held
                for node in bits_of(launched & ~reached & ~later):
                    reached |= trace.before[node] | 1 << node
        return [other for other in self._collectives if (reached | resident) >> other.end & 1]

    def _by_launches(self, operation: DeviceOperation) -> int:
        """Returns the bits of nodes for which an operation waits if they are launched before it."""
        trace = self._trace
        bits = 0
        for call, thread, end in trace.lasting:
            if thread != operation.thread and not trace.is_before(operation.host, call):
                bits |= 1 << end
        creates = operation.stream == HOST
        for other in trace.operations if self._depend_on_launches or creates else ():
            if other is operation or trace.is_before(operation.host, other.host):
                continue
            if creates:
                bits |= 1 << other.end
            elif other.stream == operation.stream:
                bits |= (other.stream in self._raced) << other.end
            elif self._share_queues:
                bits |= 1 << other.end
            if self._order_starts and operation.communicator is not None and other.communicator is not None:
                bits |= 1 << other.start
        return bits

    def _by_residents(self, operation: DeviceOperation) -> int:
        """Returns the bits of the ends of collectives that may occupy the SMs that an operation needs."""
        bits = 0
        for other in self._collectives if self._lack_sms else ():
            if other.stream != operation.stream and not self._trace.is_before(operation.end, other.start):
                bits |= 1 << other.end
        return bits


def bits_of(number: int) -> Iterator[int]:
    """Yields the places of the bits that are set."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def most_resident_ctas(trace: Trace) -> int:
    """Returns a bound of the SMs that collectives of one rank occupy at once.

    Communicators whose operations never run at the same time count once, with the largest of them.
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


def _shortest_cycle(waits: Mapping[DeviceOperation, Iterable[DeviceOperation]]) -> list[DeviceOperation]:
    """Returns a shortest cycle through the first operation that waits for itself, or nothing."""
    places = {operation: place for place, operation in enumerate(waits)}
    cyclic = _unreachable([[places[other] for other in others if other in places] for others in waits.values()])
    for operation, place in places.items():
        if place not in cyclic:
            continue
        came_from: dict[DeviceOperation, DeviceOperation] = {}
        pending = deque([operation])
        while pending:
            current = pending.popleft()
            for other in waits[current]:
                if other is operation:
                    cycle = [current]
                    while cycle[-1] is not operation:
                        cycle.append(came_from[cycle[-1]])
                    return cycle[::-1]
                if other not in came_from and places.get(other) in cyclic:
                    came_from[other] = current
                    pending.append(other)
    return []


def _lines(cycle: Sequence[DeviceOperation]) -> list[str]:
    if not cycle:
        return []
    lines = [f"{operation} waits for" for operation in cycle[:_MOST_LINES]]
    rest = [f"{len(cycle) - _MOST_LINES} more operations, and those for"] if len(cycle) > _MOST_LINES else []
    return [*lines, *rest, f"{cycle[0]}"]
