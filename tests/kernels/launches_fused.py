"""Launches of SwiGLU, RMSNorm and the cross-entropy; shapes of DeepSeek-V3."""

from functools import partial

import torch
from torch import Tensor

from tests.kernels.launches import (
    COUNTS,
    DENSE_WIDTH,
    EXPERT_WIDTH,
    HIDDEN,
    LATENT,
    TOKENS,
    VOCABULARY,
    Launch,
    Tensors,
    quantized_bytes,
)

ROWS = sum(COUNTS)
CHUNK_ROWS = 1024
EPS = 1e-6


def row_weights(tensors: Tensors, num_rows: int, has_weights: bool) -> Tensor | None:
    """Returns a weight for each row, or None as in a dense layer."""
    return tensors.scales(num_rows) if has_weights else None


def gate_and_up(tensors: Tensors, num_rows: int, width: int) -> tuple[Tensor, ...]:
    """Halves of hidden values."""
    return tensors.normal(num_rows, 2 * width).chunk(2, 1)


def swiglu_quantize(num_rows: int, width: int, has_weights: bool) -> Launch:
    """Returns launches from hidden values to the operand of the next product and the cached codes."""
    return Launch(
        module="kernels.swiglu.triton_fp8",
        kernel="swiglu_quantize_kernel",
        shape=f"{num_rows} x {width}{', weighted' if has_weights else ''}",
        bytes_moved=4 * num_rows * (width + has_weights)
        + quantized_bytes(num_rows, width)
        + quantized_bytes(num_rows, 2 * width),
        prepare=lambda functions, tensors: partial(
            functions.swiglu_quantize,
            tensors.normal(num_rows, 2 * width),
            row_weights(tensors, num_rows, has_weights),
            power_of_two=False,
        ),
        reference="kernels.swiglu.reference_fp8",
    )


def swiglu_backward_codes(num_rows: int, width: int, has_weights: bool) -> Launch:
    """Returns launches of the gradients from cached codes."""
    return Launch(
        module="kernels.swiglu.triton_fp8",
        kernel="swiglu_backward_codes_kernel",
        shape=f"{num_rows} x {width}{', weighted' if has_weights else ''}",
        bytes_moved=8 * num_rows * (width + has_weights) + quantized_bytes(num_rows, 2 * width),
        prepare=lambda functions, tensors: partial(
            functions.swiglu_backward_from_codes,
            tensors.normal(num_rows, width),
            tensors.rows(num_rows, 2 * width),
            row_weights(tensors, num_rows, has_weights),
        ),
        reference="kernels.swiglu.reference_fp8",
    )


SWIGLU = [
    Launch(
        module="kernels.swiglu.triton",
        kernel="swiglu_kernel",
        shape="4096 x 18432",
        bytes_moved=6 * TOKENS * DENSE_WIDTH,
        prepare=lambda functions, tensors: partial(functions.swiglu, *gate_and_up(tensors, TOKENS, DENSE_WIDTH)),
        reference="kernels.swiglu.reference",
    ),
    Launch(
        module="kernels.swiglu.triton",
        kernel="swiglu_backward_kernel",
        shape="4096 x 18432",
        bytes_moved=10 * TOKENS * DENSE_WIDTH,
        prepare=lambda functions, tensors: partial(
            functions.swiglu_backward, tensors.normal(TOKENS, DENSE_WIDTH), tensors.normal(TOKENS, 2 * DENSE_WIDTH)
        ),
        reference="kernels.swiglu.reference",
    ),
    swiglu_quantize(TOKENS, DENSE_WIDTH, False),
    swiglu_quantize(ROWS, EXPERT_WIDTH, True),
    swiglu_backward_codes(TOKENS, DENSE_WIDTH, False),
    swiglu_backward_codes(ROWS, EXPERT_WIDTH, True),
]


def rms_norms(width: int) -> list[Launch]:
    """Returns launches of forward and backward, in bf16 and in FP8."""
    numbers, codes = TOKENS * width, quantized_bytes(TOKENS, width)
    return [
        Launch(
            module="kernels.rms_norm.triton",
            kernel="rms_norm_kernel",
            shape=f"4096 x {width}",
            bytes_moved=4 * numbers + 4 * TOKENS + 2 * width,
            prepare=lambda functions, tensors: partial(
                functions.rms_norm, tensors.normal(TOKENS, width), tensors.normal(width), EPS
            ),
        ),
        Launch(
            module="kernels.rms_norm.triton",
            kernel="rms_norm_backward_kernel",
            shape=f"4096 x {width}",
            bytes_moved=6 * numbers + 4 * TOKENS + 4 * width,
            prepare=lambda functions, tensors: partial(
                functions.normalize_backward,
                tensors.normal(TOKENS, width),
                tensors.normal(TOKENS, width),
                tensors.scales(TOKENS, 1),
                tensors.normal(width),
            ),
            reference="kernels.rms_norm.reference",
        ),
        Launch(
            module="kernels.rms_norm.triton_fp8",
            kernel="rms_norm_quantize_kernel",
            shape=f"4096 x {width}",
            bytes_moved=2 * numbers + 4 * TOKENS + 2 * width + codes,
            prepare=lambda functions, tensors: partial(
                functions.rms_norm_quantize,
                tensors.normal(TOKENS, width),
                tensors.normal(width),
                EPS,
                power_of_two=False,
            ),
            reference="kernels.rms_norm.reference_fp8",
        ),
        Launch(
            module="kernels.rms_norm.triton_fp8",
            kernel="rms_norm_backward_codes_kernel",
            shape=f"4096 x {width}",
            bytes_moved=4 * numbers + 4 * TOKENS + 6 * width + codes,
            prepare=lambda functions, tensors: partial(
                functions.rms_norm_backward_from_codes,
                tensors.normal(TOKENS, width),
                tensors.rows(TOKENS, width),
                tensors.scales(TOKENS, 1),
                tensors.normal(width),
            ),
            reference="kernels.rms_norm.reference_fp8",
        ),
    ]


RMS_NORM = [*rms_norms(HIDDEN), *rms_norms(LATENT)]

CROSS_ENTROPY = [
    Launch(
        module="kernels.cross_entropy.triton",
        kernel="slopes_kernel",
        shape=f"{CHUNK_ROWS} x {VOCABULARY}",
        bytes_moved=4 * CHUNK_ROWS * VOCABULARY + 12 * CHUNK_ROWS,
        prepare=lambda functions, tensors: partial(
            functions.nats_and_slopes_,
            tensors.normal(CHUNK_ROWS, VOCABULARY),
            tensors.indices(CHUNK_ROWS, VOCABULARY),
            torch.empty(CHUNK_ROWS, device=tensors.device),
            True,
        ),
    )
]
