"""Objective of sampled answers with advantages: GRPO and its variants, as values of one loss.

Shape legend: B sequences, T tokens, D hidden size, R rows that are scored.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.cross_entropy.reference import IGNORE, RowScores
from model.config import PolicyLossConfig
from model.head import score_rows
from model.linear import WeightSink
from model.objective import MAIN, CrossEntropy, MicroBatch, OutputHead, TaskLoss, loss_names
from model.objectives.policy_terms import (
    KL,
    OFF_POLICY,
    TOKEN_MEANS,
    AnswerTokens,
    bounded_exp,
    policy_terms,
    sampler_factor,
)
from model.objectives.preference import REFERENCE
from model.objectives.sampled import KEPT, AnswerIndex, flat_rows, score_sampled

ADVANTAGE = "advantage"
SAMPLER = "sampler_log_probs"
OLD = "old_log_probs"
"""Names of extras, each BT at the positions that predict answers' tokens: the advantage, and log-probabilities under
the sampler and under the policy before the rollout's first update. Without the last one it is the policy's own."""


def policy_names(mtp_depth: int, *, has_reference: bool) -> tuple[str, ...]:
    """Returns the names of the losses and of reported means over tokens and answers."""
    divergence = (KL,) if has_reference else ()
    return (*loss_names(mtp_depth), *divergence, *TOKEN_MEANS, OFF_POLICY)


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyGradient:
    """Loss of sampled answers with advantages: the surrogate plus the weighted divergence.

    MTP depths learn the sampled tokens.

    Attributes:
        targets: cross-entropy of the sampled tokens at MTP depths, with its factors and the balance loss.
        factor: 1 / (tokens in the global batch) if the normalizer is `tokens`, else 1 / (answers in the global batch).
        max_new_tokens: maximum number of tokens of an answer, a divisor if the normalizer is `length`.
        temperature: of the sampling; all log-probabilities are at this temperature.
    """

    targets: CrossEntropy
    form: PolicyLossConfig
    factor: float
    max_new_tokens: int
    temperature: float

    @property
    def balance(self) -> float:
        """Factor of the sequence-wise balance loss."""
        return self.targets.balance

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes the micro-batch's part of the loss at one depth."""
        if head.depth:
            return self.targets.loss(hidden_BTD, head, batch, sink)
        targets_BT = batch.targets_BT[0]
        rows_R = batch.rows(0)
        sums: dict[str, Tensor] = {}

        def score(rows_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, records: bool) -> RowScores:  # noqa: FBT001
            scores, found = self._score(rows_RD, weight_VD, targets_R, batch, records=records)
            sums.update(found)
            return scores

        def value(log_probs_N: Tensor) -> Tensor:
            return sums[MAIN].to(log_probs_N.dtype)

        loss, log_probs_BT = score_rows(
            hidden_BTD, head.weight_VD, targets_BT, sink, score=score, value=value, rows=rows_R
        )
        return TaskLoss(self.factor * loss, sums, log_probs_BT)

    def _score(
        self, rows_RD: Tensor, head_VD: Tensor, targets_R: Tensor, batch: MicroBatch, *, records: bool
    ) -> tuple[RowScores, dict[str, Tensor]]:
        rows_R = batch.rows(0)
        kept = batch.extras.get(KEPT)
        kept_ids_RK = None if kept is None else flat_rows(kept, rows_R)
        answers = AnswerIndex(batch, rows_R)
        tokens = self._tokens(batch, answers, targets_R != IGNORE)
        sums: list[dict[str, Tensor]] = []

        def slopes(log_probs_C: Tensor, chunk: slice) -> Tensor:
            terms = policy_terms(self.form, tokens.part(chunk), log_probs_C)
            sums.append(terms.sums)
            return terms.slopes_R.to(log_probs_C.dtype)

        operands = (rows_RD, head_VD, targets_R)
        needs_answers = self._needs_answers(tokens)
        if needs_answers or not records:
            # Slopes depend on the log-probabilities of whole answers. So the head is computed twice.
            scores = score_sampled(*operands, None, kept_ids_RK, temperature=self.temperature, records=False)
            if needs_answers:
                tokens = self._compare_answers(tokens, answers, scores.log_probs_N)
        if records:
            scores = score_sampled(*operands, slopes, kept_ids_RK, temperature=self.temperature, records=True)
        if not sums:
            sums.append(policy_terms(self.form, tokens, scores.log_probs_N).sums)
        return scores, {name: torch.stack([part[name] for part in sums]).sum() for name in sums[0]}

    def _tokens(self, batch: MicroBatch, answers: AnswerIndex, is_token_R: Tensor) -> AnswerTokens:
        extras = batch.extras
        rows_R = batch.rows(0)
        is_token_R = is_token_R.double()
        length_R = torch.ones_like(is_token_R)
        form = self.form
        if form.normalizer == "answers" or form.ratio != "token" or form.off_policy_limit is not None:
            length_R = answers.sums(is_token_R).clamp_min(1)
        divisor: Tensor | float = 1.0
        if form.normalizer == "answers":
            divisor = length_R
        elif form.normalizer == "length":
            divisor = float(self.max_new_tokens)

        def read(name: str) -> Tensor | None:
            return flat_rows(extras[name], rows_R).double() if name in extras else None

        return AnswerTokens(
            advantage_R=flat_rows(extras[ADVANTAGE], rows_R).double(),
            weight_R=is_token_R / divisor,
            is_token_R=is_token_R,
            length_R=length_R,
            sampler_R=flat_rows(extras[SAMPLER], rows_R).double(),
            old_R=read(OLD),
            reference_R=read(REFERENCE),
        )

    def _needs_answers(self, tokens: AnswerTokens) -> bool:
        """Returns whether a token's slope depends on its answer: not if the policy is the old one."""
        form = self.form
        has_ratio = form.ratio != "token" and (tokens.old_R is not None or self._has_sampler_factor)
        return form.off_policy_limit is not None or has_ratio

    @property
    def _has_sampler_factor(self) -> bool:
        """Whether all tokens of an answer share their sampler factor, because they share a surrogate."""
        form = self.form
        return form.sampler_ratio_cap is not None and form.ratio != "token" and form.surrogate == "clipped"

    def _compare_answers(self, tokens: AnswerTokens, answers: AnswerIndex, log_probs_R: Tensor) -> AnswerTokens:
        """Adds the ratio and sampler factor of each answer, and whether it is near enough to its sampler."""
        form = self.form
        log_probs_R = log_probs_R.double()
        if form.ratio != "token" and tokens.old_R is not None:
            log_ratio_R = answers.sums(log_probs_R - tokens.old_R)
            if form.ratio == "sequence_mean":
                log_ratio_R = log_ratio_R / tokens.length_R
            tokens = replace(tokens, ratio_R=bounded_exp(log_ratio_R))
        if form.sampler_ratio_cap is not None and self._has_sampler_factor:
            old_R = log_probs_R if tokens.old_R is None else tokens.old_R
            factor_R = sampler_factor(old_R, tokens.sampler_R, form.sampler_ratio_cap)
            tokens = replace(tokens, sampler_factor_R=answers.sums(factor_R) / tokens.length_R)
        if form.off_policy_limit is not None:
            apart_R = answers.sums(tokens.sampler_R - log_probs_R) / tokens.length_R
            is_far_R = (tokens.advantage_R < 0) & (apart_R > form.off_policy_limit)
            tokens = replace(tokens, has_surrogate_R=1 - is_far_R.double())
        return tokens
