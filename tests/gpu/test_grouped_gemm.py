"""Grouped products on a CUDA device: near exact ones with every tiling; in FP8 faster than in bfloat16."""

from functools import partial

import pytest
import torch

from kernels.expert_mlp import grouped
from kernels.gemm import deep_gemm
from kernels.operation import has_deep_gemm
from kernels.quantize.layout import Quantized, QuantizedBlocks
from tests.kernels.agreement_gemm import HOPPER_SUMS
from tests.kernels.agreement_grouped import (
    check_empty_fp8,
    check_nan_fp8,
    check_rows_fp8,
    check_weight_fp8,
    column_operands,
    on,
    operands,
)
from tests.kernels.launches import COUNTS, HIDDEN, Tensors

AWKWARD = [(0, 130, 1, 0, 128, 127, 0), (0, 0, 259), (129, 0, 0), (1,), (1000, 0, 1, 2000)]
WIDTHS = [(131, 200), (48, 129), (576, 1024)]
MANY = (500, 37, 0, 640, 129, 1000)


@pytest.fixture
def _hopper(_cuda: None) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9: FP8 products of other tensor cores keep other bits")


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("counts", AWKWARD)
def test_products_of_groups_in_fp8_on_the_gpu_are_near_the_exact_ones(counts: tuple[int, ...]) -> None:
    from kernels.gemm.triton_fp8 import grouped_rows_fp8, grouped_weight_fp8

    for widths in WIDTHS:
        for dtype in (torch.float32, torch.bfloat16):
            check_rows_fp8(grouped_rows_fp8, "cuda", counts, widths, dtype, HOPPER_SUMS)
        check_weight_fp8(grouped_weight_fp8, "cuda", counts, widths, HOPPER_SUMS)


@pytest.mark.usefixtures("_hopper")
def test_products_of_groups_in_fp8_on_the_gpu_keep_nan_within_its_group_and_take_nothing() -> None:
    from kernels.gemm.triton_fp8 import grouped_rows_fp8, grouped_weight_fp8

    check_nan_fp8(grouped_rows_fp8, grouped_weight_fp8, "cuda")
    check_empty_fp8(grouped_rows_fp8, grouped_weight_fp8, "cuda")


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("candidate", range(4))
def test_every_tiling_on_the_gpu_gives_the_same_bits(candidate: int) -> None:
    """Warp specialization above all, which no interpreter runs."""
    from kernels.gemm.triton_fp8 import grouped_rows_fp8, grouped_weight_fp8
    from kernels.gemm.tuned import GROUPED_CANDIDATES, WEIGHT_CANDIDATES

    for widths in ((576, 1024), (192, 7168), (2048, 129)):
        on_cpu = operands(MANY, *widths)
        rows, weights = on("cuda", on_cpu[0]), on("cuda", on_cpu[1])
        expected_AN = grouped_rows_fp8(rows, weights, MANY, torch.float32)
        made_AN = grouped_rows_fp8(rows, weights, MANY, torch.float32, tiling=GROUPED_CANDIDATES[candidate])
        assert torch.equal(made_AN, expected_AN)
        grad, inputs = (on("cuda", each) for each in column_operands(MANY, *widths))
        expected_ENK = grouped_weight_fp8(grad, inputs, MANY)
        made_ENK = grouped_weight_fp8(grad, inputs, MANY, tiling=WEIGHT_CANDIDATES[candidate])
        assert torch.equal(made_ENK, expected_ENK)


@pytest.mark.usefixtures("_hopper")
def test_tuned_products_of_groups_are_near_the_exact_ones() -> None:
    from kernels.gemm import tuned

    for widths in ((576, 1024), (131, 200)):
        check_rows_fp8(tuned.grouped_rows_fp8, "cuda", MANY, widths, torch.bfloat16, HOPPER_SUMS)
        check_weight_fp8(tuned.grouped_weight_fp8, "cuda", MANY, widths, HOPPER_SUMS)


@pytest.mark.usefixtures("_hopper")
def test_deep_gemm_on_the_gpu_is_near_the_exact_products_of_groups() -> None:
    if not has_deep_gemm(torch.device("cuda")):
        pytest.skip("needs the package deep_gemm")
    refuse = partial(pytest.fail, "the package serves this shape")
    of_rows = partial(deep_gemm.grouped_rows_fp8, fallback=refuse)
    of_weight = partial(deep_gemm.grouped_weight_fp8, fallback=refuse)
    for counts in (MANY, (128, 0, 256)):
        check_rows_fp8(of_rows, "cuda", counts, (576, 1024), torch.bfloat16, HOPPER_SUMS)
        check_weight_fp8(of_weight, "cuda", counts, (576, 1024), HOPPER_SUMS)


@pytest.mark.usefixtures("_hopper")
def test_product_of_groups_reaches_numbers_beyond_two_gigabytes() -> None:
    from kernels.gemm.triton_fp8 import grouped_rows_fp8

    counts, num_outputs = (3, 2**21), 1024
    codes = torch.zeros(sum(counts), 128, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    codes[-1, -1] = 2.0
    weights = QuantizedBlocks(
        torch.ones(2, num_outputs, 128, device="cuda").to(torch.float8_e4m3fn),
        torch.ones(2, num_outputs // 128, 1, device="cuda"),
    )
    rows = Quantized(codes, torch.ones(len(codes), 1, device="cuda"))
    made = grouped_rows_fp8(rows, weights, counts, torch.bfloat16)
    assert made[-1].eq(2).all()
    assert not made[:-1].any()


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize(("num_outputs", "depth"), [(4096, HIDDEN), (HIDDEN, 2048)])
def test_product_of_groups_in_fp8_outpaces_bfloat16(num_outputs: int, depth: int) -> None:
    """The aim: 1.3 times torch's own grouped product in bfloat16."""
    from triton.testing import do_bench

    from kernels.gemm import tuned

    tensors = Tensors(torch.device("cuda"))
    rows, weights = tensors.rows(sum(COUNTS), depth), tensors.blocks(len(COUNTS), num_outputs, depth)
    plain_rows, plain_weights = tensors.normal(sum(COUNTS), depth), tensors.normal(len(COUNTS), num_outputs, depth)
    fp8 = do_bench(partial(tuned.grouped_rows_fp8, rows, weights, COUNTS, torch.bfloat16), return_mode="median")
    bfloat16 = do_bench(partial(grouped.grouped_rows, plain_rows, plain_weights, COUNTS), return_mode="median")
    assert bfloat16 / fp8 >= 1.3, f"{fp8} ms against {bfloat16} ms in bfloat16"
