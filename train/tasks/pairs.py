"""Tasks that compare the answers of pairs: ranking by a score, and direct preference optimization."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.loader import IGNORE, Batch
from model.objective import BALANCE, MAIN, MicroBatch, depth_name, depth_weights
from model.objectives.pairs import (
    CENTRE,
    PAIR,
    RANKING_LOSSES,
    SCORE,
    SFT,
    PairIndex,
    PairRanking,
    Preference,
    preference_losses,
)
from train.tasks.next_token import to_micro_batch
from train.tasks.registry import StepRates

if TYPE_CHECKING:
    from train.tasks.preferences import DpoConfig, RewardModelConfig


class Ranking:
    """The task of ranking the answers of pairs by a score of their last tokens."""

    names = RANKING_LOSSES

    def __init__(self, config: "RewardModelConfig") -> None:
        self._config = config

    def read(self, batch: Batch, device: torch.device) -> MicroBatch:
        """Returns the inputs, the mask between answers, and the places of their last tokens."""
        return to_micro_batch(batch, 0, device, masks_documents=True)

    def count(self, batch: MicroBatch) -> Tensor:
        """Counts pairs, and answers for the balance loss."""
        pairs = count_pairs(batch.extras[SCORE])
        return torch.tensor([*[pairs] * (len(self.names) - 1), count_documents(batch)], dtype=torch.float64)

    def objective(self, counts: Tensor, rates: StepRates) -> PairRanking:
        """Builds the step's ranking loss, a mean over pairs."""
        pairs, *_, sequences = counts.tolist()
        config = self._config
        return PairRanking(
            factor=1 / (pairs or 1), centre=config.centre, balance=config.balance_loss_weight / sequences
        )

    def total(self, means: Mapping[str, float], rates: StepRates) -> float:
        """Returns the loss that the step minimized."""
        config = self._config
        return means[MAIN] + config.centre * means[CENTRE] + config.balance_loss_weight * means[BALANCE]


class DirectPreference:
    """The task of preferring the chosen answer of each pair more than the reference does."""

    def __init__(self, config: "DpoConfig", mtp_depth: int) -> None:
        """Builds the task for a model with `mtp_depth` MTP modules, which predict chosen answers."""
        self.names = preference_losses(mtp_depth)
        self._config = config
        self._mtp_depth = mtp_depth

    def read(self, batch: Batch, device: torch.device) -> MicroBatch:
        """Returns inputs and targets of every depth, the mask between answers, and the pair of each target."""
        is_answer_BT = batch.extras[PAIR] != 0
        return to_micro_batch(batch, self._mtp_depth, device, masks_documents=True, weights_BT=is_answer_BT)

    def count(self, batch: MicroBatch) -> Tensor:
        """Counts pairs, targets of chosen answers at each MTP depth, and answers for the balance loss."""
        pair_BT = batch.extras[PAIR]
        depths = range(1, self._mtp_depth + 1)
        chosen = [
            float((depth_weights(pair_BT > 0, depth) & (batch.targets_BT[depth] != IGNORE)).sum()) for depth in depths
        ]
        pairs = [count_pairs(pair_BT)] * (len(self.names) - 1 - self._mtp_depth)
        return torch.tensor([*pairs, *chosen, count_documents(batch)], dtype=torch.float64)

    def objective(self, counts: Tensor, rates: StepRates) -> Preference:
        """Builds the step's preference loss, a mean over pairs; MTP depths share one weight."""
        depth = self._mtp_depth
        config = self._config
        numbers = counts.tolist()
        weight = rates.mtp_loss_weight / max(depth, 1)
        return Preference(
            factor=1 / (numbers[0] or 1),
            beta=config.beta,
            smoothing=config.label_smoothing,
            sft=config.sft_weight,
            mtp_factors=tuple(weight / (count or 1) for count in numbers[-1 - depth : -1]),
            balance=config.balance_loss_weight / numbers[-1],
        )

    def total(self, means: Mapping[str, float], rates: StepRates) -> float:
        """Returns the loss that the step minimized."""
        depth = self._mtp_depth
        config = self._config
        mtp = sum(means[depth_name(number + 1)] for number in range(depth)) / max(depth, 1)
        balance = config.balance_loss_weight * means[BALANCE]
        return means[MAIN] + config.sft_weight * means[SFT] + rates.mtp_loss_weight * mtp + balance


def count_pairs(pair_BT: Tensor) -> float:
    """Returns the number of pairs with both answers, +k and -k at tokens of pair k, else 0."""
    return float(PairIndex.of(pair_BT).is_pair_BK.sum())


def count_documents(batch: MicroBatch) -> int:
    """Returns the number of answers, for which the balance loss is computed one by one."""
    assert batch.documents is not None
    return batch.documents.num_real
