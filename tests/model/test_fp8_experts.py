"""Experts in FP8 against their formula in float64 over the same codes, and from which memory they read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from comm.dispatch.expert_order import SortedChoices
from kernels.grouped_gemm import reference as grouped_reference
from kernels.quantize import reference
from kernels.quantize.layout import Quantized, QuantizedBlocks
from kernels.rms_norm.reference import rms_norm
from model.feed_forward import RoutedExperts
from model.gradients import GradientStore, WeightQueue
from model.norm import NormSource
from model.precision.fp8.linears import Fp8Linears
from model.precision.fp8.rows import Fp8Rows, GradientSlot, pack_gradient, pack_rows, placeholder
from model.precision.linears import LocalRows
from tests.kernels.plain import randn
from tests.model.fp8_plain import Gate, InFp8, expect

HIDDEN = 160
WIDTH = 72  # so that a tile of hidden values holds the last gates and the first ups
NUM_EXPERTS = 4


def make_experts(power_of_two: bool) -> RoutedExperts:
    linears = Fp8Linears(power_of_two=power_of_two)
    experts = RoutedExperts(HIDDEN, WIDTH, range(NUM_EXPERTS), torch.float32, linears)
    with torch.no_grad():
        experts.gate_up_proj.copy_(0.1 * randn(NUM_EXPERTS, 2 * WIDTH, HIDDEN, seed=1))
        experts.down_proj.copy_(0.1 * randn(NUM_EXPERTS, HIDDEN, WIDTH, seed=2))
    return experts


@dataclass(frozen=True, slots=True)
class Expected:
    """Results and all gradients of one expert's rows."""

    out_AD: Tensor
    grad_rows_AD: Tensor
    grad_weights_A: Tensor
    grad_gate_up_HD: Tensor
    grad_down_DM: Tensor


def one_expert(
    codes: InFp8, rows_AD: Tensor, weights_A: Tensor, gate_up_HD: Tensor, down_DM: Tensor, slope_AD: Tensor
) -> Expected:
    """Rows and slopes as they were sent, in float64: both with scales that are powers of two."""
    count, weights_A = (len(rows_AD),), weights_A.double()
    sent_AD, slope_AD = codes.rows(rows_AD, rounds=True), codes.gradient(slope_AD, rounds=True)
    gate_up, down = codes.weight(gate_up_HD), codes.weight(down_DM)
    hidden_AH = sent_AD @ gate_up.t()
    kept = Gate(codes.rows(hidden_AH), weights_A)
    grad_AM = slope_AD @ down
    grad_AH = kept.backward(grad_AM)
    (hidden_columns,) = codes.columns(grad_AH, count, is_gradient=True)
    (slope_columns,) = codes.columns(slope_AD, count, rounds=True, is_gradient=True)
    (sent_columns,), (gated_columns,) = codes.columns(sent_AD, count, rounds=True), codes.columns(kept.out_AM, count)
    return Expected(
        out_AD=codes.rows(Gate(hidden_AH, weights_A).out_AM) @ down.t(),
        grad_rows_AD=codes.gradient(grad_AH) @ gate_up,
        grad_weights_A=(kept.unweighted_AM * grad_AM).sum(1),
        grad_gate_up_HD=hidden_columns.t() @ sent_columns,
        grad_down_DM=slope_columns.t() @ gated_columns,
    )


def gradients_of(experts: RoutedExperts, queue: WeightQueue | None) -> tuple[Tensor, Tensor]:
    weights: list[nn.Parameter] = [experts.gate_up_proj, experts.down_proj]
    if queue is None:
        found = [weight.grad for weight in weights if weight.grad is not None]
    else:
        assert all(weight.grad is None for weight in weights)
        store = GradientStore(weights)
        queue.flush(store)
        found = [store.gradient(weight) for weight in weights]
    gate_up, down = found
    return gate_up, down


@pytest.mark.parametrize("counts", [(130, 0, 37, 1), (0, 0, 0, 0), (0, 5, 0, 0)], ids=str)
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_experts_of_arrived_rows_equal_the_formula(power_of_two: bool, is_split: bool, counts: tuple[int, ...]) -> None:
    codes, experts, size = InFp8(power_of_two), make_experts(power_of_two), sum(counts)
    rows_AD = randn(size, HIDDEN, seed=3, dtype=torch.float32)
    weights_A, slope_AD = randn(size, seed=4, dtype=torch.float32), 1e-6 * randn(size, HIDDEN, seed=5)
    weights_A.requires_grad_()
    slot, queue = GradientSlot(), WeightQueue() if is_split else None
    rows = replace(pack_rows(rows_AD.requires_grad_()), slot=slot)
    out_AD = experts(rows, weights_A, counts, queue)
    out_AD.backward(slot.put(pack_gradient(slope_AD.float()), HIDDEN, torch.float32))
    grad_gate_up, grad_down = gradients_of(experts, queue)
    assert rows_AD.grad is not None
    assert weights_A.grad is not None
    first = 0
    for expert, count in enumerate(counts):
        part, first = slice(first, first + count), first + count
        gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
        expected = one_expert(
            codes, rows_AD.detach()[part], weights_A.detach()[part], gate_up, down, slope_AD.float()[part]
        )
        expect(out_AD[part], expected.out_AD, "output")
        # 1e6 times, so that what is near is near for its own size.
        expect(1e6 * rows_AD.grad[part], 1e6 * expected.grad_rows_AD, "gradient of rows")
        expect(1e6 * weights_A.grad[part], 1e6 * expected.grad_weights_A, "gradient of routing weights")
        expect(1e6 * grad_gate_up[expert], 1e6 * expected.grad_gate_up_HD, "gradient of gate and up")
        expect(1e6 * grad_down[expert], 1e6 * expected.grad_down_DM, "gradient of down")


