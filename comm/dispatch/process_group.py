"""All-to-alls over one process group: each logged, awaited under the watch's eyes, and counted.

Shape legend: R ranks of the group, C numbers for each, N rows sent, M rows received, B bytes of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.dispatch.traffic import ClipCount, Spread, Traffic
from comm.layout import Layout
from comm.protocol import Label
from comm.watchdog.collective_log import Collective, CollectiveLog, group_name


@dataclass(frozen=True, slots=True)
class Observers:
    """Who looks on: `traffic` counts what is sent, `log` notes every collective, `clips` counts clipped tokens."""

    traffic: Traffic
    log: CollectiveLog
    clips: ClipCount = field(default_factory=ClipCount)


class ExchangeGroup:
    """One process group as its exchanges see it. Used from the comm lane alone.

    Attributes:
        members: ranks of the group in the world, by place.
        nodes: of each member.
        place: of this rank.
    """

    members: tuple[int, ...]
    nodes: tuple[int, ...]
    place: int

    def __init__(self, name: str, group: ProcessGroup, layout: Layout, observers: Observers) -> None:
        """Wraps a group; `name`: of its kind, which with the group's ranks makes a unique name."""
        self.members = tuple(distributed.get_process_group_ranks(group))
        self.nodes = tuple(layout.node_of(rank) for rank in self.members)
        self.place = distributed.get_rank(group)
        self._name = group_name(name, self.members)
        self._group = group
        self._observers = observers

    def start_numbers(self, numbers_RC: Tensor, label: Label | None) -> "PendingExchange":
        """Starts to send row r to member r, and gives what each member sent here, RC, by place. Not counted."""
        log = self._observers.log
        if len(self.members) == 1:
            return PendingExchange(None, numbers_RC, numbers_RC, None, log)
        received_RC = torch.empty_like(numbers_RC)
        collective = self._start("exchange of counts", label)
        work = distributed.all_to_all_single(received_RC, numbers_RC, group=self._group, async_op=True)
        assert work is not None
        return PendingExchange(work, numbers_RC, received_RC, collective, log)

    def exchange_numbers(self, numbers_RC: Tensor, label: Label | None) -> Tensor:
        """Exchanges as `start_numbers` does, and waits."""
        return self.start_numbers(numbers_RC, label).wait()

    def start(
        self,
        rows_NB: Tensor,
        sent: Sequence[int],
        received: Sequence[int],
        name: str,
        label: Label | None,
        into_MB: Tensor | None = None,
    ) -> "PendingExchange":
        """Starts to send rows as they lie: the first `sent[0]` to member 0, and so on. Returns at once.

        A group of one sends nothing and does not wait, so there is no collective to log.

        Args:
            rows_NB: uint8, contiguous; must not change until the exchange is over.
            sent: rows for each member.
            received: rows from each member.
            name: of the collective.
            label: whose it is.
            into_MB: where to put what arrives, contiguous; a new tensor by default.
        """
        assert rows_NB.dtype == torch.uint8
        assert len(rows_NB) == sum(sent)
        self._count(rows_NB.shape[1], sent, received, label)
        if len(self.members) == 1:
            arrived_MB = rows_NB if into_MB is None else into_MB.copy_(rows_NB)
            return PendingExchange(None, rows_NB, arrived_MB, None, self._observers.log)
        received_MB = rows_NB.new_empty(sum(received), rows_NB.shape[1]) if into_MB is None else into_MB
        collective = self._start(name, label)
        work = distributed.all_to_all_single(
            received_MB, rows_NB, list(received), list(sent), group=self._group, async_op=True
        )
        assert work is not None
        return PendingExchange(work, rows_NB, received_MB, collective, self._observers.log)

    def _start(self, name: str, label: Label | None) -> Collective:
        return self._observers.log.start(self._name, self.members, name, label)

    def _count(self, bytes_per_row: int, sent: Sequence[int], received: Sequence[int], label: Label | None) -> None:
        rows_sent = Spread.of(sent, self.nodes, self.place)
        rows_received = Spread.of(received, self.nodes, self.place)
        self._observers.traffic.add_sent(
            None if label is None else label.layer,
            rows_sent,
            rows_sent.times(bytes_per_row),
            rows_received.times(bytes_per_row),
        )


class PendingExchange:
    """Rows under way."""

    def __init__(
        self,
        work: distributed.Work | None,
        sent: Tensor,
        received: Tensor,
        collective: Collective | None,
        log: CollectiveLog,
    ) -> None:
        """Holds an exchange; without work and collective: rows that are there already."""
        self._work = work
        self._sent: Tensor | None = sent  # kept until it has left
        self._received = received
        self._collective = collective
        self._log = log

    def wait(self) -> Tensor:
        """Returns what all members sent, by place; on CUDA as soon as the current stream may use them."""
        if self._work is not None and self._collective is not None:
            with self._log.awaiting(self._collective):
                self._work.wait()
        self._work = self._sent = None
        return self._received
