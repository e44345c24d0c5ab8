"""Tests the inputs, targets and weights of next-token prediction with numbers computed by hand."""

from dataclasses import replace

import pytest
import torch

from data.loader import Batch
from model.config import ModelConfig
from model.objective import MicroBatch, weights_of_depths
from tests.tiny import BATCH, MODEL, TASK
from train.tasks.next_token import NextToken, to_micro_batch
from train.tasks.registry import TASKS, StepRates, open_task

RATES = StepRates(learning_rate=1.0, mtp_loss_weight=0.3, bias_update=0.0)


def test_micro_batch_shifts_inputs_by_depth_and_targets_by_one_more() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 20, 21, 22]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    made = to_micro_batch(Batch(tokens_BT=tokens, positions_BT=positions, pad_id=2), 2, torch.device("cpu"))
    assert [depth.tolist() for depth in made.inputs_BT] == [
        [[10, 11, 12, 13, 20, 21, 22]],
        [[11, 12, 13, 20, 21, 22, 2]],
        [[12, 13, 20, 21, 22, 2, 2]],
    ]
    none = -100
    assert [depth.tolist() for depth in made.targets_BT] == [
        [[11, 12, 13, none, 21, 22, none]],
        [[12, 13, none, none, 22, none, none]],
        [[13, none, none, none, none, none, none]],
    ]


def test_micro_batch_has_its_documents_if_they_are_masked() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, -1]])
    batch = Batch(tokens_BT=torch.zeros_like(positions), positions_BT=positions, pad_id=2)
    masked, plain = (
        to_micro_batch(batch, 0, torch.device("cpu"), masks_documents=masks_documents)
        for masks_documents in (True, False)
    )
    assert masked.documents is not None
    assert masked.documents.ids_BT.tolist() == [[1, 1, 1, 1, 2, 2, 3]]
    assert plain.documents is None


def weighted_batch() -> MicroBatch:
    """Seven tokens in two documents; the last main target of the first document is ignored."""
    tokens = torch.tensor([[10, 11, 12, 13, 20, 21, 22]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    weights = torch.tensor([[0.5, 1.0, 2.0, 64.0, 4.0, 8.0, 64.0]])
    batch = Batch(tokens_BT=tokens, positions_BT=positions, pad_id=2, extras={"weights": weights})
    return to_micro_batch(batch, 2, torch.device("cpu"))


def test_counts_are_targets_of_each_depth_and_sequences() -> None:
    task = NextToken(TASK, 2)
    assert task.names == ("main", "mtp_1", "mtp_2", "balance")
    assert task.count(weighted_batch()).tolist() == [5, 3, 1, 1]


def test_weights_of_a_depth_are_those_of_the_tokens_that_it_predicts() -> None:
    task = NextToken(TASK, 2, weights="weights")
    batch = weighted_batch()
    batch = replace(batch, extras={"weights": weights_of_depths(batch.extras["weights"], 3)})
    assert task.count(batch).tolist() == [0.5 + 1 + 2 + 4 + 8, 1 + 2 + 8, 2, 1]


def test_objective_divides_by_global_counts() -> None:
    objective = NextToken(TASK, 2).objective(torch.tensor([50.0, 40.0, 20.0, 16.0]), RATES)
    assert objective.factors == pytest.approx((1 / 50, 0.3 / 2 / 40, 0.3 / 2 / 20))
    assert objective.balance == pytest.approx(0.01 / 16)


def test_objective_without_a_target_divides_by_one() -> None:
    objective = NextToken(TASK, 1).objective(torch.tensor([0.25, 0.0, 16.0]), RATES)
    assert objective.factors == (4.0, 0.3)


def test_total_weighs_means() -> None:
    total = NextToken(TASK, 2).total({"main": 4.0, "mtp_1": 5.0, "mtp_2": 7.0, "balance": 2.0}, RATES)
    assert total == pytest.approx(4.0 + 0.3 * 6.0 + 0.01 * 2.0)


@pytest.mark.parametrize("shape", [MODEL])
def test_registered_tasks_report_a_main_loss(shape: ModelConfig) -> None:
    assert "pretrain" in TASKS
    assert "main" in open_task(TASK, shape, BATCH).names


def test_extras_stay_with_their_sequences() -> None:
    tokens = torch.arange(12).view(4, 3)
    batch = Batch(tokens_BT=tokens, positions_BT=tokens % 3, pad_id=0, extras={"rewards": tokens[..., None] * 0.5})
    part = batch.sequences(1, 2)
    assert part.tokens_BT.tolist() == [[3, 4, 5], [6, 7, 8]]
    made = to_micro_batch(part, 0, torch.device("cpu"))
    assert made.extras["rewards"][..., 0].tolist() == [[1.5, 2.0, 2.5], [3.0, 3.5, 4.0]]
