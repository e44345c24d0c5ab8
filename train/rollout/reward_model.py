"""Scores answers by a reward model: a second network on the policy's ranks, or a whole one on rank 0.

Shape legend: B sequences, T tokens per sequence, N answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from comm.dispatch.local import LocalDispatcher
from data.loader import Batch
from data.pack import PADDING_POSITION, best_fit_decreasing
from data.tokenizer import Tokenizer
from infer.reward import score_answers
from infer.scoring.models.reward_model import RewardModelScorerConfig
from model.objective import BALANCE, LossSums, MicroBatch
from model.objectives.ranking import KeepScores
from model.transformer import Transformer, named_tensors
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.preserved import is_same_tokenizer
from train.checkpoint.sources import open_source, source_folder
from train.config import TrainConfig
from train.network import ReplicaConfig, weight_dtype
from train.replica import Replica, open_replica
from train.schedule.cut import run_cut
from train.second_network import REWARD_MODEL_KEY, second_network_run
from train.tasks.batch_reader import first_sequence
from train.tasks.next_token import to_micro_batch
from train.world import World


class RewardModel(Protocol):
    """Protocol of a reward model that scores the answers of a rollout. All ranks call its methods."""

    @property
    def longest(self) -> int:
        """The maximum number of tokens of a prompt with its answer."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Returns the score of each answer, equal on all ranks and, up to rounding, under every layout.

        Args:
            sequences: token ids of each prompt with its answer, 1 to `longest`; equal on all ranks.
        """
        ...

    def close(self) -> None:
        """Closes the model. All ranks call it at the same point."""
        ...


@dataclass(frozen=True, slots=True)
class PipelinedRewardModel:
    """A frozen network with a score head on all ranks of the job.

    Attributes:
        replica: its network.
        pad_id: token id that fills sequences.
    """

    replica: Replica
    pad_id: int

    @property
    def longest(self) -> int:
        """The length of a sequence of the job's batches, or the model's range of positions."""
        config = self.replica.config
        return min(config.batch.sequence_length_tokens, config.model.max_position_tokens)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Implements `RewardModel.score`. The answers are packed into as many passes as they need."""
        # Equal answers are computed once.
        unique = list(dict.fromkeys(tuple(sequence) for sequence in sequences))
        length, size = self.replica.config.batch.sequence_length_tokens, self.replica.global_sequences
        packed, scores_N = _pack(unique, length, size, self.pad_id), torch.zeros(len(unique), dtype=torch.float64)
        for first in range(0, len(packed.rows.tokens_BT), size):
            for place, scores_BT in self._forward(packed.rows, first).items():
                start = first + first_sequence(self.replica, *place)
                is_here = (packed.row_N >= start) & (packed.row_N < start + len(scores_BT))
                scores_N[is_here] = scores_BT.cpu().double()[  # host sync
                    packed.row_N[is_here] - start, packed.last_N[is_here]
                ]
        # One rank holds the score of an answer; all others add zeros.
        summed = self.replica.world.reduce(scores_N, "scores of answers").tolist()
        by_sequence = dict(zip(unique, summed, strict=True))
        return [by_sequence[tuple(sequence)] for sequence in sequences]

    def close(self) -> None:
        """Closes the replica. All ranks call it at the same point."""
        self.replica.close()

    def _forward(self, rows: Batch, first: int) -> dict[tuple[int, int], Tensor]:
        """Returns the scores of a pass that begins at a row, [B, T], by (direction, micro-batch)."""

        def read(direction: int, micro_batch: int) -> MicroBatch:
            start = first + first_sequence(self.replica, direction, micro_batch)
            part = rows.sequences(start, self.replica.config.batch.micro_sequences)
            return to_micro_batch(part, 0, self.replica.world.device, masks_documents=True)

        sums = LossSums((BALANCE,), {})
        self.replica.forward(read, KeepScores(), sums)
        # Records of steps count the traffic of the policy.
        self.replica.observers.traffic.take()
        self.replica.observers.clips.take()
        return sums.log_probs or {}


