"""Triton's products in FP8: interpreted, near exact ones as float32 allows; compiled for sm_90, what must be in there.

Shape legend: M rows of the left operand, N rows of the right one, K numbers in a row of both.
"""

import re
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns
from tests.kernels.agreement_gemm import check_columns, check_empty, check_gemm, check_nan, column_operands, operands
from tests.kernels.aot import Compiled, compile_launch

pytestmark = pytest.mark.slow

SHAPES = [(1, 1, 1), (5, 8, 33), (130, 131, 200), (129, 256, 256), (300, 48, 129)]
LARGEST_SHARED_BYTES = 227 * 1024


def interpreted_blocks(dtype: torch.dtype) -> None:
    from kernels.gemm_fp8.triton import gemm_fp8

    for shape in SHAPES:
        check_gemm(gemm_fp8, "cpu", shape, dtype)


def interpreted_columns() -> None:
    from kernels.gemm_fp8.triton import gemm_fp8_columns

    for shape in ((1, 1, 128), (130, 131, 256), (200, 144, 384)):
        check_columns(gemm_fp8_columns, "cpu", shape)


def interpreted_corners() -> None:
    from kernels.gemm_fp8.triton import gemm_fp8, gemm_fp8_columns

    check_nan(gemm_fp8, gemm_fp8_columns, "cpu")
    check_empty(gemm_fp8, gemm_fp8_columns, "cpu")


def interpreted_tilings() -> None:
    """Checks that every tiling gives the same product.

    Groups of tiles do not divide the result evenly, and programs process several tiles.
    """
    from kernels.gemm_fp8.tiling import Tiling
    from kernels.gemm_fp8.triton import gemm_fp8, gemm_fp8_columns

    for tiling in (Tiling(rows=16, outputs=16, group=3), Tiling(rows=32, outputs=64, specialize=True, group=1)):
        check_gemm(lambda *given, tiling=tiling: gemm_fp8(*given, tiling=tiling), "cpu", (70, 130, 130), torch.float32)
        check_columns(lambda *given, tiling=tiling: gemm_fp8_columns(*given, tiling=tiling), "cpu", (70, 48, 128))


