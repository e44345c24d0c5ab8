"""Documents packed into one sequence, with the mask on, are each as if alone: logits, losses, gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from comm.dispatch.local import LocalDispatcher
from data.loader import Batch
from kernels.attention.documents import Documents
from model.config import ModelConfig
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.transformer import Transformer, initialize_weights
from tests.tiny import MODEL
from train.tasks.next_token import to_micro_batch

LENGTHS = [[6, 1, 9], [4, 12], [16]]
CPU = torch.device("cpu")


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), dtype)
    initialize_weights(model, 5)
    return model


def packed(lengths: list[list[int]], size: int) -> Batch:
    """Sequences of documents of these lengths, then padding."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.full((len(lengths), size), 1)
    positions = torch.full((len(lengths), size), -1)
    for row, sequence in enumerate(lengths):
        first = 0
        for length in sequence:
            drawn = torch.randint(2, MODEL.vocab_size, (length,), generator=generator)
            tokens[row, first : first + length], positions[row, first : first + length] = drawn, torch.arange(length)
            first += length
    return Batch(tokens_BT=tokens, positions_BT=positions, pad_id=1)


def alone(batch: Batch) -> list[Batch]:
    """Returns each document as its own batch."""
    found = []
    for tokens, positions in zip(batch.tokens_BT, batch.positions_BT, strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        end = int((positions >= 0).sum())
        for first, last in zip(starts, [*starts[1:], end], strict=True):
            part = slice(first, last)
            found.append(Batch(tokens_BT=tokens[None, part], positions_BT=positions[None, part], pad_id=batch.pad_id))
    return found


def losses_and_gradients(config: ModelConfig, batches: list[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the sums of all losses, the balance loss included, and gradients."""
    model, depths = make_model(config), config.mtp_depth + 1
    sums = LossSums(loss_names(depths - 1))
    objective = CrossEntropy(factors=tuple(0.1 / (depth + 1) for depth in range(depths)), balance=0.02)
    for batch in batches:
        model.loss(batch, objective, sums).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return sums.settle(), gradients


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_packed_documents_with_the_mask_equal_each_alone(depth: int) -> None:
    config = replace(MODEL, mtp_depth=depth)
    batch = packed(LENGTHS, 19)
    together, gradients = losses_and_gradients(config, [to_micro_batch(batch, depth, CPU, masks_documents=True)])
    single = [to_micro_batch(each, depth, CPU) for each in alone(batch)]
    assert len(single) == 6
    expected, expected_gradients = losses_and_gradients(config, single)
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=0)
    assert set(gradients) == set(expected_gradients)
    for name, gradient in expected_gradients.items():
        error = (gradients[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-30)
        assert error <= 1e-12, f"{name}: {error}"
    without, unlike = losses_and_gradients(config, [to_micro_batch(batch, depth, CPU)])
    assert (without - expected).abs().min() > 1e-2
    assert max(float((unlike[name] - expected_gradients[name]).abs().max()) for name in unlike) > 1e-2


@torch.no_grad()
def test_logits_of_packed_documents_with_the_mask_are_those_of_each_alone() -> None:
    model, batch = make_model(MODEL), packed(LENGTHS, 19)
    logits = model(batch.tokens_BT, Documents.from_positions(batch.positions_BT))
    rows = [model(each.tokens_BT)[0] for each in alone(batch)]
    torch.testing.assert_close(logits[batch.positions_BT >= 0], torch.cat(rows), rtol=1e-12, atol=1e-13)
    without = model(batch.tokens_BT)[batch.positions_BT >= 0]
    assert (without - torch.cat(rows)).abs().max() > 1e-2


@torch.no_grad()
def test_logits_of_packed_documents_in_float32_are_those_of_each_alone() -> None:
    model, batch = make_model(MODEL, torch.float32), packed(LENGTHS, 19)
    logits = model(batch.tokens_BT, Documents.from_positions(batch.positions_BT))
    rows = torch.cat([model(each.tokens_BT)[0] for each in alone(batch)])
    assert (logits[batch.positions_BT >= 0] - rows).abs().max() <= 2e-6


@torch.no_grad()
def test_one_document_for_each_sequence_is_no_mask_at_all() -> None:
    model, batch = make_model(MODEL), packed([[8], [8]], 8)
    logits = model(batch.tokens_BT, Documents.from_positions(batch.positions_BT))
    torch.testing.assert_close(logits, model(batch.tokens_BT), rtol=1e-12, atol=1e-13)
