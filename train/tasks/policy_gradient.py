"""The task of learning from sampled answers with advantages."""

from collections.abc import Mapping

import torch
from torch import Tensor

from data.loader import Batch
from data.samples.pack import WEIGHTS
from model.objective import MicroBatch
from model.objectives.policy import PolicyGradient, policy_names
from model.objectives.policy_terms import OFF_POLICY
from model.objectives.sampled import AnswerIndex
from train.tasks.grpo import GrpoConfig
from train.tasks.next_token import NextToken
from train.tasks.registry import StepRates


class PolicyGradientTask:
    """The task of policy gradients. Its batches have the values of sampled tokens as extras."""

    def __init__(self, config: GrpoConfig, mtp_depth: int) -> None:
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
        tokens, answers = counts[:1], AnswerIndex(batch, None).count().to("cpu", torch.float64)[None]  # host sync
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
