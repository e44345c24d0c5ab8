"""Continues prompts with a model that is whole in this process."""

import time
from collections import deque
from collections.abc import Sequence

import torch

from infer.active import ActiveSequence, StopCondition
from infer.batch import PROMPT_TOKENS, GenerationBatch
from infer.config import Speculative, Statistics, check
from infer.decoder import Decoder
from infer.engines.protocol import NumberedPrompt, Request, Rollouts, Sample, SampledRoutes
from infer.routes import RouteStore, join_routes
from infer.sample import SequenceRandom
from model.transformer import Transformer


class LocalEngine:
    """An engine with the whole model in one process.

    Continuations of a prompt share the pass over it. When one ends, the next one takes its place in the batch.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        speculative: Speculative = "auto",
        batch_size: int = 64,
        prefill_tokens: int = PROMPT_TOKENS,
        stop_condition: StopCondition = lambda index, token: False,
    ) -> None:
        """Stores the arguments.

        Args:
            stop_condition: called with each new token (prompt's number, token); true ends the continuation after it.
        """
        self._stop_condition = stop_condition
        self._model, self._wanted, self._batch_size = model, speculative, batch_size
        self._prefill_tokens = prefill_tokens
        self._speculative = model.config.mtp_depth > 0 if speculative == "auto" else speculative

    @torch.no_grad()
    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Implements `Engine.generate`."""
        config = self._model.config
        check(config, [prompt.tokens for prompt in prompts], request.max_new_tokens, self._wanted, self._batch_size)
        sequences = start_sequences(prompts, request, config.max_position_tokens)
        store = RouteStore(prompts, request.samples) if request.record_routes else None
        waiting = deque(sequence for sequence in sequences if sequence.num_left > 0)
        if not waiting:
            rollouts = to_rollouts(sequences, keeps_sets=request.keeps_sets)
            return Rollouts(rollouts=rollouts, statistics=Statistics(), routes=_collect(store, rollouts))
        capacity, size = max(sequence.max_length for sequence in waiting), min(self._batch_size, len(waiting))
        decoder = Decoder(self._model, size, capacity, with_mtp=self._speculative, routes=store)
        batch = GenerationBatch(
            decoder,
            request.sampling,
            request.stop,
            self._stop_condition,
            speculative=self._speculative,
            prefill_tokens=self._prefill_tokens,
            keeps_sets=request.keeps_sets,
        )
        began = time.perf_counter()
        with self._model.weights_unchanged():
            for _ in batch.run(waiting, size):
                pass
        statistics = batch.statistics(time.perf_counter() - began)
        rollouts = to_rollouts(sequences, keeps_sets=request.keeps_sets)
        return Rollouts(rollouts=rollouts, statistics=statistics, routes=_collect(store, rollouts))


def _collect(store: RouteStore | None, rollouts: Sequence[Sample]) -> SampledRoutes | None:
    return None if store is None else join_routes([store], rollouts)


def start_sequences(prompts: Sequence[NumberedPrompt], request: Request, max_positions: int) -> list[ActiveSequence]:
    """Returns the empty continuations of all prompts: all samples of a prompt, then those of the next.

    Args:
        max_positions: maximum number of tokens of a prompt and its continuation.
    """
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
