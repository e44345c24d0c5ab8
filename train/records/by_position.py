"""Measures validation by position within a document, and bits per byte up to a base length.

Shape legend: B sequences, T tokens, R ranges of positions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.documents import count_token_bytes
from data.loader import IGNORE, Batch
from data.tokenizer import Tokenizer
from model.objective import MicroBatch
from train.config import TrainConfig
from train.tasks.long_context import base_length
from train.tasks.registry import TASKS
from train.world import World

FIRST_RANGE_TOKENS = 128
LOSS_BY_POSITION, BITS_PER_BYTE = "loss_by_position", "bits_per_byte"
_POSITIONS = "positions"


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionMeans:
    """Means of validation; a range of positions such as `128-255` without a token is left out.

    `losses` are in nats per token. `bits_per_byte` is of tokens at positions below the base length.
    """

    losses: Mapping[str, float]
    bits_per_byte: float | None

    def record(self) -> dict[str, object]:
        """Returns what a step's record holds; a run whose sequences have a single range records no ranges."""
        found: dict[str, object] = {LOSS_BY_POSITION: dict(self.losses)} if len(self.losses) > 1 else {}
        return found if self.bits_per_byte is None else {**found, BITS_PER_BYTE: self.bits_per_byte}


class LossByPosition:
    """Sums of one rank over the micro-batches of a validation.

    A token's position is the number of tokens before it in its document or piece. Ranges end at powers of two.
    """

    def __init__(self, length: int, base: int, tokenizer: Tokenizer, first_range: int = FIRST_RANGE_TOKENS) -> None:
        """Starts from zero. Bits per byte are measured up to `base`."""
        self._base, self._first_range = base, first_range
        self._bytes_V = torch.from_numpy(count_token_bytes(tokenizer))
        num_ranges = 1 + max(length - 1, 1).bit_length() - (first_range - 1).bit_length()
        self._sums_2R = torch.zeros(2, max(num_ranges, 1), dtype=torch.float64)
        self._base_sums = torch.zeros(2, dtype=torch.float64)

    @staticmethod
    def mark(batch: Batch) -> Batch:
        """Returns a batch with each token's position as an extra, which is split like the tokens."""
        return replace(batch, extras={**batch.extras, _POSITIONS: batch.positions_BT})

    def add(self, batch: MicroBatch, log_probs_BT: Tensor) -> None:
        """Adds a marked micro-batch, given the log-probabilities of its main targets."""
        targets = batch.targets_BT[0].cpu().flatten()  # host sync
        kept = targets != IGNORE
        # The position is that of the target, not of the token that predicts it.
        positions = batch.extras[_POSITIONS].cpu().flatten()[kept] + 1
        nats = -log_probs_BT.detach().cpu().double().flatten()[kept]
        # The exponent of a power of two is exact: 127 is in range 0, 128 in range 1, 256 in range 2.
        ranges = torch.frexp(positions / self._first_range).exponent.clamp(min=0).long()
        self._sums_2R[0].index_add_(0, ranges, nats)
        self._sums_2R[1].index_add_(0, ranges, torch.ones_like(nats))
        is_near = positions < self._base
        self._base_sums += torch.stack([nats[is_near].sum(), self._bytes_V[targets[kept][is_near]].sum().double()])

    def means(self, world: World) -> PositionMeans:
        """Returns the means over all ranks. All ranks call it."""
        summed = world.reduce(torch.cat([self._sums_2R.flatten(), self._base_sums]), "sum of losses by position")
        nats, num_bytes = summed[-2:].tolist()
        nats_R, counts_R = (row.tolist() for row in summed[:-2].view(2, -1))
        pairs = enumerate(zip(nats_R, counts_R, strict=True))
        losses = {self._name(number): total / count for number, (total, count) in pairs if count}
        return PositionMeans(losses=losses, bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None)

    def _name(self, number: int) -> str:
        last = self._first_range << number
        return f"{last // 2 if number else 0}-{last - 1}"


def open_by_position(config: TrainConfig, tokenizer: Tokenizer) -> LossByPosition | None:
    """Returns what measures a run's validations by position; None if its task does not train on documents."""
    spec = TASKS.get(config.task.kind)
    if spec.values or spec.has_rollouts or config.model.head != "tokens":
        return None
    return LossByPosition(config.batch.sequence_length_tokens, base_length(config), tokenizer)
