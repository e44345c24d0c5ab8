"""Continues requests that arrive at any time with one model, in one batch and one paged cache.

A step has at most one pass over parts of prompts and one over all sequences that are continued. Between steps, a
request may arrive or be cancelled. Everything runs on the thread of the caller.
"""

from bisect import insort
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from infer.batch import DraftChoice, GenerationBatch, Results
from infer.config import Finish, GenerateError, Speculative, check
from infer.decoder import Decoder
from infer.protocol import ChosenToken, NumberedPrompt, Request
from infer.sequence import ActiveSequence, never_stop, start_sequences
from model.config import BLOCK_TOKENS
from model.transformer import Transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceUpdate:
    """What a step adds to a continuation.

    Attributes:
        tokens: new tokens that are text; a stop token is not.
        prompt_scores: the prompt's tokens after the first, if requested, once.
        finish: why it ended; None if it has not.
        error: why it failed and ended.
    """

    number: int
    tokens: tuple[ChosenToken, ...] = ()
    prompt_scores: tuple[ChosenToken, ...] | None = None
    finish: Finish | None = None
    error: GenerateError | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MovedSequence:
    """A sequence on its way to another engine of the same model: its text so far, and its cached values.

    Attributes:
        values: of the main model's layers, and of the MTP module, both LTC; no layers without drafts.
        states_TD: states of the last 1 or 2 tokens.
    """

    prompt: NumberedPrompt
    request: Request
    chosen: tuple[ChosenToken, ...]
    values: tuple[Tensor, ...]
    states_TD: Tensor


