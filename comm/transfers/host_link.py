"""Sends and receives messages between pipeline ranks over gloo, through host memory."""

import itertools
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.groups import make_group
from comm.lane import ThreadLane
from comm.layout import Layout, pipeline_partition
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

# A payload up to this size is sent in one message with its header, which costs less than a second message.
_INLINE_BYTES = 16384


def host_links(
    layout: Layout,
    index: int,
    pairs: set[tuple[int, int]],
    device: torch.device,
    timeout_seconds: float,
    log: CollectiveLog,
    kinds: Sequence[MessageKind],
) -> dict[tuple[int, int, str], "HostLink"]:
    """Opens the links of pipeline rank `index` with its peers in `pairs`, by source, destination and kind.

    All links share a communicator and differ by their tags, because each gloo communicator runs a thread that wakes a
    hundred times a second.
    """
    links: dict[tuple[int, int, str], HostLink] = {}
    for (members,) in pipeline_partition(layout):
        with _batch_priority_threads():
            group = make_group(members, timeout_seconds)
        if group is not None:
            mine = [pair for low, high in pairs for pair in ((low, high), (high, low)) if index in pair]
            for (source, destination), kind in itertools.product(mine, kinds):
                peer = destination if index == source else source
                link_log = LinkLog(log, kind, (members[source], members[destination]))
                links[source, destination, kind] = HostLink(group, peer, kind, device, link_log)
    return links


@contextmanager
def _batch_priority_threads() -> Iterator[None]:
    """Starts threads inside with SCHED_BATCH on Linux, so that they do not preempt others on wake-up.

    gloo's event thread polls a connection's lock while a sender holds it. With fewer cores than threads, it would
    preempt that sender and then spin for milliseconds.
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
    """One link over gloo and host memory. A header carries a small payload or is followed by a large one.

    Receive buffers for both are posted in advance, so the sender never waits for a reply. gloo aborts the process if a
    message is larger than its buffer. This cannot happen: the first buffer of each message fits the largest header with
    an inline payload, and the tag of a large payload is derived from its header.
    """

    def __init__(self, group: ProcessGroup, peer: int, kind: MessageKind, device: torch.device, log: LinkLog) -> None:
        self._group = group
        self._peer = peer
        self._header_tag = MESSAGE_KINDS.index(kind)
        self._device = device
        self._log = log
        self._sent: list[tuple[Collective, distributed.Work]] = []
        self._lane: ThreadLane | None = None
        self._pending_sends: list[Work[None]] = []

    def send(self, key: MessageKey, tensor: Tensor) -> None:
        """Starts sending a message."""
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

        # gloo marks a send as finished only if a thread waits for it. Else the payload would be kept until the step
        # ends.
        if self._lane is None:
            self._lane = ThreadLane(f"link-to-{self._peer}")
        self._pending_sends.append(self._lane.submit(wait))

    def _start(self, frame: bytearray) -> distributed.Work:
        return self._group.send([torch.frombuffer(frame, dtype=torch.uint8)], self._peer, self._header_tag)

    def receive(self, key: MessageKey, shape: tuple[int, ...], dtype: torch.dtype) -> Work[Tensor]:
        """Posts the receive of a message. `wait` raises TransferError if another message arrives."""
        expected = Header(key, dtype, shape)
        encoded = expected.encode()
        collective = self._log.start(key)
        frame = bytearray(HEADER_BYTES + _INLINE_BYTES)
        buffer = torch.frombuffer(frame, dtype=torch.uint8)
        works = [self._group.recv([buffer], self._peer, self._header_tag)]
        size = math.prod(shape) * dtype.itemsize
        payload = buffer[HEADER_BYTES : HEADER_BYTES + size]
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

        return _PendingHostReceive(finish)

    def flush(self) -> None:
        """Waits until all messages have been sent."""
        sent = self._sent
        self._sent = []
        pending_sends = self._pending_sends
        self._pending_sends = []
        for collective, work in sent:
            with self._log.awaiting(collective):
                work.wait()
        for job in pending_sends:
            job.wait()

    def close(self) -> None:
        """Ends the thread that waits for sends."""
        if self._lane is not None:
            self._lane.close()


class _PendingHostReceive:
    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish

    def wait(self) -> Tensor:
        return self._finish()


def _payload_tag(header: bytes) -> int:
    """Returns the tag of the payload that follows a header. It differs from all header tags."""
    return zlib.crc32(header) & 0x3FFFFFFF | 0x40000000
