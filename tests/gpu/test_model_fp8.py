"""A whole small model in FP8 on a CUDA device, near the same model on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from comm.dispatch.local import LocalDispatcher
from model.config import Computing, Products
from model.linear import GradientStore
from model.objective import LossSums, MicroBatch, loss_names
from model.transformer import BIAS, Transformer, initialize_weights
from tests.model.test_phases import OBJECTIVE, make_batch, run_stage
from tests.tiny import MODEL

CONFIG = replace(
    MODEL,
    num_layers=2,
    hidden_size=160,
    dense_intermediate_size=192,
    kv_lora_rank=48,
    q_lora_rank=128,
    expert_intermediate_size=80,
)
TOKENS = 40


def make_model(products: Products, dtype: torch.dtype) -> Transformer:
    """Builds a model whose router's bias alone determines the experts; half of the experts get no tokens.

    Rounding therefore cannot send a token to another expert.
    """
    dispatcher = LocalDispatcher(CONFIG.num_routed_experts)
    model = Transformer(CONFIG, dispatcher, dtype, computing=Computing(products=products))
    initialize_weights(model, 3)
    for name, buffer in model.named_buffers():
        if name.endswith(BIAS):
            buffer.copy_(10.0 * torch.arange(len(buffer)))
    return model


def on(device: str, batch: MicroBatch) -> MicroBatch:
    inputs, targets = (tuple(each.to(device) for each in part) for part in (batch.inputs_BT, batch.targets_BT))
    return replace(batch, inputs_BT=inputs, targets_BT=targets)


def eagerly(model: Transformer, device: str) -> dict[str, Tensor]:
    """Loss and gradients by autograd, in float64 on the CPU."""
    model = model.to(device)
    loss = model.loss(on(device, make_batch(TOKENS)), OBJECTIVE, LossSums(loss_names(1)))
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: each.detach().double().cpu() for name, each in {"loss": loss, **found}.items()}


def by_phases(model: Transformer, device: str) -> dict[str, Tensor]:
    model = model.to(device)
    store = GradientStore(model.parameters())
    run_stage(model, on(device, make_batch(TOKENS)), store, lambda moment: None)
    return {name: store.gradient(weight).double().cpu() for name, weight in model.named_parameters()}


def assert_near(
    made: dict[str, Tensor], reference: dict[str, Tensor], exact: dict[str, Tensor], roundings: float
) -> None:
    """Asserts that every difference from the reference is a limited share of the reference's own error.

    The reference's error is its difference from exact numbers.
    """
    assert made.keys() <= reference.keys()
    for name, found in made.items():
        rounding = float((reference[name] - exact[name]).norm())
        allowed = max(roundings * rounding, 0.01 * float(exact[name].norm()))
        assert float((found - reference[name]).norm()) <= allowed, name


@pytest.mark.parametrize("products", ["fp8", "fp8_power_of_two"])
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 0.5), (torch.bfloat16, 1.5)])
def test_a_model_in_fp8_on_the_gpu_is_near_the_one_on_the_cpu(
    dtype: torch.dtype, roundings: float, products: Products
) -> None:
    exact = eagerly(make_model("own", torch.float64), "cpu")
    reference = eagerly(make_model(products, dtype), "cpu")
    assert len(reference) == 50
    for made in (eagerly, by_phases):
        assert_near(made(make_model(products, dtype), "cuda"), reference, exact, roundings)
