"""Chooses tokens from logits and from drafts, for rows of requests with equal settings.

Shape legend: B rows of a pass, R of them in a group, V vocabulary, D hidden size.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infer.config import ConstraintError
from infer.protocol import ChosenToken
from infer.sample import TokenHistory, distribution, draw, log_probs, num_times, penalize, verify
from infer.sequence import ActiveSequence
from model.linear import widen


class Draft(NamedTuple):
    """Drafted tokens, R, and the distribution they were drawn from, RV; None if it was not needed."""

    tokens_R: Tensor
    target_RV: Tensor | None


class RowGroup:
    """Rows with equal settings. Each row has its own seed, bias of logits and constraint."""

    def __init__(self, sequences: Sequence[ActiveSequence], rows: Sequence[int], device: torch.device) -> None:
        """Selects rows of a pass."""
        self.rows = rows
        self._sequences = [sequences[row] for row in rows]
        self._device = device
        # All rows together are not copied.
        self._rows_R = None if len(rows) == len(sequences) else torch.tensor(rows, device=device)
        self._request = self._sequences[0].request
        self._sampling = self._request.sampling
        adjusted = [sequence.request.logit_bias or sequence.constraint for sequence in self._sequences]
        self._adjusted = [row for row, adjustment in enumerate(adjusted) if adjustment]

    def select(self, values_B: Tensor) -> Tensor:
        """Returns the values of this group's rows."""
        return values_B if self._rows_R is None else values_B[self._rows_R]

    def choose(self, logits_RV: Tensor) -> list[list[ChosenToken]]:
        """Chooses the next token of each row."""
        tokens_R, target_RV = self._draw(logits_RV, self._history(logits_RV), 0)
        return [[token] for token in self._report(logits_RV, target_RV, tokens_R)]

    def draft(self, logits_RV: Tensor, *, is_coupled: bool) -> Draft:
        """Drafts the next token of each row, with the random numbers of a pass without drafts if coupled."""
        return Draft(*self._draw(logits_RV, self._history(logits_RV), 0 if is_coupled else None))

    def judge(self, logits_R2V: Tensor, draft: Draft, *, is_coupled: bool) -> list[list[ChosenToken]]:
        """Chooses the next token, and the one after it if the draft is right."""
        first_RV, second_RV = logits_R2V.unbind(1)
        history = self._history(first_RV)
        if is_coupled or draft.target_RV is None:
            first_R, target_RV = self._draw(first_RV, history, 0)
            accepted_R = first_R == draft.tokens_R
        else:
            target_RV = distribution(self._adjust(first_RV, history, 0), self._sampling)
            accepted_R, first_R = verify(target_RV, draft.target_RV, draft.tokens_R, self._times(first_RV, None))
        after = None if history is None else history.after(draft.tokens_R)
        second_R, after_RV = self._draw(second_RV, after, 1 if is_coupled else None, ahead=1)
        first = self._report(first_RV, target_RV, first_R)
        second = self._report(second_RV, after_RV, second_R)
        chosen = zip(self._sequences, accepted_R.tolist(), first, second, strict=True)  # host sync
        # What a constraint allows after a draft is not known yet.
        return [
            [*tokens] if is_accepted and sequence.constraint is None else [tokens[0]]
            for sequence, is_accepted, *tokens in chosen
        ]

    def _draw(
        self, logits_RV: Tensor, history: TokenHistory | None, number: int | None, ahead: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Returns tokens, R, and the distribution that they are drawn from; None if that is not needed.

        Args:
            number: whose random numbers are used: of each sequence's next token, 0, or the one after, 1. None: new
                ones.
            ahead: 1 if the tokens follow a draft.
        """
        adjusted_RV = self._adjust(logits_RV, history, ahead)
        if self._sampling.temperature == 0 and not self._request.keeps_sets:
            # The most probable token needs neither a distribution nor random numbers.
            return adjusted_RV.argmax(-1), None
        target_RV = distribution(adjusted_RV, self._sampling)
        return draw(target_RV, self._times(target_RV, number)), target_RV

    def _adjust(self, logits_RV: Tensor, history: TokenHistory | None, ahead: int) -> Tensor:
        """Returns the logits after penalties, biases and, for the next token, constraints."""
        adjusted_RV = penalize(logits_RV, history, self._sampling)
        if self._adjusted:
            adjusted_RV = widen(adjusted_RV).clone()
        for row in self._adjusted:
            sequence = self._sequences[row]
            bias = sequence.request.logit_bias
            adjusted_RV[row, list(bias)] += adjusted_RV.new_tensor(list(bias.values()))
            allowed = sequence.constraint.allowed() if sequence.constraint is not None and not ahead else None
            if allowed is not None and not allowed.any():
                sequence.error = ConstraintError(f"prompt {sequence.index + 1}: its constraint allows no token")
            elif allowed is not None:
                adjusted_RV[row].masked_fill_(~torch.from_numpy(allowed).to(self._device), -torch.inf)
        return adjusted_RV

    def _times(self, weights_RV: Tensor, ahead: int | None) -> Tensor:
        size = num_times(weights_RV.shape[1])
        numbers = [None if ahead is None else len(sequence.chosen) + ahead for sequence in self._sequences]
        rows = zip(self._sequences, numbers, strict=True)
        return torch.from_numpy(np.stack([row.random.times(size, number) for row, number in rows])).to(self._device)

    def _history(self, logits_RV: Tensor) -> TokenHistory | None:
        """Counts the tokens of prompts and continuations; None if the sampling has no penalties."""
        if not self._sampling.has_penalties:
            return None
        sequences = [(row.prompt, row.tokens) for row in self._sequences]
        return TokenHistory.of(sequences, logits_RV.shape[1], self._device)

    def _report(self, logits_RV: Tensor, target_RV: Tensor | None, tokens_R: Tensor) -> list[ChosenToken]:
        """Returns tokens with their log-probabilities, and with the kept tokens if they are recorded."""
        if self._request.num_alternatives is not None:
            return score_tokens(logits_RV, tokens_R, self._request.num_alternatives)
        # A kept token whose probability is 0 in this type cannot be drawn, and adds nothing to a sum.
        kept_RV = target_RV > 0 if target_RV is not None and self._request.keeps_sets else None
        log_probs_R = log_probs(logits_RV, tokens_R, self._sampling, kept_RV)
        sets: Sequence[tuple[int, ...]] = [()] * len(tokens_R)
        if kept_RV is not None:
            rows_and_ids = kept_RV.nonzero().cpu()  # host sync
            counts = torch.bincount(rows_and_ids[:, 0], minlength=len(tokens_R)).tolist()
            sets = [tuple(ids.tolist()) for ids in rows_and_ids[:, 1].split(counts)]
        rows = zip(tokens_R.tolist(), log_probs_R.tolist(), sets, strict=True)  # host sync
        return [ChosenToken(*values) for values in rows]


def group_rows(sequences: Sequence[ActiveSequence], device: torch.device) -> list[RowGroup]:
    """Returns the groups of equal settings among the rows of a pass."""
    request = sequences[0].request
    if all(sequence.request is request for sequence in sequences):
        return [RowGroup(sequences, range(len(sequences)), device)]
    rows: dict[object, list[int]] = defaultdict(list)
    for row, sequence in enumerate(sequences):
        rows[sequence.settings].append(row)
    return [RowGroup(sequences, group, device) for group in rows.values()]


def choose_tokens(sequences: Sequence[ActiveSequence], logits_BV: Tensor) -> list[list[ChosenToken]]:
    """Chooses the next token of each row, a list of one."""
    groups = group_rows(sequences, logits_BV.device)
    return join_rows(groups, [group.choose(group.select(logits_BV)) for group in groups])


def join_rows(groups: Sequence[RowGroup], results: Sequence[Sequence[list[ChosenToken]]]) -> list[list[ChosenToken]]:
    """Returns the results of groups in the order of the rows."""
    if len(groups) == 1:
        return list(results[0])
    by_row = {
        row: chosen
        for group, rows in zip(groups, results, strict=True)
        for row, chosen in zip(group.rows, rows, strict=True)
    }
    return [by_row[row] for row in range(len(by_row))]


def score_tokens(logits_RV: Tensor, tokens_R: Tensor, num_alternatives: int) -> list[ChosenToken]:
    """Returns tokens and alternatives with the model's log-probabilities at temperature 1."""
    logs_RV = widen(logits_RV).log_softmax(-1)
    chosen_R = logs_RV.gather(-1, tokens_R[:, None])[:, 0]
    best_RK, ids_RK = logs_RV.topk(min(num_alternatives, logs_RV.shape[1]), -1)
    rows = zip(tokens_R.tolist(), chosen_R.tolist(), ids_RK.tolist(), best_RK.tolist(), strict=True)  # host sync
    return [
        ChosenToken(token, log_prob, alternatives=tuple(zip(ids, values, strict=True)))
        for token, log_prob, ids, values in rows
    ]
