"""Measures loss, bits per byte and expert loads by source, in training and validation of a mixture.

Shape legend: B sequences, T tokens, K choices per token, N tokens of a micro-batch, E experts, S sources, L layers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comm.protocol import Label
from data.loader import IGNORE
from data.pack import count_token_bytes
from data.tokenizer import Tokenizer
from train.config import TrainConfig
from train.core.replica import BatchReader, Replica
from train.core.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceMeans:
    """Means by the name of the source; a source without tokens is left out.

    Losses are in nats per token. Loads are the tokens that each expert of `layer_N` received in a validation.
    """

    losses: Mapping[str, float]
    bits_per_byte: Mapping[str, float]
    loads: Mapping[str, Mapping[str, list[int]]] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """Returns what a step's record holds: of the loads, the largest over the mean, averaged over layers."""
        values: dict[str, object] = {"loss_by_source": self.losses, "bits_per_byte_by_source": self.bits_per_byte}
        largest = {
            name: sum(max(row) * len(row) / max(sum(row), 1) for row in layers.values()) / len(layers)
            for name, layers in self.loads.items()
            if layers
        }
        return {**values, "largest_load_by_source": largest} if largest else values


class SumsBySource:
    """Sums of one rank: nats, tokens and bytes of the main targets of each source."""

    def __init__(self, names: tuple[str, ...], tokenizer: Tokenizer, device: torch.device) -> None:
        self.names = names
        self._bytes_V = torch.from_numpy(count_token_bytes(tokenizer)).to(device)
        self._sums_3S = torch.zeros(3, len(names), dtype=torch.float64)

    def add(
        self,
        batches: BatchReader,
        log_probs: Mapping[tuple[int, int], Tensor],
        sources_of: Callable[[int, int], Tensor],
    ) -> None:
        """Adds log-probabilities of the main targets, 0 where there is none, by direction and micro-batch.

        `sources_of` returns the source of each of a micro-batch's sequences, -1 for empty ones.
        """
        sums = []
        sources = []
        # In one order, so that the order in which a schedule ran the micro-batches does not matter.
        for position in sorted(log_probs):
            batch = batches(*position)
            assert batch is not None
            targets_BT = batch.targets_BT[0]
            is_target_BT = targets_BT != IGNORE
            bytes_BT = self._bytes_V[targets_BT.clamp(min=0)] * is_target_BT
            nats_B = -log_probs[position].detach().double().sum(1)
            sums.append(torch.stack([nats_B, is_target_BT.sum(1).double(), bytes_BT.sum(1).double()]))
            sources.append(sources_of(*position))
        if sums:
            sources_B = torch.cat(sources)
            is_counted_B = sources_B >= 0
            sums_3B = torch.cat(sums, 1).cpu()  # host sync
            self._sums_3S.index_add_(1, sources_B[is_counted_B], sums_3B[:, is_counted_B])

    def take(self) -> Tensor:
        """Returns the sums, flat, and starts again."""
        sums_3S = self._sums_3S
        self._sums_3S = torch.zeros_like(sums_3S)
        return sums_3S.flatten()

    def means(self, sums: Tensor) -> SourceMeans:
        """Returns the means of flat sums over all ranks."""
        values = zip(self.names, *sums.view_as(self._sums_3S).tolist(), strict=True)
        used = [(name, nats, tokens, num_bytes) for name, nats, tokens, num_bytes in values if tokens]
        return SourceMeans(
            losses={name: nats / tokens for name, nats, tokens, _ in used},
            bits_per_byte={name: nats / math.log(2) / num_bytes for name, nats, _, num_bytes in used if num_bytes},
        )


class ValidationBySource:
    """Sums of one rank over the passes of a validation: those of the losses, and loads of the experts."""

    def __init__(self, config: TrainConfig, losses: SumsBySource) -> None:
        model = config.model
        self._losses = losses
        self._layers = range(model.num_dense_layers, model.num_layers + model.mtp_depth)
        num_sources = len(losses.names)
        self._loads_LSE = torch.zeros(len(self._layers), num_sources, model.num_routed_experts, dtype=torch.float64)
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

        def sources_of(direction: int, micro_batch: int) -> Tensor:
            first = replica.first_sequence(direction, micro_batch)
            return self._sources_B[first : first + replica.config.batch.micro_sequences]

        self._losses.add(batches, log_probs, sources_of)
        num_experts = self._loads_LSE.shape[2]
        for label, ids_NK in ids.items():
            sources_B = sources_of(label.direction, label.micro_batch)
            sources_N = sources_B.repeat_interleave(len(ids_NK) // len(sources_B))
            is_counted_N = sources_N >= 0
            # One number for each pair of source and expert.
            pairs = sources_N[is_counted_N, None] * num_experts + ids_NK.cpu().long()[is_counted_N]  # host sync
            loads_SE = self._loads_LSE[self._layers.index(label.layer)]
            loads_SE += torch.bincount(pairs.flatten(), minlength=loads_SE.numel()).view_as(loads_SE)

    def means(self, world: World) -> SourceMeans:
        """Returns the means over all ranks. All ranks call it."""
        sums = self._losses.take()
        summed = world.reduce(torch.cat([sums, self._loads_LSE.flatten()]), "sum of losses by source")
        means = self._losses.means(summed[: len(sums)])
        loads_LSE = summed[len(sums) :].view_as(self._loads_LSE).long()
        return replace(
            means,
            loads={
                name: {
                    f"layer_{layer}": loads_SE[number].tolist()
                    for layer, loads_SE in zip(self._layers, loads_LSE, strict=True)
                }
                for number, name in enumerate(self._losses.names)
                if name in means.losses
            },
        )
