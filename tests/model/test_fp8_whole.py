"""Experts and a whole model in FP8: near the formula over the same codes, one result whichever way they are run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from comm.dispatch.local import LocalDispatcher, SortedChoices
from comm.protocol import RankLocalDispatcher
from kernels.gemm import reference as grouped_reference
from kernels.quantize import reference
from kernels.quantize.layout import Quantized, QuantizedBlocks
from kernels.rms_norm.reference import rms_norm
from model.attention.mla import LatentAttention
from model.block import RoutedExperts
from model.config import MlaConfig, Products
from model.linear import GradientStore, WeightQueue
from model.norm import NormSource
from model.objective import LossSums, loss_names
from model.precision.fp8_linears import Fp8Linears
from model.precision.fp8_rows import Fp8Rows, GradientSlot, pack_gradient, pack_rows, placeholder
from model.precision.linears import LocalRows
from tests.kernels.plain import randn
from tests.model.fp8_models import CONFIG, FP8, Away, assert_same, by_phases, compute_eagerly, make_batch, make_model
from tests.model.fp8_plain import Gate, InFp8, expect
from tests.model.test_stage import make_objective, phased

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


@pytest.mark.covering(1)
@pytest.mark.parametrize("counts", [(130, 0, 37, 1), (0, 0, 0, 0)], ids=str)
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


FP8_FUNCTIONS = """
    quantize.quantize_1x128 quantize.quantize_columns quantize.requantize_columns quantize.quantize_128x128
    quantize.transpose_blocks quantize.pack_e5m6 quantize.unpack_e5m6 gemm.gemm_fp8 gemm.gemm_fp8_columns
    gemm.grouped_rows_fp8 gemm.grouped_weight_fp8 swiglu.swiglu_quantize swiglu.swiglu_backward_from_codes
    rms_norm.rms_norm_quantize rms_norm.rms_norm_backward_from_codes
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("products", "config", "is_packed"),
    [
        ("fp8", CONFIG, True),
        ("fp8", replace(CONFIG, q_lora_rank=None, num_shared_experts=0), False),
        ("fp8_power_of_two", replace(CONFIG, q_lora_rank=24, num_shared_experts=2, hidden_size=33), True),
    ],
    ids=["all features", "neither query rank nor shared experts", "narrow tiles"],
)
def test_model_gives_the_same_bits_whichever_way_it_is_run(
    products: Products, config: MlaConfig, is_packed: bool
) -> None:
    batch = make_batch(config, is_packed=is_packed)
    loss, eager = compute_eagerly(make_model(products, config), batch)
    loss_away, away = compute_eagerly(make_model(products, config, is_away=True), batch)
    assert torch.equal(loss, loss_away)
    assert_same(eager, away)
    one = by_phases(make_model(products, config), batch)
    assert_same(one, by_phases(make_model(products, config), batch, num_stages=3))
    for weight, gradient in eager.items():
        if weight in ("model.embed_tokens.weight", "lm_head.weight"):
            # What is used at two depths: autograd rounds each part to bf16, and their sum.
            assert float((gradient - one[weight]).norm()) <= 2**-7 * float(one[weight].norm()), weight
        else:
            assert torch.equal(gradient, one[weight].to(gradient.dtype)), weight


def test_weights_held_in_codes_change_no_bit_and_changed_ones_are_seen() -> None:
    batch, made = make_batch(CONFIG, 1, 40), [make_model("fp8"), make_model("fp8")]
    stores = [GradientStore(each.parameters()) for each in made]
    found = []
    for _ in range(2):
        with made[0].weights_unchanged():
            found.append(by_phases(made[0], batch, store=stores[0]))
        assert_same(found[-1], by_phases(made[1], batch, store=stores[1]))
        for each, store in zip(made, stores, strict=True):
            store.clear()
            with torch.no_grad():
                for weight in each.parameters():
                    weight.mul_(1.5)
    assert not torch.equal(found[0]["losses"], found[1]["losses"])


def spied(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], dict[str, int]]:
    """Records every weight that is quantized, and the number of calls of each kernel."""
    weights, calls = list[Tensor](), dict[str, int]()
    quantize_128x128 = reference.quantize_128x128

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:

        def call(*args: object, **kwargs: Any) -> object:
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    def quantize(values: Tensor, *, power_of_two: bool, min_amax: float = 1e-4) -> QuantizedBlocks:
        weights.append(values)
        return quantize_128x128(values, power_of_two=power_of_two, min_amax=min_amax)

    for folder, name in (path.split(".") for path in FP8_FUNCTIONS.split()):
        module = import_module(f"kernels.{folder}.reference")
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    monkeypatch.setattr(reference, "quantize_128x128", quantize)
    return weights, calls


