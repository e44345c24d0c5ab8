"""Layers against formulas under ordinary autograd, and rotations against those of transformers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from kernels.heads.reference import rotate
from kernels.launch import without_launches
from model.attention.form import inverse_frequencies, rotation_table, softmax_scale
from model.block import Mlp
from model.config import Recomputed, RopeScaling, YarnRope
from model.hf.config import write_config
from model.linear import GradientStore, Projection, WeightQueue, WeightSink, linear, outer_product
from model.norm import RmsNorm, norm_and_map, normed_linear
from model.precision.plain import PlainLinears
from tests.kernels import plain
from tests.kernels.plain import randn, strided
from tests.model.against_plain import Weights, assert_equals_plain, randomize
from tests.tiny import MODEL

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


@pytest.mark.covering(2)
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


NORM_EPS = 1e-5
NORM_SHAPES = [(5, 6), (2, 3, 6), (1, 1, 6), (0, 6)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Maps(nn.Module):
    """A norm and two maps of different widths."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RmsNorm(6, NORM_EPS, dtype)
        self.left, self.right = Projection(6, 4, dtype), Projection(6, 9, dtype)
        randomize(self, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_map_equal_formula_and_map_in_float32(dtype: torch.dtype) -> None:
    maps = Maps(dtype)
    del maps.left

    def call(maps: Maps, inputs: Sequence[Tensor], sink: WeightSink | None) -> tuple[Tensor, Tensor]:
        normal, out = norm_and_map(inputs[0], maps.norm, maps.right.weight)
        assert normal.dtype == dtype
        assert out.dtype == torch.promote_types(dtype, torch.float32)
        # The map reads the rounded rows, and rounds nothing more itself.
        expected = normal.double() @ maps.right.weight.double().t()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        return normal, out

    def plainly(weights: Weights, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        normal = plain.rms_norm(inputs[0], weights["norm.weight"], NORM_EPS)
        return normal, normal @ weights["right.weight"].t()

    for shape in NORM_SHAPES:
        assert_equals_plain(maps, call, plainly, [randn(*shape, seed=2, dtype=dtype)], is_split=False)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_alone_equals_formula(dtype: torch.dtype, is_split: bool) -> None:
    norm = nn.ModuleDict({"norm": RmsNorm(6, NORM_EPS, dtype)})
    randomize(norm, 1)
    for shape in NORM_SHAPES:
        assert_equals_plain(
            norm,
            lambda norm, inputs, sink: (norm["norm"](inputs[0]),),
            lambda weights, inputs: (plain.rms_norm(inputs[0], weights["norm.weight"], NORM_EPS),),
            [strided(randn(*shape, seed=2, dtype=dtype))],
            is_split=is_split,
        )


def test_norm_in_a_forward_alone_records_nothing() -> None:
    maps = Maps(torch.float32)
    with torch.no_grad():
        out = normed_linear(torch.ones(2, 6), maps.norm, (maps.left.weight,), None, keeps_normal=True)
    assert not out.requires_grad


YARN = YarnRope(
    kind="yarn",
    factor=40.0,
    original_max_position_tokens=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)

V3 = replace(MODEL, qk_rope_head_dim=64, qk_nope_head_dim=128, rope_scaling=YARN)


def test_yarn_frequencies_equal_anchors() -> None:
    frequencies = inverse_frequencies(V3)
    anchors = {0: 1.0, 10: 0.0562341, 15: 0.00833451, 20: 7.90569e-4, 23: 3.3338e-5, 31: 3.3338e-6}
    for pair, value in anchors.items():
        assert float(frequencies[pair]) == pytest.approx(value, rel=1e-5)


def test_yarn_softmax_scale_equals_anchor() -> None:
    assert softmax_scale(V3) == pytest.approx(0.1352338, rel=1e-6)
    assert softmax_scale(replace(V3, rope_scaling=MODEL.rope_scaling)) == pytest.approx(192**-0.5, rel=1e-12)


def test_rotation_is_the_complex_product_of_interleaved_pairs() -> None:
    cos, sin = rotation_table(MODEL, 3, torch.float64)
    x = torch.arange(12.0, dtype=torch.float64).view(1, 3, 1, 4)
    turned = rotate(x, torch.complex(cos, sin))
    for position in range(3):
        for pair in range(2):
            angle = position * 10000.0 ** (-pair / 2)
            value = complex(x[0, position, 0, 2 * pair], x[0, position, 0, 2 * pair + 1])
            expected = value * complex(math.cos(angle), math.sin(angle))
            assert complex(turned[0, position, 0, 2 * pair], turned[0, position, 0, 2 * pair + 1]) == pytest.approx(
                expected, rel=1e-12
            )


@pytest.mark.covering(1)
@pytest.mark.parametrize("first", [0, 1, 2, 3])
@pytest.mark.parametrize("width", [8, 9])
def test_rotation_takes_a_part_of_a_single_row_from_any_place(first: int, width: int) -> None:
    turns = torch.complex(*rotation_table(MODEL, 3, torch.float32))
    row = torch.randn(1, 1, 1, width, generator=torch.Generator().manual_seed(0))
    part = row[..., first : first + 4]
    assert torch.equal(rotate(part, turns[2:]), rotate(part.clone(), turns[2:]))


@pytest.mark.parametrize("scaling", [MODEL.rope_scaling, YARN, replace(YARN, factor=8.0, mscale=0.0)])
def test_tables_in_float32_are_those_of_transformers_to_the_bit(scaling: RopeScaling) -> None:
    """A last bit of a frequency is 1e-3 radians after 20,000 positions."""
    model = replace(V3, rope_scaling=scaling, max_position_tokens=32768)
    keys = write_config(model, dtype="F32", fp8=False)
    reference = DeepseekV3RotaryEmbedding(DeepseekV3Config(**keys))
    expected = reference(torch.empty(1, dtype=torch.float32), torch.arange(20_000)[None])
    for table, both_halves in zip(rotation_table(model, 20_000, torch.float32), expected, strict=True):
        assert torch.equal(table, both_halves[0, :, :32])


def test_split_linear_gives_input_gradient_now_and_weight_gradient_later() -> None:
    weight = nn.Parameter(randn(4, 3, seed=0))
    store, queue = GradientStore([weight]), WeightQueue()
    ours, theirs = randn(2, 5, 3, seed=1).requires_grad_(), randn(2, 5, 3, seed=1).requires_grad_()
    linear(ours, weight, queue).square().sum().backward()
    assert torch.equal(store.gradient(weight), torch.zeros(4, 3))
    queue.flush(store)
    queue.flush(store)
    reference = weight.detach().clone().requires_grad_()
    linear(theirs, reference, None).square().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(store.gradient(weight), reference.grad, rtol=1e-12, atol=1e-14)
    assert weight.grad is None


def test_queue_drops_what_a_gradient_held_before_it_computes_the_next() -> None:
    weight, queue = nn.Parameter(randn(1, seed=0)), WeightQueue()
    seen: list[bool] = []
    held = randn(1, seed=1)
    first = ref(held)

    def second() -> torch.Tensor:
        seen.append(first() is None)
        return randn(1, seed=2)

    queue.defer(weight, held.double)
    queue.defer(weight, second)
    del held
    queue.flush(GradientStore([weight]))
    assert seen == [True]


def test_store_keeps_float32_sums_of_bf16_gradients() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    store = GradientStore([weight])
    for _ in range(1000):
        (weight * 1.0).sum().backward()
    assert weight.grad is None
    assert store.gradient(weight).dtype == torch.float32
    assert float(store.gradient(weight)) == 1000.0  # bf16 alone would stop at 256
    store.clear()
    assert float(store.gradient(weight)) == 0.0


def test_gradient_in_16_bits_is_added_to_its_sum_by_the_product_on_cuda() -> None:
    """Seen on tensors without memory; other devices need separate memory for the product."""
    grad_AN, rows_AK = (torch.empty(8, size, dtype=torch.bfloat16, device="meta") for size in (4, 6))
    total_NK = torch.empty(4, 6, device="meta")
    with without_launches(), Names() as names:
        assert outer_product(grad_AN, rows_AK, total_NK) is total_NK
    assert names.found == ["t", "addmm_"]
    with Names() as names:
        outer_product(grad_AN, rows_AK, total_NK)
    assert names.found == ["t", "mm", "add_"]


class Names(TorchDispatchMode):
    """Lists the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
