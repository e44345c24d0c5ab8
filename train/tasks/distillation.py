"""Builds the objective of distillation: a student imitates its teacher where samples have targets."""

from collections.abc import Mapping

import torch
from torch import Tensor

from data.loader import Batch
from data.samples.pack import WEIGHTS
from kernels.distillation.divergence import Divergence
from model.objective import MAIN, MicroBatch
from model.objectives.distillation import DIVERGENCE, Distillation, distillation_names
from train.tasks.distill import DistillConfig
from train.tasks.next_token import NextToken
from train.tasks.registry import StepRates


class DistillationTask:
    """The task of distillation. Its batches have the teacher's scores or states as extras."""

    def __init__(self, config: DistillConfig, mtp_depth: int, *, masks_documents: bool) -> None:
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