@pytest.mark.parametrize("power_of_two", [False, True])
def test_local_experts_equal_the_formula(power_of_two: bool) -> None:
    """Seventy tokens have two choices each; the last expert gets none, and a few choices are no expert."""
    codes, experts, tokens = InFp8(power_of_two), make_experts(power_of_two), 70
    generator = torch.Generator().manual_seed(6)
    ids_TK = torch.stack([torch.randperm(NUM_EXPERTS - 1, generator=generator)[:2] for _ in range(tokens)])
    ids_TK[:3, 0] = -1
    order = SortedChoices.sort(ids_TK).keep(3)
    counts = tuple(int((ids_TK == expert).sum()) for expert in range(NUM_EXPERTS))
    norm_weight_D = 0.5 + torch.rand(HIDDEN, generator=generator)
    source = NormSource(randn(tokens, HIDDEN, seed=3, dtype=torch.float32), norm_weight_D, 1e-6)
    x_ND, _ = rms_norm(source.x, source.norm_weight_D, source.eps)
    x_ND.requires_grad_()
    weights_TK = randn(tokens, 2, seed=4, dtype=torch.float32).requires_grad_()
    slope_ND = randn(tokens, HIDDEN, seed=5)
    made = experts(pack_rows(x_ND), weights_TK, counts, None, LocalRows(source, order))
    made.backward(slope_ND.float())
    total, grad_x = torch.zeros(2, tokens, HIDDEN, dtype=torch.float64)
    grad_weights = torch.zeros(tokens, 2, dtype=torch.float64)
    grad_gate_up, grad_down = gradients_of(experts, None)
    for expert in range(NUM_EXPERTS):
        token, place = (ids_TK == expert).nonzero().unbind(1)
        gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
        given = x_ND.detach()[token], weights_TK.detach()[token, place], gate_up, down, slope_ND.float()[token]
        expected = one_expert(codes, *given)
        total.index_add_(0, token, expected.out_AD)
        grad_x.index_add_(0, token, expected.grad_rows_AD)
        grad_weights[token, place] = expected.grad_weights_A
        expect(grad_gate_up[expert], expected.grad_gate_up_HD, "gradient of gate and up")
        expect(grad_down[expert], expected.grad_down_DM, "gradient of down")
    expect(made, total, "output")
    expect(x_ND.grad, grad_x, "gradient of rows")
    expect(weights_TK.grad, grad_weights, "gradient of routing weights")


def test_received_rows_and_gradients_are_operands_without_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first product of forward and backward reads the received memory, codes and scales.

    It quantizes no row.
    """
    experts, seen, num_quantized = make_experts(False), list[int](), list[int]()
    grouped_rows_fp8, quantize_1x128 = grouped_reference.grouped_rows_fp8, reference.quantize_1x128

    def grouped_rows(rows: Quantized, weights: QuantizedBlocks, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
        seen.extend(each.untyped_storage().data_ptr() for each in rows)
        return grouped_rows_fp8(rows, weights, counts, dtype)

    def quantize(rows_ND: Tensor, *, power_of_two: bool, min_amax: float = 1e-4) -> Quantized:
        num_quantized.append(rows_ND.shape[1])
        return quantize_1x128(rows_ND, power_of_two=power_of_two, min_amax=min_amax)

    monkeypatch.setattr(grouped_reference, "grouped_rows_fp8", grouped_rows)
    monkeypatch.setattr(reference, "quantize_1x128", quantize)
    x = randn(4, HIDDEN, seed=3, dtype=torch.float32).requires_grad_()
    packed_AB, slope_AB = (pack_rows(randn(4, HIDDEN, seed=n)).packed for n in (1, 2))
    num_quantized.clear()
    slot = GradientSlot()
    weights_A = torch.ones(4, requires_grad=True)
    out_AD = experts(Fp8Rows(placeholder(x.shape, x), packed_AB, slot), weights_A, (1, 0, 3, 0), None)
    assert seen[:2] == [packed_AB.untyped_storage().data_ptr()] * 2
    seen.clear()
    out_AD.backward(slot.put(slope_AB, HIDDEN, torch.float32))
    assert seen[:2] == [slope_AB.untyped_storage().data_ptr()] * 2
    assert num_quantized == [2 * WIDTH]  # the gradient inside, before its product


def test_a_gradient_is_taken_from_the_mailbox_once() -> None:
    slot = GradientSlot()
    slot.put(torch.zeros(1, 4, dtype=torch.uint8), 4, torch.float32)
    slot.take()
    with pytest.raises(AssertionError):
        slot.take()
