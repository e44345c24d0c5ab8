"""Launches of the products in FP8 and bf16; shapes of DeepSeek-V3."""

from functools import partial

import torch

from kernels.gemm_fp8.tiling import Tiling
from kernels.gemm_fp8.tuned import CANDIDATES, COLUMN_CANDIDATES
from tests.kernels.launches import (
    ATTENTION_WIDTH,
    DENSE_WIDTH,
    HIDDEN,
    TOKENS,
    Launch,
    Product,
    blocks_bytes,
    further,
    options,
    quantized_bytes,
    words,
)

FIRST = "shared up"
RAGGED = "stored by masks"
MAPS = {
    FIRST: (HIDDEN, 2048),
    "q_a and kv_a": (HIDDEN, 2112),
    "q_b": (1536, 24576),
    "kv_b": (512, 32768),
    "o_proj": (ATTENTION_WIDTH, HIDDEN),
    "dense gate_up": (HIDDEN, 2 * DENSE_WIDTH),
    "dense down": (DENSE_WIDTH, HIDDEN),
}
"""Inputs and outputs of the model's linear maps."""
TUNED = (FIRST, "o_proj")
"""Maps for which candidates are compiled: rows of scales that begin at multiples of 16 bytes differ in machine code."""


def of_rows(name: str, inputs: int, outputs: int, tiling: Tiling | None = None) -> Launch:
    """Outputs of a map; or the gradient of the inputs of one with as many inputs as this has outputs."""
    return Launch(
        module="kernels.gemm_fp8.triton",
        kernel="gemm_kernel",
        shape=f"{TOKENS} x {inputs} x {outputs}, {name}",
        bytes_moved=quantized_bytes(TOKENS, inputs) + blocks_bytes(outputs, inputs) + 2 * TOKENS * outputs,
        prepare=lambda functions, tensors: partial(
            functions.gemm_fp8,
            tensors.rows(TOKENS, inputs),
            tensors.blocks(outputs, inputs),
            torch.bfloat16,
            **options(tiling),
        ),
        reference="kernels.gemm_fp8.reference",
        product=Product(num_rows=TOKENS, num_columns=outputs, depth=inputs),
        is_timed=tiling is None,
    )


def of_weight(name: str, inputs: int, outputs: int, tiling: Tiling | None = None) -> Launch:
    """Returns the product of the gradient of a map's weight."""
    return Launch(
        module="kernels.gemm_fp8.triton",
        kernel="gemm_kernel",
        shape=f"{outputs} x {TOKENS} x {inputs}, gradient, {name}",
        bytes_moved=quantized_bytes(inputs + outputs, TOKENS) + 4 * inputs * outputs,
        prepare=lambda functions, tensors: partial(
            functions.gemm_fp8_columns,
            tensors.columns(outputs, TOKENS),
            tensors.columns(inputs, TOKENS),
            **options(tiling),
        ),
        reference="kernels.gemm_fp8.reference",
        product=Product(num_rows=outputs, num_columns=inputs, depth=TOKENS, is_gradient=True),
        is_timed=tiling is None,
    )


GEMM_FP8 = [
    *(of_rows(name, *sizes) for name, sizes in MAPS.items()),
    of_rows(RAGGED, HIDDEN, 2049),
    *(of_weight(name, *sizes) for name, sizes in MAPS.items()),
    of_weight(RAGGED, 2049, HIDDEN),
    *(of_rows(words(tiling), *MAPS[name], tiling) for name in TUNED for tiling in further(CANDIDATES)),
    *(of_weight(words(tiling), *MAPS[FIRST], tiling) for tiling in further(COLUMN_CANDIDATES)),
]
