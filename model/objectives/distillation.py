"""Objective of a student that imitates a teacher's distributions.

Source: arXiv:2306.13649. Shape legend: R rows with a target, S hidden size of the teacher, K kept tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cross_entropy import linear_distillation
from kernels.cross_entropy.reference import Divergence, RowScores, Teacher, TeacherStates, TeacherTopK
from model.head import score_rows
from model.linear import WeightSink
from model.objective import CrossEntropy, MicroBatch, OutputHead, TaskLoss, depth_name, loss_names

DIVERGENCE = "divergence"
TEACHER_IDS = "teacher_ids"
TEACHER_LOG_PROBS = "teacher_log_probs"
"""Extras with the most probable tokens of a teacher at each target, and their log-probabilities, [B, T, K]."""
TEACHER_STATES = "teacher_states"
"""Extra with the input of the teacher's head, [B, T, S]."""


def distillation_names(mtp_depth: int) -> tuple[str, ...]:
    """Returns the names of the losses: cross-entropy at every depth, the balance loss, and the divergence."""
    return (*loss_names(mtp_depth), DIVERGENCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """Divergence from a teacher at the main head, mixed with the cross-entropy of the targets.

    MTP depths have no teacher and learn from the targets alone.

    Attributes:
        targets: cross-entropy of the targets at every depth, with its factors and the balance loss.
        cross_entropy_weight: weight of the main head's cross-entropy; the divergence has the rest to 1.
        teacher_head_VS: head of a teacher if its states are an extra; None if its most probable tokens are.
    """

    targets: CrossEntropy
    cross_entropy_weight: float
    form: Divergence
    teacher_head_VS: Tensor | None = None

    @property
    def balance(self) -> float:
        """Factor of the sequence-wise balance loss."""
        return self.targets.balance

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes the mixed loss at the main head, and the cross-entropy at other depths."""
        if head.depth:
            return self.targets.loss(hidden_BTD, head, batch, sink)
        wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
        rows = batch.rows(0)
        mix = (1 - self.cross_entropy_weight, self.cross_entropy_weight)
        weights_N = None
        if self.targets.weights is not None:
            weights_N = batch.extras[self.targets.weights][..., 0].flatten().to(wide)
        teacher = self._teacher(batch, rows)
        divergences: list[Tensor] = []

        def score(rows_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, records: bool) -> RowScores:  # noqa: FBT001
            # The kernel sees only rows with a target: [R].
            weights_R = weights_N if weights_N is None or rows is None else weights_N[rows]
            distilled = linear_distillation(
                *(rows_RD, weight_VD, targets_R, teacher, self.form),
                mix=mix,
                row_weights_N=weights_R,
                wants_gradients=records,
            )
            weighted_R = distilled.divergences_N if weights_R is None else weights_R * distilled.divergences_N
            # Read by `value`, which is called after the scores.
            divergences.append(weighted_R.sum())
            return distilled.scores

        def nats_of(log_probs_N: Tensor) -> Tensor:
            return -(log_probs_N if weights_N is None else weights_N * log_probs_N).sum()

        def value(log_probs_N: Tensor) -> Tensor:
            return mix[0] * divergences[0] + mix[1] * nats_of(log_probs_N)

        targets_BT = batch.targets_BT[0]
        loss, log_probs_BT = score_rows(
            hidden_BTD, head.weight_VD, targets_BT, sink, score=score, value=value, rows=rows
        )
        sums = {depth_name(0): nats_of(log_probs_BT.flatten()), DIVERGENCE: divergences[0]}
        return TaskLoss(self.targets.factors[0] * loss, sums, log_probs_BT)

    def _teacher(self, batch: MicroBatch, rows: Tensor | None) -> Teacher:
        def of_rows(name: str) -> Tensor:
            # The teacher's values of the same rows.
            flat = batch.extras[name].flatten(0, 1)
            return flat if rows is None else flat[rows]

        if self.teacher_head_VS is not None:
            return TeacherStates(rows_NS=of_rows(TEACHER_STATES), head_VS=self.teacher_head_VS)
        return TeacherTopK(ids_NK=of_rows(TEACHER_IDS).long(), log_probs_NK=of_rows(TEACHER_LOG_PROBS))


@dataclass(frozen=True, slots=True)
class KeepStates:
    """Objective of a teacher's pass, which keeps the main head's input in place of log-probabilities."""

    balance: float = 0.0

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Returns the states, and loss 0."""
        return TaskLoss(hidden_BTD.new_zeros(()), {}, hidden_BTD)
