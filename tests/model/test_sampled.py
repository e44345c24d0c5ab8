"""Scores of sampled tokens: answers of a micro-batch, and memory at V3's vocabulary."""

from dataclasses import replace

import pytest
import torch

from model.objective import CrossEntropy, MicroBatch, Objective, OutputHead
from model.objectives.policy import PolicyGradient
from model.objectives.policy_loss import PolicyLossConfig
from model.objectives.sampled import AnswerIndex
from tests.answers import GRPO, draw_answers, drawn
from tests.model.live_memory import LiveMemory
from train.tasks.next_token import to_micro_batch

V3_VOCABULARY, NUM_ROWS, HIDDEN = 129_280, 130, 8
FEW = CrossEntropy(factors=(1.0,), balance=0.0)


def objective(form: PolicyLossConfig) -> PolicyGradient:
    return PolicyGradient(targets=FEW, form=form, factor=1.0, max_new_tokens=NUM_ROWS, temperature=0.6)


def drawn_batch(rows: tuple[int, ...], length: int) -> MicroBatch:
    batch = draw_answers(3, rows, length, 11)
    return to_micro_batch(batch, 0, torch.device("cpu"), masks_documents=True, weights_BT=batch.extras["weights"])


def test_sums_of_answers_are_those_of_loops() -> None:
    batch = drawn_batch((3, 0, 2), 40)
    answer_BT, values_BT = batch.extras["answer"], drawn(1, 3, 40)
    expected_BT = torch.zeros(3, 40, dtype=torch.float64)
    for row in range(3):
        for number in range(1, int(answer_BT[row].max()) + 1):
            place = answer_BT[row] == number
            expected_BT[row, place] = values_BT[row, place].sum()
    is_answer_BT = answer_BT > 0
    few = batch.rows(0)
    assert few is not None
    for rows in (few, torch.arange(answer_BT.numel())):
        answers = AnswerIndex(batch, rows if rows is few else None)
        values_R, is_answer_R, expected_R = (each.flatten()[rows] for each in (values_BT, is_answer_BT, expected_BT))
        assert torch.allclose(answers.sums(values_R)[is_answer_R], expected_R[is_answer_R], rtol=1e-14)
        assert int(answers.count()) == 5
    cut = replace(batch, targets_BT=(batch.targets_BT[0].masked_fill(answer_BT == 2, -100),))
    assert int(AnswerIndex(cut, None).count()) == 3


def one_answer(*, has_old: bool, has_kept: bool) -> MicroBatch:
    """One sequence that is one answer to V3's vocabulary."""
    shape = (1, NUM_ROWS)
    targets = torch.randint(0, V3_VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
    extras = {
        "answer": torch.ones(shape, dtype=torch.int64),
        "weights": torch.ones(shape),
        "advantage": torch.full(shape, -0.5),
        "sampler_log_probs": torch.full(shape, -11.0),
        "reference_log_probs": torch.full(shape, -12.0),
    }
    if has_old:
        extras["old_log_probs"] = torch.full(shape, -11.5)
    if has_kept:
        extras["kept_ids"] = torch.cat([targets[..., None], torch.arange(49).expand(*shape, 49)], -1)
    return MicroBatch(inputs_BT=(targets,), targets_BT=(targets,), extras=extras)


def peak_bytes(loss: Objective, batch: MicroBatch) -> int:
    """Peak bytes that operators allocate in forward and backward, with gradients and without inputs."""
    hidden = drawn(1, 1, NUM_ROWS, HIDDEN).float().requires_grad_()
    weight = torch.full((V3_VOCABULARY, HIDDEN), 0.01).requires_grad_()
    with LiveMemory() as memory:
        loss.loss(hidden, OutputHead(0, weight), batch, None).loss.backward()
    found: int = memory.peak_bytes
    return found


@pytest.mark.slow
def test_head_of_policy_gradients_takes_as_little_memory_as_that_of_cross_entropy() -> None:
    """Law A7: at most 1.1 times as much, also if the head is computed twice or among kept tokens."""
    plain = peak_bytes(FEW, one_answer(has_old=False, has_kept=False))
    assert plain < 4 * NUM_ROWS * V3_VOCABULARY * 2
    for name, form, has_old, has_kept in (
        ("one sweep", replace(GRPO, kl="reverse", kl_weight=0.1), True, False),
        ("two sweeps", replace(GRPO, ratio="sequence_mean"), True, False),
        ("kept tokens", replace(GRPO, off_policy_limit=0.1), False, True),
    ):
        found = peak_bytes(objective(form), one_answer(has_old=has_old, has_kept=has_kept))
        print(f"{name}: {found / plain:.3f} of {plain / 2**20:.0f} MiB")
        assert found <= 1.1 * plain, name
