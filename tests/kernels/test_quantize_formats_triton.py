"""Triton's columns, blocks and E5M6: interpreted, bit-equal to the reference; compiled for sm_90, what is in there.

Shape legend: N rows, D columns.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

import kernels.quantize.triton as blocks
import kernels.quantize.triton_columns as columns
import kernels.quantize.triton_e5m6 as e5m6
from kernels.quantize.layout import PackedE5M6, Quantized, QuantizedBlocks
from tests.kernels.agreement_formats import assert_same_pair, check_blocks, check_columns, check_e5m6
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.interpreter_casts import interpreted

pytestmark = pytest.mark.slow

DTYPES = [torch.bfloat16, torch.float32]
COUNTS = [[0, 130, 1, 0, 127, 128, 0], [128]]


@pytest.mark.parametrize("dtype", DTYPES)
@interpreted
def test_interpreted_formats_equal_the_reference(dtype: torch.dtype) -> None:
    for counts, num_columns in ((COUNTS[0], 136), (COUNTS[1], 64), ([5], 1)):
        check_columns(columns, "cpu", counts, num_columns, dtype)
    for shape in ((128, 128), (2, 1, 130, 72), (1, 1)):
        check_blocks(blocks, "cpu", shape, dtype)
    for num_rows, num_columns in ((16, 128), (18, 271), (32, 1), (16, 130)):
        check_e5m6(e5m6, "cpu", num_rows, num_columns, dtype)


@interpreted
def test_interpreted_formats_of_nothing_have_their_shapes() -> None:
    for counts, num_columns in (([0, 0], 5), ([], 5), ([3], 0)):
        rows_ND = torch.ones(sum(counts), num_columns)
        made = columns.quantize_columns(rows_ND, counts, power_of_two=True)
        assert (made.codes.shape, made.scales.shape) == (
            (num_columns, 128 if counts == [3] else 0),
            (num_columns, len(counts) % 2),
        )
        by_rows = Quantized(rows_ND.to(torch.float8_e4m3fn), torch.ones(len(rows_ND), -(-num_columns // 128)))
        assert_same_pair(columns.requantize_columns(by_rows, counts, power_of_two=True), made)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        made_blocks = blocks.quantize_128x128(torch.ones(shape), power_of_two=True)
        assert made_blocks.codes.shape == shape
        assert made_blocks.scales.shape == (shape[0], min(1, shape[1]), min(1, shape[2]))
        assert blocks.dequantize_128x128(made_blocks, torch.float32).shape == shape
        assert blocks.transpose_blocks(made_blocks).codes.shape == (shape[0], shape[2], shape[1])
    for num_rows, num_columns in ((0, 5), (3, 0)):
        packed = e5m6.pack_e5m6(torch.ones(num_rows, num_columns))
        assert packed.codes.shape == (num_rows, 9 if num_columns else 0)
        assert e5m6.unpack_e5m6(packed, num_columns, torch.float32).shape == (num_rows, num_columns)


@interpreted
def test_interpreted_formats_are_the_same_with_any_tile() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(150, 200, generator=generator)
    by_rows = Quantized(rows_ND.to(torch.float8_e4m3fn), torch.rand(150, 2, generator=generator))
    expected, again = (
        columns.quantize_columns(rows_ND, [150], power_of_two=False),
        columns.requantize_columns(by_rows, [150], power_of_two=False),
    )
    for block_columns, vector in ((16, 1), (128, 8)):
        tile = {"block_columns": block_columns, "vector": vector}
        assert_same_pair(columns.quantize_columns(rows_ND, [150], power_of_two=False, **tile), expected)
        assert_same_pair(columns.requantize_columns(by_rows, [150], power_of_two=False, **tile), again)
    packed = e5m6.pack_e5m6(rows_ND)
    assert_same_pair(e5m6.pack_e5m6(rows_ND, block_rows=64), packed)
    whole, single = (e5m6.unpack_e5m6(packed, 200, torch.float32, block_rows=rows) for rows in (64, 1))
    assert torch.equal(whole, single)


def compiled(
    module: ModuleType, kernel: str, function: str, *arguments: Any, power_of_two: bool | None = None
) -> Compiled:
    options = {} if power_of_two is None else {"power_of_two": power_of_two}
    made = compile_launch(module, kernel, lambda: getattr(module, function)(*arguments, **options))
    made.assert_sound()
    assert made.shared_bytes <= 16384
    assert made.instructions(r".*\.ftz") == []
    return made


def vectors(made: Compiled) -> tuple[set[str], set[str]]:
    """Returns the vector loads from and stores to global memory."""
    loads = {name.rsplit(".", 2)[1] for name in made.instructions(r"ld\.global\.v")}
    stores = {name.rsplit(".", 2)[1] for name in made.instructions(r"st\.global\.v")}
    return loads, stores


def codes(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(("counts", "power_of_two"), [([256], False), ([100, 156], True)])
def test_compiled_columns_read_and_write_side_by_side(counts: Sequence[int], power_of_two: bool) -> None:
    rows_ND = torch.empty(256, 7168, dtype=torch.bfloat16)
    made = compiled(columns, "quantize_columns_kernel", "quantize_columns", rows_ND, counts, power_of_two=power_of_two)
    # 8 bytes a thread, of 64 columns of a row; and 16 bytes of the 128 codes of a tile.
    assert vectors(made) == ({"v2"}, {"v4"})
    assert len(made.instructions(r"st\.global\.v4")) == 2
    assert made.registers <= 80
    by_rows = Quantized(codes(256, 7168), torch.empty(256, 56))
    again = compiled(
        columns, "requantize_columns_kernel", "requantize_columns", by_rows, counts, power_of_two=power_of_two
    )
    assert vectors(again) == (set(), {"v4"})
    assert len(again.instructions(r"st\.global\.v4")) == 4
    assert again.registers <= 128
    for kernel in (made, again):
        assert kernel.instructions(r"cvt\.rn\.satfinite\.e4m3x2\.f32")
        # The scales alone are divisions, and their reciprocals.
        assert len(kernel.instructions(r"div\.rn\.f32")) == (4 if power_of_two else 8)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_compiled_blocks_move_16_bytes_at_a_time(power_of_two: bool) -> None:
    values = torch.empty(4, 256, 7168, dtype=torch.bfloat16)
    made = compiled(blocks, "quantize_blocks_kernel", "quantize_128x128", values, power_of_two=power_of_two)
    assert vectors(made) == ({"v4"}, {"v4"})
    assert len(made.instructions(r"div\.rn\.f32")) == (1 if power_of_two else 2)
    in_blocks = QuantizedBlocks(codes(4, 256, 7168), torch.empty(4, 2, 56))
    back = compiled(blocks, "dequantize_blocks_kernel", "dequantize_128x128", in_blocks, torch.bfloat16)
    turned = compiled(blocks, "transpose_blocks_kernel", "transpose_blocks", in_blocks)
    for kernel in (made, back, turned):
        assert vectors(kernel) == ({"v4"}, {"v4"})
        assert kernel.registers <= 128


def test_compiled_e5m6_moves_a_row_in_vectors() -> None:
    packed = compiled(e5m6, "pack_kernel", "pack_e5m6", torch.empty(32, 7168, dtype=torch.bfloat16))
    # 16 numbers a thread are 16 bytes of lower bits and 8 of upper ones.
    assert vectors(packed) == ({"v4"}, {"v4", "v2"})
    rows = PackedE5M6(torch.empty(32, 10752, dtype=torch.uint8), torch.empty(32, 56))
    unpacked = compiled(e5m6, "unpack_kernel", "unpack_e5m6", rows, 7168, torch.bfloat16)
    assert vectors(unpacked) == ({"v4", "v2"}, {"v4"})
    for kernel in (packed, unpacked):
        assert kernel.registers <= 64


def test_compiled_formats_of_unaligned_rows_are_sound() -> None:
    rows_ND = torch.empty(130, 7167)
    compiled(columns, "quantize_columns_kernel", "quantize_columns", rows_ND, [130], power_of_two=False)
    compiled(blocks, "quantize_blocks_kernel", "quantize_128x128", rows_ND, power_of_two=False)
    compiled(e5m6, "pack_kernel", "pack_e5m6", rows_ND)
