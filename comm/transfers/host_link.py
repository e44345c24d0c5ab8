"""Messages between pipeline ranks over gloo, from and to host memory."""

import itertools
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.groups import make_group
from comm.lane import ThreadLane
from comm.layout import Layout
from comm.protocol import Work
from comm.transfers.message import (
    HEADER_BYTES,
    MESSAGE_KINDS,
    Header,
    LinkLog,
    MessageKey,
    MessageKind,
    TransferError,
    as_bytes,
)
from comm.watchdog.collective_log import Collective, CollectiveLog

# A payload up to this size is copied into its header's message, which costs less than a message of its own.
_INLINE_BYTES = 16384


def host_links(
    layout: Layout,
    index: int,
    pairs: set[tuple[int, int]],
    device: torch.device,
    timeout_seconds: float,
    log: CollectiveLog,
) -> dict[tuple[int, int, str], "HostLink"]:
    """Returns the links of pipeline rank `index` with its peers in `pairs`, by source, destination and kind.

    All share a communicator, and differ by their tags: each costs gloo a thread that wakes a hundred times a second.
    See `comm.transfers.transport.PipelineTransport` for the arguments.
    """
    links: dict[tuple[int, int, str], HostLink] = {}
    for data_index in range(layout.parallelism.data):
        members = tuple(layout.rank(member, data_index) for member in range(layout.parallelism.pipeline))
        with _batch_priority_threads():
            group = make_group(members, timeout_seconds)
        if group is not None:
            mine = [pair for low, high in pairs for pair in ((low, high), (high, low)) if index in pair]
            for (source, destination), kind in itertools.product(mine, MESSAGE_KINDS):
                peer = destination if index == source else source
                link_log = LinkLog(log, kind, (members[source], members[destination]))
                links[source, destination, kind] = HostLink(group, peer, kind, device, link_log)
    return links


@contextmanager
def _batch_priority_threads() -> Iterator[None]:
    """Lets threads that are started inside never preempt another when they wake, if this is Linux.

    gloo's event thread tries to take a connection's lock again and again while a sender holds it. Where cores are fewer
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


class HostLink:
    """Over gloo, from and to host memory: a header with a small payload in it, or followed by a large one.

    Room for both is made before they come, so that neither waits for an answer, and both leave and arrive on the
    caller's thread. A message larger than its room would abort the process. But every link's first room is for the
    largest header; and what follows a header has a tag made of it, so it never meets the room for another message.
    """

    def __init__(self, group: ProcessGroup, peer: int, kind: MessageKind, device: torch.device, log: LinkLog) -> None:
        """Opens one end; `peer`: the other's rank within `group`."""
        self._group = group
        self._peer = peer
        self._header_tag = MESSAGE_KINDS.index(kind)
        self._device = device
        self._log = log
        self._sent: list[tuple[Collective, distributed.Work]] = []
        self._lane: ThreadLane | None = None
        self._pending_sends: list[Work[None]] = []

    def send(self, key: MessageKey, tensor: Tensor) -> None:
        """Starts a message."""
        header = Header(key, tensor.dtype, tuple(tensor.shape)).encode()
        collective = self._log.start(key)
        payload = as_bytes(tensor.to("cpu"))
        if len(payload) <= _INLINE_BYTES:
            self._sent.append((collective, self._start(bytearray(header) + payload.numpy().data)))
            return
        works = [self._start(bytearray(header)), self._group.send([payload], self._peer, _payload_tag(header))]

        def wait() -> None:
            with self._log.awaiting(collective):
                for work in works:
                    work.wait()

        # gloo reports a finished send only to a thread that waits; else the payload would stay until the step ends.
        if self._lane is None:
            self._lane = ThreadLane(f"link-to-{self._peer}")
        self._pending_sends.append(self._lane.submit(wait))

    def _start(self, frame: bytearray) -> distributed.Work:
        return self._group.send([torch.frombuffer(frame, dtype=torch.uint8)], self._peer, self._header_tag)

    def receive(self, key: MessageKey, shape: tuple[int, ...], dtype: torch.dtype) -> Work[Tensor]:
        """Makes room for a message."""
        expected = Header(key, dtype, shape)
        encoded = expected.encode()
        collective = self._log.start(key)
        frame = bytearray(HEADER_BYTES + _INLINE_BYTES)
        room = torch.frombuffer(frame, dtype=torch.uint8)
        works = [self._group.recv([room], self._peer, self._header_tag)]
        size = math.prod(shape) * dtype.itemsize
        payload = room[HEADER_BYTES : HEADER_BYTES + size]
        if size > _INLINE_BYTES:
            payload = torch.empty(size, dtype=torch.uint8)
            works.append(self._group.recv([payload], self._peer, _payload_tag(encoded)))

        def finish() -> Tensor:
            with self._log.awaiting(collective):
                works[0].wait()
                if not frame.startswith(encoded):
                    got = Header.decode(frame[:HEADER_BYTES])
                    raise TransferError(f"pipeline rank {key.destination}", str(expected), str(got))
                for work in works[1:]:
                    work.wait()
            return payload.view(dtype).view(shape).to(self._device)

        return _HostReceipt(finish)

    def flush(self) -> None:
        """Waits until everything sent has left."""
        sent, self._sent = self._sent, []
        pending_sends, self._pending_sends = self._pending_sends, []
        for collective, work in sent:
            with self._log.awaiting(collective):
                work.wait()
        for job in pending_sends:
            job.wait()

    def close(self) -> None:
        """Ends the thread."""
        if self._lane is not None:
            self._lane.close()


class _HostReceipt:
    """A message on its way here."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish

    def wait(self) -> Tensor:
        return self._finish()


def _payload_tag(header: bytes) -> int:
    """Returns a tag for what follows a header: never one of the headers' own."""
    return zlib.crc32(header) & 0x3FFFFFFF | 0x40000000
