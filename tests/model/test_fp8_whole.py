"""A whole model in FP8: one result whichever way it is run, what is in FP8 and what is not, and what is no number."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from comm.dispatch.local import LocalDispatcher
from comm.protocol import RankLocalDispatcher
from kernels.quantize import reference
from kernels.quantize.layout import QuantizedBlocks
from model.attention.mla import LatentAttention
from model.config import ModelConfig, Products
from model.gradients import GradientStore
from model.objective import LossSums, loss_names
from tests.kernels.fp8_functions import FP8_FUNCTIONS
from tests.kernels.plain import randn
from tests.model.fp8_models import CONFIG, FP8, Away, assert_same, by_phases, compute_eagerly, make_batch, make_model
from tests.model.test_stage import make_objective, phased


@pytest.mark.parametrize(
    ("products", "config", "is_packed"),
    [
        ("fp8", CONFIG, True),
        ("fp8_power_of_two", CONFIG, False),
        ("fp8", replace(CONFIG, q_lora_rank=None, num_shared_experts=0), False),
        ("fp8_power_of_two", replace(CONFIG, q_lora_rank=24, num_shared_experts=2, hidden_size=33), True),
    ],
    ids=["documents", "all features", "neither query rank nor shared experts", "narrow tiles"],
)
def test_model_gives_the_same_bits_whichever_way_it_is_run(
    products: Products, config: ModelConfig, is_packed: bool
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


@pytest.mark.parametrize("products", FP8)
def test_weights_held_in_codes_change_no_bit_and_changed_ones_are_seen(products: Products) -> None:
    batch, made = make_batch(CONFIG), [make_model(products), make_model(products)]
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

        def call(*args: object, **kwargs: object) -> object:
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    def quantize(values: Tensor, *, power_of_two: bool, min_amax: float = 1e-4) -> QuantizedBlocks:
        weights.append(values)
        return quantize_128x128(values, power_of_two=power_of_two, min_amax=min_amax)

    for name, (path, _) in FP8_FUNCTIONS.items():
        module = import_module(path)
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

    def attend(*args: Tensor, **kwargs: object) -> Tensor:
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


@pytest.mark.parametrize(("sequences", "size"), [(1, 1), (1, 129), (3, 2)])
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


def test_a_second_backward_is_rejected() -> None:
    loss = make_model("fp8").loss(make_batch(CONFIG), make_objective(CONFIG), LossSums(loss_names(1)))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


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
