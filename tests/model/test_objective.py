"""Objectives and the model's ends against autograd through whole logits in float64, and the memory of the loss.

Shape legend: B sequences, T tokens, N tokens of all, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.mla import LatentAttention
from model.config import Computing
from model.head import score_tokens
from model.linear import GradientStore, Projection, WeightSink
from model.objective import (
    BALANCE,
    MAIN,
    CrossEntropy,
    LossSums,
    MicroBatch,
    Objective,
    OutputHead,
    TaskLoss,
    find_target_rows,
    loss_names,
    weights_of_depths,
)
from model.transformer import Embedding, MtpBlock, build_linears
from tests.kernels import plain
from tests.kernels.plain import randn, strided
from tests.model.against_plain import Weights, assert_equals_plain, randomize
from tests.model.live_memory import LiveMemory
from tests.model.test_stage import make_batch, make_model, phased
from tests.tiny import MODEL

CLIP = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ClippedPolicyGradient:
    """PPO's clipped surrogate: the slope of a row is a function of its own log-probability."""

    balance: float = 0.0

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes the sum over tokens of -min(ratio A, clipped ratio A)."""
        old_N, advantages_N = (batch.extras[name].flatten() for name in ("old_log_probs", "advantages"))
        is_target_N = batch.targets_BT[0].flatten() != -100

        def value(log_probs_N: Tensor) -> Tensor:
            return clipped_surrogate(log_probs_N, old_N, advantages_N)[is_target_N].sum()

        def slopes(log_probs_C: Tensor, chunk: slice) -> Tensor:
            ratios_C, advantages_C = (log_probs_C - old_N[chunk]).exp(), advantages_N[chunk]
            is_clipped_C = torch.where(advantages_C > 0, ratios_C > 1 + CLIP, ratios_C < 1 - CLIP)
            return ratios_C * advantages_C * ~is_clipped_C

        loss, log_probs_BT = score_tokens(
            hidden_BTD, head.weight_VD, batch.targets_BT[0], sink, value=value, slopes=slopes, rows=batch.rows(0)
        )
        return TaskLoss(loss, {MAIN: loss.detach()}, log_probs_BT)


def clipped_surrogate(log_probs_N: Tensor, old_N: Tensor, advantages_N: Tensor) -> Tensor:
    ratios_N = (log_probs_N - old_N).exp()
    return -torch.minimum(ratios_N * advantages_N, ratios_N.clamp(1 - CLIP, 1 + CLIP) * advantages_N)


def scored_batch(mtp_depth: int, vocab: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(vocab, (2, 40), generator=generator)
    targets = [tokens[:, depth + 1 : depth + 33].clone() for depth in range(mtp_depth + 1)]
    targets[0][:, ::5] = -100
    extras = {
        "weights": torch.rand(2, 32, generator=generator),
        "old_log_probs": -torch.rand(2, 32, generator=generator).double() * 4,
        "advantages": torch.randn(2, 32, generator=generator).double(),
    }
    inputs = tuple(tokens[:, depth : depth + 32] for depth in range(mtp_depth + 1))
    rows = tuple(find_target_rows(targets_BT) for targets_BT in targets)
    assert rows[0] is not None
    return MicroBatch(inputs_BT=inputs, targets_BT=tuple(targets), extras=extras, target_rows=rows)


def plain_log_probs(hidden_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Returns log-probabilities of the targets by the formula over whole logits, 0 if there is no target."""
    logs_NV = (hidden_BTD @ head_VD.t()).log_softmax(-1).flatten(0, 1)
    targets_N = targets_BT.flatten()
    picked_N = logs_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    return picked_N.masked_fill(targets_N == -100, 0)


def gradients_of(objective: Objective, batch: MicroBatch, depth: int) -> tuple[TaskLoss, tuple[Tensor, ...]]:
    hidden, head = randn(2, 32, 6, seed=0).requires_grad_(), randn(50, 6, seed=1).requires_grad_()
    found = objective.loss(hidden, OutputHead(depth, head), batch, None)
    return found, torch.autograd.grad(found.loss, (hidden, head))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_weighted_cross_entropy_equals_autograd(depth: int) -> None:
    batch = scored_batch(2, 50)
    objective = CrossEntropy(factors=(0.3, 0.2, 0.1), balance=0.0, weights="weights")
    of_depths = {"weights": weights_of_depths(batch.extras["weights"], 3)}
    found, gradients = gradients_of(objective, replace(batch, extras=of_depths), depth)
    hidden, head = randn(2, 32, 6, seed=0).requires_grad_(), randn(50, 6, seed=1).requires_grad_()
    log_probs_N = plain_log_probs(hidden, head, batch.targets_BT[depth])
    # The target at place i of depth k is the main target at place i + k.
    weights_BT = torch.zeros(2, 32, dtype=torch.float64)
    for place in range(32 - depth):
        weights_BT[:, place] = batch.extras["weights"][:, place + depth].double()
    nats = -(weights_BT.flatten() * log_probs_N).sum()
    expected = torch.autograd.grad(objective.factors[depth] * nats, (hidden, head))
    name = loss_names(2)[depth]
    torch.testing.assert_close(found.sums[name], nats.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.loss.detach(), objective.factors[depth] * nats.detach(), rtol=1e-12, atol=0)
    assert found.log_probs_BT is not None
    torch.testing.assert_close(found.log_probs_BT.flatten(), log_probs_N.detach(), rtol=1e-12, atol=1e-14)
    for made, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-11, atol=1e-14)


