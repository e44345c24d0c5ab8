"""Sequences that are being made together: what each has made, why it ended, and the rounds that lengthen them.

Shape legend: B sequences being made, S new tokens of each, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from infer.config import Finish, GenerateError, Sampling, Statistics
from infer.decoder import Decoder
from infer.sample import Draws, distribution, draw
from infer.speculative import verify

Ends = Callable[[int, int], bool]
"""Told of every token as it is made (prompt's number, token); true ends the sequence with that token."""


class Growth:
    """One prompt's continuation as far as it is."""

    def __init__(self, index: int, prompt: Sequence[int], room: int, draws: Draws) -> None:
        """`room`: the number of tokens that may be made, at least 1."""
        self.index = index
        self.prompt = prompt
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.draws = draws
        self.states_TD: Tensor | None = None  # of tokens whose pair the MTP module has not read: 1 or 2
        self._room = room

    @property
    def room(self) -> int:
        """Tokens that may still be made."""
        return self._room - len(self.tokens)

    def take(self, token: int, stop: frozenset[int], ends: Ends) -> bool:
        """Adds a token that was chosen, unless it is a stop token. Whether it belongs to the result."""
        if token in stop:
            self.finish = "stop"
            return False
        self.tokens.append(token)
        if ends(self.index, token):
            self.finish = "stop"
        elif self.room == 0:
            self.finish = "length"
        return True


class GenerationBatch:
    """The sequences in a decoder's rows, in the same order."""

    def __init__(
        self, decoder: Decoder, sampling: Sampling, stop: frozenset[int], ends: Ends, *, speculative: bool
    ) -> None:
        """A batch without sequences."""
        self._decoder, self._sampling, self._stop, self._ends = decoder, sampling, stop, ends
        self._speculative = speculative
        self._growing: list[Growth] = []
        self._counts = {"passes": 0, "tokens": 0, "drafts_offered": 0, "drafts_accepted": 0}

    def __len__(self) -> int:
        """Sequences being made."""
        return len(self._growing)

    def statistics(self, seconds: float) -> Statistics:
        """Of everything so far."""
        return Statistics(**self._counts, seconds=seconds)

    def admit(self, growths: Sequence[Growth]) -> list[tuple[Growth, list[int]]]:
        """Reads prompts and makes the first token of each; as `advance`."""
        decoder, counts = self._decoder, [len(growth.prompt) for growth in growths]
        rows = [decoder.add() for _ in growths]
        self._growing += growths
        state_ND, logits_BV = decoder.read_prompts(rows, [growth.prompt for growth in growths])
        for row, growth, count, states_TD in zip(rows, growths, counts, state_ND.split(counts), strict=True):
            decoder.main.resize(row, count)
            growth.states_TD = states_TD[-1:].clone()  # alone: not the whole prompt's
        if self._speculative:
            self._read_pairs(rows, growths, state_ND.split(counts))
        self._counts["passes"] += len(growths)
        chosen = self._choose(growths, logits_BV)
        made = [(growth, self._take(growth, tokens)) for growth, tokens in zip(growths, chosen, strict=True)]
        self._drop_finished()
        return made

    def advance(self) -> list[tuple[Growth, list[int]]]:
        """One pass of the main model over every sequence: what each made, one token or two.

        Sequences that ended (`Growth.finish`) leave the batch.
        """
        growing = list(self._growing)
        self._counts["passes"] += len(growing)
        # Drafts are made even where all sequences are at their last token: whether they are must not change any draw.
        chosen = self._advance_with_drafts(growing) if self._speculative else self._advance_by_one(growing)
        made = [(growth, self._take(growth, tokens)) for growth, tokens in zip(growing, chosen, strict=True)]
        self._drop_finished()
        return made

    def _advance_by_one(self, growing: Sequence[Growth]) -> list[list[int]]:
        _, logits_B1V = self._decoder.step(self._last_tokens(growing))
        for row in range(len(growing)):
            self._decoder.main.resize(row, self._decoder.main.lengths[row] + 1)
        return self._choose(growing, logits_B1V[:, 0])

    def _choose(self, growths: Sequence[Growth], logits_BV: Tensor) -> list[list[int]]:
        """One token of each sequence from the main model's scores."""
        tokens_B = draw(distribution(logits_BV, self._sampling), self._uniform(growths, 1)[:, 0])
        table = torch.stack((logits_BV.isfinite().all(-1).long(), tokens_B), 1).tolist()
        for growth, (is_finite, _) in zip(growths, table, strict=True):
            _check_finite(growth, bool(is_finite))
        return [[token] for _, token in table]

    def _advance_with_drafts(self, growing: Sequence[Growth]) -> list[list[int]]:
        uniform_B3 = self._uniform(growing, 3)
        draft_BV = distribution(self._read_new_pairs(growing), self._sampling)
        drafts_B = draw(draft_BV, uniform_B3[:, 0])
        tokens_B2 = torch.cat((self._last_tokens(growing), drafts_B[:, None]), 1)
        state_B2D, logits_B2V = self._decoder.step(tokens_B2)
        target_B2V = distribution(logits_B2V.flatten(0, 1), self._sampling).view_as(logits_B2V)
        kept_B, tokens_B = verify(target_B2V[:, 0], draft_BV, drafts_B, target_B2V[:, 1], uniform_B3[:, 1:])
        finite_B = logits_B2V.isfinite().all(-1).all(-1)
        # The round's one host synchronisation.
        table = torch.stack((finite_B.long(), kept_B.long(), drafts_B, tokens_B), 1).tolist()
        chosen = []
        for row, (growth, (is_finite, kept, draft, token)) in enumerate(zip(growing, table, strict=True)):
            _check_finite(growth, bool(is_finite))
            growth.states_TD = state_B2D[row, : 1 + kept]
            # A draft that fell is taken back from the cache by not counting it.
            self._decoder.main.resize(row, self._decoder.main.lengths[row] + 1 + kept)
            if growth.room > 1:
                self._counts["drafts_offered"] += 1
                self._counts["drafts_accepted"] += kept
            chosen.append([draft, token] if kept else [token])
        return chosen

    def _read_pairs(self, rows: Sequence[int], growths: Sequence[Growth], states: Sequence[Tensor]) -> None:
        """The MTP module over the pairs within prompts: all states but the last, each with the token after it."""
        longer = [at for at, growth in enumerate(growths) if len(growth.prompt) > 1]
        if not longer:
            return
        next_tokens = [growths[at].prompt[1:] for at in longer]
        self._decoder.read_prompts_mtp(
            [rows[at] for at in longer], next_tokens, torch.cat([states[at][:-1] for at in longer])
        )
        for at, tokens in zip(longer, next_tokens, strict=True):
            self._decoder.mtp.resize(rows[at], len(tokens))

    def _read_new_pairs(self, growing: Sequence[Growth]) -> Tensor:
        """The MTP module over the pairs made since it last ran, 1 or 2 of each sequence: logits of the draft, BV."""
        states = [growth.states_TD for growth in growing if growth.states_TD is not None]
        counts = [len(states_TD) for states_TD in states]
        widest = max(counts)
        # A sequence with fewer pairs repeats its last: written beyond its length, where nothing reads it.
        places = [[min(at, count - 1) for at in range(widest)] for count in counts]
        state_BSD = torch.stack([states_TD[place] for states_TD, place in zip(states, places, strict=True)])
        tokens = [
            [growth.tokens[at - count] for at in place]
            for growth, place, count in zip(growing, places, counts, strict=True)
        ]
        chosen_B = torch.tensor(counts, device=self._decoder.device) - 1
        logits_BV = self._decoder.step_mtp(torch.tensor(tokens, device=self._decoder.device), state_BSD, chosen_B)
        for row, count in enumerate(counts):
            self._decoder.mtp.resize(row, self._decoder.mtp.lengths[row] + count)
        return logits_BV

    def _last_tokens(self, growing: Sequence[Growth]) -> Tensor:
        return torch.tensor([growth.tokens[-1:] for growth in growing], device=self._decoder.device)

    def _uniform(self, growths: Sequence[Growth], count: int) -> Tensor:
        return torch.stack([growth.draws.uniform(count) for growth in growths]).to(self._decoder.device)

    def _take(self, growth: Growth, tokens: Sequence[int]) -> list[int]:
        """Gives a sequence its tokens until it ends; those that belong to the result."""
        kept = []
        for token in tokens:
            self._counts["tokens"] += 1
            if growth.take(token, self._stop, self._ends):
                kept.append(token)
            if growth.finish is not None:
                break
        return kept

    def _drop_finished(self) -> None:
        for row in reversed(range(len(self._growing))):
            if self._growing[row].finish is None:
                continue
            self._decoder.remove(row)
            last = self._growing.pop()
            if row < len(self._growing):
                self._growing[row] = last


def _check_finite(growth: Growth, is_finite: bool) -> None:
    """Nothing can be chosen by scores that are no numbers."""
    if not is_finite:
        raise GenerateError(
            f"prompt {growth.index + 1}: the model's scores must be finite, are not after {len(growth.tokens)} new "
            f"tokens; its weights, or their type, hold no usable model"
        )
