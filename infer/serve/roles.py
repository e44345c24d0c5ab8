"""Moves sequences from ranks that read prompts to ranks that decode, with their values in the caches.

Shape legend: L layers, T tokens of a sequence, C values per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from comm.config import ParallelismConfig
from comm.layout import Layout
from comm.transfers import MessageKey, PipelineTransport
from comm.watchdog.collective_log import CollectiveLog
from infer.continuous import ContinuousEngine, MovedSequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """The ranks that a sequence leaves and joins. Its values have no data, only shapes."""

    sequence: MovedSequence
    source: int
    target: int

    def keys(self) -> Iterator[MessageKey]:
        """Yields the key of the message with the values of each cache."""
        for cache in range(len(self.sequence.values)):
            yield MessageKey(
                kind="activation",
                direction=cache,
                stage=self.sequence.sample,
                micro_batch=self.sequence.prompt.number,
                source=self.source,
                destination=self.target,
            )


class SequenceTransfers:
    """Links from the first ranks of a server, which read prompts, to the others, which decode."""

    def __init__(self, engine: ContinuousEngine, rank: int, num_ranks: int, num_reading: int, seconds: float) -> None:
        """Opens links with a timeout in seconds. All ranks call it at the same point."""
        self._engine = engine
        self.is_reading = rank < num_reading
        self._values: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # of sequences that are not sent yet
        # The ranks as one pipeline, whose stages have links with each other.
        layout = Layout(ParallelismConfig(pipeline=num_ranks, data=1, expert=1), num_ranks)
        pairs = [(source, target) for source in range(num_reading) for target in range(num_reading, num_ranks)]
        self._device = next(engine.model.parameters()).device
        self._transport = PipelineTransport(layout, pairs, self._device, seconds, CollectiveLog(), ("activation",))

    @torch.no_grad()
    def depart(self) -> list[MovedSequence]:
        """Removes the sequences that have their first token, and keeps their values until they are sent.

        Sequences with a constraint stay, because its state is not sent.
        """
        if not self.is_reading:
            return []
        batch = self._engine.batch
        departures = []
        for row in [row for row in batch.rows[: batch.num_active] if row.constraint is None]:
            moved = self._engine.export_sequence(row.index, row.sample)
            self._values[row.index, row.sample] = moved.values
            shapes = tuple(values_LTC.to("meta") for values_LTC in moved.values)
            # Copies on the host, because a view is pickled with all of its storage, and a device has other ranks.
            states_TD = moved.states_TD.cpu().clone()
            departures.append(replace(moved, values=shapes, states_TD=states_TD))
        return departures

    def send(self, move: Move) -> None:
        """Sends the values of a sequence that has left this rank."""
        self._transport.flush()  # Their receivers have taken the values of earlier rounds.
        values = self._values.pop((move.sequence.prompt.number, move.sequence.sample))
        for key, values_LTC in zip(move.keys(), values, strict=True):
            if values_LTC.numel():
                self._transport.send(key, values_LTC)

    def receive(self, move: Move) -> None:
        """Receives the values of a sequence, and continues it here."""
        values = []
        for key, shape_LTC in zip(move.keys(), move.sequence.values, strict=True):
            values_LTC = torch.empty_like(shape_LTC, device=self._device)
            if values_LTC.numel():
                values_LTC = self._transport.post_receive(key, tuple(shape_LTC.shape), shape_LTC.dtype).wait()
            values.append(values_LTC)
        states_TD = move.sequence.states_TD.to(self._device)
        self._engine.import_sequence(replace(move.sequence, values=tuple(values), states_TD=states_TD))

    def close(self) -> None:
        """Closes the links. All ranks call it at the same point."""
        self._transport.close()