def test_clipped_policy_gradient_from_outside_equals_autograd() -> None:
    batch = scored_batch(0, 50)
    found, gradients = gradients_of(ClippedPolicyGradient(), batch, 0)
    hidden, head = randn(2, 32, 6, seed=0).requires_grad_(), randn(50, 6, seed=1).requires_grad_()
    log_probs_N = plain_log_probs(hidden, head, batch.targets_BT[0])
    old_N, advantages_N = batch.extras["old_log_probs"].flatten(), batch.extras["advantages"].flatten()
    losses_N = clipped_surrogate(log_probs_N, old_N, advantages_N)
    ratios_N = (log_probs_N - old_N).exp().detach()
    is_target_N = batch.targets_BT[0].flatten() != -100
    for is_clipped_N in (ratios_N > 1 + CLIP, ratios_N < 1 - CLIP):
        assert is_clipped_N[is_target_N].any()
    loss = losses_N[is_target_N].sum()
    torch.testing.assert_close(found.loss.detach(), loss.detach(), rtol=1e-12, atol=0)
    for made, wanted in zip(gradients, torch.autograd.grad(loss, (hidden, head)), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-11, atol=1e-13)


def test_phased_weighted_cross_entropy_equals_plain() -> None:
    config = replace(MODEL, mtp_depth=2)
    objective = CrossEntropy(factors=(0.1, 0.05, 0.03), balance=0.05, weights="weights")
    plain, cut = make_model(config), make_model(config)
    batch = make_batch(config, 3)
    weights_BT = torch.rand(2, 12, generator=torch.Generator().manual_seed(1))
    batch = replace(batch, extras={"weights": weights_of_depths(weights_BT, 3)})
    store, sums = GradientStore(cut.parameters()), LossSums(loss_names(2))
    plain.loss(batch, objective, sums).backward()
    made = phased(cut, 4, batch, store, objective=objective)
    torch.testing.assert_close(made.settle(), sums.settle(), rtol=1e-12, atol=0)
    ours = dict(cut.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(store.gradient(ours[name]), parameter.grad, rtol=1e-10, atol=1e-14, msg=name)


def test_sums_keep_main_log_probs_by_place_if_wanted() -> None:
    model, batch = make_model(MODEL), make_batch(MODEL, 6)
    sums = LossSums(loss_names(1), log_probs={})
    objective = CrossEntropy(factors=(1.0, 1.0), balance=0.0)
    with torch.no_grad():
        logits_BTV = model(batch.inputs_BT[0])
        model.loss(batch, objective, sums)
    assert sums.log_probs is not None
    assert list(sums.log_probs) == [(0, 0)]
    logs_BT1 = logits_BTV.log_softmax(-1).gather(2, batch.targets_BT[0].clamp(min=0)[..., None])
    expected = logs_BT1[..., 0].masked_fill(batch.targets_BT[0] == -100, 0)
    torch.testing.assert_close(sums.log_probs[0, 0], expected, rtol=1e-12, atol=1e-13)


def test_sums_are_in_the_order_of_names_and_know_no_other() -> None:
    sums = LossSums(loss_names(1))
    for name, value in ((BALANCE, 3.0), ("mtp_1", 2.0), (MAIN, 1.0), (BALANCE, 4.0)):
        sums.add(name, torch.tensor(value))
    assert sums.settle().tolist() == [1.0, 2.0, 7.0]
    assert sums.settle().tolist() == [1.0, 2.0, 7.0]
    with pytest.raises(AssertionError, match="rewards"):
        sums.add("rewards", torch.tensor(1.0))


def test_extras_are_frozen_and_have_a_value_for_each_token() -> None:
    batch = scored_batch(0, 50)
    with pytest.raises(TypeError):
        batch.extras["weights"] = torch.zeros(2, 32)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"advantages must begin with the shape of the tokens, \[2, 32\], is \[2\]"):
        replace(batch, extras={"advantages": torch.zeros(2)})


V3_VOCABULARY = 129_280
NUM_ROWS = 1024


class Head(nn.Module):
    def __init__(self, vocab: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.lm_head = Projection(6, vocab, dtype)
        randomize(self, 1)


def nats_of(rows_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, sink: WeightSink | None) -> Tensor:
    """Returns the summed cross-entropy."""
    nats, _ = score_tokens(rows_BTD, head_VD, targets_BT, sink, value=lambda log_probs_N: -log_probs_N.sum())
    return nats


def some_targets(shape: tuple[int, ...], vocab: int) -> Tensor:
    targets = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(5))
    targets.flatten()[::3] = -100
    return targets


