"""Products in FP8 on a Hopper GPU: near exact ones with every tiling, faster than bfloat16; and by `deep_gemm`."""

from functools import partial

import pytest
import torch

from kernels.gemm import deep_gemm
from kernels.operation import has_deep_gemm
from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns
from tests.kernels.agreement_gemm import (
    HOPPER_SUMS,
    check_columns,
    check_empty,
    check_gemm,
    check_nan,
    column_operands,
    operands,
)

SHAPES = [(1, 1, 1), (5, 8, 33), (33, 131, 200), (130, 256, 4096), (1000, 576, 7168), (2048, 1536, 512)]
LARGE = (4096, 2048, 7168)


@pytest.fixture(autouse=True)
def _hopper(_cuda: None) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9: FP8 products of other tensor cores keep other bits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_on_the_gpu_is_near_the_exact_one(dtype: torch.dtype) -> None:
    from kernels.gemm.triton_fp8 import gemm_fp8

    for shape in SHAPES:
        check_gemm(gemm_fp8, "cuda", shape, dtype, HOPPER_SUMS)


def test_product_over_rows_on_the_gpu_is_near_the_exact_one() -> None:
    from kernels.gemm.triton_fp8 import gemm_fp8_columns

    for shape in ((1, 1, 128), (130, 131, 256), (2048, 512, 4096)):
        check_columns(gemm_fp8_columns, "cuda", shape, HOPPER_SUMS)


def test_product_on_the_gpu_carries_nan_and_takes_nothing() -> None:
    from kernels.gemm.triton_fp8 import gemm_fp8, gemm_fp8_columns

    check_nan(gemm_fp8, gemm_fp8_columns, "cuda")
    check_empty(gemm_fp8, gemm_fp8_columns, "cuda")


@pytest.mark.parametrize("candidate", range(6))
def test_every_tiling_on_the_gpu_gives_the_same_bits(candidate: int) -> None:
    """Warp specialization above all, which no interpreter runs."""
    from kernels.gemm.triton_fp8 import gemm_fp8, gemm_fp8_columns
    from kernels.gemm.tuned import CANDIDATES, COLUMN_CANDIDATES

    tiling = CANDIDATES[candidate]
    for shape in ((130, 256, 4096), (1000, 576, 7168), (4000, 1536, 512)):
        check_gemm(partial(gemm_fp8, tiling=tiling), "cuda", shape, torch.float32, HOPPER_SUMS)
        left, right = (type(each)(*(part.cuda() for part in each)) for each in operands(shape))
        assert isinstance(left, Quantized)
        assert isinstance(right, QuantizedBlocks)
        assert torch.equal(gemm_fp8(left, right, torch.float32, tiling=tiling), gemm_fp8(left, right, torch.float32))
    by_columns = partial(gemm_fp8_columns, tiling=COLUMN_CANDIDATES[candidate % len(COLUMN_CANDIDATES)])
    check_columns(by_columns, "cuda", (1024, 576, 4096), HOPPER_SUMS)


def test_tuned_products_are_near_the_exact_ones() -> None:
    from kernels.gemm import tuned

    for shape in ((130, 256, 4096), (150, 256, 4096), (33, 131, 200)):
        check_gemm(tuned.gemm_fp8, "cuda", shape, torch.bfloat16, HOPPER_SUMS)
    check_columns(tuned.gemm_fp8_columns, "cuda", (1024, 576, 4096), HOPPER_SUMS)


def test_product_reaches_numbers_beyond_two_gigabytes() -> None:
    from kernels.gemm.triton_fp8 import gemm_fp8

    depth = 2**20
    num_rows = 2**31 // depth + 2
    left = Quantized(
        torch.zeros(num_rows, depth, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn),
        torch.ones(num_rows, depth // 128, device="cuda"),
    )
    left.codes[-1, -1] = 2.0
    right = QuantizedBlocks(
        torch.ones(16, depth, device="cuda").to(torch.float8_e4m3fn), torch.ones(1, depth // 128, device="cuda")
    )
    made = gemm_fp8(left, right, torch.float32)
    assert made[-1].eq(2).all()
    assert made[:-1].eq(0).all()


def test_product_outpaces_bfloat16() -> None:
    """The aim: 1.4 times torch's own product in bfloat16."""
    from triton.testing import do_bench

    from kernels.gemm import tuned

    num_rows, num_outputs, depth = LARGE
    left, right = operands(LARGE)
    there = Quantized(*(each.cuda() for each in left)), QuantizedBlocks(*(each.cuda() for each in right))
    rows, weight = (torch.randn(size, depth, device="cuda", dtype=torch.bfloat16) for size in (num_rows, num_outputs))
    fp8 = do_bench(partial(tuned.gemm_fp8, *there, torch.bfloat16), return_mode="median")
    bfloat16 = do_bench(partial(torch.mm, rows, weight.t()), return_mode="median")
    assert bfloat16 / fp8 >= 1.4, f"{fp8} ms against {bfloat16} ms in bfloat16"


def test_deep_gemm_on_the_gpu_is_near_the_exact_product() -> None:
    if not has_deep_gemm(torch.device("cuda")):
        pytest.skip("needs the package deep_gemm")
    refuse = partial(pytest.fail, "the package serves this shape")
    gemm, columns = (partial(each, fallback=refuse) for each in (deep_gemm.gemm_fp8, deep_gemm.gemm_fp8_columns))
    for shape in ((130, 256, 4096), (1000, 576, 7168)):
        check_gemm(gemm, "cuda", shape, torch.bfloat16, HOPPER_SUMS)
    left, right = (QuantizedColumns(*(part.cuda() for part in each)) for each in column_operands((1024, 576, 4096)))
    assert columns(left, right).isfinite().all()
    check_columns(columns, "cuda", (1024, 576, 4096), HOPPER_SUMS)
