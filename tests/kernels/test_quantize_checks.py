"""Operands that are not of a format are refused, by every implementation in the same words, before a kernel runs."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

import kernels.gemm_fp8.reference as gemm
import kernels.gemm_fp8.triton as compiled_gemm
import kernels.grouped_gemm.reference_fp8 as grouped
import kernels.grouped_gemm.triton_fp8 as compiled_grouped
import kernels.quantize.reference as rows
import kernels.quantize.reference_blocks as blocks
import kernels.quantize.reference_columns as columns
import kernels.quantize.reference_e5m6 as e5m6
import kernels.quantize.triton as compiled_rows
import kernels.quantize.triton_blocks as compiled_blocks
import kernels.quantize.triton_columns as compiled_columns
import kernels.quantize.triton_e5m6 as compiled_e5m6
from kernels.quantize.layout import PackedE5M6, Quantized, QuantizedBlocks, QuantizedColumns

VALUES = torch.ones(3, 200)
QUANTIZED = rows.quantize_1x128(VALUES, power_of_two=True)
BLOCKS = blocks.quantize_128x128(torch.ones(2, 130, 200), power_of_two=True)
COLUMNS = columns.quantize_columns(VALUES, [3], power_of_two=True)
PACKED = e5m6.pack_e5m6(VALUES)
OTHER = torch.float8_e5m2


@pytest.mark.parametrize("module", [rows, compiled_rows])
def test_rows_of_another_kind_are_named(module: ModuleType) -> None:
    codes, scales = QUANTIZED
    refused(
        lambda: module.quantize_1x128(VALUES.int(), power_of_two=True),
        "quantize_1x128: rows_ND must be floating point, got torch.int32",
    )
    refused(
        lambda: module.quantize_1x128(VALUES[0], power_of_two=True),
        "quantize_1x128: rows_ND must have 2 dimensions, got 1",
    )
    for broken, rule in (
        (Quantized(codes.to(OTHER), scales), "codes must be torch.float8_e4m3fn, got torch.float8_e5m2"),
        (Quantized(codes, scales[:, :1]), "scales must be [3, 2], got [3, 1]"),
        (Quantized(codes, scales[:1]), "scales must be [3, 2], got [1, 2]"),
        (Quantized(codes, scales.bfloat16()), "scales must be torch.float32, got torch.bfloat16"),
        (Quantized(codes, scales.to("meta")), "scales must be on cpu, where the codes are, got meta"),
    ):
        refused(lambda broken=broken: module.dequantize_1x128(broken, torch.float32), f"dequantize_1x128: {rule}")


@pytest.mark.parametrize("module", [columns, compiled_columns])
def test_columns_of_another_kind_are_named(module: ModuleType) -> None:
    codes, scales = QUANTIZED
    refused(
        lambda: module.quantize_columns(VALUES.int(), [3], power_of_two=True),
        "quantize_columns: rows_ND must be floating point, got torch.int32",
    )
    refused(
        lambda: module.requantize_columns(Quantized(codes, scales[:, :1]), [3], power_of_two=True),
        "requantize_columns: scales must be [3, 2], got [3, 1]",
    )


@pytest.mark.parametrize("module", [blocks, compiled_blocks])
def test_blocks_of_another_kind_are_named(module: ModuleType) -> None:
    codes, scales = BLOCKS
    broken = QuantizedBlocks(codes, scales[:, :1])
    refused(
        lambda: module.quantize_128x128(VALUES[0], power_of_two=True),
        "quantize_128x128: values must have at least 2 dimensions, got 1",
    )
    refused(lambda: module.transpose_blocks(broken), "transpose_blocks: scales must be [2, 2, 2], got [2, 1, 2]")
    refused(
        lambda: module.dequantize_128x128(broken, torch.float32),
        "dequantize_128x128: scales must be [2, 2, 2], got [2, 1, 2]",
    )


@pytest.mark.parametrize("module", [e5m6, compiled_e5m6])
def test_packed_rows_of_another_kind_are_named(module: ModuleType) -> None:
    codes, scales = PACKED
    refused(lambda: module.pack_e5m6(VALUES.int()), "pack_e5m6: rows_ND must be floating point, got torch.int32")
    for broken, rule in (
        (PackedE5M6(codes.view(torch.int8), scales), "codes must be torch.uint8, got torch.int8"),
        (PackedE5M6(codes, scales[:1]), "scales must be [3, 2], got [1, 2]"),
    ):
        refused(lambda broken=broken: module.unpack_e5m6(broken, 200, torch.float32), f"unpack_e5m6: {rule}")


@pytest.mark.parametrize("module", [gemm, compiled_gemm])
def test_operands_of_a_product_of_another_kind_are_named(module: ModuleType) -> None:
    weight = QuantizedBlocks(BLOCKS.codes[0], BLOCKS.scales[0])
    for left, right, rule in (
        (Quantized(QUANTIZED.codes.to(OTHER), QUANTIZED.scales), weight, "left.codes must be torch.float8_e4m3fn, got"),
        (QUANTIZED, QuantizedBlocks(weight.codes, weight.scales.double()), "right.scales must be torch.float32, got"),
        (
            QUANTIZED,
            QuantizedBlocks(*(each.to("meta") for each in weight)),
            "right.codes must be on cpu, where left.codes",
        ),
    ):
        refused(lambda left=left, right=right: module.gemm_fp8(left, right, torch.float32), f"gemm_fp8: {rule}")
    wide = QuantizedColumns(COLUMNS.codes.view(torch.uint8), COLUMNS.scales)
    refused(
        lambda: module.gemm_fp8_columns(COLUMNS, wide), "gemm_fp8_columns: right.codes must be torch.float8_e4m3fn, got"
    )


@pytest.mark.parametrize("module", [grouped, compiled_grouped])
def test_operands_of_products_of_groups_of_another_kind_are_named(module: ModuleType) -> None:
    as_bytes = Quantized(QUANTIZED.codes.view(torch.uint8), QUANTIZED.scales)
    for left, right, rule in (
        (as_bytes, BLOCKS, "the matrices must be torch.uint8, as rows are, got torch.float8_e4m3fn"),
        (
            as_bytes,
            QuantizedBlocks(BLOCKS.codes.view(torch.uint8), BLOCKS.scales),
            "rows.codes must be torch.float8_e4m3fn",
        ),
        (
            QUANTIZED,
            QuantizedBlocks(BLOCKS.codes, BLOCKS.scales[:, :1]),
            "weights.scales must be [2, 2, 2], got [2, 1, 2]",
        ),
    ):
        refused(
            lambda left=left, right=right: module.grouped_rows_fp8(left, right, [1, 2], torch.float32),
            f"grouped_rows_fp8: {rule}",
        )


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert str(caught.value).startswith(message)