@pytest.mark.slow
@pytest.mark.covering(2)
@pytest.mark.parametrize("frozen", [(), ("lm_head.weight",)])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_summed_cross_entropy_equals_formula(dtype: torch.dtype, is_split: bool, frozen: tuple[str, ...]) -> None:
    for shape, vocab in (((2, 5), 11), ((1, 1), 2), ((0, 4), 7), ((2, 70), 20_011)):
        targets = some_targets(shape, vocab)

        def call(
            head: Head, inputs: Sequence[Tensor], sink: WeightSink | None, targets: Tensor = targets
        ) -> tuple[Tensor]:
            return (nats_of(inputs[0], head.lm_head.weight, targets, sink),)

        def plainly(weights: Weights, inputs: Sequence[Tensor], targets: Tensor = targets) -> tuple[Tensor]:
            logits_NV = inputs[0].flatten(0, 1) @ weights["lm_head.weight"].t()
            return (plain.cross_entropies(logits_NV, targets.flatten()).sum(),)

        x = randn(*shape, 6, seed=2, dtype=dtype)
        for given in (x, strided(x)):
            assert_equals_plain(Head(vocab, dtype), call, plainly, [given], is_split=is_split, frozen=frozen)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_embedding_equals_lookup_and_sums_slopes_of_each_token(dtype: torch.dtype, is_split: bool) -> None:
    embedding = Embedding(9, 6, dtype)
    randomize(embedding, 1)
    tokens = torch.tensor([[0, 8, 3, 3], [3, 0, 0, 7]])
    factor = randn(2, 4, 6, seed=3, dtype=dtype)
    assert_equals_plain(
        embedding,
        lambda module, inputs, sink: (module(tokens, sink) * inputs[0],),
        lambda weights, inputs: (functional.one_hot(tokens, 9).double() @ weights["weight"] * inputs[0],),
        [factor],
        is_split=is_split,
    )


@pytest.mark.covering(2)
@pytest.mark.parametrize("frozen", [(), ("eh_proj.weight",)])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mtp_merge_equals_formula(dtype: torch.dtype, is_split: bool, frozen: tuple[str, ...]) -> None:
    linears = build_linears(Computing())
    attention = LatentAttention(MODEL, dtype, "auto", linears)
    block = MtpBlock(MODEL, range(0), dtype, attention, linears)
    for name, _ in list(block.named_children()):
        if name not in ("enorm", "hnorm", "eh_proj"):
            delattr(block, name)
    randomize(block, 1)

    def plainly(weights: Weights, inputs: Sequence[Tensor]) -> tuple[Tensor]:
        left = plain.rms_norm(inputs[0], weights["enorm.weight"], MODEL.norm_eps)
        right = plain.rms_norm(inputs[1], weights["hnorm.weight"], MODEL.norm_eps)
        return (torch.cat((left, right), -1) @ weights["eh_proj.weight"].t(),)

    for shape in ((2, 5, 32), (1, 1, 32), (0, 3, 32)):
        given = [randn(*shape, seed=2, dtype=dtype), strided(randn(*shape, seed=3, dtype=dtype))]
        assert_equals_plain(
            block,
            lambda module, inputs, sink: (module.merge(*inputs, sink),),
            plainly,
            given,
            is_split=is_split,
            frozen=frozen,
        )


def test_cross_entropy_rejects_a_second_backward() -> None:
    """Its gradients are scaled in place, so a second backward would silently be wrong."""
    head = Head(11, torch.float64)
    nats = nats_of(randn(1, 3, 6, seed=0).requires_grad_(), head.lm_head.weight, some_targets((1, 3), 11), None)
    (nats * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second|modified by an inplace"):
        (nats * 2).backward()


def whole_logits(rows_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Computes all logits, then the loss, as usual."""
    logits_NV = functional.linear(rows_BTD.flatten(0, 1), head_VD)
    return functional.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=-100, reduction="sum")


def in_chunks(rows_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Computes the loss by this project's function."""
    return nats_of(rows_BTD, head_VD, targets_BT, None)


def peak_bytes(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
    """Returns the peak bytes that operators allocate in forward and backward, with gradients and without inputs."""
    rows = randn(1, NUM_ROWS, 16, seed=0, dtype=torch.float32).requires_grad_()
    head = torch.full((V3_VOCABULARY, 16), 0.01).requires_grad_()
    targets = some_targets((1, NUM_ROWS), V3_VOCABULARY)
    with LiveMemory() as memory:
        loss(rows, head, targets).backward()
    return memory.peak_bytes


@pytest.mark.slow
def test_cross_entropy_of_v3s_vocabulary_takes_a_small_share_of_whole_logits_memory() -> None:
    chunked, whole = peak_bytes(in_chunks), peak_bytes(whole_logits)
    assert whole > 3 * 4 * NUM_ROWS * V3_VOCABULARY / 2
    assert chunked <= 0.07 * whole
