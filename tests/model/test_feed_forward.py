"""Compares the dense feed-forward network with the formula under autograd, for every choice of recomputation."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from model.config import Recomputed
from model.feed_forward import Mlp
from model.norm import RmsNorm
from model.precision.linear import WeightSink
from model.precision.plain import PlainLinears
from tests.kernels import plain
from tests.kernels.plain import randn, strided
from tests.model.against_plain import Weights, assert_equals_plain, randomize

EPS = 1e-6
SHAPES = [(2, 3, 6), (1, 1, 6), (0, 4, 6), (7, 6)]
SUBSETS: list[frozenset[Recomputed]] = [
    frozenset(),
    frozenset({"norm"}),
    frozenset({"swiglu"}),
    frozenset({"norm", "swiglu"}),
]


class Network(nn.Module):
    """A norm and the network that reads it."""

    def __init__(self, dtype: torch.dtype, recomputed: frozenset[Recomputed]) -> None:
        super().__init__()
        self.norm = RmsNorm(6, EPS, dtype)
        self.mlp = Mlp(6, 5, dtype, PlainLinears(recomputed))
        randomize(self, 1)


def plain_network(weights: Weights, x: Tensor) -> Tensor:
    gate, up = (x @ weights[f"mlp.{name}_proj.weight"].t() for name in ("gate", "up"))
    return plain.swiglu(gate, up) @ weights["mlp.down_proj.weight"].t()


def plain_sum(weights: Weights, inputs: Sequence[Tensor]) -> tuple[Tensor]:
    return (inputs[0] + plain_network(weights, plain.rms_norm(inputs[0], weights["norm.weight"], EPS)),)


@pytest.mark.parametrize("frozen", [(), ("mlp.gate_proj.weight", "mlp.down_proj.weight"), ("mlp.up_proj.weight",)])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("recomputed", SUBSETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sum_with_network_equals_formula(
    dtype: torch.dtype, recomputed: frozenset[Recomputed], is_split: bool, frozen: tuple[str, ...]
) -> None:
    network = Network(dtype, recomputed)

    def call(network: Network, inputs: Sequence[Tensor], sink: WeightSink | None) -> tuple[Tensor]:
        return (network.mlp.add(inputs[0], network.norm, sink),)

    for shape in SHAPES:
        for x in (randn(*shape, seed=2, dtype=dtype), strided(randn(*shape, seed=2, dtype=dtype))):
            assert_equals_plain(network, call, plain_sum, [x], is_split=is_split, frozen=frozen)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_network_alone_equals_formula(dtype: torch.dtype, is_split: bool) -> None:
    network = Network(dtype, frozenset())
    del network.norm
    assert_equals_plain(
        network,
        lambda network, inputs, sink: (network.mlp(inputs[0], sink),),
        lambda weights, inputs: (plain_network(weights, inputs[0]),),
        [randn(2, 3, 6, seed=2, dtype=dtype)],
        is_split=is_split,
    )
