"""Continues prompts with a model that is whole in this process."""

import time
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from infer.batch import PROMPT_TOKENS, ActiveSequence, GenerationBatch, StopCondition, never_stop
from infer.config import Speculative, Statistics, check
from infer.decoder import Decoder, RouteStore, join_routes
from infer.protocol import NumberedPrompt, Request, Rollouts, Sample
from infer.sample import SequenceRandom
from model.transformer import Transformer


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
        stop_condition: StopCondition = never_stop,
    ) -> None:
        self._stop_condition = stop_condition
        self._model = model
        self._wanted: Speculative = speculative
        self._batch_size = batch_size
        self._prefill_tokens = prefill_tokens
        self._speculative = model.config.mtp_depth > 0 if speculative == "auto" else speculative
        self.statistics = Statistics()

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Implements `Engine.generate`."""
        sequences = self.start(prompts, request)
        store = RouteStore(prompts, request.samples) if request.record_routes else None
        for _ in self.run(sequences, request, store):
            pass
        rollouts = to_rollouts(sequences, keeps_sets=request.keeps_sets)
        routes = None if store is None else join_routes([store], rollouts)
        return Rollouts(rollouts=rollouts, statistics=self.statistics, routes=routes)

    def start(self, prompts: Sequence[NumberedPrompt], request: Request) -> list[ActiveSequence]:
        """Returns the empty continuations of all prompts."""
        config = self._model.config
        check(config, [prompt.tokens for prompt in prompts], request.max_new_tokens, self._wanted, self._batch_size)
        return start_sequences(prompts, request, config.max_position_tokens)

    @torch.no_grad()
    def run(
        self, sequences: Sequence[ActiveSequence], request: Request, store: RouteStore | None = None
    ) -> Iterator[tuple[ActiveSequence, list[int]]]:
        """Continues sequences, and yields the new tokens of each pass that are text. `statistics` count them."""
        self.statistics = Statistics()
        waiting = deque(sequence for sequence in sequences if sequence.num_left > 0)
        if not waiting:
            return
        # The capacity includes a draft: the model reads it together with the last token, which is not in the cache yet.
        capacity = max(sequence.max_length for sequence in waiting)
        size = min(self._batch_size, len(waiting))
        decoder = Decoder(self._model, size, capacity, with_mtp=self._speculative, routes=store)
        batch = GenerationBatch(
            decoder,
            request,
            self._stop_condition,
            speculative=self._speculative,
            prefill_tokens=self._prefill_tokens,
        )
        began = time.perf_counter()
        with self._model.weights_unchanged():
            for made in batch.run(waiting, size):
                self.statistics = batch.statistics(time.perf_counter() - began)
                yield from made


def start_sequences(prompts: Sequence[NumberedPrompt], request: Request, max_positions: int) -> list[ActiveSequence]:
    """Returns the empty continuations of all prompts: all samples of a prompt, then those of the next."""
    return [
        ActiveSequence(
            prompt.number,
            prompt.tokens,
            min(request.max_new_tokens, max_positions - len(prompt.tokens)),
            SequenceRandom(request.sampling.seed, prompt.number, sample, request.step),
            sample=sample,
            place=number * request.samples + sample,
        )
        for number, prompt in enumerate(prompts)
        for sample in range(request.samples)
    ]


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
