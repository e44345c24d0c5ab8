"""Scores and generates with a model that is whole in this process.

Shape legend: B sequences, T tokens, D hidden size, R rows with a target.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infer.engines.local import LocalEngine
from infer.evaluate.protocol import StopToken, TargetScores, TargetSequence
from infer.protocol import NumberedPrompt, Request, Rollouts
from infer.reward import score_answers
from kernels.cross_entropy.reference import IGNORE, greedy_scores
from model.transformer import Transformer

PADDING = 0
MOST_TOKENS = 2**13  # tokens, with padding, that are computed together if there are several sequences


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Inputs and the token after each, -100 if it is not scored. Padding at the end is never seen."""

    inputs_BT: Tensor
    targets_BT: Tensor


def pad(sequences: Sequence[TargetSequence], size: tuple[int, int] | None = None) -> PaddedBatch:
    """Returns sequences as tensors on the host, of a size B and T or as small as they fit."""
    num_rows, length = size or (len(sequences), max(len(sequence.tokens) for sequence in sequences) - 1)
    inputs_BT = torch.full((num_rows, length), PADDING)
    targets_BT = torch.full((num_rows, length), IGNORE)
    for row, sequence in enumerate(sequences):
        tokens = torch.tensor(sequence.tokens)
        end = len(sequence.tokens) - 1
        inputs_BT[row, :end] = tokens[:-1]
        targets_BT[row, end - sequence.num_targets : end] = tokens[-sequence.num_targets :]
    return PaddedBatch(inputs_BT, targets_BT)


def by_length(
    sequences: Sequence[TargetSequence], batch_size: int, most_tokens: int = MOST_TOKENS
) -> Iterator[list[int]]:
    """Yields numbers of sequences to compute together, the longest first. One alone may be longer."""
    order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number].tokens))
    first = 0
    while first < len(order):
        longest = len(sequences[order[first]].tokens) - 1
        size = max(1, min(batch_size, most_tokens // longest))
        yield order[first : first + size]
        first += size


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A whole model that is evaluated. At most `batch_size` sequences together change no result."""

    model: Transformer
    batch_size: int

    @torch.no_grad()
    def score(self, sequences: Sequence[TargetSequence]) -> list[TargetScores]:
        """Implements `EvaluatedModel.score`."""
        scores: dict[int, TargetScores] = {}
        with self.model.weights_unchanged():
            for numbers in by_length(sequences, self.batch_size):
                together = self._score([sequences[number] for number in numbers])
                scores |= dict(zip(numbers, together, strict=True))
        return [scores[number] for number in range(len(sequences))]

    def rate(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Implements `EvaluatedModel.rate`."""
        return score_answers(self.model, sequences, self.batch_size)

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request, stop_condition: StopToken) -> Rollouts:
        """Implements `EvaluatedModel.generate`."""
        engine = LocalEngine(self.model, speculative=False, batch_size=self.batch_size, stop_condition=stop_condition)
        return engine.generate(prompts, request)

    def _score(self, sequences: Sequence[TargetSequence]) -> list[TargetScores]:
        model = self.model
        batch = pad(sequences)
        device = model.head_weight.device
        states_BTD = model.final_states(batch.inputs_BT.to(device))
        # Only rows with a target are multiplied with the head. The host's copy finds them without waiting for a device.
        rows_R = (batch.targets_BT.flatten() != IGNORE).nonzero().flatten()
        states_RD = states_BTD.flatten(0, 1)[rows_R.to(device)]
        targets_R = batch.targets_BT.flatten()[rows_R].to(device)
        log_probs_R, are_greedy_R = greedy_scores(states_RD, model.head_weight, targets_R)
        counts = [sequence.num_targets for sequence in sequences]
        log_probs = log_probs_R.double().cpu().split(counts)  # host sync
        are_greedy = are_greedy_R.cpu().split(counts)
        return [
            TargetScores(log_probs=tuple(values.tolist()), are_greedy=tuple(flags.tolist()))
            for values, flags in zip(log_probs, are_greedy, strict=True)
        ]
