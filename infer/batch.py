"""Batched decoding: sequences that are generated together, and the rounds that extend them.

Shape legend: B active sequences, S new tokens of each, N prompt tokens of all, D hidden size, V vocabulary.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from infer.cohorts import PROMPT_TOKENS, take_waiting
from infer.config import Finish, GenerateError, Speculative, Statistics
from infer.decoder import Decoder
from infer.protocol import Request
from infer.sample import SequenceRandom, TokenHistory, distribution, draw, log_probs, num_times, penalize, verify

StopCondition = Callable[[int, int], bool]
"""Called with each new token (prompt's number, token); returns true to end the sequence after that token."""


def never_stop(index: int, token: int) -> bool:
    """Ends no sequence."""
    return False


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """A token, its log-probability (`infer.sample.log_probs`) and those that sampling kept, if recorded."""

    token: int
    log_prob: float
    kept: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptEnd:
    """The state for the MTP module and the logits at the last token of a prompt."""

    state_1D: Tensor
    logits_V: Tensor
    has_pairs: bool  # whether the MTP module has read the prompt


@dataclass(slots=True, eq=False)
class ActiveSequence:
    """A prompt and its continuation so far.

    Attributes:
        finish: why it ended; None if it has not.
        states_TD: states of the last 1 or 2 tokens, which the MTP module has not read.
    """

    index: int
    prompt: Sequence[int]
    max_tokens: int
    random: SequenceRandom
    sample: int = 0
    place: int = 0
    chosen: list[ChosenToken] = field(default_factory=list)
    finish: Finish | None = None
    states_TD: Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        """Tokens of the continuation, including a stop token that ended it."""
        return [chosen.token for chosen in self.chosen]

    @property
    def num_left(self) -> int:
        """Number of tokens that can still be generated."""
        return self.max_tokens - len(self.chosen)

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of prompt and continuation."""
        return len(self.prompt) + self.max_tokens

    def take(self, chosen: ChosenToken, stop: frozenset[int], stop_condition: StopCondition) -> bool:
        """Adds a chosen token. Returns whether it is text, which a stop token is not."""
        self.chosen.append(chosen)
        if chosen.token in stop:
            self.finish = "stop"
            return False
        if stop_condition(self.index, chosen.token):
            self.finish = "stop"
        elif self.num_left == 0:
            self.finish = "length"
        return True


class DraftChoice:
    """Chooses whether a pass has drafts: always, never, or (`auto`) if they save time.

    Numbers of rows are grouped by powers of two. Both kinds of passes are timed while they generate: at first two of
    each, then one of the slower kind so rarely that it costs less than 1 % of the time.
    """

    def __init__(self, wanted: Speculative, *, is_timed: bool = True) -> None:
        """Starts without times. If none are taken, `auto` always drafts, with the tokens of no drafts."""
        self.keeps_tokens = wanted == "auto"
        self.wanted: Speculative = True if self.keeps_tokens and not is_timed else wanted
        # Seconds per row of the last passes, by power of two and by whether there were drafts.
        self._seconds: dict[tuple[int, bool], deque[float]] = defaultdict(lambda: deque(maxlen=4))
        # Tokens per second with drafts, divided by those without, by power of two.
        self._gains: dict[int, float] = {}
        # Counts of recent drafts. Two accepted ones are assumed at the start, so that a few are tried.
        self._offered = self._accepted = 2.0
        self._num_passes = 0  # since the last one of the slower kind

    def pays(self, num_rows: int) -> bool:
        """Whether drafts make tokens faster, as far as was measured."""
        return self.wanted if self.wanted != "auto" else self._gains.get((num_rows - 1).bit_length(), 0.0) > 1

    def choose(self, num_rows: int) -> bool:
        """Returns whether the next pass has drafts."""
        if self.wanted != "auto":
            return self.wanted
        num_plain, num_drafted = (len(self._seconds[(num_rows - 1).bit_length(), kind]) for kind in (False, True))
        if num_plain < 2 or (num_drafted < 2 and self._accepted > self._offered / 8):
            return num_plain >= 2
        gain = self._gains.get((num_rows - 1).bit_length(), 0.5)
        self._num_passes += 1
        is_probe = self._num_passes > _LEAST_PASSES + 100 * (max(gain, 1 / gain) - 1)
        self._num_passes *= not is_probe
        return self.pays(num_rows) != is_probe

    def record(self, num_rows: int, seconds: float, num_tokens: int, *, is_drafted: bool) -> None:
        """Records a pass."""
        power = (num_rows - 1).bit_length()
        self._seconds[power, is_drafted].append(seconds / num_rows)
        if is_drafted:
            kept_share = _RECENT_DRAFTS / max(self._offered, _RECENT_DRAFTS)
            self._offered = self._offered * kept_share + num_rows
            self._accepted = self._accepted * kept_share + num_tokens - num_rows
        if self._seconds[power, False] and self._seconds[power, True]:
            ratio = min(self._seconds[power, False]) / min(self._seconds[power, True])
            self._gains[power] = (1 + self._accepted / self._offered) * ratio

    def summary(self) -> str:
        """Returns the measured gains."""
        gains = ", ".join(f"{gain:.2f} at {2**power}" for power, gain in sorted(self._gains.items()))
        return f"speed with drafts by rows: {gains}" if gains else ""


_LEAST_PASSES = 4  # between passes of the slower kind, if both are equally fast
_RECENT_DRAFTS = 64


class GenerationBatch:
    """The active sequences, in the order of the decoder's rows."""

    def __init__(
        self,
        decoder: Decoder,
        request: Request,
        stop_condition: StopCondition,
        *,
        drafts: DraftChoice,
        prefill_tokens: int = PROMPT_TOKENS,
    ) -> None:
        self._decoder = decoder
        self._request = request
        self._stop_condition = stop_condition
        self._sampling = request.sampling
        self._drafts = drafts
        # Other work on the machine adds no CPU time. A device is waited for at the end of each pass.
        self._clock = time.process_time if decoder.device.type == "cpu" else time.perf_counter
        self._prefill_tokens = prefill_tokens
        self._reads_pairs = False  # whether the MTP module reads the prompts that are admitted
        self._active: list[ActiveSequence] = []
        self._prompt_ends: dict[int, PromptEnd] = {}  # by prompt number, of the active sequences
        self._counts = {"passes": 0, "visits": 0, "tokens": 0, "drafts_offered": 0, "drafts_accepted": 0}

    def __len__(self) -> int:
        return len(self._active)

    def statistics(self, seconds: float) -> Statistics:
        """Returns the statistics of all tokens so far, generated in the given number of seconds."""
        return Statistics(**self._counts, seconds=seconds, choice=self._drafts.summary())

    def run(self, waiting: deque[ActiveSequence], batch_size: int) -> Iterator[list[tuple[ActiveSequence, list[int]]]]:
        """Generates until no sequence is left. Yields the results of each pass."""
        while waiting or self._active:
            admitted = take_waiting(waiting, batch_size - len(self._active), self._prefill_tokens)
            yield self.admit(admitted) if admitted else self.advance()

    def admit(self, sequences: Sequence[ActiveSequence]) -> list[tuple[ActiveSequence, list[int]]]:
        """Reads prompts, each once, and generates the first token of each. Returns the same as `advance`."""
        rows = [self._decoder.add(sequence.place) for sequence in sequences]
        unread = {
            sequence.index: row
            for row, sequence in zip(reversed(rows), reversed(sequences), strict=True)
            if sequence.index not in self._prompt_ends
        }
        sources = {sequence.index: row for row, sequence in enumerate(self._active)} | unread
        self._active += sequences
        self._reads_pairs = self._drafts.pays(len(self._active))
        self._read_prompts([(row, self._active[row]) for row in sorted(unread.values())])
        for row, sequence in zip(rows, sequences, strict=True):
            if sources[sequence.index] != row:
                self._decoder.copy_prompt(sources[sequence.index], row, len(sequence.prompt))
            prompt_end = self._prompt_ends[sequence.index]
            sequence.states_TD = prompt_end.state_1D
            if not prompt_end.has_pairs:
                self._decoder.mtp.resize(row, 0)
        logits_BV = torch.stack([self._prompt_ends[sequence.index].logits_V for sequence in sequences])
        new_tokens = self._take(sequences, self._choose(sequences, logits_BV))
        self._drop_finished()
        return new_tokens

    def _read_prompts(self, unread: Sequence[tuple[int, ActiveSequence]]) -> None:
        short = [(row, sequence) for row, sequence in unread if len(sequence.prompt) <= self._prefill_tokens]
        if short:
            self._counts["visits"] += 1
            self._read_short_prompts([row for row, _ in short], [sequence for _, sequence in short])
        for row, sequence in unread:
            if len(sequence.prompt) > self._prefill_tokens:
                self._prompt_ends[sequence.index] = self._read_long_prompt(row, sequence.prompt)
        self._counts["passes"] += len(unread)

    def _read_short_prompts(self, rows: Sequence[int], sequences: Sequence[ActiveSequence]) -> None:
        prompts = [sequence.prompt for sequence in sequences]
        states, logits_BV = self._decoder.read_prompts(rows, prompts)
        for row, sequence, states_TD, logits_V in zip(rows, sequences, states, logits_BV, strict=True):
            self._decoder.main.resize(row, len(sequence.prompt))
            # A copy, so that the states of the whole prompt are freed.
            self._prompt_ends[sequence.index] = PromptEnd(states_TD[-1:].clone(), logits_V, self._reads_pairs)
        if self._reads_pairs:
            self._read_pairs(rows, prompts, states)

    def _read_long_prompt(self, row: int, prompt: Sequence[int]) -> PromptEnd:
        """Reads a prompt chunk by chunk, so that no pass has more than `prefill_tokens` tokens."""
        decoder = self._decoder
        size = self._prefill_tokens
        for first in range(0, len(prompt), size):
            self._counts["visits"] += 1
            tokens = prompt[first : first + size]
            states_TD, last_1D = decoder.read_chunk(row, tokens)
            decoder.main.resize(row, first + len(tokens))
            next_tokens = prompt[first + 1 : first + 1 + size]
            if self._reads_pairs and next_tokens:
                decoder.read_chunk_mtp(row, next_tokens, states_TD[: len(next_tokens)])
                decoder.mtp.resize(row, first + len(next_tokens))
        return PromptEnd(states_TD[-1:].clone(), decoder.logits(last_1D)[0], self._reads_pairs)

    def advance(self) -> list[tuple[ActiveSequence, list[int]]]:
        """Runs one pass of the main model over all sequences. Returns the new tokens of each, one or two."""
        active = list(self._active)
        self._counts["passes"] += len(active)
        self._counts["visits"] += 1
        # Drafts are made even if every sequence generates its last token. Otherwise the random numbers of a sequence
        # would depend on the other sequences in its batch.
        is_drafted = self._drafts.choose(len(active))
        began = self._clock()
        chosen = self._advance_with_drafts(active) if is_drafted else self._advance_by_one(active)
        self._drafts.record(len(active), self._clock() - began, sum(map(len, chosen)), is_drafted=is_drafted)
        new_tokens = self._take(active, chosen)
        self._drop_finished()
        return new_tokens

    def _advance_by_one(self, active: Sequence[ActiveSequence]) -> list[list[ChosenToken]]:
        state_B1D, logits_B1V = self._decoder.step(self._last_tokens(active))
        for row, (sequence, state_1D) in enumerate(zip(active, state_B1D, strict=True)):
            # The MTP module skips the tokens of passes without drafts, except the last.
            sequence.states_TD = state_1D
            self._decoder.main.resize(row, self._decoder.main.lengths[row] + 1)
        return self._choose(active, logits_B1V[:, 0])

    def _choose(self, sequences: Sequence[ActiveSequence], logits_BV: Tensor) -> list[list[ChosenToken]]:
        tokens_B, target_BV = self._draw(sequences, logits_BV, self._history(sequences), 0)
        return [[token] for token in self._with_log_probs(sequences, logits_BV, target_BV, tokens_B)]

    def _draw(
        self, sequences: Sequence[ActiveSequence], logits_BV: Tensor, history: TokenHistory | None, ahead: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns tokens, B, and the distribution that they are drawn from; None if that is not needed.

        Args:
            ahead: whose random numbers are used: of each sequence's next token, 0, or the one after, 1. None: new ones.
        """
        adjusted_BV = penalize(logits_BV, history, self._sampling)
        if self._sampling.temperature == 0 and not self._request.keeps_sets:
            # The most probable token needs neither a distribution nor random numbers.
            return adjusted_BV.argmax(-1), None
        target_BV = distribution(adjusted_BV, self._sampling)
        return draw(target_BV, self._times(sequences, ahead)), target_BV

    def _times(self, sequences: Sequence[ActiveSequence], ahead: int | None) -> Tensor:
        size = num_times(self._decoder.vocab_size)
        numbers = [None if ahead is None else len(sequence.chosen) + ahead for sequence in sequences]
        times = [sequence.random.times(size, number) for sequence, number in zip(sequences, numbers, strict=True)]
        return torch.from_numpy(np.stack(times)).to(self._decoder.device)

    def _with_log_probs(
        self, sequences: Sequence[ActiveSequence], logits_BV: Tensor, target_BV: Tensor | None, tokens_B: Tensor
    ) -> list[ChosenToken]:
        """Returns tokens with their log-probabilities, and with the kept tokens if they are recorded."""
        # A kept token whose probability is 0 in this type cannot be drawn, and adds nothing to a sum.
        kept_BV = target_BV > 0 if target_BV is not None and self._request.keeps_sets else None
        log_probs_B = log_probs(logits_BV, tokens_B, self._sampling, kept_BV)
        sets: Sequence[tuple[int, ...]] = [()] * len(tokens_B)
        if kept_BV is not None:
            rows_and_ids = kept_BV.nonzero().cpu()  # host sync
            counts = torch.bincount(rows_and_ids[:, 0], minlength=len(tokens_B)).tolist()
            sets = [tuple(ids.tolist()) for ids in rows_and_ids[:, 1].split(counts)]
        rows = zip(sequences, tokens_B.tolist(), log_probs_B.tolist(), sets, strict=True)  # host sync
        return [_checked(sequence, ChosenToken(*values)) for sequence, *values in rows]

    def _advance_with_drafts(self, active: Sequence[ActiveSequence]) -> list[list[ChosenToken]]:
        # Draft one token for each sequence. If drafts must change no token, the main model uses the random numbers of a
        # pass without drafts. A draft that is drawn with the same ones is often the same token.
        is_coupled = self._drafts.keeps_tokens
        history = self._history(active)
        drafts_B, draft_BV = self._draw(active, self._read_new_pairs(active), history, 0 if is_coupled else None)
        # Run the main model over [last token, draft].
        state_B2D, logits_B2V = self._decoder.step(torch.cat((self._last_tokens(active), drafts_B[:, None]), 1))
        # Choose the next token, and the one after it, which counts if the draft is right.
        if is_coupled or draft_BV is None:
            first_B, target_BV = self._draw(active, logits_B2V[:, 0], history, 0)
            accepted_B = first_B == drafts_B
        else:
            target_BV = distribution(penalize(logits_B2V[:, 0], history, self._sampling), self._sampling)
            accepted_B, first_B = verify(target_BV, draft_BV, drafts_B, self._times(active, None))
        after = None if history is None else history.after(drafts_B)
        second_B, after_BV = self._draw(active, logits_B2V[:, 1], after, 1 if is_coupled else None)
        first = self._with_log_probs(active, logits_B2V[:, 0], target_BV, first_B)
        second = self._with_log_probs(active, logits_B2V[:, 1], after_BV, second_B)
        chosen = []
        for row, (sequence, is_accepted) in enumerate(zip(active, accepted_B.tolist(), strict=True)):
            sequence.states_TD = state_B2D[row, : 1 + is_accepted]
            # A rejected draft is removed from the cache by not counting it in the length.
            self._decoder.main.resize(row, self._decoder.main.lengths[row] + 1 + is_accepted)
            if sequence.num_left > 1:
                self._counts["drafts_offered"] += 1
                self._counts["drafts_accepted"] += is_accepted
            chosen.append([first[row], second[row]][: 1 + is_accepted])
        return chosen

    def _history(self, sequences: Sequence[ActiveSequence]) -> TokenHistory | None:
        """Counts the tokens of prompts and continuations; None if the sampling has no penalties."""
        if not self._sampling.has_penalties:
            return None
        decoder = self._decoder
        size = decoder.vocab_size
        device = decoder.device
        return TokenHistory.join([TokenHistory.of(row.prompt, row.tokens, size, device) for row in sequences])

    def _read_pairs(self, rows: Sequence[int], prompts: Sequence[Sequence[int]], states: Sequence[Tensor]) -> None:
        """Runs the MTP module over the pairs (state, next token) within prompts."""
        longer = [at for at, prompt in enumerate(prompts) if len(prompt) > 1]
        if not longer:
            return
        next_tokens = [prompts[at][1:] for at in longer]
        self._decoder.read_prompts_mtp(
            [rows[at] for at in longer], next_tokens, torch.cat([states[at][:-1] for at in longer])
        )
        for at, tokens in zip(longer, next_tokens, strict=True):
            self._decoder.mtp.resize(rows[at], len(tokens))

    def _read_new_pairs(self, active: Sequence[ActiveSequence]) -> Tensor:
        """Runs the MTP module over each sequence's 1 or 2 new pairs. Returns the logits of the draft, BV."""
        states = [sequence.states_TD for sequence in active if sequence.states_TD is not None]
        counts = [len(states_TD) for states_TD in states]
        widest = max(counts)
        # A sequence with fewer pairs repeats its last pair. The repetition is written past its length and never read.
        positions = [[min(at, count - 1) for at in range(widest)] for count in counts]
        state_BSD = torch.stack(
            [states_TD[row_positions] for states_TD, row_positions in zip(states, positions, strict=True)]
        )
        tokens = [
            [sequence.chosen[at - count].token for at in row_positions]
            for sequence, row_positions, count in zip(active, positions, counts, strict=True)
        ]
        chosen_B = torch.tensor(counts, device=self._decoder.device) - 1
        logits_BV = self._decoder.step_mtp(torch.tensor(tokens, device=self._decoder.device), state_BSD, chosen_B)
        for row, count in enumerate(counts):
            self._decoder.mtp.resize(row, self._decoder.mtp.lengths[row] + count)
        return logits_BV

    def _last_tokens(self, active: Sequence[ActiveSequence]) -> Tensor:
        return torch.tensor([[sequence.chosen[-1].token] for sequence in active], device=self._decoder.device)

    def _take(
        self, sequences: Sequence[ActiveSequence], chosen: Sequence[Sequence[ChosenToken]]
    ) -> list[tuple[ActiveSequence, list[int]]]:
        """Adds tokens to each sequence until it ends. Returns the tokens of each that are text."""
        text_tokens = []
        for sequence, tokens in zip(sequences, chosen, strict=True):
            ids = []
            for token in tokens:
                self._counts["tokens"] += 1
                if sequence.take(token, self._request.stop, self._stop_condition):
                    ids.append(token.token)
                if sequence.finish is not None:
                    break
            text_tokens.append((sequence, ids))
        return text_tokens

    def _drop_finished(self) -> None:
        for row in reversed(range(len(self._active))):
            if self._active[row].finish is None:
                continue
            self._decoder.remove(row)
            last = self._active.pop()
            if row < len(self._active):
                self._active[row] = last
        active = {sequence.index for sequence in self._active}
        self._prompt_ends = {index: end for index, end in self._prompt_ends.items() if index in active}


def _checked(sequence: ActiveSequence, chosen: ChosenToken) -> ChosenToken:
    """Returns a chosen token, or raises an error if the logits of the sequence are not finite."""
    if not math.isfinite(chosen.log_prob):
        raise GenerateError(
            f"prompt {sequence.index + 1}: the model's logits must be finite, are not after {len(sequence.chosen)} new "
            f"tokens; its weights or their type are not usable"
        )
    return chosen
