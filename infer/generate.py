"""Generates continuations of prompts token by token with a latent KV cache."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from infer.config import Finish, Sampling, Speculative, Statistics, as_token_ids
from infer.engines.local import LocalEngine
from infer.protocol import NumberedPrompt, Request
from infer.sequence import StopCondition, never_stop
from model.transformer import Transformer

GREEDY = Sampling()
BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Continuation:
    """Continuation of one prompt: its tokens without the final stop token, and why it ended."""

    tokens: tuple[int, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class Generation:
    """Continuations of all prompts in the prompts' order, and joint statistics."""

    continuations: tuple[Continuation, ...]
    statistics: Statistics


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of the prompt with number `index`. `finish` is None until the continuation ends."""

    index: int
    tokens: tuple[int, ...]
    finish: Finish | None


class Stream:
    """Streaming generation: iterate once to get the pieces of all prompts as their tokens are chosen."""

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
        stop_condition: StopCondition = never_stop,
    ) -> None:
        """Checks the arguments, which are those of `generate`. Generation starts with the iteration."""
        numbered = [
            NumberedPrompt(number=number, tokens=tuple(prompt)) for number, prompt in enumerate(as_token_ids(prompts))
        ]
        self._request = Request(samples=1, max_new_tokens=max_new_tokens, sampling=sampling, stop=frozenset(stop))
        self._engine = LocalEngine(model, speculative=speculative, batch_size=batch_size, stop_condition=stop_condition)
        self._sequences = self._engine.start(numbered, self._request)

    @property
    def statistics(self) -> Statistics:
        """Statistics of the tokens so far."""
        return self._engine.statistics

    def __iter__(self) -> Iterator[Piece]:
        """Yields each prompt's pieces in order; pieces of prompts in one batch are interleaved."""
        for sequence in self._sequences:
            if sequence.num_left == 0:
                yield Piece(sequence.index, (), "length")
        for sequence, tokens in self._engine.run(self._sequences):
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
    stop_condition: StopCondition = never_stop,
) -> Generation:
    """Continues every prompt. Returns the continuations in the prompts' order, and statistics.

    Args:
        model: the whole model, in one process.
        prompts: token ids of each prompt, at least one; lengths may differ. Rows of a tensor are accepted, too.
        max_new_tokens: maximum number of new tokens per prompt; also limited by the model's positions.
        stop: token ids that end a continuation; they are not part of the result.
        speculative: whether the first MTP module drafts one token per round. Drafts reduce the number of passes. They
            change neither the tokens of greedy decoding nor the distribution of sampled tokens.
        batch_size: number of prompts that are continued together; when one ends, the next prompt takes its place.
        stop_condition: called with each new token (prompt's number, token); true ends the continuation after it.

    Raises:
        GenerateError: a prompt is empty or too long, a token is outside the vocabulary, drafts are requested without an
            MTP module, or logits are not finite.
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
    continuations = (Continuation(tuple(ids), why) for ids, why in zip(tokens, finish, strict=True))
    return Generation(tuple(continuations), stream.statistics)
