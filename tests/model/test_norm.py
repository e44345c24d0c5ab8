"""RMSNorm, alone and before linear maps, against the formula under ordinary autograd."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from model.norm import RmsNorm, norm_and_map, normed_linear
from model.precision.linear import Projection, WeightSink
from tests.kernels import plain
from tests.kernels.plain import randn, strided
from tests.model.against_plain import Weights, assert_equals_plain, randomize

EPS = 1e-5
SHAPES = [(5, 6), (2, 3, 6), (1, 1, 6), (0, 6)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Maps(nn.Module):
    """A norm and two maps of different widths."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RmsNorm(6, EPS, dtype)
        self.left, self.right = Projection(6, 4, dtype), Projection(6, 9, dtype)
        randomize(self, 1)


def plain_maps(weights: Weights, inputs: Sequence[Tensor]) -> tuple[Tensor]:
    normal = plain.rms_norm(inputs[0], weights["norm.weight"], EPS)
    return (torch.cat((normal @ weights["left.weight"].t(), normal @ weights["right.weight"].t()), -1),)


@pytest.mark.parametrize("frozen", [(), ("left.weight",), ("right.weight", "norm.weight")])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("keeps_normal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_normed_maps_equal_formula(
    dtype: torch.dtype, keeps_normal: bool, is_split: bool, frozen: tuple[str, ...]
) -> None:
    maps = Maps(dtype)

    def call(maps: Maps, inputs: Sequence[Tensor], sink: WeightSink | None) -> tuple[Tensor]:
        weights = (maps.left.weight, maps.right.weight)
        return (normed_linear(inputs[0], maps.norm, weights, sink, keeps_normal=keeps_normal),)

    for shape in SHAPES:
        x = randn(*shape, seed=2, dtype=dtype)
        assert_equals_plain(maps, call, plain_maps, [x], is_split=is_split, frozen=frozen)
    assert_equals_plain(maps, call, plain_maps, [strided(x)], is_split=is_split, frozen=frozen)


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
        normal = plain.rms_norm(inputs[0], weights["norm.weight"], EPS)
        return normal, normal @ weights["right.weight"].t()

    for shape in SHAPES:
        assert_equals_plain(maps, call, plainly, [randn(*shape, seed=2, dtype=dtype)], is_split=False)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_alone_equals_formula(dtype: torch.dtype, is_split: bool) -> None:
    norm = nn.ModuleDict({"norm": RmsNorm(6, EPS, dtype)})
    randomize(norm, 1)
    for shape in SHAPES:
        assert_equals_plain(
            norm,
            lambda norm, inputs, sink: (norm["norm"](inputs[0]),),
            lambda weights, inputs: (plain.rms_norm(inputs[0], weights["norm.weight"], EPS),),
            [strided(randn(*shape, seed=2, dtype=dtype))],
            is_split=is_split,
        )


def test_norm_in_a_forward_alone_records_nothing() -> None:
    maps = Maps(torch.float32)
    with torch.no_grad():
        out = normed_linear(torch.ones(2, 6), maps.norm, (maps.left.weight,), None, keeps_normal=True)
    assert not out.requires_grad