def interpreted_layouts() -> None:
    """Strided, transposed and unaligned operands, surrounded by NaN, are read correctly."""
    from kernels.gemm_fp8.triton import gemm_fp8, gemm_fp8_columns

    left, right = operands((20, 130, 200))
    expected = gemm_fp8(left, right, torch.float32)
    for columns in (slice(16, 216), slice(3, 203)):
        wide = torch.full((22, 240), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
        wide[1:21, columns] = left.codes
        scales = torch.cat([left.scales, left.scales], dim=1)[:, 1:3].flip(1)
        apart = Quantized(wide[1:21, columns], scales)
        assert torch.equal(gemm_fp8(apart, right, torch.float32), expected)
    across = Quantized(left.codes.t().contiguous().t(), left.scales.t().contiguous().t())
    right_across = QuantizedBlocks(right.codes.t().contiguous().t(), right.scales.t().contiguous().t())
    assert torch.equal(gemm_fp8(across, right_across, torch.float32), expected)
    first, second = column_operands((20, 40, 384))
    part = (
        QuantizedColumns(first.codes[:, 128:], first.scales[:, 1:]),
        QuantizedColumns(second.codes[:, 128:], second.scales[:, 1:]),
    )
    whole = (QuantizedColumns(*(each.contiguous() for each in operand)) for operand in part)
    assert torch.equal(gemm_fp8_columns(*part), gemm_fp8_columns(*whole))


def interpreted_tuner() -> list[list[float]]:
    """Returns what is measured: all candidates at a first product.

    Nothing is measured after that, without elements or at odd widths.
    """
    from kernels.gemm_fp8.tiling import Tiling
    from kernels.gemm_fp8.tuned import TunedGemm

    measured: list[float] = []

    def milliseconds(call: object) -> float:
        measured.append(float(len(measured) + 1))
        return 10 - measured[-1]

    candidates = (Tiling(rows=16, outputs=16), Tiling(rows=32, outputs=32))
    tuned = TunedGemm(candidates, candidates, milliseconds)
    lengths = []
    for shape in ((5, 24, 128), (8, 24, 128), (9, 24, 128), (0, 24, 128), (5, 20, 128)):
        check_gemm(tuned.gemm_fp8, "cpu", shape, torch.bfloat16)
        lengths.append(measured.copy())
    tuned.gemm_fp8(*operands((7, 24, 128)), torch.float64)  # stored by mask for any width
    assert measured == lengths[-1]
    check_columns(tuned.gemm_fp8_columns, "cpu", (5, 24, 128))
    lengths.append(measured.copy())
    chosen = set(tuned._chosen.values())
    assert chosen == {Tiling(rows=32, outputs=32)}, chosen
    untuned = TunedGemm()
    check_gemm(untuned.gemm_fp8, "cpu", (5, 24, 128), torch.bfloat16)
    assert not untuned._chosen
    return lengths


def interpreted_misuse() -> list[str]:
    from kernels.gemm_fp8.tiling import Tiling
    from kernels.gemm_fp8.triton import gemm_fp8

    left, right = operands((4, 130, 200))
    messages = []
    for misuse in (
        lambda: gemm_fp8(left, QuantizedBlocks(right.codes, right.scales.t()[:1]), torch.float32),
        lambda: Tiling(rows=100),
        lambda: Tiling(outputs=256),
    ):
        try:
            misuse()
            messages.append("nothing was raised")
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_product_is_near_the_exact_one(interpreter: ProcessPoolExecutor, dtype: torch.dtype) -> None:
    interpreter.submit(interpreted_blocks, dtype).result()


def test_interpreted_product_over_rows_is_near_the_exact_one(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_columns).result()


def test_interpreted_product_carries_nan_and_takes_nothing(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_corners).result()


def test_interpreted_product_is_near_the_exact_one_with_any_tiling(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_tilings).result()


def test_interpreted_product_reads_any_layout(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpreted_layouts).result()


def test_tuner_measures_all_candidates_once_for_a_shape(interpreter: ProcessPoolExecutor) -> None:
    lengths = interpreter.submit(interpreted_tuner).result()
    assert [len(each) for each in lengths] == [2, 2, 4, 4, 4, 6]


def test_misuse_of_products_is_named(interpreter: ProcessPoolExecutor) -> None:
    scales, rows, outputs = interpreter.submit(interpreted_misuse).result()
    assert scales == "gemm_fp8: right.scales must be [2, 2], got [1, 2]"
    assert rows == "Tiling: rows must be a power of two in [16, 128], got 100; nearest: 128"
    assert outputs == "Tiling: outputs must be a power of two in [16, 128], got 256; nearest: 128"


def compiled_blocks(shape: tuple[int, int, int], dtype: torch.dtype, candidate: int | None) -> Compiled:
    import kernels.gemm_fp8.triton as module
    from kernels.gemm_fp8.tuned import CANDIDATES

    num_rows, num_outputs, depth = shape
    left = Quantized(torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn), torch.empty(num_rows, -(-depth // 128)))
    scales = torch.empty(-(-num_outputs // 128), -(-depth // 128))
    right = QuantizedBlocks(torch.empty(num_outputs, depth, dtype=torch.float8_e4m3fn), scales)
    tiling = None if candidate is None else CANDIDATES[candidate]
    return compile_launch(module, "gemm_kernel", lambda: module.gemm_fp8(left, right, dtype, tiling=tiling))


def compiled_columns(candidate: int | None) -> Compiled:
    import kernels.gemm_fp8.triton as module
    from kernels.gemm_fp8.tuned import COLUMN_CANDIDATES

    left, right = (
        QuantizedColumns(torch.empty(rows, 4096, dtype=torch.float8_e4m3fn), torch.empty(rows, 32))
        for rows in (2048, 7168)
    )
    tiling = None if candidate is None else COLUMN_CANDIDATES[candidate]
    return compile_launch(module, "gemm_kernel", lambda: module.gemm_fp8_columns(left, right, tiling=tiling))


def assert_pipelined(compiled: Compiled) -> None:
    """Asserts FP8 on tensor cores, operands loaded ahead by descriptor, and few instructions for promotion.

    Four instructions move a sum to the float32 sum.
    """
    compiled.assert_sound()
    assert compiled.shared_bytes <= LARGEST_SHARED_BYTES
    products = compiled.instructions(r"wgmma\.mma_async")
    assert products
    assert all(re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3", name) for name in products)
    assert compiled.instructions(r"mma\.sync") == []
    assert len(compiled.instructions(r"cp\.async\.bulk\.tensor\.2d\.shared")) >= 2
    assert compiled.instructions(r"mbarrier\.try_wait")
    assert compiled.instructions(r".*\.ftz") == []


@pytest.mark.parametrize("candidate", range(5))
def test_compiled_product_is_pipelined_with_any_tiling(candidate: int) -> None:
    from kernels.gemm_fp8.tuned import CANDIDATES

    compiled = compiled_blocks((4096, 2048, 7168), torch.bfloat16, candidate)
    assert_pipelined(compiled)
    tiling = CANDIDATES[candidate]
    multiplying = 2 if tiling.specialize else 1
    assert len(compiled.instructions(r"wgmma\.mma_async")) == 4 * multiplying
    # One fused operation adds a number to the sum in float32: both scales were multiplied before.
    warps = tiling.warps * multiplying
    numbers = tiling.rows * tiling.outputs // (32 * warps)
    assert len(compiled.instructions(r"fma\.rn\.f32")) == numbers * multiplying
    assert len(compiled.instructions(r"mul\.(rn\.)?f32")) <= 8
    assert bool(compiled.instructions(r"setmaxnreg")) == tiling.specialize
    assert compiled.instructions(r"cp\.async\.bulk\.tensor\.2d\.global")


@pytest.mark.parametrize("candidate", [None, 1, 2])
def test_compiled_product_over_rows_is_pipelined(candidate: int | None) -> None:
    compiled = compiled_columns(candidate)
    assert_pipelined(compiled)
    assert compiled.instructions(r"cp\.async\.bulk\.tensor\.2d\.global")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_product_of_odd_width_is_stored_under_a_mask(dtype: torch.dtype) -> None:
    compiled = compiled_blocks((33, 131, 200), dtype, None)
    assert_pipelined(compiled)
    assert compiled.instructions(r"cp\.async\.bulk\.tensor\.2d\.global") == []
    assert compiled.instructions(r"st\.global")


def test_compiled_product_in_float32_is_sound() -> None:
    assert_pipelined(compiled_blocks((4096, 2048, 7168), torch.float32, None))
