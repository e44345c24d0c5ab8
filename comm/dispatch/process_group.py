"""Runs all-to-alls over one process group, and logs and counts each of them."""

# Shape legend: R ranks of the group, C numbers for each, N rows sent, M rows received, B bytes of a row.

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
    """Counters and log of exchanges."""

    traffic: Traffic  # counter of rows and bytes sent
    log: CollectiveLog  # log of every collective
    clips: ClipCount = field(default_factory=ClipCount)  # counter of clipped tokens


class ExchangeGroup:
    """Process group with its exchanges. Used only from the comm lane."""

    members: tuple[int, ...]  # global ranks of the group's members
    nodes: tuple[int, ...]  # node of each member
    place: int  # index of this rank in the group

    def __init__(self, name: str, group: ProcessGroup, layout: Layout, observers: Observers) -> None:
        self.members = tuple(distributed.get_process_group_ranks(group))
        self.nodes = tuple(layout.node_of(rank) for rank in self.members)
        self.place = distributed.get_rank(group)
        self._name = group_name(name, self.members)
        self._group = group
        self._observers = observers

    def start_numbers(self, numbers_RC: Tensor, label: Label | None) -> "PendingExchange":
        """Starts to send row r to member r, uncounted; the result has the row of each member, RC."""
        log = self._observers.log
        if len(self.members) == 1:
            return PendingExchange(None, numbers_RC, numbers_RC, None, log)
        received_RC = torch.empty_like(numbers_RC)
        collective = self._start("exchange of counts", label)
        work = distributed.all_to_all_single(received_RC, numbers_RC, group=self._group, async_op=True)
        assert work is not None
        return PendingExchange(work, numbers_RC, received_RC, collective, log)

    def exchange_numbers(self, numbers_RC: Tensor, label: Label | None) -> Tensor:
        """Exchanges numbers like `start_numbers`, and waits for the result."""
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
        """Starts to send uint8 rows in order, `sent[0]` of them to member 0, and so on. Does not block.

        They must not change until the exchange is complete. `into_MB` receives rows.
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
    """Exchange that has started."""

    def __init__(
        self,
        work: distributed.Work | None,
        sent: Tensor,
        received: Tensor,
        collective: Collective | None,
        log: CollectiveLog,
    ) -> None:
        self._work = work
        self._sent: Tensor | None = sent  # kept until it has been sent
        self._received = received
        self._collective = collective
        self._log = log

    def wait(self) -> Tensor:
        """Waits for the rows of all members and returns them by member; on CUDA only the current stream waits."""
        if self._work is not None and self._collective is not None:
            with self._log.awaiting(self._collective):
                self._work.wait()
        self._work = self._sent = None
        return self._received
