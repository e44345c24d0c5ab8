"""Batched decoding: sequences that are generated together, and the rounds that extend them.

Shape legend: B active sequences, S new tokens of each, N prompt tokens of all, D hidden size, V vocabulary.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infer.chooser import choose_tokens, group_rows, join_rows, score_tokens
from infer.cohorts import PROMPT_TOKENS, plan_reads, take_waiting
from infer.config import Speculative, Statistics
from infer.decoder import Decoder
from infer.protocol import ChosenToken, StopToken
from infer.sequence import ActiveSequence


@dataclass(frozen=True, slots=True)
class PromptEnd:
    """The state for the MTP module and the logits at the last token of a prompt."""

    state_1D: Tensor
    logits_V: Tensor
    num_pairs: int  # pairs of the prompt that the MTP module has read


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


Results = list[tuple[ActiveSequence, list[ChosenToken]]]
"""Sequences with their new tokens that are text."""


class GenerationBatch:
    """Sequences by the decoder's rows: those that are continued, then those with prompts to read."""

    def __init__(
        self,
        decoder: Decoder,
        stop_condition: StopToken,
        *,
        drafts: DraftChoice,
        prefill_tokens: int = PROMPT_TOKENS,
        keeps_blocks: bool = False,
    ) -> None:
        """Starts empty. `keeps_blocks`: whether finished blocks of the cache stay readable for later prompts."""
        self.decoder = decoder
        self.rows: list[ActiveSequence] = []
        self.num_active = 0
        self._stop_condition = stop_condition
        self._drafts = drafts
        # Other work on the machine adds no CPU time. A device is waited for at the end of each pass.
        self._clock = time.process_time if decoder.device.type == "cpu" else time.perf_counter
        self._is_timed = drafts.wanted == "auto"
        self._prefill_tokens = prefill_tokens
        self._keeps_blocks = keeps_blocks
        self.num_reused = 0  # tokens of prompts that were found in finished blocks
        self._prompt_ends: dict[int, PromptEnd] = {}  # by prompt number, of the active sequences
        self._counts = {"passes": 0, "visits": 0, "tokens": 0, "drafts_offered": 0, "drafts_accepted": 0}

    def __len__(self) -> int:
        return len(self.rows)

    def statistics(self, seconds: float) -> Statistics:
        """Returns the statistics of all tokens so far, generated in the given number of seconds."""
        return Statistics(**self._counts, seconds=seconds, choice=self._drafts.summary())

    def run(self, waiting: deque[ActiveSequence], batch_size: int) -> Iterator[Results]:
        """Generates until no sequence is left. Yields the results of each pass."""
        while waiting or self.rows:
            admitted = take_waiting(waiting, batch_size - len(self), self._prefill_tokens)
            results = self._admit(admitted) if admitted else self.advance()
            for sequence, _ in results:
                if sequence.error is not None:
                    raise sequence.error
            yield results

    def _admit(self, sequences: Sequence[ActiveSequence]) -> Results:
        """Reads prompts, each once, and generates the first token of each."""
        passes = plan_reads(sequences, self._prompt_ends, self._prefill_tokens)
        for sequence in sequences:
            self.begin(sequence)
        for counts in passes:
            self.read([*counts], [*counts.values()])
        return self.join(sequences)

    def begin(self, sequence: ActiveSequence) -> None:
        """Adds a row for a sequence before its prompt is read, except for finished blocks."""
        row = self.decoder.add(sequence.place)
        self.rows.append(sequence)
        scores_prompt = sequence.request.scores_prompt and not sequence.chosen
        if self._keeps_blocks and not scores_prompt:
            self.num_reused += self.decoder.main.start(row, sequence.text)
        if scores_prompt:
            sequence.prompt_scores = []

    def num_cached(self, sequence: ActiveSequence) -> int:
        """Returns how many tokens of a sequence are in the cache."""
        return self.decoder.main.lengths[self.rows.index(sequence)]

    def reserve(self, sequence: ActiveSequence, count: int) -> bool:
        """Takes blocks for the next tokens of a sequence. Returns false, and takes none, if too few are free."""
        row = self.rows.index(sequence)
        caches = (self.decoder.main, self.decoder.mtp)
        has_room = all(cache.has_room(row, count) for cache in caches)
        if has_room:
            for cache in caches:
                cache.reserve(row, count)
        return has_room

    def read(self, sequences: Sequence[ActiveSequence], counts: Sequence[int]) -> None:
        """Reads the next tokens in one pass: the first ones of empty rows, or later ones of a single row."""
        decoder = self.decoder
        rows = [self.rows.index(sequence) for sequence in sequences]
        token_lists = [sequence.text for sequence in sequences]
        ends = [decoder.main.lengths[row] + count for row, count in zip(rows, counts, strict=True)]
        spans = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        values = decoder.read(rows, [text[span] for text, span in zip(token_lists, spans, strict=True)])
        self._counts["visits"] += 1
        for row, end in zip(rows, ends, strict=True):
            decoder.main.resize(row, end)
        states = [states_TD for states_TD, _ in values]
        if self._drafts.pays(len(self)):
            pairs = [text[span.start + 1 : span.stop + 1] for text, span in zip(token_lists, spans, strict=True)]
            self._read_pairs(rows, pairs, states)
        for sequence, (_, normal_TD), span in zip(sequences, values, spans, strict=True):
            self._score_prompt(sequence, normal_TD, span)
        # A copy of the last state, so that the states of the whole prompt are freed.
        last = [at for at, (text, end) in enumerate(zip(token_lists, ends, strict=True)) if end == len(text)]
        logits_BV = decoder.logits(torch.stack([values[at][1][-1] for at in last])) if last else ()
        for at, logits_V in zip(last, logits_BV, strict=True):
            sequence = sequences[at]
            self._counts["passes"] += 1
            sequence.states_TD = states[at][-1:].clone()
            if self._keeps_blocks:
                decoder.main.finish(rows[at], token_lists[at])
            if not sequence.chosen:
                num_pairs = decoder.mtp.lengths[rows[at]]
                self._prompt_ends[sequence.index] = PromptEnd(sequence.states_TD, logits_V, num_pairs)

    def _read_pairs(self, rows: Sequence[int], pairs: Sequence[Sequence[int]], states: Sequence[Tensor]) -> None:
        """Runs the MTP module over pairs (state, next token) within prompts."""
        filled = [at for at, next_tokens in enumerate(pairs) if next_tokens]
        if not filled:
            return
        next_states = torch.cat([states[at][: len(pairs[at])] for at in filled])
        self.decoder.read_mtp([rows[at] for at in filled], [pairs[at] for at in filled], next_states)
        for at in filled:
            self.decoder.mtp.resize(rows[at], self.decoder.mtp.lengths[rows[at]] + len(pairs[at]))

    def _score_prompt(self, sequence: ActiveSequence, normal_TD: Tensor, span: slice) -> None:
        """Scores the tokens of a prompt that follow those that were just read, if requested."""
        if not sequence.request.scores_prompt or sequence.chosen:
            return
        targets = torch.tensor(sequence.prompt[span.start + 1 : span.stop + 1], device=normal_TD.device)
        # A few tokens at a time, because each has a row of the vocabulary.
        pieces = zip(targets.split(_SCORED_TOKENS), normal_TD[: len(targets)].split(_SCORED_TOKENS), strict=True)
        for targets_R, normal_RD in pieces:
            logits_RV = self.decoder.logits(normal_RD)
            sequence.prompt_scores += score_tokens(logits_RV, targets_R, sequence.request.num_alternatives or 0)

    def load(self, sequence: ActiveSequence, values: Sequence[Tensor], states_TD: Tensor) -> None:
        """Continues a sequence after another decoder has read its text."""
        row = self.rows.index(sequence)
        for cache, values_LTC in zip((self.decoder.main, self.decoder.mtp), values, strict=True):
            # Blocks of the same beginning may be here already.
            cache.load(row, values_LTC[:, cache.lengths[row] :])
        sequence.states_TD = states_TD
        self.join([sequence])

    def join(self, sequences: Sequence[ActiveSequence]) -> Results:
        """Continues sequences after their prompts are read or copied, and chooses their first tokens."""
        for sequence in sequences:
            row = self.rows.index(sequence)
            if sequence.states_TD is None:
                self._copy_prompt(sequence, row)
            self._swap(row, self.num_active)
            self.num_active += 1
        empty = [sequence for sequence in sequences if sequence.max_tokens == 0]
        for sequence in empty:
            sequence.finish = "length"
        results: Results = [(sequence, []) for sequence in empty]
        if new := [sequence for sequence in sequences if not sequence.chosen and sequence.finish is None]:
            logits_BV = torch.stack([self._prompt_ends[sequence.index].logits_V for sequence in new])
            results += self._take(new, choose_tokens(new, logits_BV))
        self._drop_finished()
        return results

    def _copy_prompt(self, sequence: ActiveSequence, row: int) -> None:
        end = self._prompt_ends[sequence.index]
        source = [active.index for active in self.rows[: self.num_active]].index(sequence.index)
        num_pairs = min(end.num_pairs, self.decoder.mtp.lengths[source])
        self.decoder.copy_prompt(source, row, len(sequence.prompt), num_pairs)
        sequence.states_TD = end.state_1D

    def advance(self) -> Results:
        """Runs one pass of the main model over all active sequences. Returns 1 or 2 new tokens of each."""
        active = self.rows[: self.num_active]
        self._counts["passes"] += len(active)
        self._counts["visits"] += 1
        # Drafts are made even if every sequence generates its last token. Otherwise the random numbers of a sequence
        # would depend on the other sequences in its batch.
        is_drafted = self._drafts.choose(len(active))
        began = self._clock() if self._is_timed else 0.0
        chosen = self._advance_with_drafts(active) if is_drafted else self._advance_by_one(active)
        if self._is_timed:
            self._drafts.record(len(active), self._clock() - began, sum(map(len, chosen)), is_drafted=is_drafted)
        results = self._take(active, chosen)
        self._drop_finished()
        return results

    def _advance_by_one(self, active: Sequence[ActiveSequence]) -> list[list[ChosenToken]]:
        state_B1D, logits_B1V = self.decoder.step(self._last_tokens(active))
        for row, (sequence, state_1D) in enumerate(zip(active, state_B1D, strict=True)):
            # The MTP module skips the tokens of passes without drafts, except the last.
            sequence.states_TD = state_1D
            self.decoder.main.resize(row, self.decoder.main.lengths[row] + 1)
        return choose_tokens(active, logits_B1V[:, 0])

    def _advance_with_drafts(self, active: Sequence[ActiveSequence]) -> list[list[ChosenToken]]:
        # Draft one token for each sequence. If drafts must change no token, the main model uses the random numbers of a
        # pass without drafts. A draft that is drawn with the same ones is often the same token.
        is_coupled = self._drafts.keeps_tokens
        groups = group_rows(active, self.decoder.device)
        draft_BV = self._read_new_pairs(active)
        drafts = [group.draft(group.select(draft_BV), is_coupled=is_coupled) for group in groups]
        drafts_B = torch.empty(len(active), dtype=torch.int64, device=self.decoder.device)
        for group, draft in zip(groups, drafts, strict=True):
            drafts_B[group.rows] = draft.tokens_R
        # Run the main model over [last token, draft].
        state_B2D, logits_B2V = self.decoder.step(torch.cat((self._last_tokens(active), drafts_B[:, None]), 1))
        # Choose the next token, and the one after it, which counts if the draft is right.
        verdicts = [
            group.judge(group.select(logits_B2V), draft, is_coupled=is_coupled)
            for group, draft in zip(groups, drafts, strict=True)
        ]
        chosen = join_rows(groups, verdicts)
        for row, (sequence, tokens) in enumerate(zip(active, chosen, strict=True)):
            sequence.states_TD = state_B2D[row, : len(tokens)]
            # A rejected draft is removed from the cache by not counting it in the length.
            self.decoder.main.resize(row, self.decoder.main.lengths[row] + len(tokens))
            if sequence.num_left > 1:
                self._counts["drafts_offered"] += 1
                self._counts["drafts_accepted"] += len(tokens) - 1
        return chosen

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
        chosen_B = torch.tensor(counts, device=self.decoder.device) - 1
        logits_BV = self.decoder.step_mtp(torch.tensor(tokens, device=self.decoder.device), state_BSD, chosen_B)
        for row, count in enumerate(counts):
            self.decoder.mtp.resize(row, self.decoder.mtp.lengths[row] + count)
        return logits_BV

    def _last_tokens(self, active: Sequence[ActiveSequence]) -> Tensor:
        return torch.tensor([[sequence.chosen[-1].token] for sequence in active], device=self.decoder.device)

    def _take(self, sequences: Sequence[ActiveSequence], chosen: Sequence[Sequence[ChosenToken]]) -> Results:
        """Adds tokens to each sequence until it ends. Returns the tokens of each that are text."""
        results = []
        for sequence, tokens in zip(sequences, chosen, strict=True):
            text = []
            for token in tokens:
                self._counts["tokens"] += 1
                if sequence.take(token, self._stop_condition):
                    text.append(token)
                if sequence.finish is not None:
                    break
            results.append((sequence, text))
        return results

    def remove(self, sequence: ActiveSequence) -> None:
        """Removes a sequence and frees its blocks. It can begin again: its text is then read with its tokens."""
        row = self.rows.index(sequence)
        sequence.states_TD = None
        if self._keeps_blocks:
            self.decoder.main.finish(row, [*sequence.prompt, *sequence.tokens])
        self.decoder.remove(row)
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last
        if row < self.num_active:
            self.num_active -= 1
            if self.num_active < len(self.rows):
                # The last row was one whose prompt is read. It moves behind the active ones.
                self._swap(row, self.num_active)
        active = {sequence.index for sequence in self.rows[: self.num_active]}
        self._prompt_ends = {index: end for index, end in self._prompt_ends.items() if index in active}

    def _swap(self, row: int, other: int) -> None:
        if row != other:
            self.decoder.swap(row, other)
            self.rows[row], self.rows[other] = self.rows[other], self.rows[row]

    def _drop_finished(self) -> None:
        for sequence in reversed(self.rows[: self.num_active]):
            if sequence.finish is not None:
                self.remove(sequence)


_SCORED_TOKENS = 256  # tokens of a prompt that are scored together
