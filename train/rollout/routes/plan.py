"""Plans which records of experts each rank holds, sends and needs.

Plans are pure functions of the layout and the answers.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from infer.engines.pipelined.plan import assign_prompt
from infer.engines.protocol import PROMPT_SAMPLE, RouteKey
from train.replica import Replica

Share = tuple[int, int]
"""Data index and direction: the ranks of a pipeline that run a sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedAnswer:
    """A sampled answer, and where it is trained.

    Attributes:
        prompt: number of its prompt.
        sample: its number among the prompt's answers.
        prompt_tokens: number of tokens of the prompt.
        answer_tokens: number of tokens of the answer.
        batch: number of the batch.
        row: sequence within the global batch.
        start: position of the prompt's first token.
    """

    prompt: int
    sample: int
    prompt_tokens: int
    answer_tokens: int
    batch: int
    row: int
    start: int

    def records(self) -> Iterator[tuple[int, int, int]]:
        """Yields the sample and the first position of each of its records, and its number of tokens."""
        yield PROMPT_SAMPLE, self.start, self.prompt_tokens
        # The sampler does not read the last token.
        if self.answer_tokens > 1:
            yield self.sample, self.start + self.prompt_tokens, self.answer_tokens - 1


@dataclass(frozen=True, slots=True)
class RoutePiece:
    """A record that one rank sends to another one, or keeps, and its number of tokens."""

    key: RouteKey
    num_tokens: int


class RowOfAnswer(NamedTuple):
    """An answer, and its sequence within a micro-batch."""

    row: int
    answer: PlacedAnswer


class RoutePlan:
    """Which records each rank holds and needs, as a pure function of the layout and of all answers.

    Attributes:
        answers: all answers of the job that are trained, in order.
        layers: MoE layers of each stage.
    """

    def __init__(self, replica: Replica, homes: Mapping[int, Share], answers: Sequence[PlacedAnswer]) -> None:
        """Plans an exchange.

        Args:
            replica: the network that samples and is trained.
            homes: data index and direction that sampled the answers to each prompt, by the prompt's number.
            answers: all answers of the job that are trained, in order; equal on all ranks.
        """
        self._replica, self._homes, self.answers = replica, homes, answers
        self.layers = moe_layers(replica)
        self._needed: dict[Share, dict[tuple[int, int], int]] = defaultdict(dict)
        for answer in answers:
            (share, _, _) = self.destination(answer.row)
            for sample, _, num_tokens in answer.records():
                self._needed[share][answer.prompt, sample] = num_tokens

    def destination(self, row: int) -> tuple[Share, int, int]:
        """Returns where a sequence of the global batch is trained.

        Returns:
            Data index and direction, the number of the micro-batch, and that of the sequence within it.
        """
        replica = self._replica
        schedule, size = replica.schedule, replica.config.batch.micro_sequences
        data_index, micro_batch = divmod(row // size, schedule.num_micro_batches)
        for direction in range(schedule.num_directions):
            count = len(schedule.micro_batches_of(direction))
            if micro_batch < count:
                return (data_index, direction), micro_batch, row % size
            micro_batch -= count
        raise AssertionError(f"sequence {row} is in no micro-batch")

    def pieces(self, source: int, destination: int) -> list[RoutePiece]:
        """Returns the records that a rank has and another one needs, in the order in which they are sent."""
        layout, placement = self._replica.world.layout, self._replica.schedule.placement
        # A dict, because both directions may need a prompt in a stage that they share.
        found: dict[RouteKey, int] = {}
        for direction, row in enumerate(placement):
            for stage, pipeline_index in enumerate(row):
                if pipeline_index != layout.pipeline_index(destination):
                    continue
                for (prompt, sample), num_tokens in self._needed[layout.data_index(destination), direction].items():
                    data_index, home = self._homes[prompt]
                    if layout.rank(placement[home][stage], data_index) == source:
                        found |= {RouteKey(prompt, sample, layer): num_tokens for layer in self.layers[stage]}
        return [RoutePiece(key, num_tokens) for key, num_tokens in found.items()]

    def rows_of(self, batch: int) -> dict[tuple[int, int], list[RowOfAnswer]]:
        """Returns the answers that this rank's pipeline trains in a batch, by direction and micro-batch."""
        rows: dict[tuple[int, int], list[RowOfAnswer]] = defaultdict(list)
        for answer in self.answers:
            (data_index, direction), micro_batch, row = self.destination(answer.row)
            if answer.batch == batch and data_index == self._replica.world.data_index:
                rows[direction, micro_batch].append(RowOfAnswer(row, answer))
        return rows


def assign_homes(replica: Replica, requests: Iterable[Sequence[int]]) -> dict[int, Share]:
    """Returns the data index and direction that sample the answers to each prompt.

    Args:
        requests: numbers of the prompts of each request to the pipelined engine, in order.
    """
    num_data, num_directions = replica.world.layout.parallelism.data, replica.schedule.num_directions
    return {
        number: assign_prompt(position, num_data, num_directions)
        for request in requests
        for position, number in enumerate(request)
    }


def held_records(
    replica: Replica, homes: Mapping[int, Share], lengths: Iterable[tuple[int, int, Sequence[int]]]
) -> dict[RouteKey, int]:
    """Returns the records that this rank has after sampling, with their numbers of tokens.

    Args:
        homes: data index and direction that sampled the answers to each prompt, by the prompt's number.
        lengths: number of each prompt, of its tokens, and of the tokens of each of its answers.
    """
    world, layers = replica.world, moe_layers(replica)
    held: dict[RouteKey, int] = {}
    for prompt, prompt_tokens, answers in lengths:
        data_index, direction = homes[prompt]
        if data_index != world.data_index:
            continue
        read = {PROMPT_SAMPLE: prompt_tokens} | {sample: tokens - 1 for sample, tokens in enumerate(answers)}
        for stage, pipeline_index in enumerate(replica.schedule.placement[direction]):
            if pipeline_index == world.pipeline_index:
                held |= {
                    RouteKey(prompt, sample, layer): num_tokens
                    for sample, num_tokens in read.items()
                    for layer in layers[stage]
                    if num_tokens > 0
                }
    return held


def moe_layers(replica: Replica) -> tuple[tuple[int, ...], ...]:
    """Returns the MoE layers of the main model in each stage."""
    config = replica.config.model
    own = range(config.num_dense_layers, config.num_layers)
    return tuple(tuple(layer for layer in stage if layer in own) for stage in replica.cut)
