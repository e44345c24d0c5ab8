"""Text from a model: continuations of prompts, token by token, over a latent cache."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from infer.batch import ActiveSequence, GenerationBatch, StopCondition
from infer.config import Finish, Sampling, Speculative, Statistics, as_token_ids, check
from infer.decoder import Decoder
from infer.sample import SequenceRandom
from model.transformer import Transformer

GREEDY = Sampling()
BATCH_SIZE = 16
PROMPT_TOKENS = 8192  # read at once, where several prompts are read together


@dataclass(frozen=True, slots=True)
class Continuation:
    """Of one prompt: the tokens made, without the stop token that ended them, and why they ended."""

    tokens: tuple[int, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation of every prompt, in the prompts' order, and what all took together."""

    continuations: tuple[Continuation, ...]
    statistics: Statistics


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of a prompt, by its number; `finish` is None while more may come."""

    index: int
    tokens: tuple[int, ...]
    finish: Finish | None


class Stream:
    """Continuations as they are made: iterate once over it for pieces of all prompts, as their tokens are chosen."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Iterable[int] = (),
        speculative: Speculative = "auto",
        batch_size: int = BATCH_SIZE,
        stop_condition: StopCondition | None = None,
    ) -> None:
        """As `generate`; nothing is made before the first piece is asked for."""
        self._model, self._prompts, self._max_new_tokens = model, as_token_ids(prompts), max_new_tokens
        check(model.config, self._prompts, max_new_tokens, speculative, batch_size)
        self._sampling, self._stop, self._batch_size = sampling, frozenset(stop), batch_size
        self._speculative = model.config.mtp_depth > 0 if speculative == "auto" else speculative
        self._stop_condition = stop_condition or _never_stop
        self.statistics = Statistics()

    @torch.no_grad()
    def __iter__(self) -> Iterator[Piece]:
        """Every prompt's pieces in order; pieces of prompts that are made together come mixed."""
        limit = self._model.config.max_position_tokens
        limits = [min(self._max_new_tokens, limit - len(prompt)) for prompt in self._prompts]
        waiting: deque[ActiveSequence] = deque()
        for index, (prompt, max_tokens) in enumerate(zip(self._prompts, limits, strict=True)):
            if max_tokens > 0:
                waiting.append(ActiveSequence(index, prompt, max_tokens, SequenceRandom(self._sampling.seed, index)))
            else:
                yield Piece(index, (), "length")
        if not waiting:
            return
        # A draft fits too: it is read beside the last token made, which has not been read yet.
        capacity = max(len(sequence.prompt) + sequence.num_left for sequence in waiting)
        decoder = Decoder(self._model, min(self._batch_size, len(waiting)), capacity, with_mtp=self._speculative)
        batch = GenerationBatch(
            decoder, self._sampling, self._stop, self._stop_condition, speculative=self._speculative
        )
        begin = time.perf_counter()
        while waiting or len(batch):
            admitted = _next(waiting, self._batch_size - len(batch))
            made = batch.admit(admitted) if admitted else batch.advance()
            self.statistics = batch.statistics(time.perf_counter() - begin)
            for sequence, tokens in made:
                yield Piece(sequence.index, tuple(tokens), sequence.finish)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Iterable[int] = (),
    speculative: Speculative = "auto",
    batch_size: int = BATCH_SIZE,
    stop_condition: StopCondition | None = None,
) -> Generation:
    """Continues every prompt.

    Args:
        model: whole, in one process.
        prompts: token ids of each, at least one; lengths may differ. Rows of a tensor do as well.
        max_new_tokens: at most this many are made of each, and never more than the model's positions hold.
        sampling: how tokens are chosen; the most probable ones by default.
        stop: tokens after which nothing follows; not part of the result.
        speculative: whether the first MTP module drafts a token a round. It changes how many passes the tokens take,
            not the tokens of greedy decoding nor the distribution of others.
        batch_size: prompts that are made together; as one ends the next takes its place.
        stop_condition: told of every token of the result as it is made; true ends that prompt's continuation with it.

    Raises:
        GenerateError: an empty or too long prompt, a token outside the vocabulary, drafts without an MTP module,
            scores that are not finite.
    """
    stream = Stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        speculative=speculative,
        batch_size=batch_size,
        stop_condition=stop_condition,
    )
    tokens: list[list[int]] = [[] for _ in range(len(prompts))]
    finish: list[Finish] = ["length"] * len(prompts)
    for piece in stream:
        tokens[piece.index] += piece.tokens
        finish[piece.index] = piece.finish or finish[piece.index]
    made = (Continuation(tuple(ids), why) for ids, why in zip(tokens, finish, strict=True))
    return Generation(tuple(made), stream.statistics)


def _next(waiting: deque[ActiveSequence], free: int) -> list[ActiveSequence]:
    """The prompts to read next: as many as fit, in passes of a bounded number of tokens."""
    taken: list[ActiveSequence] = []
    num_tokens = 0
    while waiting and len(taken) < free:
        num_tokens += len(waiting[0].prompt)
        if taken and num_tokens > PROMPT_TOKENS:
            break
        taken.append(waiting.popleft())
    return taken


def _never_stop(index: int, token: int) -> bool:
    return False
