"""Predicts the next token at every MTP depth, alone or as a part of distillation and policy gradients.

Source: arXiv:2412.19437, section 2.2. Shape legend: B sequences, T tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.loader import IGNORE, Batch
from data.pack import WEIGHTS
from kernels.attention.documents import Documents
from kernels.cross_entropy.reference import Divergence
from model.objective import (
    BALANCE,
    MAIN,
    CrossEntropy,
    MicroBatch,
    depth_weights,
    find_target_rows,
    loss_names,
    weights_of_depths,
)
from model.objectives.distillation import DIVERGENCE, Distillation, distillation_names
from model.objectives.policy import OFF_POLICY, AnswerIndex, PolicyGradient, policy_names
from train.config import TaskConfig
from train.tasks.registry import StepRates

if TYPE_CHECKING:
    from train.tasks.distill import DistillConfig
    from train.tasks.grpo import GrpoConfig


class NextToken:
    """The task of next-token prediction. A subclass may add extras or change targets in `read`."""

    def __init__(
        self, config: TaskConfig, mtp_depth: int, *, masks_documents: bool = False, weights: str | None = None
    ) -> None:
        """Builds the task; `weights` names the extra with the weight of each main target, by default 1."""
        self.names = loss_names(mtp_depth)
        self._config = config
        self._mtp_depth = mtp_depth
        self._masks_documents = masks_documents
        self._weights = weights

    def read(self, batch: Batch, device: torch.device) -> MicroBatch:
        """Returns the inputs, the targets of every depth and the extras; a target of weight 0 is none."""
        weights = None if self._weights is None else batch.extras.get(self._weights)
        if self._weights is not None and weights is not None:
            of_depths = weights_of_depths(weights, self._mtp_depth + 1)
            batch = replace(batch, extras={**batch.extras, self._weights: of_depths})
        return to_micro_batch(batch, self._mtp_depth, device, masks_documents=self._masks_documents, weights_BT=weights)

    def count(self, batch: MicroBatch) -> Tensor:
        """Counts targets of each depth, or sums weights, and counts sequences, or documents, for balance."""
        counts = [self._weight_of(batch, depth) for depth in range(self._mtp_depth + 1)]
        sequences = len(batch.targets_BT[0]) if batch.documents is None else batch.documents.num_real
        counts.append(torch.tensor(float(sequences), dtype=torch.float64))
        return torch.stack([count.to("cpu", torch.float64) for count in counts])

    def objective(self, counts: Tensor, rates: StepRates) -> CrossEntropy:
        """Builds the step's cross-entropy. Each depth is a mean over its targets; MTP depths share one weight."""
        depth = self._mtp_depth
        numbers = counts.tolist()
        weights = [1.0] + [rates.mtp_loss_weight / max(depth, 1)] * depth
        return CrossEntropy(
            factors=tuple(weight / (count or 1) for weight, count in zip(weights, numbers[:-1], strict=True)),
            balance=self._config.balance_loss_weight / (numbers[-1] or 1),
            weights=self._weights,
        )

    def total(self, means: Mapping[str, float], rates: StepRates) -> float:
        """Returns the loss that the step minimized."""
        mtp = [means[name] for name in self.names[1:-1]]
        mtp_part = rates.mtp_loss_weight * sum(mtp) / max(len(mtp), 1)
        return means[MAIN] + mtp_part + self._config.balance_loss_weight * means[BALANCE]

    def _weight_of(self, batch: MicroBatch, depth: int) -> Tensor:
        is_target_BT = batch.targets_BT[depth] != IGNORE
        if self._weights is None:
            return is_target_BT.sum()
        return (batch.extras[self._weights][..., depth].double() * is_target_BT).sum()


