"""Continues prompts, and scores sequences, with a model that is whole in this process.

Shape legend: B sequences, T tokens, D hidden size, R rows with a target.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from infer.batch import DraftChoice, GenerationBatch
from infer.cohorts import PROMPT_TOKENS
from infer.config import Speculative, Statistics, check
from infer.decoder import Decoder, RouteStore, join_routes
from infer.protocol import NumberedPrompt, Request, Rollouts, Sample, StopToken, TargetScores, TargetSequence
from infer.sequence import ActiveSequence, never_stop, start_sequences
from kernels.cross_entropy.reference import IGNORE, greedy_scores
from model.head import score_states
from model.router import Routing
from model.transformer import Transformer

ScoreT = TypeVar("ScoreT")


class LocalEngine:
    """An engine with the whole model in one process. `statistics` are those of the last call.

    Continuations of a prompt share the pass over it. When one ends, the next one takes its place in the batch.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        speculative: Speculative = "auto",
        batch_size: int = 64,
        prefill_tokens: int = PROMPT_TOKENS,
        stop_condition: StopToken = never_stop,
    ) -> None:
        self._stop_condition = stop_condition
        self._model = model
        self._wanted: Speculative = speculative
        self._batch_size = batch_size
        self._prefill_tokens = prefill_tokens
        self._drafts = DraftChoice(speculative if model.config.mtp_depth > 0 else False)
        self.statistics = Statistics()

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Implements `Engine.generate`."""
        sequences = self.start(prompts, request)
        store = RouteStore(prompts, request.samples) if request.record_routes else None
        for _ in self.run(sequences, store):
            pass
        rollouts = to_rollouts(sequences, keeps_sets=request.keeps_sets)
        routes = None if store is None else join_routes([store], rollouts)
        return Rollouts(rollouts=rollouts, statistics=self.statistics, routes=routes)

    def start(self, prompts: Sequence[NumberedPrompt], request: Request) -> list[ActiveSequence]:
        """Returns the empty continuations of all prompts."""
        config = self._model.config
        check(config, [prompt.tokens for prompt in prompts], request.max_new_tokens, self._wanted, self._batch_size)
        return start_sequences(prompts, request, config.max_position_tokens)

    @torch.inference_mode()
    def run(
        self, sequences: Sequence[ActiveSequence], store: RouteStore | None = None
    ) -> Iterator[tuple[ActiveSequence, list[int]]]:
        """Continues sequences, and yields the new tokens of each pass that are text. `statistics` count them."""
        self.statistics = Statistics()
        waiting = deque(sequence for sequence in sequences if sequence.num_left > 0)
        for sequence in sequences:
            if sequence.num_left == 0:
                sequence.finish = "length"
                yield sequence, []
        if not waiting:
            return
        # The capacity includes a draft: the model reads it together with the last token, which is not in the cache yet.
        capacity = max(sequence.max_length for sequence in waiting)
        size = min(self._batch_size, len(waiting))
        decoder = Decoder(self._model, size, capacity, with_mtp=self._drafts.wanted is not False, routes=store)
        batch = GenerationBatch(
            decoder,
            self._stop_condition,
            drafts=self._drafts,
            prefill_tokens=self._prefill_tokens,
        )
        began = time.perf_counter()
        with self._model.weights_unchanged():
            for results in batch.run(waiting, size):
                self.statistics = batch.statistics(time.perf_counter() - began)
                yield from ((sequence, [chosen.token for chosen in tokens]) for sequence, tokens in results)


def to_rollouts(sequences: Sequence[ActiveSequence], *, keeps_sets: bool) -> tuple[Sample, ...]:
    """Returns the rollouts of finished sequences, in order. Those without room for a token are empty."""
    return tuple(
        Sample(
            prompt=sequence.index,
            sample=sequence.sample,
            tokens=tuple(sequence.tokens),
            log_probs=tuple(chosen.log_prob for chosen in sequence.chosen),
            finish=sequence.finish or "length",
            kept=tuple(chosen.kept for chosen in sequence.chosen) if keeps_sets else (),
        )
        for sequence in sequences
    )


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


def by_length(sequences: Sequence[TargetSequence], batch_size: int) -> Iterator[list[int]]:
    """Yields numbers of sequences to compute together, the longest first. One alone may be longer."""
    order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number].tokens))
    first = 0
    while first < len(order):
        longest = len(sequences[order[first]].tokens) - 1
        size = max(1, min(batch_size, MOST_TOKENS // longest))
        yield order[first : first + size]
        first += size


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A whole model that is evaluated. At most `batch_size` sequences together change no result."""

    model: Transformer
    batch_size: int

    def score(self, sequences: Sequence[TargetSequence]) -> list[TargetScores]:
        """Implements `EvaluatedModel.score`."""
        return self._in_batches(sequences, self._score)

    def rate(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Implements `EvaluatedModel.rate`."""
        # The token after an answer is never read; its place is where the score is.
        targets = [TargetSequence(tokens=(*sequence, PADDING), num_targets=1) for sequence in sequences]
        return self._in_batches(targets, self._rate)

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request, stop_condition: StopToken) -> Rollouts:
        """Implements `EvaluatedModel.generate`."""
        engine = LocalEngine(self.model, speculative=False, batch_size=self.batch_size, stop_condition=stop_condition)
        return engine.generate(prompts, request)

    @torch.no_grad()
    def _in_batches(
        self, sequences: Sequence[TargetSequence], score: Callable[[Sequence[TargetSequence]], list[ScoreT]]
    ) -> list[ScoreT]:
        """Scores sequences of similar length together, and returns the scores in their order."""
        scores: dict[int, ScoreT] = {}
        with self.model.weights_unchanged():
            for numbers in by_length(sequences, self.batch_size):
                scores |= dict(zip(numbers, score([sequences[number] for number in numbers]), strict=True))
        return [scores[number] for number in range(len(sequences))]

    def _rate(self, sequences: Sequence[TargetSequence]) -> list[float]:
        states_RD, _ = self._target_states(sequences)
        rates: list[float] = score_states(states_RD, self.model.head_weight).tolist()  # host sync
        return rates

    def _score(self, sequences: Sequence[TargetSequence]) -> list[TargetScores]:
        routings: dict[int, Routing] | None = {} if any(sequence.loads for sequence in sequences) else None
        states_RD, targets_R = self._target_states(sequences, routings)
        log_probs_R, are_greedy_R = greedy_scores(states_RD, self.model.head_weight, targets_R)
        counts = [sequence.num_targets for sequence in sequences]
        log_probs = log_probs_R.double().cpu().split(counts)  # host sync
        are_greedy = are_greedy_R.cpu().split(counts)
        loads = _loads(routings or {}, sequences)
        return [
            TargetScores(log_probs=tuple(values.tolist()), are_greedy=tuple(flags.tolist()), loads=counts)
            for values, flags, counts in zip(log_probs, are_greedy, loads, strict=True)
        ]

    def _target_states(
        self, sequences: Sequence[TargetSequence], routings: dict[int, Routing] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the states before the targets of all sequences, RD, and the targets, R."""
        batch = pad(sequences)
        device = self.model.head_weight.device
        states_BTD = self.model.final_states(batch.inputs_BT.to(device), routings=routings)
        # Only rows with a target are multiplied with the head. The host's copy finds them without waiting for a device.
        rows_R = (batch.targets_BT.flatten() != IGNORE).nonzero().flatten()
        return states_BTD.flatten(0, 1)[rows_R.to(device)], batch.targets_BT.flatten()[rows_R].to(device)


def _loads(routings: Mapping[int, Routing], sequences: Sequence[TargetSequence]) -> list[dict[str, list[int]]]:
    """Returns how often the tokens before each sequence's targets chose each expert, by layer."""
    loads: list[dict[str, list[int]]] = [{} for _ in sequences]
    for layer, routing in routings.items():
        num_experts = routing.scores_BTE.shape[2]
        ids_BTK = routing.ids_TK.view(*routing.scores_BTE.shape[:2], -1).cpu()  # host sync
        for counts, ids_TK, sequence in zip(loads, ids_BTK, sequences, strict=True):
            end = len(sequence.tokens) - 1
            chosen = ids_TK[end - sequence.num_targets : end].flatten()
            counts[f"layer_{layer}"] = chosen.bincount(minlength=num_experts).tolist()
    return loads
