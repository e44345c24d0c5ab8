"""Sends and receives activations and gradients between pipeline ranks."""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.groups import make_group
from comm.lane import ClosesOnSuccess
from comm.layout import Layout, pipeline_partition
from comm.protocol import Work
from comm.transfers.host_link import host_links
from comm.transfers.message import TRAINING_KINDS, LinkLog, MessageKey, MessageKind, as_bytes
from comm.watchdog.collective_log import Collective, CollectiveLog


class _Link(Protocol):
    """One end of a link: one direction and message kind between two ranks, in FIFO order."""

    def send(self, key: MessageKey, tensor: Tensor) -> None: ...

    def receive(self, key: MessageKey, shape: tuple[int, ...], dtype: torch.dtype) -> Work[Tensor]: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class PipelineTransport(ClosesOnSuccess):
    """Links of one pipeline rank: FIFOs by source, destination and kind, each a communicator on NCCL."""

    def __init__(
        self,
        layout: Layout,
        pairs: Iterable[tuple[int, int]],
        device: torch.device,
        timeout_seconds: float,
        log: CollectiveLog,
        kinds: Sequence[MessageKind] = TRAINING_KINDS,
    ) -> None:
        """Opens the links of `pairs` of pipeline indices, one per kind. Every rank calls it at the same point."""
        self._index = layout.pipeline_index(distributed.get_rank())
        ordered = {(min(pair), max(pair)) for pair in pairs}
        make_links = _device_links if distributed.get_backend() == "nccl" else host_links
        self._links: Mapping[tuple[int, int, str], _Link] = make_links(
            layout, self._index, ordered, device, timeout_seconds, log, kinds
        )

    def post_receive(self, key: MessageKey, shape: Sequence[int], dtype: torch.dtype) -> Work[Tensor]:
        """Posts receives in the order of sends; `wait` raises TransferError for another message, not on NCCL."""
        assert key.destination == self._index
        return self._link(key).receive(key, tuple(shape), dtype)

    def send(self, key: MessageKey, tensor: Tensor) -> None:
        """Sends a tensor with any strides without waiting. The tensor must not change until `flush`."""
        assert key.source == self._index
        self._link(key).send(key, tensor)

    def flush(self) -> None:
        """Waits until all messages have been sent, and raises errors of their transfers."""
        for link in self._links.values():
            link.flush()

    def close(self) -> None:
        """Flushes and ends the links' threads. Every posted receive must have completed."""
        self.flush()
        for link in self._links.values():
            link.close()

    def _link(self, key: MessageKey) -> _Link:
        link = self._links.get((key.source, key.destination, key.kind))
        if link is None:
            known = ", ".join(f"{source}->{destination} {kind}" for source, destination, kind in self._links)
            raise ValueError(
                f"pipeline rank {self._index}: a message must use one of the links {known}, "
                f"is {key.source}->{key.destination} {key.kind}"
            )
        return link


def _device_links(
    layout: Layout,
    index: int,
    pairs: set[tuple[int, int]],
    device: torch.device,
    timeout_seconds: float,
    log: CollectiveLog,
    kinds: Sequence[MessageKind],
) -> dict[tuple[int, int, str], "_DeviceLink"]:
    links: dict[tuple[int, int, str], _DeviceLink] = {}
    # All ranks use one order, which prevents deadlocks. Sorted by parity so that neighboring pairs can start at once.
    ordered = sorted(pairs, key=lambda pair: (pair[0] % 2, pair))
    for (low, high), (members,) in itertools.product(ordered, pipeline_partition(layout)):
        ends = {low: members[low], high: members[high]}
        for (source, destination), kind in itertools.product(((low, high), (high, low)), kinds):
            group = make_group((ends[low], ends[high]), timeout_seconds)
            if group is not None:
                peer = ends[destination if index == source else source]
                link_log = LinkLog(log, kind, (ends[source], ends[destination]))
                link = _DeviceLink(group, peer, device, link_log, is_source=index == source)
                links[source, destination, kind] = link
    return links


class _DeviceLink:
    """One link over NCCL. It sends only the payload's bytes, between device memories."""

    def __init__(self, group: ProcessGroup, peer: int, device: torch.device, log: LinkLog, *, is_source: bool) -> None:
        self._group = group
        self._peer = peer
        self._device = device
        self._log = log
        self._sends: deque[tuple[Collective, distributed.Work, Tensor]] = deque()
        # The first message of a communicator creates it, which blocks both ends. It is exchanged here, where all ranks
        # open links in one order. During the schedule two ranks could block each other.
        first = torch.zeros(1, dtype=torch.uint8, device=device)
        with log.opening():
            if is_source:
                distributed.send(first, peer, group=group)
            else:
                distributed.recv(first, peer, group=group)

    def send(self, key: MessageKey, tensor: Tensor) -> None:
        while self._sends and self._sends[0][1].is_completed():
            self._sends.popleft()
        collective = self._log.start(key)
        payload = as_bytes(tensor)
        work = distributed.isend(payload, self._peer, group=self._group)
        assert work is not None
        self._sends.append((collective, work, payload))

    def receive(self, key: MessageKey, shape: tuple[int, ...], dtype: torch.dtype) -> Work[Tensor]:
        payload = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=self._device)
        collective = self._log.start(key)
        work = distributed.irecv(payload, self._peer, group=self._group)
        assert work is not None
        return _PendingDeviceReceive(work, payload.view(dtype).view(shape), collective, self._log)

    def flush(self) -> None:
        while self._sends:
            collective, work, _ = self._sends.popleft()
            with self._log.awaiting(collective):
                work.wait()

    def close(self) -> None:
        return


class _PendingDeviceReceive:
    """Receive that is posted. After `wait`, the current stream may use the tensor."""

    def __init__(self, work: distributed.Work, tensor: Tensor, collective: Collective, log: LinkLog) -> None:
        self._work = work
        self._tensor = tensor
        self._collective = collective
        self._log = log

    def wait(self) -> Tensor:
        with self._log.awaiting(self._collective):
            self._work.wait()
        return self._tensor
