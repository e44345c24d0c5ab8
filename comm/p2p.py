"""Activations and gradients on their way between pipeline ranks."""

import itertools
import math
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.closing import ClosesOnSuccess
from comm.groups import make_group
from comm.lane import ThreadLane
from comm.layout import Layout
from comm.message import HEADER_BYTES, MESSAGE_KINDS, Header, MessageKey, MessageKind, TransferError
from comm.protocol import Work

# A payload up to this size is copied into its header's message, which costs less than a message of its own.
_INLINE_BYTES = 16384


class _Link(Protocol):
    """One way and kind between two ranks, as one of its ends sees it. Keeps its order."""

    def send(self, key: MessageKey, tensor: Tensor) -> None: ...

    def receive(self, key: MessageKey, shape: tuple[int, ...], dtype: torch.dtype) -> Work[Tensor]: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Transport(ClosesOnSuccess):
    """The links of one pipeline rank.

    Each (source, destination, kind) keeps the order in which its messages were sent, and no message waits behind
    one of another link: on NCCL each is a communicator of its own, on gloo all share one and differ by their tags.
    """

    def __init__(
        self, layout: Layout, pairs: Iterable[tuple[int, int]], device: torch.device, timeout_seconds: float
    ) -> None:
        """Made by every rank of the job at the same point.

        Args:
            layout: of the world.
            pairs: pipeline indices that exchange messages; see `adjacent_pairs`.
            device: where tensors live; gloo is staged through the host.
            timeout_seconds: of one transfer, from its start on both sides.
        """
        self._index = layout.pipeline_index(distributed.get_rank())
        ordered = {(min(pair), max(pair)) for pair in pairs}
        make_links = _device_links if distributed.get_backend() == "nccl" else _host_links
        self._links = make_links(layout, self._index, ordered, device, timeout_seconds)

    def post_receive(self, key: MessageKey, shape: Sequence[int], dtype: torch.dtype) -> Work[Tensor]:
        """Makes room for a message, in the order in which its link's messages are sent.

        Args:
            key: what is due; its destination is this rank.
            shape: of the tensor.
            dtype: of the tensor.

        Returns:
            Work whose `wait` gives the tensor on the transport's device, or raises `TransferError` when
            something else came. On NCCL what comes is not checked.

        Raises:
            ValueError: there is no such link.
        """
        assert key.destination == self._index
        return self._link(key).receive(key, tuple(shape), dtype)

    def send(self, key: MessageKey, tensor: Tensor) -> None:
        """Sends without waiting for the other side. The tensor must not change until `flush`.

        Args:
            key: what it is; its source is this rank.
            tensor: of any strides; kept until it has left.

        Raises:
            ValueError: there is no such link, or the tensor's type cannot travel.
        """
        assert key.source == self._index
        self._link(key).send(key, tensor)

    def flush(self) -> None:
        """Waits until everything sent has left; raises what went wrong on the way."""
        for link in self._links.values():
            link.flush()

    def close(self) -> None:
        """Flushes and ends the links' threads; every receive posted must have its message."""
        self.flush()
        for link in self._links.values():
            link.close()

    def _link(self, key: MessageKey) -> _Link:
        link = self._links.get((key.source, key.destination, key.kind))
        if link is None:
            known = ", ".join(f"{source}->{destination} {kind}" for source, destination, kind in self._links)
            raise ValueError(
                f"pipeline rank {self._index}: a message must take one of the links {known}, "
                f"got {key.source}->{key.destination} {key.kind}"
            )
        return link


def adjacent_pairs(num_ranks: int) -> list[tuple[int, int]]:
    """The pairs of a pipeline whose stages follow its ranks, in either direction."""
    return [(index, index + 1) for index in range(num_ranks - 1)]


_Links = dict[tuple[int, int, str], _Link]


def _host_links(
    layout: Layout, index: int, pairs: set[tuple[int, int]], device: torch.device, timeout_seconds: float
) -> _Links:
    """A communicator for each pipeline: each costs gloo a thread that wakes a hundred times a second."""
    links: _Links = {}
    for data_index in range(layout.parallelism.data):
        members = tuple(layout.rank(member, data_index) for member in range(layout.parallelism.pipeline))
        with _unassuming_threads():
            group = make_group(members, timeout_seconds)
        if group is not None:
            mine = [pair for low, high in pairs for pair in ((low, high), (high, low)) if index in pair]
            for (source, destination), kind in itertools.product(mine, MESSAGE_KINDS):
                peer = destination if index == source else source
                links[source, destination, kind] = _HostLink(group, peer, kind, device)
    return links


@contextmanager
def _unassuming_threads() -> Iterator[None]:
    """What starts a thread within, starts one that never preempts another when it wakes, where Linux lets it.

    gloo's event thread asks for a connection's lock again and again while a sender holds it. Where cores are fewer
    than threads, it would push that very sender off its core and then spin for milliseconds.
    """
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    unprivileged = os.sched_param(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, unprivileged)
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, unprivileged)


