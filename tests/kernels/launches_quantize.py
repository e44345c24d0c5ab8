"""Launches of the kernels that put numbers in FP8 and back, or in another order; shapes of DeepSeek-V3."""

from functools import partial

import torch

from kernels.quantize.layout import GRADIENTS_MIN_AMAX, padded_rows
from tests.kernels.launches import (
    ATTENTION_WIDTH,
    COUNTS,
    DENSE_WIDTH,
    EXPERT_WIDTH,
    HIDDEN,
    TOKENS,
    TOP,
    Launch,
    blocks_bytes,
    quantized_bytes,
)

ROWS = sum(COUNTS)
NUMBERS = TOKENS * HIDDEN
CODES = quantized_bytes(TOKENS, HIDDEN)
EXPERTS = (len(COUNTS), 2 * EXPERT_WIDTH, HIDDEN)
PACKED = TOKENS * (3 * ATTENTION_WIDTH // 2 + ATTENTION_WIDTH // 32)


def columns_bytes(counts: tuple[int, ...]) -> int:
    """Returns the bytes of codes and scales of grouped rows, transposed."""
    return quantized_bytes(HIDDEN, padded_rows(counts))


def of_rows(power_of_two: bool) -> Launch:
    """Returns launches that quantize rows of a model's width."""
    return Launch(
        module="kernels.quantize.triton",
        kernel="quantize_kernel",
        shape=f"4096 x 7168{', powers of two' if power_of_two else ''}",
        bytes_moved=2 * NUMBERS + CODES,
        prepare=lambda functions, tensors: partial(
            functions.quantize_1x128, tensors.normal(TOKENS, HIDDEN), power_of_two=power_of_two
        ),
        reference="kernels.quantize.reference",
    )


def of_columns(counts: tuple[int, ...]) -> Launch:
    """Gradients to FP8, for the product that gives a weight's gradient."""
    return Launch(
        module="kernels.quantize.triton_columns",
        kernel="quantize_columns_kernel",
        shape=f"{sum(counts)} x 7168, groups: {len(counts)}",
        bytes_moved=2 * HIDDEN * sum(counts) + columns_bytes(counts),
        prepare=lambda functions, tensors: partial(
            functions.quantize_columns,
            tensors.normal(sum(counts), HIDDEN),
            counts,
            power_of_two=False,
            min_amax=GRADIENTS_MIN_AMAX,
        ),
        reference="kernels.quantize.reference_columns",
    )


def of_codes(counts: tuple[int, ...]) -> Launch:
    """Inputs that were kept in FP8, for the same product."""
    return Launch(
        module="kernels.quantize.triton_columns",
        kernel="requantize_columns_kernel",
        shape=f"{sum(counts)} x 7168, groups: {len(counts)}",
        bytes_moved=quantized_bytes(sum(counts), HIDDEN) + columns_bytes(counts),
        prepare=lambda functions, tensors: partial(
            functions.requantize_columns, tensors.rows(sum(counts), HIDDEN), counts, power_of_two=False
        ),
        reference="kernels.quantize.reference_columns",
    )


def of_weights(num_weights: int, num_rows: int, num_columns: int) -> Launch:
    """Weights to FP8."""
    return Launch(
        module="kernels.quantize.triton",
        kernel="quantize_blocks_kernel",
        shape=f"{num_weights} x {num_rows} x {num_columns}",
        bytes_moved=num_weights * (2 * num_rows * num_columns + blocks_bytes(num_rows, num_columns)),
        prepare=lambda functions, tensors: partial(
            functions.quantize_128x128, tensors.normal(num_weights, num_rows, num_columns), power_of_two=False
        ),
        reference="kernels.quantize.reference",
    )


QUANTIZE = [
    of_rows(False),
    of_rows(True),
    Launch(
        module="kernels.quantize.triton",
        kernel="dequantize_kernel",
        shape="4096 x 7168",
        bytes_moved=2 * NUMBERS + CODES,
        prepare=lambda functions, tensors: partial(
            functions.dequantize_1x128, tensors.rows(TOKENS, HIDDEN), torch.bfloat16
        ),
        reference="kernels.quantize.reference",
    ),
    of_columns((TOKENS,)),
    of_columns(COUNTS),
    of_codes((TOKENS,)),
    of_codes(COUNTS),
    of_weights(1, DENSE_WIDTH, HIDDEN),
    of_weights(*EXPERTS),
    Launch(
        module="kernels.quantize.triton",
        kernel="dequantize_blocks_kernel",
        shape="18432 x 7168",
        bytes_moved=2 * DENSE_WIDTH * HIDDEN + blocks_bytes(DENSE_WIDTH, HIDDEN),
        prepare=lambda functions, tensors: partial(
            functions.dequantize_128x128, tensors.blocks(DENSE_WIDTH, HIDDEN), torch.bfloat16
        ),
        reference="kernels.quantize.reference",
    ),
    Launch(
        module="kernels.quantize.triton",
        kernel="transpose_blocks_kernel",
        shape=" x ".join(map(str, EXPERTS)),
        bytes_moved=2 * EXPERTS[0] * blocks_bytes(*EXPERTS[1:]),
        prepare=lambda functions, tensors: partial(functions.transpose_blocks, tensors.blocks(*EXPERTS)),
        reference="kernels.quantize.reference",
    ),
    Launch(
        module="kernels.quantize.triton_e5m6",
        kernel="pack_kernel",
        shape="4096 x 16384",
        bytes_moved=2 * TOKENS * ATTENTION_WIDTH + PACKED,
        prepare=lambda functions, tensors: partial(functions.pack_e5m6, tensors.normal(TOKENS, ATTENTION_WIDTH)),
        reference="kernels.quantize.reference_e5m6",
    ),
    Launch(
        module="kernels.quantize.triton_e5m6",
        kernel="unpack_kernel",
        shape="4096 x 16384",
        bytes_moved=2 * TOKENS * ATTENTION_WIDTH + PACKED,
        prepare=lambda functions, tensors: partial(
            functions.unpack_e5m6,
            tensors.packed(TOKENS, ATTENTION_WIDTH),
            ATTENTION_WIDTH,
            torch.bfloat16,
        ),
        reference="kernels.quantize.reference_e5m6",
    ),
]

PERMUTE = [
    Launch(
        module="kernels.permute.triton",
        kernel="permute_kernel",
        shape=f"4096 to {TOKENS * TOP} x 7168",
        bytes_moved=2 * HIDDEN * TOKENS * (1 + TOP) + 8 * TOKENS * TOP,
        prepare=lambda functions, tensors: partial(
            functions.permute, tensors.normal(TOKENS, HIDDEN), tensors.indices(TOKENS * TOP, TOKENS)
        ),
        reference="kernels.permute.reference",
    ),
    Launch(
        module="kernels.permute.triton",
        kernel="unpermute_kernel",
        shape=f"{TOKENS * TOP} to 4096 x 7168",
        bytes_moved=2 * HIDDEN * TOKENS * (1 + TOP) + 8 * TOKENS * TOP,
        prepare=lambda functions, tensors: partial(
            functions.unpermute,
            tensors.normal(TOKENS * TOP, HIDDEN),
            tensors.indices(TOKENS * TOP, TOKENS * TOP).view(TOKENS, TOP),
        ),
        reference="kernels.permute.reference",
    ),
]