class DistillationTask:
    """The task of distillation. Its batches have the teacher's scores or states as extras."""

    def __init__(self, config: "DistillConfig", mtp_depth: int, *, masks_documents: bool) -> None:
        """Builds the task; the arguments are those of `NextToken`."""
        self.names = distillation_names(mtp_depth)
        self._targets = NextToken(config, mtp_depth, masks_documents=masks_documents, weights=WEIGHTS)
        self._mix = config.cross_entropy_weight
        self._form = Divergence(kind=config.divergence, beta=config.beta, temperature=config.temperature)

    def read(self, batch: Batch, device: torch.device) -> MicroBatch:
        """Returns the inputs and targets of every depth, and the batch's extras."""
        return self._targets.read(batch, device)

    def count(self, batch: MicroBatch) -> Tensor:
        """Counts as next-token prediction does; the divergence is a mean over the main targets."""
        counts = self._targets.count(batch)
        return torch.cat([counts, counts[:1]])

    def objective(self, counts: Tensor, rates: StepRates) -> Distillation:
        """Builds the step's objective."""
        targets = self._targets.objective(counts[:-1], rates)
        return Distillation(targets=targets, cross_entropy_weight=self._mix, form=self._form)

    def total(self, means: Mapping[str, float], rates: StepRates) -> float:
        """Returns the loss that the step minimized."""
        mixed = (1 - self._mix) * means[DIVERGENCE] + self._mix * means[MAIN]
        return self._targets.total(means, rates) - means[MAIN] + mixed


class PolicyGradientTask:
    """The task of policy gradients. Its batches have the values of sampled tokens as extras."""

    def __init__(self, config: "GrpoConfig", mtp_depth: int) -> None:
        """Builds the task for a model with `mtp_depth` MTP modules, which learn the sampled tokens."""
        self.names = policy_names(mtp_depth, has_reference=config.has_reference)
        self._targets = NextToken(config, mtp_depth, masks_documents=True, weights=WEIGHTS)
        self._config = config

    def read(self, batch: Batch, device: torch.device) -> MicroBatch:
        """Returns the inputs and targets of every depth, the mask between answers, and the batch's extras."""
        return self._targets.read(batch, device)

    def count(self, batch: MicroBatch) -> Tensor:
        """Counts tokens or answers for the main loss and for means, targets of MTP depths, and sequences."""
        counts = self._targets.count(batch)
        tokens, answers = counts[:1], AnswerIndex(batch, None).count().to("cpu", torch.float64)[None]
        main = tokens if self._config.loss.normalizer == "tokens" else answers
        num_token_means = self.names.index(OFF_POLICY) - len(counts)
        return torch.cat([main, counts[1:], *[tokens] * num_token_means, answers])

    def objective(self, counts: Tensor, rates: StepRates) -> PolicyGradient:
        """Builds the step's objective."""
        targets = self._targets.objective(counts[: len(self._targets.names)], rates)
        return PolicyGradient(
            targets=targets,
            form=self._config.loss,
            factor=targets.factors[0],
            max_new_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
        )

    def total(self, means: Mapping[str, float], rates: StepRates) -> float:
        """Returns the loss that the step minimized."""
        return self._targets.total(means, rates)


def to_micro_batch(
    batch: Batch,
    mtp_depth: int,
    device: torch.device,
    *,
    masks_documents: bool = False,
    weights_BT: Tensor | None = None,
) -> MicroBatch:
    """Returns the inputs and targets of every depth on a device.

    `weights_BT` has the weight of each main target, on the host; a target of weight 0 is none at any depth.
    """
    depths = range(mtp_depth + 1)
    inputs = [batch.inputs(depth) for depth in depths]
    targets = [batch.targets(depth + 1) for depth in depths]
    if masks_documents:
        inputs[1:] = [_within_documents(batch, depth) for depth in depths[1:]]
    if weights_BT is not None:
        targets = [
            targets_BT.masked_fill(depth_weights(weights_BT, depth) == 0, IGNORE)
            for depth, targets_BT in enumerate(targets)
        ]
    micro_batch = MicroBatch(
        inputs_BT=tuple(inputs),
        targets_BT=tuple(targets),
        documents=Documents.from_positions(batch.positions_BT) if masks_documents else None,
        extras=batch.extras,
        target_rows=tuple(find_target_rows(targets_BT) for targets_BT in targets),
    )
    return micro_batch.to(device)


def _within_documents(batch: Batch, shift: int) -> Tensor:
    """Returns the tokens shifted left, with the pad id in place of other documents' tokens, int64 BT."""
    ahead_BT = batch.targets(shift)
    return ahead_BT.masked_fill(ahead_BT == IGNORE, batch.pad_id)