class _HostLink:
    """Over gloo, from and to host memory: a header with a small payload in it, or followed by a large one.

    Room for both is made before they come, so that neither waits for an answer, and both leave and arrive on the
    caller's thread. A message larger than its room would abort the process. But every link's first room is for the
    largest header; and what follows a header has a tag made of it, so it never meets the room for another message.
    """

    def __init__(self, group: ProcessGroup, peer: int, kind: MessageKind, device: torch.device) -> None:
        """`peer`: its rank within `group`."""
        self._group = group
        self._peer = peer
        self._header_tag = MESSAGE_KINDS.index(kind)
        self._device = device
        self._sent: list[distributed.Work] = []
        self._lane: ThreadLane | None = None
        self._leaving: list[Work[None]] = []

    def send(self, key: MessageKey, tensor: Tensor) -> None:
        header = Header(key, tensor.dtype, tuple(tensor.shape)).encode()
        payload = _as_bytes(tensor.to("cpu"))
        if len(payload) <= _INLINE_BYTES:
            self._sent.append(self._start(bytearray(header) + payload.numpy().data))
            return
        works = [self._start(bytearray(header)), self._group.send([payload], self._peer, _payload_tag(header))]

        def wait() -> None:
            for work in works:
                work.wait()

        # gloo tells of a finished send only to who waits for it: else the payload would stay until the step's end.
        if self._lane is None:
            self._lane = ThreadLane(f"link-to-{self._peer}")
        self._leaving.append(self._lane.submit(wait))

    def _start(self, frame: bytearray) -> distributed.Work:
        return self._group.send([torch.frombuffer(frame, dtype=torch.uint8)], self._peer, self._header_tag)

    def receive(self, key: MessageKey, shape: tuple[int, ...], dtype: torch.dtype) -> Work[Tensor]:
        expected = Header(key, dtype, shape)
        encoded = expected.encode()
        frame = bytearray(HEADER_BYTES + _INLINE_BYTES)
        room = torch.frombuffer(frame, dtype=torch.uint8)
        works = [self._group.recv([room], self._peer, self._header_tag)]
        size = math.prod(shape) * dtype.itemsize
        payload = room[HEADER_BYTES : HEADER_BYTES + size]
        if size > _INLINE_BYTES:
            payload = torch.empty(size, dtype=torch.uint8)
            works.append(self._group.recv([payload], self._peer, _payload_tag(encoded)))

        def finish() -> Tensor:
            works[0].wait()
            if not frame.startswith(encoded):
                got = Header.decode(frame[:HEADER_BYTES])
                raise TransferError(f"pipeline rank {key.destination}", str(expected), str(got))
            for work in works[1:]:
                work.wait()
            return payload.view(dtype).view(shape).to(self._device)

        return _HostReceipt(finish)

    def flush(self) -> None:
        sent, self._sent = self._sent, []
        leaving, self._leaving = self._leaving, []
        for work in sent:
            work.wait()
        for job in leaving:
            job.wait()

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()


class _HostReceipt:
    """A message on its way here."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish

    def wait(self) -> Tensor:
        return self._finish()


def _payload_tag(header: bytes) -> int:
    """A tag for what follows a header: never one of the headers' own."""
    return zlib.crc32(header) & 0x3FFFFFFF | 0x40000000


def _device_links(
    layout: Layout, index: int, pairs: set[tuple[int, int]], device: torch.device, timeout_seconds: float
) -> _Links:
    """A communicator for each link."""
    links: _Links = {}
    # One order for all ranks, so that none wait crosswise; by parity, so that neighbouring pairs do not queue up.
    ordered = sorted(pairs, key=lambda pair: (pair[0] % 2, pair))
    for (low, high), data_index in itertools.product(ordered, range(layout.parallelism.data)):
        ends = {low: layout.rank(low, data_index), high: layout.rank(high, data_index)}
        for (source, destination), kind in itertools.product(((low, high), (high, low)), MESSAGE_KINDS):
            group = make_group((ends[low], ends[high]), timeout_seconds)
            if group is not None:
                peer = ends[destination if index == source else source]
                links[source, destination, kind] = _DeviceLink(group, peer, device, index == source)
    return links


class _DeviceLink:
    """Over NCCL: the payload's bytes alone, from and to device memory."""

    def __init__(self, group: ProcessGroup, peer: int, device: torch.device, is_source: bool) -> None:
        self._group = group
        self._peer = peer
        self._device = device
        self._sends: deque[tuple[distributed.Work, Tensor]] = deque()
        # The first message of a communicator makes it, and blocks both ends meanwhile: so it is exchanged here,
        # where links come in one order, and not amid the schedule, where two ranks could block each other.
        first = torch.zeros(1, dtype=torch.uint8, device=device)
        if is_source:
            distributed.send(first, peer, group=group)
        else:
            distributed.recv(first, peer, group=group)

    def send(self, key: MessageKey, tensor: Tensor) -> None:
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()
        payload = _as_bytes(tensor)
        work = distributed.isend(payload, self._peer, group=self._group)
        assert work is not None
        self._sends.append((work, payload))

    def receive(self, key: MessageKey, shape: tuple[int, ...], dtype: torch.dtype) -> Work[Tensor]:
        payload = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=self._device)
        work = distributed.irecv(payload, self._peer, group=self._group)
        assert work is not None
        return _DeviceReceipt(work, payload.view(dtype).view(shape))

    def flush(self) -> None:
        while self._sends:
            self._sends.popleft()[0].wait()

    def close(self) -> None:
        return


class _DeviceReceipt:
    """A tensor that the current stream may use once it has waited."""

    def __init__(self, work: distributed.Work, tensor: Tensor) -> None:
        self._work = work
        self._tensor = tensor

    def wait(self) -> Tensor:
        self._work.wait()
        return self._tensor


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