def test_maps_are_in_fp8_and_heads_routers_norms_and_merges_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight is quantized once for two micro-batches."""
    weights, calls = spied(monkeypatch)
    made, batch = make_model("fp8"), make_batch(CONFIG)
    with made.weights_unchanged():
        by_phases(made, batch)
        # In each layer, down-projections of queries and of keys and values are one matrix.
        assert calls.pop("transpose_blocks") == len(weights) - 4
        first = dict(calls)
        by_phases(made, batch)
    by_place = {weight.data_ptr(): name for name, weight in made.named_parameters()}
    found = [by_place[weight.data_ptr()] for weight in weights]
    assert len(found) == len(set(found))
    kept = ("embed_tokens", "lm_head", "gate.weight", "norm", "eh_proj")
    assert set(found) == {name for name in by_place.values() if not any(part in name for part in kept)}
    assert calls == {name: 2 * number for name, number in first.items()}
    layers, moe = 4, 3
    # Forward: down, up for queries and for keys and values, out; gate and up apart, as the second begins within a tile;
    # down. The backward makes queries, keys and values again, and each product has its input gradient.
    assert first["gemm_fp8"] == layers * (7 + 2 + 7)
    assert first["grouped_rows_fp8"] == 4 * moe
    assert first["grouped_weight_fp8"] == 2 * moe
    assert first["gemm_fp8_columns"] == layers * 6
    assert first["pack_e5m6"] == layers
    assert first["swiglu_quantize"] == layers + moe


def test_attention_itself_is_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def attend(*args: Tensor, **kwargs: Any) -> Tensor:
        seen.extend(each.dtype for each in args)
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    compute_eagerly(make_model("fp8"), make_batch(CONFIG))
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 3 * 4


def test_gate_reads_the_residual_and_no_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's choice, scores and gradient equal those of a model in bf16, bit for bit."""
    monkeypatch.setattr(LatentAttention, "forward", lambda self, x, *others: x)
    found = []
    kinds: list[Products] = ["own", *FP8]
    for products in kinds:
        made = make_model(products)
        x = randn(2, 20, CONFIG.hidden_size, seed=1, dtype=torch.bfloat16).requires_grad_()
        routing = made.block(1).attend(x, None).routing
        slope = randn(*routing.weights_TK.shape, seed=2, dtype=routing.weights_TK.dtype)
        (routing.weights_TK * slope).sum().backward()
        gate = made.block(1).moe.gate  # type: ignore[union-attr]
        assert x.grad is not None
        assert gate.weight.grad is not None
        found.append((routing.ids_TK, routing.weights_TK.detach(), gate.weight.grad, x.grad))
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(other, found[0], strict=True))


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "weight",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_a_proj.weight",
        "model.layers.1.self_attn.kv_b_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.2.mlp.experts.gate_up_proj",
        "model.layers.2.mlp.experts.down_proj",
        "model.layers.2.mlp.shared_experts.down_proj.weight",
    ],
)
def test_what_is_no_number_makes_a_loss_that_is_none(weight: str, value: float) -> None:
    made = make_model("fp8")
    with torch.no_grad():
        for place in dict(made.named_parameters())[weight].unbind() if "experts." in weight else ():
            place.flatten()[0] = value
        dict(made.named_parameters())[weight].flatten()[0] = value
        batch = make_batch(CONFIG)
        batch.inputs_BT[0][0, 0] = 0
        objective, sums = make_objective(CONFIG), LossSums(loss_names(1))
        assert not made.loss(batch, objective, sums).isfinite()


@pytest.mark.slow
@pytest.mark.parametrize(("sequences", "size"), [(1, 1), (1, 129)])
def test_any_number_of_tokens_gives_gradients_of_numbers(sequences: int, size: int) -> None:
    """Also a single token, whose weight gradients have one summand.

    Embeddings of zeros, which norms keep at zero, are included.
    """
    made, batch = make_model("fp8"), make_batch(CONFIG, sequences, size)
    with torch.no_grad():
        made.model.embed_tokens.weight[batch.inputs_BT[0][0, 0]] = 0  # type: ignore[union-attr]
    loss, grads = compute_eagerly(made, batch)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in grads.values())
    again = by_phases(made, batch)
    assert all(gradient.isfinite().all() for gradient in again.values())


def test_experts_without_tokens_get_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = make_model("fp8"), make_batch(CONFIG)
    gate = made.block(1).moe.gate  # type: ignore[union-attr]
    gate.e_score_correction_bias.copy_(torch.tensor([-10.0, -10.0] + 6 * [0.0]))
    _, grads = compute_eagerly(made, batch)
    experts = [grads[f"model.layers.1.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")]
    for gradient in experts:
        assert not gradient[:2].any()
        assert all(gradient[expert].any() for expert in range(2, 8))


def test_gradients_under_hooks_that_copy_are_the_same() -> None:
    """Held weights as well, which such hooks replace by copies that come and go."""
    batch = make_batch(CONFIG, is_packed=True)
    _, expected = compute_eagerly(make_model("fp8"), batch)
    made = make_model("fp8")
    with made.weights_unchanged(), saved_tensors_hooks(torch.clone, torch.clone):
        _, grads = compute_eagerly(made, batch)
    assert_same(grads, expected)


def test_a_pass_without_a_backward_puts_nothing_by(monkeypatch: pytest.MonkeyPatch) -> None:
    _, calls = spied(monkeypatch)
    made, batch = make_model("fp8"), make_batch(CONFIG)
    losses = phased(made, 1, batch, None).settle()
    assert "pack_e5m6" not in calls
    assert torch.equal(losses, by_phases(made, batch)["losses"])
    assert "pack_e5m6" in calls


def test_a_dispatcher_that_hides_its_home_is_taken_for_another() -> None:
    assert isinstance(LocalDispatcher(4), RankLocalDispatcher)
    assert not isinstance(Away(LocalDispatcher(4)), RankLocalDispatcher)
