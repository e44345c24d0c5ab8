"""Measures validation by the source of a mixture: loss, bits per byte, and loads of the experts.

Shape legend: B sequences, T tokens, N tokens of a micro-batch, K choices per token, E experts, S sources, L layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comm.protocol import Label
from data.loader import IGNORE
from data.pack import count_token_bytes
from data.tokenizer import Tokenizer
from train.config import TrainConfig
from train.replica import BatchReader, Replica
from train.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceMeans:
    """Means of validation by the name of the source; a source without held-out tokens is left out.

    Losses are in nats per token. Loads are the tokens that each expert of `layer_N` received.
    """

    losses: Mapping[str, float]
    bits_per_byte: Mapping[str, float]
    loads: Mapping[str, Mapping[str, list[int]]]

    def record(self) -> dict[str, object]:
        """Returns what a step's record holds: of the loads, the largest over the mean, averaged over layers."""
        values: dict[str, object] = {"loss_by_source": self.losses, "bits_per_byte_by_source": self.bits_per_byte}
        largest = {
            name: sum(max(row) * len(row) / max(sum(row), 1) for row in layers.values()) / len(layers)
            for name, layers in self.loads.items()
            if layers
        }
        return {**values, "largest_load_by_source": largest} if largest else values


class MeansBySource:
    """Sums of one rank over the passes of a validation."""

    def __init__(self, config: TrainConfig, names: tuple[str, ...], tokenizer: Tokenizer) -> None:
        model = config.model
        self._names = names
        self._layers = range(model.num_dense_layers, model.num_layers + model.mtp_depth)
        self._bytes_V = torch.from_numpy(count_token_bytes(tokenizer)).double()
        self._sums_3S = torch.zeros(3, len(names), dtype=torch.float64)  # nats, tokens, bytes
        self._loads_LSE = torch.zeros(len(self._layers), len(names), model.num_routed_experts, dtype=torch.float64)
        self._sources_B = torch.empty(0, dtype=torch.int64)

    def begin(self, sources_B: NDArray[np.int64]) -> None:
        """Names the source of each sequence of the next pass, -1 for empty ones."""
        self._sources_B = torch.from_numpy(sources_B)

    def add(
        self,
        replica: Replica,
        batches: BatchReader,
        log_probs: Mapping[tuple[int, int], Tensor],
        ids: Mapping[Label, Tensor],
    ) -> None:
        """Adds a pass: log-probabilities of the main targets, and the experts that routers chose."""
        for position, log_probs_BT in log_probs.items():
            batch = batches(*position)
            assert batch is not None
            targets = batch.targets_BT[0].cpu().flatten()  # host sync
            sources = self._sources(replica, *position, len(targets))
            is_counted = (targets != IGNORE) & (sources >= 0)
            nats = -log_probs_BT.detach().cpu().double().flatten()[is_counted]
            values = (nats, torch.ones_like(nats), self._bytes_V[targets[is_counted]])
            for sums_S, value in zip(self._sums_3S, values, strict=True):
                sums_S.index_add_(0, sources[is_counted], value)
        num_experts = self._loads_LSE.shape[2]
        for label, ids_NK in ids.items():
            sources = self._sources(replica, label.direction, label.micro_batch, len(ids_NK))
            is_counted = sources >= 0
            # One number for each pair of source and expert.
            pairs = sources[is_counted, None] * num_experts + ids_NK.cpu().long()[is_counted]  # host sync
            loads_SE = self._loads_LSE[self._layers.index(label.layer)]
            loads_SE += torch.bincount(pairs.flatten(), minlength=loads_SE.numel()).view_as(loads_SE)

    def _sources(self, replica: Replica, direction: int, micro_batch: int, num_tokens: int) -> Tensor:
        """Returns the source of each token of a micro-batch, or of this rank's part of one."""
        first = replica.first_sequence(direction, micro_batch)
        sources_B = self._sources_B[first : first + replica.config.batch.micro_sequences]
        return sources_B.repeat_interleave(num_tokens // len(sources_B))

    def means(self, world: World) -> SourceMeans:
        """Returns the means over all ranks. All ranks call it."""
        summed = world.reduce(
            torch.cat([self._sums_3S.flatten(), self._loads_LSE.flatten()]), "sum of losses by source"
        )
        split = self._sums_3S.numel()
        nats_S, tokens_S, bytes_S = summed[:split].view_as(self._sums_3S).tolist()
        loads_LSE = summed[split:].view_as(self._loads_LSE).long()
        used = [number for number, count in enumerate(tokens_S) if count]
        return SourceMeans(
            losses={self._names[number]: nats_S[number] / tokens_S[number] for number in used},
            bits_per_byte={
                self._names[number]: nats_S[number] / math.log(2) / bytes_S[number]
                for number in used
                if bytes_S[number]
            },
            loads={
                self._names[number]: {
                    f"layer_{layer}": loads_SE[number].tolist()
                    for layer, loads_SE in zip(self._layers, loads_LSE, strict=True)
                }
                for number in used
            },
        )
