"""Scores answers by a reward model: a second network on the policy's ranks, or a whole one on rank 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import distributed as dist

from comm.dispatch.local import LocalDispatcher
from data.loader import Batch
from data.tokenizer import Tokenizer
from infer.protocol import Group, NumberedPrompt, Sample
from infer.reward import score_answers
from infer.scoring.score import Score, failure
from infer.scoring.scorers import RewardModelScorerConfig
from model.objective import MicroBatch
from model.objectives.pairs import KeepScores
from model.transformer import Transformer, named_tensors
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.sources import REWARD_MODEL_KEY, is_same_tokenizer, open_source, second_network_run, source_folder
from train.config import TrainConfig
from train.post.pack import BatchShape, fill, place_answers
from train.replica import Replica, open_replica
from train.schedule.cut import run_cut
from train.tasks.next_token import to_micro_batch
from train.world import ReplicaConfig, World, weight_dtype


@dataclass(frozen=True, slots=True)
class RewardModelPart:
    """Scores of answers by a reward model that reads `longest` tokens at most (see `ModelPart`)."""

    longest: int

    def rate(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """Returns the score of each sequence, equal on all ranks and, up to rounding, under every layout."""
        raise NotImplementedError

    def score(self, groups: Sequence[Group], step: int) -> list[list[Score]]:
        """Implements `ModelPart.score`. An answer that is longer than the model can read is unknown."""
        sequences = [[(*group.tokens, *answer.tokens) for answer in group.answers] for group in groups]
        fitting = [each for group in sequences for each in group if len(each) <= self.longest]
        scores = iter(self.rate(fitting))
        too_long = failure("unknown", f"has more than the {self.longest} tokens that the reward model reads")
        return [
            [Score(value=next(scores), outcome="rated") if len(each) <= self.longest else too_long for each in group]
            for group in sequences
        ]

    def close(self) -> None:
        """Implements `ModelPart.close`."""


@dataclass(frozen=True, slots=True)
class PipelinedRater(RewardModelPart):
    """A frozen network with a score head on all ranks of the job."""

    replica: Replica
    pad_id: int

    def rate(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """Implements `RewardModelPart.rate`. The answers are packed into as many passes as they need."""
        # Equal answers are computed once.
        unique = list(dict.fromkeys(sequences))
        shape = BatchShape(
            num_sequences=self.replica.global_sequences,
            length=self.replica.config.batch.sequence_length_tokens,
            pad_id=self.pad_id,
        )
        nothing = Sample(prompt=0, sample=0, tokens=(), log_probs=(), finish="stop")
        answers = [(NumberedPrompt(number=0, tokens=each), nothing) for each in unique]
        places = place_answers(answers, shape)
        scores: dict[tuple[int, ...], float] = {}
        for number, batch in enumerate(fill(answers, places, shape, {}) if places else ()):
            scores_BT = self.replica.gather(self.replica.record(partial(self._read, batch), KeepScores()))
            here = [both for both in zip(unique, places, strict=True) if both[1].batch == number]
            scores |= {tokens: float(scores_BT[each.row, each.first]) for tokens, each in here}
        return [scores[each] for each in sequences]

    def _read(self, batch: Batch, direction: int, micro_batch: int) -> MicroBatch:
        first = self.replica.first_sequence(direction, micro_batch)
        part = batch.sequences(first, self.replica.config.batch.micro_sequences)
        return to_micro_batch(part, 0, self.replica.world.device, masks_documents=True)

    def close(self) -> None:
        """Closes the replica. All ranks call it at the same point."""
        self.replica.close()


@dataclass(frozen=True, slots=True)
class WholeRater(RewardModelPart):
    """A whole model on rank 0, None elsewhere, which broadcasts its scores."""

    world: World
    batch_size: int
    model: Transformer | None

    def rate(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """Implements `RewardModelPart.rate`."""
        shared = [score_answers(self.model, sequences, self.batch_size) if self.model is not None else []]
        with self.world.log.collective("world", self.world.groups.world, "scores of answers"):
            dist.broadcast_object_list(shared, src=0, group=self.world.groups.world)
        return shared[0]


def open_reward_model(
    config: TrainConfig, part: RewardModelScorerConfig, policy: Replica, tokenizer: Tokenizer
) -> RewardModelPart:
    """Opens a reward model and loads its weights. All ranks call it.

    Raises:
        CheckpointError: the reward model has another tokenizer.
        CheckpointError, HfError: a tensor's content cannot be read.
    """
    if not is_same_tokenizer(source_folder(part.ckpt, REWARD_MODEL_KEY), tokenizer):
        raise CheckpointError(
            f"{REWARD_MODEL_KEY}: must have the tokenizer of this run's data, {part.ckpt} has another one; nearest "
            f"valid: a reward model that was trained from the policy's weights"
        )
    run = second_network_run(config, part.ckpt, REWARD_MODEL_KEY)
    source = open_source(part.ckpt, REWARD_MODEL_KEY, drop_mtp=True)
    if part.place == "first_rank":
        model = None
        if policy.world.rank == 0:
            dispatcher = LocalDispatcher(run.model.num_routed_experts)
            model = Transformer(run.model, dispatcher, weight_dtype(config.precision)).to(policy.world.device)
            source.fill(named_tensors(model))
        return WholeRater(run.model.max_position_tokens, policy.world, part.batch_size, model)
    cut = run_cut(run, policy.schedule.placement)
    replica = open_replica(policy.world, ReplicaConfig.of_run(run), policy.schedule, cut, is_proven=True)
    source.fill(named_tensors(replica.network))
    longest = min(run.batch.sequence_length_tokens, run.model.max_position_tokens)
    return PipelinedRater(longest, replica, tokenizer.pad_id)
