"""Batched decoding: sequences that are generated together, and the rounds that extend them.

Shape legend: B active sequences, S new tokens of each, N prompt tokens of all, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from infer.config import Finish, GenerateError, Sampling, Statistics
from infer.decoder import Decoder
from infer.sample import SequenceRandom, distribution, draw
from infer.speculative import verify

StopCondition = Callable[[int, int], bool]
"""Called with each new token (prompt's number, token); returns true to end the sequence after that token."""


class ActiveSequence:
    """A prompt and its continuation so far."""

    def __init__(self, index: int, prompt: Sequence[int], max_tokens: int, random: SequenceRandom) -> None:
        """Starts an empty continuation.

        Args:
            index: the prompt's number.
            prompt: token ids of the prompt.
            max_tokens: maximum number of new tokens, at least 1.
            random: random numbers of this sequence.
        """
        self.index = index
        self.prompt = prompt
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.random = random
        self.states_TD: Tensor | None = None  # states of the last 1 or 2 tokens, which the MTP module has not read
        self._max_tokens = max_tokens

    @property
    def num_left(self) -> int:
        """Number of tokens that can still be generated."""
        return self._max_tokens - len(self.tokens)

    def take(self, token: int, stop: frozenset[int], stop_condition: StopCondition) -> bool:
        """Adds a chosen token unless it is a stop token. Returns whether the token belongs to the result."""
        if token in stop:
            self.finish = "stop"
            return False
        self.tokens.append(token)
        if stop_condition(self.index, token):
            self.finish = "stop"
        elif self.num_left == 0:
            self.finish = "length"
        return True


class GenerationBatch:
    """The active sequences, in the order of the decoder's rows."""

    def __init__(
        self,
        decoder: Decoder,
        sampling: Sampling,
        stop: frozenset[int],
        stop_condition: StopCondition,
        *,
        speculative: bool,
    ) -> None:
        """Creates an empty batch.

        Args:
            decoder: the model with its caches.
            sampling: how tokens are chosen.
            stop: token ids that end a sequence and are not part of the result.
            stop_condition: called with every token of the result; true ends the sequence after it.
            speculative: whether the MTP module drafts tokens.
        """
        self._decoder, self._sampling, self._stop, self._stop_condition = decoder, sampling, stop, stop_condition
        self._speculative = speculative
        self._active: list[ActiveSequence] = []
        self._counts = {"passes": 0, "tokens": 0, "drafts_offered": 0, "drafts_accepted": 0}

    def __len__(self) -> int:
        """Returns the number of active sequences."""
        return len(self._active)

    def statistics(self, seconds: float) -> Statistics:
        """Returns the statistics of all tokens so far, generated in the given number of seconds."""
        return Statistics(**self._counts, seconds=seconds)

    def admit(self, sequences: Sequence[ActiveSequence]) -> list[tuple[ActiveSequence, list[int]]]:
        """Reads prompts and generates the first token of each. Returns the same as `advance`."""
        decoder, counts = self._decoder, [len(sequence.prompt) for sequence in sequences]
        rows = [decoder.add() for _ in sequences]
        self._active += sequences
        state_ND, logits_BV = decoder.read_prompts(rows, [sequence.prompt for sequence in sequences])
        for row, sequence, count, states_TD in zip(rows, sequences, counts, state_ND.split(counts), strict=True):
            decoder.main.resize(row, count)
            sequence.states_TD = states_TD[-1:].clone()  # a copy, so that the states of the whole prompt are freed
        if self._speculative:
            self._read_pairs(rows, sequences, state_ND.split(counts))
        self._counts["passes"] += len(sequences)
        chosen = self._choose(sequences, logits_BV)
        made = [(sequence, self._take(sequence, tokens)) for sequence, tokens in zip(sequences, chosen, strict=True)]
        self._drop_finished()
        return made

    def advance(self) -> list[tuple[ActiveSequence, list[int]]]:
        """Runs one pass of the main model over every sequence. Returns the new tokens of each, one or two.

        Sequences that ended (see `ActiveSequence.finish`) are removed from the batch.
        """
        active = list(self._active)
        self._counts["passes"] += len(active)
        # Drafts are made even if every sequence generates its last token. Otherwise the random numbers of a sequence
        # would depend on the other sequences in its batch.
        chosen = self._advance_with_drafts(active) if self._speculative else self._advance_by_one(active)
        made = [(sequence, self._take(sequence, tokens)) for sequence, tokens in zip(active, chosen, strict=True)]
        self._drop_finished()
        return made

    def _advance_by_one(self, active: Sequence[ActiveSequence]) -> list[list[int]]:
        _, logits_B1V = self._decoder.step(self._last_tokens(active))
        for row in range(len(active)):
            self._decoder.main.resize(row, self._decoder.main.lengths[row] + 1)
        return self._choose(active, logits_B1V[:, 0])

    def _choose(self, sequences: Sequence[ActiveSequence], logits_BV: Tensor) -> list[list[int]]:
        """Chooses one token for each sequence from the main model's logits."""
        tokens_B = draw(distribution(logits_BV, self._sampling), self._uniform(sequences, 1)[:, 0])
        table = torch.stack((logits_BV.isfinite().all(-1).long(), tokens_B), 1).tolist()  # host sync
        for sequence, (is_finite, _) in zip(sequences, table, strict=True):
            _check_finite(sequence, is_finite=bool(is_finite))
        return [[token] for _, token in table]

    def _advance_with_drafts(self, active: Sequence[ActiveSequence]) -> list[list[int]]:
        # Draft one token for each sequence.
        uniform_B3 = self._uniform(active, 3)
        draft_BV = distribution(self._read_new_pairs(active), self._sampling)
        drafts_B = draw(draft_BV, uniform_B3[:, 0])
        # Run the main model over [last token, draft], and accept or replace the draft.
        tokens_B2 = torch.cat((self._last_tokens(active), drafts_B[:, None]), 1)
        state_B2D, logits_B2V = self._decoder.step(tokens_B2)
        target_B2V = distribution(logits_B2V.flatten(0, 1), self._sampling).view_as(logits_B2V)
        kept_B, tokens_B = verify(target_B2V[:, 0], draft_BV, drafts_B, target_B2V[:, 1], uniform_B3[:, 1:])
        finite_B = logits_B2V.isfinite().all(-1).all(-1)
        table = torch.stack((finite_B.long(), kept_B.long(), drafts_B, tokens_B), 1).tolist()  # host sync
        chosen = []
        for row, (sequence, (is_finite, kept, draft, token)) in enumerate(zip(active, table, strict=True)):
            _check_finite(sequence, is_finite=bool(is_finite))
            sequence.states_TD = state_B2D[row, : 1 + kept]
            # A rejected draft is removed from the cache by not counting it in the length.
            self._decoder.main.resize(row, self._decoder.main.lengths[row] + 1 + kept)
            if sequence.num_left > 1:
                self._counts["drafts_offered"] += 1
                self._counts["drafts_accepted"] += kept
            chosen.append([draft, token] if kept else [token])
        return chosen

    def _read_pairs(self, rows: Sequence[int], sequences: Sequence[ActiveSequence], states: Sequence[Tensor]) -> None:
        """Runs the MTP module over the pairs (state, next token) within prompts."""
        longer = [at for at, sequence in enumerate(sequences) if len(sequence.prompt) > 1]
        if not longer:
            return
        next_tokens = [sequences[at].prompt[1:] for at in longer]
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
        places = [[min(at, count - 1) for at in range(widest)] for count in counts]
        state_BSD = torch.stack([states_TD[place] for states_TD, place in zip(states, places, strict=True)])
        tokens = [
            [sequence.tokens[at - count] for at in place]
            for sequence, place, count in zip(active, places, counts, strict=True)
        ]
        chosen_B = torch.tensor(counts, device=self._decoder.device) - 1
        logits_BV = self._decoder.step_mtp(torch.tensor(tokens, device=self._decoder.device), state_BSD, chosen_B)
        for row, count in enumerate(counts):
            self._decoder.mtp.resize(row, self._decoder.mtp.lengths[row] + count)
        return logits_BV

    def _last_tokens(self, active: Sequence[ActiveSequence]) -> Tensor:
        return torch.tensor([sequence.tokens[-1:] for sequence in active], device=self._decoder.device)

    def _uniform(self, sequences: Sequence[ActiveSequence], count: int) -> Tensor:
        return torch.stack([sequence.random.uniform(count) for sequence in sequences]).to(self._decoder.device)

    def _take(self, sequence: ActiveSequence, tokens: Sequence[int]) -> list[int]:
        """Adds tokens to a sequence until it ends. Returns the tokens that belong to the result."""
        kept = []
        for token in tokens:
            self._counts["tokens"] += 1
            if sequence.take(token, self._stop, self._stop_condition):
                kept.append(token)
            if sequence.finish is not None:
                break
        return kept

    def _drop_finished(self) -> None:
        for row in reversed(range(len(self._active))):
            if self._active[row].finish is None:
                continue
            self._decoder.remove(row)
            last = self._active.pop()
            if row < len(self._active):
                self._active[row] = last


def _check_finite(sequence: ActiveSequence, *, is_finite: bool) -> None:
    """Raises an error if the logits of a sequence are not finite."""
    if not is_finite:
        raise GenerateError(
            f"prompt {sequence.index + 1}: the model's logits must be finite, are not after {len(sequence.tokens)} new "
            f"tokens; its weights or their type are not usable"
        )
