"""Launches of the products of rows sorted by expert; shapes of DeepSeek-V3."""

from functools import partial

import torch

from kernels.gemm_fp8.tiling import Tiling
from kernels.grouped_gemm.tuned import CANDIDATES, WEIGHT_CANDIDATES
from kernels.quantize.layout import padded_rows
from tests.kernels.launches import (
    COUNTS,
    EXPERT_WIDTH,
    HIDDEN,
    Launch,
    Product,
    blocks_bytes,
    further,
    options,
    quantized_bytes,
    words,
)

EXPERTS = len(COUNTS)
ROWS = sum(COUNTS)
PADDED = padded_rows(COUNTS)
FIRST, DOWN = "gate_up", "down"
MAPS = {FIRST: (HIDDEN, 2 * EXPERT_WIDTH), DOWN: (EXPERT_WIDTH, HIDDEN)}
"""Inputs and outputs of an expert's linear maps."""


def of_rows(inputs: int, outputs: int, *, is_fp8: bool) -> Product:
    """Outputs of all experts' maps; or the gradient of inputs of maps with as many inputs as these have outputs."""
    return Product(num_rows=ROWS, num_columns=outputs, depth=inputs, counts=COUNTS, is_fp8=is_fp8)


def of_weights(inputs: int, outputs: int, *, is_fp8: bool) -> Product:
    """Returns the product of the gradients of all experts' weights."""
    return Product(num_rows=outputs, num_columns=inputs, depth=ROWS, counts=COUNTS, is_gradient=True, is_fp8=is_fp8)


def rows_fp8(name: str, inputs: int, outputs: int, tiling: Tiling | None = None) -> Launch:
    """Returns launches of products of rows in FP8."""
    return Launch(
        module="kernels.grouped_gemm.triton_fp8",
        kernel="grouped_rows_fp8_kernel",
        shape=f"32 experts, {ROWS} x {inputs} x {outputs}, {name}",
        bytes_moved=quantized_bytes(ROWS, inputs) + EXPERTS * blocks_bytes(outputs, inputs) + 2 * ROWS * outputs,
        prepare=lambda functions, tensors: partial(
            functions.grouped_rows_fp8,
            tensors.rows(ROWS, inputs),
            tensors.blocks(EXPERTS, outputs, inputs),
            COUNTS,
            torch.bfloat16,
            **options(tiling),
        ),
        reference="kernels.grouped_gemm.reference_fp8",
        product=of_rows(inputs, outputs, is_fp8=True),
        is_timed=tiling is None,
    )


def weights_fp8(name: str, inputs: int, outputs: int, tiling: Tiling | None = None) -> Launch:
    """Returns launches of weight gradients in FP8."""
    return Launch(
        module="kernels.grouped_gemm.triton_fp8",
        kernel="grouped_weight_fp8_kernel",
        shape=f"32 experts, {outputs} x {ROWS} x {inputs}, gradient, {name}",
        bytes_moved=quantized_bytes(inputs + outputs, PADDED) + 4 * EXPERTS * inputs * outputs,
        prepare=lambda functions, tensors: partial(
            functions.grouped_weight_fp8,
            tensors.columns(outputs, PADDED),
            tensors.columns(inputs, PADDED),
            COUNTS,
            **options(tiling),
        ),
        reference="kernels.grouped_gemm.reference_fp8",
        product=of_weights(inputs, outputs, is_fp8=True),
        is_timed=tiling is None,
    )


def rows_bf16(name: str, inputs: int, outputs: int, *, is_across: bool = False) -> Launch:
    """Returns launches of products of rows in bf16.

    `is_across`: the matrices are stored as for the forward, to compute the gradient of its inputs.
    """
    return Launch(
        module="kernels.grouped_gemm.triton",
        kernel="grouped_rows_kernel",
        shape=f"32 experts, {ROWS} x {inputs} x {outputs}, {name}",
        bytes_moved=2 * (ROWS * (inputs + outputs) + EXPERTS * inputs * outputs),
        prepare=lambda functions, tensors: partial(
            functions.grouped_rows,
            tensors.normal(ROWS, inputs),
            tensors.normal(EXPERTS, inputs, outputs).transpose(1, 2)
            if is_across
            else tensors.normal(EXPERTS, outputs, inputs),
            COUNTS,
        ),
        reference="kernels.grouped_gemm.reference",
        product=of_rows(inputs, outputs, is_fp8=False),
    )


def weights_bf16(name: str, inputs: int, outputs: int) -> Launch:
    """Returns launches of weight gradients in bf16."""
    return Launch(
        module="kernels.grouped_gemm.triton",
        kernel="grouped_weight_kernel",
        shape=f"32 experts, {outputs} x {ROWS} x {inputs}, gradient, {name}",
        bytes_moved=2 * (ROWS * (inputs + outputs) + EXPERTS * inputs * outputs),
        prepare=lambda functions, tensors: partial(
            functions.grouped_weight, tensors.normal(ROWS, outputs), tensors.normal(ROWS, inputs), COUNTS
        ),
        reference="kernels.grouped_gemm.reference",
        product=of_weights(inputs, outputs, is_fp8=False),
    )


GROUPED_GEMM = [
    *(rows_bf16(name, *sizes) for name, sizes in MAPS.items()),
    rows_bf16("inputs of gate_up", 2 * EXPERT_WIDTH, HIDDEN, is_across=True),
    *(weights_bf16(name, *sizes) for name, sizes in MAPS.items()),
    *(rows_fp8(name, *sizes) for name, sizes in MAPS.items()),
    *(weights_fp8(name, *sizes) for name, sizes in MAPS.items()),
    *(rows_fp8(words(tiling), *sizes, tiling) for sizes in MAPS.values() for tiling in further(CANDIDATES)),
    *(weights_fp8(words(tiling), *MAPS[FIRST], tiling) for tiling in further(WEIGHT_CANDIDATES)),
]