class ContinuousEngine:
    """Serves requests in the order of their arrival; short prompts may overtake long ones.

    A request gets the tokens that it would get alone as the first prompt of a `LocalEngine`. If no block of the cache
    is free, the youngest sequence waits and is read again later, with the same tokens.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_sequences: int,
        cached_tokens: int,
        chunk_tokens: int = 512,
        speculative: Speculative = "auto",
        prefix_cache: bool = True,
        build_decoder: Callable[..., Decoder] = Decoder,
    ) -> None:
        """Allocates a cache of `cached_tokens` tokens. `speculative`: true drafts in every pass."""
        config = model.config
        self.model = model
        self._speculative = speculative
        self._config = config
        self._max_sequences = max_sequences
        self._chunk_tokens = chunk_tokens
        self._num_blocks = -(-cached_tokens // BLOCK_TOKENS)
        wanted: Speculative = speculative if config.mtp_depth > 0 else False
        self._new_tokens = 1 if wanted is False else 2  # most new tokens of a sequence in a pass
        decoder = build_decoder(
            model,
            max_sequences,
            config.max_position_tokens,
            with_mtp=wanted is not False,
            num_blocks=self._num_blocks,
        )
        # Drafts that change no token may start and end at any time.
        drafts = DraftChoice("auto", is_timed=False) if wanted is True else DraftChoice(wanted)
        self.batch = GenerationBatch(decoder, never_stop, drafts=drafts, keeps_blocks=prefix_cache)
        self._waiting: list[ActiveSequence] = []  # by age
        self._news: list[SequenceUpdate] = []
        self._num_submitted = 0
        self._num_preempted = 0
        self._prefers_oldest = False
        self._unchanged = ExitStack()
        self._unchanged.enter_context(model.weights_unchanged())

    @property
    def is_idle(self) -> bool:
        """Whether no sequence waits or is continued."""
        return not (self._waiting or self.batch.rows or self._news)

    def counts(self) -> Mapping[str, int]:
        """Returns the numbers of sequences and blocks, and what was counted since the start."""
        statistics = self.batch.statistics(0.0)
        return {
            "queued": len(self._waiting),
            "active": len(self.batch),
            "free_blocks": self.batch.decoder.main.num_free_blocks,
            "total_blocks": self._num_blocks,
            "cache_bytes": self.batch.decoder.main.num_bytes + self.batch.decoder.mtp.num_bytes,
            "reused_tokens": self.batch.num_reused,
            "preemptions": self._num_preempted,
            "tokens": statistics.tokens,
            "passes": statistics.visits,
            "drafts_offered": statistics.drafts_offered,
            "drafts_accepted": statistics.drafts_accepted,
        }

    def check(self, prompt: NumberedPrompt, request: Request) -> None:
        """Raises GenerateError if a request is invalid, or if the cache can never hold it."""
        limit = self._config.max_position_tokens
        check(self._config, [prompt.tokens], request.max_new_tokens, self._speculative, self._max_sequences)
        longest = min(len(prompt.tokens) + request.max_new_tokens, limit)
        most = self._num_blocks * BLOCK_TOKENS
        if longest > most:
            raise GenerateError.broken("tokens", "the cache must hold prompt and continuation", longest, most)

    def submit(self, prompt: NumberedPrompt, request: Request) -> None:
        """Queues a request with a new number, or raises as `check`."""
        self.check(prompt, request)
        assert all(row.index != prompt.number for row in (*self._waiting, *self.batch.rows)), "the number is taken"
        self._waiting.append(self._start(prompt, request))

    def _start(self, prompt: NumberedPrompt, request: Request) -> ActiveSequence:
        assert request.samples == 1, "each answer is a separate prompt"
        # Random numbers depend on the seed, not on other requests.
        (sequence,) = start_sequences([replace(prompt, number=0)], request, self._config.max_position_tokens)
        sequence.index = prompt.number
        sequence.order = self._num_submitted
        self._num_submitted += 1
        return sequence

    def export_sequence(self, number: int) -> MovedSequence:
        """Removes a sequence that has a token, and returns it."""
        row = [active.index for active in self.batch.rows].index(number)
        sequence = self.batch.rows[row]
        assert sequence.states_TD is not None, "a sequence without a token has no state to move"
        decoder = self.batch.decoder
        moved = MovedSequence(
            prompt=NumberedPrompt(number=number, tokens=tuple(sequence.prompt)),
            request=sequence.request,
            chosen=tuple(sequence.chosen),
            values=(decoder.main.export(row), decoder.mtp.export(row)),
            states_TD=sequence.states_TD,
        )
        self.batch.remove(sequence)
        return moved

    def import_sequence(self, moved: MovedSequence) -> None:
        """Continues an exported sequence. It waits, and is read again, if it has no room yet."""
        sequence = self._start(moved.prompt, moved.request)
        sequence.resume(moved.chosen)
        self._waiting.append(sequence)
        if self._has_room(sequence):
            self._begin(sequence)
            self.batch.load(sequence, moved.values, moved.states_TD)

    def cancel(self, number: int) -> None:
        """Removes a request, and frees its blocks."""
        self._waiting = [sequence for sequence in self._waiting if sequence.index != number]
        self._news = [news for news in self._news if news.number != number]
        for sequence in [row for row in self.batch.rows if row.index == number]:
            self.batch.remove(sequence)

    @torch.inference_mode()
    def step(self) -> list[SequenceUpdate]:
        """Runs the passes of a step, and returns what is new."""
        for sequence in sorted(self.batch.rows[: self.batch.num_active], key=_AGE):
            if sequence in self.batch.rows:
                self._reserve_pass(sequence)
        chunk = self._plan_chunk()
        if self.batch.num_active:
            self._report(self.batch.advance())
        if chunk:
            self.batch.read([*chunk], [*chunk.values()])
            self._report(self.batch.join([sequence for sequence in chunk if sequence.states_TD is not None]))
        news = self._news
        self._news = []
        return news

    def forget_codes(self) -> None:
        """Discards the quantized codes of weights. Call it after weights have changed between two steps."""
        self._unchanged.close()
        self._unchanged.enter_context(self.model.weights_unchanged())

    def close(self) -> None:
        """Allows the weights to change. No step may follow."""
        self._unchanged.close()

    def _plan_chunk(self) -> dict[ActiveSequence, int]:
        """Chooses what is read next, as numbers of tokens: in turn the oldest prompt, and the shortest ones."""
        reading = self.batch.rows[self.batch.num_active :]
        startable = self._startable()
        if not reading and not startable:
            return {}
        self._prefers_oldest = not self._prefers_oldest
        first = min([*reading, *startable], key=_AGE if self._prefers_oldest else self._num_unread)
        if first in startable:
            self._begin(first)
        chunk = {first: min(self._chunk_tokens, self._num_unread(first))}
        if self.batch.num_cached(first) or chunk[first] < self._num_unread(first):
            return chunk
        others = [sequence for sequence in (*reading, *startable) if sequence is not first]
        for sequence in sorted(others, key=self._num_unread):
            if sum(chunk.values()) + self._num_unread(sequence) > self._chunk_tokens:
                break
            if sequence in startable:
                if not self._has_room(sequence):
                    break
                self._begin(sequence)
            if not self.batch.num_cached(sequence):
                chunk[sequence] = self._num_unread(sequence)
        return chunk

    def _startable(self) -> list[ActiveSequence]:
        """Returns the waiting sequences to read now; none if the oldest one has too few blocks."""
        if not self._waiting or not self._has_room(self._waiting[0]):
            return []
        return [sequence for sequence in self._waiting if self._has_room(sequence)]

    def _has_room(self, sequence: ActiveSequence) -> bool:
        num_blocks = -(-(sequence.num_text + self._new_tokens) // BLOCK_TOKENS)
        # A sequence alone always fits.
        return not self.batch.rows or (
            len(self.batch) < self._max_sequences and num_blocks <= self.batch.decoder.num_free_blocks
        )

    def _begin(self, sequence: ActiveSequence) -> None:
        """Adds a row for a sequence, with blocks for its whole text."""
        self._waiting.remove(sequence)
        self.batch.begin(sequence)
        has_room = self.batch.reserve(sequence, self._num_unread(sequence))
        assert has_room, "a sequence began without room for its text"

    def _num_unread(self, sequence: ActiveSequence) -> int:
        num_cached = self.batch.num_cached(sequence) if sequence in self.batch.rows else 0
        return sequence.num_text - num_cached

    def _reserve_pass(self, sequence: ActiveSequence) -> None:
        """Reserves the blocks of a sequence's next tokens, if need be those of younger sequences."""
        while not self.batch.reserve(sequence, self._new_tokens):
            youngest = max(self.batch.rows, key=_AGE)
            self.batch.remove(youngest)
            insort(self._waiting, youngest, key=_AGE)
            self._num_preempted += 1
            if youngest is sequence:
                return

    def _report(self, results: Results) -> None:
        for sequence, tokens in results:
            scores = tuple(sequence.prompt_scores) or None
            sequence.prompt_scores = []
            news = SequenceUpdate(
                number=sequence.index,
                tokens=tuple(tokens),
                prompt_scores=scores,
                finish=sequence.finish,
                error=sequence.error,
            )
            self._news.append(news)


_AGE = attrgetter("order")
