"""Sends and receives activations and gradients between pipeline ranks.

Messages have headers and enter the log. With gloo they pass through host memory.
"""

import itertools
import math
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, Self, get_args

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.config import LINK_CTAS
from comm.groups import GroupKernels, make_group
from comm.lane import ClosesOnSuccess, ThreadLane
from comm.layout import Layout, pipeline_partition
from comm.protocol import CompletedWork, MappedWork, Work
from comm.watchdog.collective_log import Collective, CollectiveLog, LoggedWork

MessageKind = Literal["activation", "gradient", "tokens"]
MESSAGE_KINDS: tuple[MessageKind, ...] = get_args(MessageKind)
TRAINING_KINDS: tuple[MessageKind, ...] = ("activation", "gradient")
DECODING_KINDS: tuple[MessageKind, ...] = ("activation", "tokens")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int64)
_MAX_DIMS = 8
# A receive is posted long before its message is sent, and occupies its SMs from then on.
_LINK_KERNELS = GroupKernels(max_ctas=LINK_CTAS, is_urgent=True)
_FORMAT = struct.Struct(f"<{8 + _MAX_DIMS}q")
HEADER_BYTES = _FORMAT.size


class TransferError(RuntimeError):
    """Raised if a link delivers another message than expected: its two ranks disagree on the order."""

    def __init__(self, place: str, expected: str, got: str) -> None:
        super().__init__(f"{place}: expected {expected}, got {got}")
        self.place = place
        self.expected = expected
        self.got = got


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageKey:
    """Identity of a message, with pipeline indices; both ends use the same stage number."""

    kind: MessageKind
    direction: int
    stage: int
    micro_batch: int
    source: int
    destination: int

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.source}->{self.destination} of direction {self.direction}, stage {self.stage}, "
            f"micro-batch {self.micro_batch}"
        )


@dataclass(frozen=True, slots=True)
class Header:
    """Header that precedes a payload; raises ValueError if it cannot hold the dtype or dimensions."""

    key: MessageKey
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"transfer: a message's dtype must be one of {_DTYPES}, is {self.dtype}")
        if len(self.shape) > _MAX_DIMS:
            raise ValueError(f"transfer: a message must have at most {_MAX_DIMS} dimensions, has shape {self.shape}")

    def encode(self) -> bytes:
        """Encodes the header in `HEADER_BYTES` bytes, which are unique for each header."""
        key = self.key
        return _FORMAT.pack(
            MESSAGE_KINDS.index(key.kind),
            key.direction,
            key.stage,
            key.micro_batch,
            key.source,
            key.destination,
            _DTYPES.index(self.dtype),
            len(self.shape),
            *self.shape,
            *(0,) * (_MAX_DIMS - len(self.shape)),
        )

    @classmethod
    def decode(cls, encoded: bytes | bytearray) -> Self:
        """Decodes the bytes that `encode` returned."""
        kind, direction, stage, micro_batch, source, destination, dtype, num_dims, *shape = _FORMAT.unpack(encoded)
        key = MessageKey(
            kind=MESSAGE_KINDS[kind],
            direction=direction,
            stage=stage,
            micro_batch=micro_batch,
            source=source,
            destination=destination,
        )
        return cls(key, _DTYPES[dtype], tuple(shape[:num_dims]))

    def __str__(self) -> str:
        return f"{self.key}, {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def as_bytes(tensor: Tensor) -> Tensor:
    """Returns the bytes of a tensor as a flat uint8 tensor on the same device."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


class LinkLog:
    """Log of one link: one direction and message kind between two ranks, logged as a separate group."""

    def __init__(self, log: CollectiveLog, kind: MessageKind, ranks: tuple[int, int]) -> None:
        self.log = log
        self._ranks = ranks
        self._group = f"{kind} {ranks[0]}->{ranks[1]}"

    def start(self, key: MessageKey) -> Collective:
        """Logs the link's next message, when it is sent or its receive is posted."""
        return self.log.start(self._group, self._ranks, "transfer", key)

    def opening(self) -> AbstractContextManager[None]:
        """Logs the opening of the link while inside."""
        return self.log.awaiting(self.log.start(self._group, self._ranks, "opening of the link"))

    def awaiting(self, collective: Collective) -> AbstractContextManager[None]:
        """Logs that this end waits for the message while inside."""
        return self.log.awaiting(collective)


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
            links = ", ".join(f"{source}->{destination} {kind}" for source, destination, kind in self._links)
            raise ValueError(
                f"pipeline rank {self._index}: a message must use one of the links {links}, "
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
            group = make_group((ends[low], ends[high]), timeout_seconds, _LINK_KERNELS)
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
        # A send that failed is complete, too: its error names the message now, not when the schedule has ended.
        while self._sends and self._sends[0][1].is_completed():
            self._finish_first()
        collective = self._log.start(key)
        payload = as_bytes(tensor)
        work = distributed.isend(payload, self._peer, group=self._group)
        assert work is not None
        self._sends.append((collective, work, payload))

    def receive(self, key: MessageKey, shape: tuple[int, ...], dtype: torch.dtype) -> Work[Tensor]:
        payload = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=self._device)
        collective = self._log.start(key)
        work = distributed.irecv(payload, self._peer, group=self._group)
        return LoggedWork(self._log.log, collective, work, payload.view(dtype).view(shape))

    def flush(self) -> None:
        while self._sends:
            self._finish_first()

    def _finish_first(self) -> None:
        collective, work, _ = self._sends.popleft()
        with self._log.awaiting(collective):
            work.wait()

    def close(self) -> None:
        return


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

    All links share a communicator and differ by their tags.
    """
    links: dict[tuple[int, int, str], HostLink] = {}
    for (members,) in pipeline_partition(layout):
        group = make_group(members, timeout_seconds)
        if group is not None:
            rank_pairs = [pair for low, high in pairs for pair in ((low, high), (high, low)) if index in pair]
            for (source, destination), kind in itertools.product(rank_pairs, kinds):
                peer = destination if index == source else source
                link_log = LinkLog(log, kind, (members[source], members[destination]))
                links[source, destination, kind] = HostLink(group, peer, kind, device, link_log)
    return links


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
        self._lane: ThreadLane | None = None
        self._pending_sends: list[Work[None]] = []

    def send(self, key: MessageKey, tensor: Tensor) -> None:
        """Starts sending a message."""
        header = Header(key, tensor.dtype, tuple(tensor.shape)).encode()
        collective = self._log.start(key)
        payload = as_bytes(tensor.to("cpu"))
        if len(payload) <= _INLINE_BYTES:
            work = self._start(bytearray(header) + payload.numpy().data)
            self._pending_sends.append(LoggedWork(self._log.log, collective, work, None))
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

        def finish(_: None) -> Tensor:
            with self._log.awaiting(collective):
                works[0].wait()
                if not frame.startswith(encoded):
                    got = Header.decode(frame[:HEADER_BYTES])
                    raise TransferError(f"pipeline rank {key.destination}", str(expected), str(got))
                for work in works[1:]:
                    work.wait()
            return payload.view(dtype).view(shape).to(self._device)

        return MappedWork(CompletedWork(None), finish)

    def flush(self) -> None:
        """Waits until all messages have been sent."""
        pending_sends = self._pending_sends
        self._pending_sends = []
        for send in pending_sends:
            send.wait()

    def close(self) -> None:
        """Ends the thread that waits for sends."""
        if self._lane is not None:
            self._lane.close()


def _payload_tag(header: bytes) -> int:
    """Returns the tag of the payload that follows a header. It differs from all header tags."""
    return zlib.crc32(header) & 0x3FFFFFFF | 0x40000000