@dataclass(frozen=True, slots=True)
class WholeRewardModel:
    """A whole model on rank 0, which broadcasts its scores.

    Attributes:
        world: of this rank.
        longest: maximum number of tokens of a prompt with its answer.
        batch_size: sequences that are computed together.
        model: the model; None on the other ranks.
    """

    world: World
    longest: int
    batch_size: int
    model: Transformer | None

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Implements `RewardModel.score`."""
        found = [score_answers(self.model, sequences, self.batch_size) if self.model is not None else []]
        with self.world.log.collective("world", self.world.groups.world, "scores of answers"):
            dist.broadcast_object_list(found, src=0, group=self.world.groups.world)
        return found[0]

    def close(self) -> None:
        """Does nothing."""


def open_reward_model(
    config: TrainConfig, part: RewardModelScorerConfig, policy: Replica, tokenizer: Tokenizer
) -> RewardModel:
    """Opens a reward model and loads its weights. All ranks call it.

    Args:
        part: names the weights, which `check_reward_model` has accepted.
        policy: the replica that the run trains.

    Raises:
        CheckpointError: the reward model has another tokenizer.
        CheckpointError, HfError: a tensor's content cannot be read.
    """
    if not is_same_tokenizer(source_folder(part.ckpt, REWARD_MODEL_KEY), tokenizer):
        raise CheckpointError(
            f"{REWARD_MODEL_KEY}: must have the tokenizer of this run's data, {part.ckpt} has another one; nearest "
            f"valid: a reward model that was trained from the policy's weights"
        )
    own = second_network_run(config, part.ckpt, REWARD_MODEL_KEY)
    source = open_source(part.ckpt, REWARD_MODEL_KEY, drop_mtp=True)
    if part.place == "first_rank":
        model = None
        if policy.world.rank == 0:
            dispatcher = LocalDispatcher(own.model.num_routed_experts)
            model = Transformer(own.model, dispatcher, weight_dtype(config.precision)).to(policy.world.device)
            source.fill(named_tensors(model))
        return WholeRewardModel(policy.world, own.model.max_position_tokens, part.batch_size, model)
    cut = run_cut(own, policy.schedule.placement)
    replica = open_replica(policy.world, ReplicaConfig.of_run(own), policy.schedule, cut, is_proven=True)
    source.fill(named_tensors(replica.network))
    return PipelinedRewardModel(replica, tokenizer.pad_id)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _PackedSequences:
    """Sequences in rows that do not see each other.

    Attributes:
        rows: of whole passes.
        row_N: the row of each sequence.
        last_N: the column of its last token.
    """

    rows: Batch
    row_N: Tensor
    last_N: Tensor


def _pack(sequences: Sequence[Sequence[int]], length: int, multiple: int, pad_id: int) -> _PackedSequences:
    """Packs sequences by best fit. The result is equal on all ranks.

    Args:
        sequences: of 1 to `length` tokens.
        multiple: the number of rows is a multiple of it; further rows are padding.
        pad_id: token id of padding.
    """
    bins, num_bins = best_fit_decreasing([len(sequence) for sequence in sequences], length)
    num_rows = -(-num_bins // multiple) * multiple
    tokens_BT = np.full((num_rows, length), pad_id, dtype=np.int64)
    positions_BT = np.full((num_rows, length), PADDING_POSITION, dtype=np.int64)
    filled, last = [0] * num_rows, []
    for row, sequence in zip(bins, sequences, strict=True):
        place = slice(filled[row], filled[row] + len(sequence))
        tokens_BT[row, place], positions_BT[row, place] = sequence, np.arange(len(sequence))
        filled[row] = place.stop
        last.append(place.stop - 1)
    rows = Batch(tokens_BT=torch.from_numpy(tokens_BT), positions_BT=torch.from_numpy(positions_BT), pad_id=pad_id)
    return _PackedSequences(rows=rows, row_N=torch.tensor(bins), last_N=torch.tensor(last))
