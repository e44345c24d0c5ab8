"""Objective of sampled answers with advantages: GRPO and its variants, as values of one loss.

Tokens are scored under the distribution that their sampler drew from. Terms and slopes are float64. Sources:
arXiv:2402.03300, 2412.19437 section 5.2.2, 2503.20783, 2503.14476, 2507.18071, 2506.13585, 2505.07291, 2512.02556.
Shape legend: R rows that are scored, K kept tokens.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.reference import IGNORE, RowScores, RowSlopes
from model.config import PolicyLossConfig
from model.head import score_log_probs, score_rows
from model.linear import WeightSink
from model.objective import MAIN, CrossEntropy, MicroBatch, OutputHead, TaskLoss, loss_names
from model.objectives.pairs import REFERENCE

ANSWER = "answer"
KEPT = "kept_ids"
"""Names of extras: number of the answer whose token a position predicts (from 1 within its sequence, else 0), and the
tokens among which the sampler drew it, int64 [B, T, K] as in `kernels.cross_entropy`."""
KL = "kl"
ENTROPY = "entropy"
CLIPPED = "clip_fraction"
RATIO = "ratio_deviation"
SAMPLER_DIFFERENCE = "sampler_difference"
OFF_POLICY = "off_policy_share"
TOKEN_MEANS = (ENTROPY, CLIPPED, RATIO, SAMPLER_DIFFERENCE)
"""Names of reported means over tokens. With a reference, the divergence is another one."""
_LARGEST_LOG_RATIO = 20.0
ADVANTAGE = "advantage"
SAMPLER = "sampler_log_probs"
OLD = "old_log_probs"
"""Names of extras, each BT at the positions that predict answers' tokens: the advantage, and log-probabilities under
the sampler and under the policy before the rollout's first update. Without the last one it is the policy's own."""


def flat_rows(values: Tensor, rows_R: Tensor | None) -> Tensor:
    """Returns the values [B, T, ...] of the rows that are scored, [R, ...]; None: all."""
    flat = values.flatten(0, 1)
    return flat if rows_R is None else flat[rows_R]


def score_sampled(
    rows_RD: Tensor,
    head_VD: Tensor,
    targets_R: Tensor,
    slopes: RowSlopes | None,
    kept_ids_RK: Tensor | None,
    *,
    temperature: float,
    records: bool,
) -> RowScores:
    """Computes log-probabilities among kept tokens at a temperature, by which rows are divided."""
    scores = linear_cross_entropy(
        *(rows_RD if temperature == 1 else rows_RD / temperature, head_VD, targets_R, slopes),
        wants_rows=records,
        wants_head=records and head_VD.requires_grad,
        kept_ids_NK=kept_ids_RK,
    )
    # Rows were divided before the logits, so their gradient is divided too.
    if scores.rows_ND is not None and temperature != 1:
        scores.rows_ND.div_(temperature)
    return scores


class AnswerIndex:
    """The answers of rows of a micro-batch, of which no function reads the device from the host."""

    def __init__(self, batch: MicroBatch, rows_R: Tensor | None) -> None:
        """Finds the answers of a micro-batch's rows, of which only targets count; None: of all rows."""
        answer_BT = batch.extras[ANSWER].long().masked_fill(batch.targets_BT[0] == IGNORE, 0)
        num_sequences, length = answer_BT.shape
        # Slots of a flat table, T + 1 for each sequence: slot 0 takes rows outside answers.
        first_B1 = torch.arange(num_sequences, device=answer_BT.device)[:, None] * (length + 1)
        self.slots_R = flat_rows(answer_BT + first_B1, rows_R)
        self._size = num_sequences * (length + 1)
        self._length = length

    def sums(self, values_R: Tensor) -> Tensor:
        """Returns for each row the sum of its answer's rows, R in float64."""
        return self._table(values_R)[self.slots_R]

    def count(self) -> Tensor:
        """Returns the number of answers that have rows."""
        table = self._table(torch.ones_like(self.slots_R)).view(-1, self._length + 1)
        return (table[:, 1:] > 0).sum()

    def _table(self, values_R: Tensor) -> Tensor:
        empty = torch.zeros(self._size, dtype=torch.float64, device=values_R.device)
        return empty.scatter_add_(0, self.slots_R, values_R.double())


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogProbs:
    """Objective of a forward-only pass that only records log-probabilities, at the sampler's temperature."""

    temperature: float = 1.0
    balance: float = 0.0

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes the log-probabilities at depth 0. The loss is 0."""
        if head.depth:
            return TaskLoss(hidden_BTD.new_zeros(()), {})
        log_probs_BT = score_log_probs(
            hidden_BTD,
            head.weight_VD,
            batch.targets_BT[0],
            batch.rows(0),
            temperature=self.temperature,
            kept_ids_BTK=batch.extras.get(KEPT),
        )
        return TaskLoss(log_probs_BT.new_zeros(()), {}, log_probs_BT)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AnswerTokens:
    """Values of sampled tokens besides their log-probabilities under the policy, R in float64.

    Attributes:
        weight_R: factor of the token's term in the loss; 0 for rows that are no sampled tokens.
        is_token_R: 1 for sampled tokens, else 0.
        length_R: tokens of the answer.
        sampler_R: log-probability under the sampler.
        old_R: the same under the old policy; None: it is the policy itself.
        reference_R: the same under the reference; None: there is none.
        ratio_R: ratio of the answer, the same for all its tokens; None: each token has its own ratio.
        answer_log_q_R: log(reference / policy) of the answer, the same for all its tokens; None: tokens have their own.
        sampler_factor_R: weight of the answer for what its sampler was; None: each token has its own.
        has_surrogate_R: 0 for tokens of answers that are too far off the policy, else 1; None: 1 for all.
    """

    advantage_R: Tensor
    weight_R: Tensor
    is_token_R: Tensor
    length_R: Tensor
    sampler_R: Tensor
    old_R: Tensor | None
    reference_R: Tensor | None
    ratio_R: Tensor | None = None
    answer_log_q_R: Tensor | None = None
    sampler_factor_R: Tensor | None = None
    has_surrogate_R: Tensor | None = None

    def part(self, chunk: slice) -> "AnswerTokens":
        """Returns the values of a chunk of the rows."""
        cut: dict[str, Any] = {}
        for field in fields(self):
            values_R = getattr(self, field.name)
            cut[field.name] = None if values_R is None else values_R[chunk]
        return AnswerTokens(**cut)


@dataclass(frozen=True, slots=True, eq=False)
class PolicyTerms:
    """Derivative of the loss in -log p of each token, and sums of the loss and reported values."""

    slopes_R: Tensor
    sums: dict[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Term:
    """A value of each token, and its derivative in log p."""

    value_R: Tensor
    slope_R: Tensor


def policy_terms(form: PolicyLossConfig, tokens: AnswerTokens, log_probs_R: Tensor) -> PolicyTerms:
    """Computes the loss of tokens, its derivative in each -log p, and reported sums."""
    log_probs_R = log_probs_R.double()
    old_R = log_probs_R if tokens.old_R is None else tokens.old_R
    # policy / old policy of each token, or one ratio for the whole answer.
    own_ratio_R = bounded_exp(log_probs_R - old_R)
    ratio_R = own_ratio_R if tokens.ratio_R is None else tokens.ratio_R
    surrogate, is_clipped_R = _surrogate(form, tokens, ratio_R, log_probs_R)
    # The surrogate is maximized, so the loss takes it with a minus, and slopes in -log p get their sign back.
    factor_R = _surrogate_factor(form, tokens, old_R)
    loss_R = -factor_R * surrogate.value_R
    slope_R = factor_R * surrogate.slope_R
    means: dict[str, Tensor] = {}
    if tokens.reference_R is not None:
        log_q_R = tokens.reference_R - log_probs_R
        excess_R = _excess(log_q_R)
        means[KL] = own_ratio_R * excess_R
        if form.kl_weight and form.kl != "none":
            if tokens.answer_log_q_R is None:
                divergence = _divergence(form, own_ratio_R, log_q_R, excess_R)
            else:
                # Equation 27 of V3's report: each of an answer's tokens has an equal share of its divergence.
                log_q_R = tokens.answer_log_q_R
                divergence = _Term(_excess(log_q_R) / tokens.length_R, 1 - bounded_exp(log_q_R))
            loss_R = loss_R + form.kl_weight * divergence.value_R
            slope_R = slope_R - form.kl_weight * divergence.slope_R
    means |= {
        ENTROPY: -log_probs_R,
        CLIPPED: is_clipped_R,
        RATIO: (ratio_R - 1).abs(),
        SAMPLER_DIFFERENCE: (old_R - tokens.sampler_R).abs(),
    }
    # The loss is weighted by the normalizer; reported means count each token once.
    sums = {MAIN: (tokens.weight_R * loss_R).sum()}
    sums |= {name: (tokens.is_token_R * mean_R).sum() for name, mean_R in means.items()}
    if tokens.has_surrogate_R is not None:
        sums[OFF_POLICY] = (tokens.is_token_R * (1 - tokens.has_surrogate_R) / tokens.length_R).sum()
    return PolicyTerms(tokens.weight_R * slope_R, sums)


def _excess(log_q: Tensor) -> Tensor:
    """Returns q - log q - 1, which is never negative."""
    # expm1 keeps the digits near log q = 0.
    return (torch.expm1(log_q.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)) - log_q).clamp_min(0)


def bounded_exp(logs: Tensor) -> Tensor:
    """Returns exp of values that are bounded to +-20, so that nothing overflows. Slopes ignore the bound."""
    return logs.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def _surrogate(
    form: PolicyLossConfig, tokens: AnswerTokens, ratio_R: Tensor, log_probs_R: Tensor
) -> tuple[_Term, Tensor]:
    advantage_R = tokens.advantage_R
    largest = math.inf if form.largest_ratio is None else form.largest_ratio
    bounded_R = ratio_R.clamp_max(largest)
    if form.surrogate == "weighted":
        slope_R = bounded_R * advantage_R
        return _Term(slope_R * log_probs_R, slope_R), ratio_R > largest
    # PPO's clip: no gain from moving the ratio further in the direction that the advantage favors.
    low = -math.inf if form.clip_low is None else 1 - form.clip_low
    high = math.inf if form.clip_high is None else 1 + form.clip_high
    value_R = torch.minimum(bounded_R * advantage_R, bounded_R.clamp(low, high) * advantage_R)
    is_clipped_R = ((advantage_R > 0) & (ratio_R > min(high, largest))) | (
        (advantage_R < 0) & ((ratio_R < low) | (ratio_R > largest))
    )
    if form.ratio == "sequence_product":
        value_R = value_R / tokens.length_R
    # A ratio has derivative ratio in the log-probability of its token. In that of any token of an answer of n tokens,
    # the n equal values of a geometric mean have together n * ratio / n, and the n shares of a product n * ratio / n.
    return _Term(value_R, (ratio_R * advantage_R).masked_fill(is_clipped_R, 0)), is_clipped_R


def _surrogate_factor(form: PolicyLossConfig, tokens: AnswerTokens, old_R: Tensor) -> Tensor:
    factor_R = tokens.is_token_R if tokens.has_surrogate_R is None else tokens.has_surrogate_R
    if tokens.sampler_factor_R is not None:
        return factor_R * tokens.sampler_factor_R
    if form.sampler_ratio_cap is None:
        return factor_R
    return factor_R * sampler_factor(old_R, tokens.sampler_R, form.sampler_ratio_cap)


def sampler_factor(old_R: Tensor, sampler_R: Tensor, cap: float) -> Tensor:
    """Returns the bounded ratio of old policy to sampler of each token."""
    return bounded_exp(old_R - sampler_R).clamp_max(cap)


def _divergence(form: PolicyLossConfig, own_ratio_R: Tensor, log_q_R: Tensor, excess_R: Tensor) -> _Term:
    """Returns the divergence of each token from the reference; `excess_R` is q - log q - 1."""
    if form.kl == "reverse":
        return _Term(own_ratio_R * excess_R, -own_ratio_R * log_q_R)
    if form.kl == "reverse_squared":
        return _Term(log_q_R.square() / 2, -log_q_R)
    return _Term(excess_R, 1 - bounded_exp(log_q_R))


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
            scores, part_sums = self._score(rows_RD, weight_VD, targets_R, batch, records=records)
            sums.update(part_sums)
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
        kept_ids_BTK = batch.extras.get(KEPT)
        kept_ids_RK = None if kept_ids_BTK is None else flat_rows(kept_ids_BTK, rows_R)
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
        needs_length = form.ratio != "token" or form.kl == "forward_answer" or form.off_policy_limit is not None
        if form.normalizer == "answers" or needs_length:
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
        """Returns whether slopes depend on whole answers. Ratios do not if the policy is the old one."""
        form = self.form
        has_ratio = form.ratio != "token" and (tokens.old_R is not None or self._has_sampler_factor)
        has_divergence = form.kl == "forward_answer" and tokens.reference_R is not None
        return form.off_policy_limit is not None or has_ratio or has_divergence

    @property
    def _has_sampler_factor(self) -> bool:
        """Whether all tokens of an answer share their sampler factor, because they share a surrogate."""
        form = self.form
        return form.sampler_ratio_cap is not None and form.ratio != "token" and form.surrogate == "clipped"

    def _compare_answers(self, tokens: AnswerTokens, answers: AnswerIndex, log_probs_R: Tensor) -> AnswerTokens:
        """Adds ratios and sampler factor of each answer, and whether it is near enough to its sampler."""
        form = self.form
        log_probs_R = log_probs_R.double()
        if form.ratio != "token" and tokens.old_R is not None:
            log_ratio_R = answers.sums(log_probs_R - tokens.old_R)
            if form.ratio == "sequence_mean":
                log_ratio_R = log_ratio_R / tokens.length_R
            tokens = replace(tokens, ratio_R=bounded_exp(log_ratio_R))
        if form.kl == "forward_answer" and tokens.reference_R is not None:
            tokens = replace(tokens, answer_log_q_R=answers.sums(tokens.reference_R - log_probs_R))
        if form.sampler_ratio_cap is not None and self._has_sampler_factor:
            old_R = log_probs_R if tokens.old_R is None else tokens.old_R
            factor_R = sampler_factor(old_R, tokens.sampler_R, form.sampler_ratio_cap)
            tokens = replace(tokens, sampler_factor_R=answers.sums(factor_R) / tokens.length_R)
        if form.off_policy_limit is not None:
            apart_R = answers.sums(tokens.sampler_R - log_probs_R) / tokens.length_R
            is_far_R = (tokens.advantage_R < 0) & (apart_R > form.off_policy_limit)
            tokens = replace(tokens, has_surrogate_R=1 - is_far_R.double())
        return tokens
