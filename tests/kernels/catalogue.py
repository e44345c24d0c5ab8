"""Every launch that is compiled and timed; shapes of DeepSeek-V3."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.adamw import compute_coefficients
from kernels.gemm.tuned import CANDIDATES, COLUMN_CANDIDATES, GROUPED_CANDIDATES, WEIGHT_CANDIDATES
from kernels.launch import Tiling
from kernels.quantize.layout import GRADIENTS_MIN_AMAX, padded_rows
from kernels.router.reference import RouteLimits
from tests.kernels.launches import (
    ATTENTION_WIDTH,
    COUNTS,
    DENSE_WIDTH,
    EXPERT_WIDTH,
    HIDDEN,
    LATENT,
    ROUTED_EXPERTS,
    TOKENS,
    TOP,
    VOCABULARY,
    Launch,
    Product,
    Tensors,
    blocks_bytes,
    further,
    launch,
    quantized_bytes,
    words,
)

ROWS = sum(COUNTS)
PADDED = padded_rows(COUNTS)
EXPERTS = len(COUNTS)
NUMBERS = TOKENS * HIDDEN
CODES = quantized_bytes(TOKENS, HIDDEN)
WEIGHTS = (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN)
PACKED = TOKENS * (3 * ATTENTION_WIDTH // 2 + ATTENTION_WIDTH // 32)
CHUNK_ROWS = 1024
EPS = 1e-6
BF16 = torch.bfloat16
NUM_WEIGHTS = 2**26
"""About as many as a layer's share of ZeRO-1 has."""


def quantize_rows(power_of_two: bool) -> Launch:
    """Returns launches that quantize rows of a model's width."""
    return launch(
        "quantize.triton",
        "quantize",
        f"4096 x 7168{', powers of two' if power_of_two else ''}",
        2 * NUMBERS + CODES,
        "quantize_1x128",
        lambda tensors: (tensors.normal(TOKENS, HIDDEN),),
        power_of_two=power_of_two,
    )


def quantize_columns(counts: tuple[int, ...], function: str = "quantize_columns") -> Launch:
    """Gradients, by columns or both ways, or inputs that were kept in FP8, as operands of weight gradients."""
    num_rows = sum(counts)
    from_codes = function == "requantize_columns"
    row_bytes = quantized_bytes(num_rows, HIDDEN)
    moved = {"quantize_columns": 0, "quantize_both": row_bytes, "requantize_columns": row_bytes}[function]
    moved += quantized_bytes(HIDDEN, padded_rows(counts)) + (0 if from_codes else 2 * HIDDEN * num_rows)
    options = {} if from_codes else {"min_amax": GRADIENTS_MIN_AMAX}
    return launch(
        "quantize.triton_columns",
        "requantize_columns" if from_codes else "quantize_columns",
        f"{num_rows} x 7168, groups: {len(counts)}{', and rows' if function == 'quantize_both' else ''}",
        moved,
        function,
        lambda tensors: ((tensors.rows if from_codes else tensors.normal)(num_rows, HIDDEN), counts),
        power_of_two=False,
        **options,  # type: ignore[arg-type]
    )


def quantize_weights(num_weights: int, num_rows: int, num_columns: int) -> Launch:
    return launch(
        "quantize.triton",
        "quantize_blocks",
        f"{num_weights} x {num_rows} x {num_columns}",
        num_weights * (2 * num_rows * num_columns + blocks_bytes(num_rows, num_columns)),
        "quantize_128x128",
        lambda tensors: (tensors.normal(num_weights, num_rows, num_columns),),
        power_of_two=False,
    )


QUANTIZE = [
    quantize_rows(False),
    quantize_rows(True),
    launch(
        "quantize.triton",
        "dequantize",
        "4096 x 7168",
        2 * NUMBERS + CODES,
        "dequantize_1x128",
        lambda tensors: (tensors.rows(TOKENS, HIDDEN), BF16),
    ),
    *(
        quantize_columns(counts, function)
        for function in ("quantize_columns", "quantize_both", "requantize_columns")
        for counts in ((TOKENS,), COUNTS)
    ),
    quantize_weights(1, DENSE_WIDTH, HIDDEN),
    quantize_weights(*WEIGHTS),
    launch(
        "quantize.triton",
        "dequantize_blocks",
        "18432 x 7168",
        2 * DENSE_WIDTH * HIDDEN + blocks_bytes(DENSE_WIDTH, HIDDEN),
        "dequantize_128x128",
        lambda tensors: (tensors.blocks(DENSE_WIDTH, HIDDEN), BF16),
    ),
    launch(
        "quantize.triton",
        "transpose_blocks",
        " x ".join(map(str, WEIGHTS)),
        2 * EXPERTS * blocks_bytes(*WEIGHTS[1:]),
        "transpose_blocks",
        lambda tensors: (tensors.blocks(*WEIGHTS),),
    ),
    launch(
        "quantize.triton_e5m6",
        "pack",
        "4096 x 16384",
        2 * TOKENS * ATTENTION_WIDTH + PACKED,
        "pack_e5m6",
        lambda tensors: (tensors.normal(TOKENS, ATTENTION_WIDTH),),
    ),
    launch(
        "quantize.triton_e5m6",
        "unpack",
        "4096 x 16384",
        2 * TOKENS * ATTENTION_WIDTH + PACKED,
        "unpack_e5m6",
        lambda tensors: (tensors.packed(TOKENS, ATTENTION_WIDTH), ATTENTION_WIDTH, BF16),
    ),
]

PERMUTE = [
    launch(
        "permute.triton",
        "permute",
        f"4096 to {TOKENS * TOP} x 7168",
        2 * HIDDEN * TOKENS * (1 + TOP) + 8 * TOKENS * TOP,
        "permute",
        lambda tensors: (tensors.normal(TOKENS, HIDDEN), tensors.indices(TOKENS * TOP, TOKENS)),
    ),
    launch(
        "permute.triton",
        "unpermute",
        f"{TOKENS * TOP} to 4096 x 7168",
        2 * HIDDEN * TOKENS * (1 + TOP) + 8 * TOKENS * TOP,
        "unpermute",
        lambda tensors: (
            tensors.normal(TOKENS * TOP, HIDDEN),
            tensors.indices(TOKENS * TOP, TOKENS * TOP).view(TOKENS, TOP),
        ),
    ),
]

LIMITS = RouteLimits(TOP, 8, 4, 2.5, 2)
SCORES = (TOKENS, ROUTED_EXPERTS)
# Ids of 8 bytes and weights of the chosen.
CHOSEN_BYTES = 12 * TOKENS * TOP

ROUTER = [
    launch(
        "router.triton",
        "route",
        f"{TOKENS} x {ROUTED_EXPERTS}, 8 of 4 groups",
        8 * TOKENS * ROUTED_EXPERTS + CHOSEN_BYTES,
        "route",
        lambda tensors: (
            tensors.scales(*SCORES),
            tensors.scales(ROUTED_EXPERTS),
            LIMITS,
            tensors.indices(ROUTED_EXPERTS, ROUTED_EXPERTS),
        ),
    ),
    launch(
        "router.triton",
        "route_backward",
        f"{TOKENS} x {ROUTED_EXPERTS}",
        12 * TOKENS * ROUTED_EXPERTS + CHOSEN_BYTES + 4 * TOKENS * TOP,
        "route_backward",
        lambda tensors: (
            tensors.scales(TOKENS, TOP),
            tensors.indices(TOKENS * TOP, ROUTED_EXPERTS).view(TOKENS, TOP),
            tensors.scales(TOKENS, TOP),
            tensors.scales(*SCORES),
            tensors.scales(*SCORES),
            LIMITS,
        ),
    ),
]

NUM_HEADS, NOPE, ROPE, VALUE = 128, 128, 64, 128
HEAD_NUMBERS = TOKENS * NUM_HEADS


def heads_like(tensors: Tensors) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Returns keys and values, or their gradients, turns, and shared keys within compressed values."""
    key, value = (tensors.normal(1, TOKENS, NUM_HEADS, width) for width in (NOPE + ROPE, VALUE))
    shared = tensors.normal(1, TOKENS, ROPE)
    return (key, value), torch.view_as_complex(tensors.scales(TOKENS, ROPE // 2, 2)), shared


def queries(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Returns the rotated numbers of queries, and turns."""
    (query, _), turns, _ = heads_like(tensors)
    return query[..., NOPE:], turns


def heads(kernel: str, function: str, arguments: Callable[[Tensors], tuple[Any, ...]], numbers: int) -> Launch:
    """Returns a launch that moves 16-bit numbers of heads, and reads turns."""
    moved = 2 * numbers + 4 * TOKENS * ROPE
    return launch("heads.triton", kernel, f"{TOKENS} x {NUM_HEADS} heads", moved, function, arguments)


BOTH = HEAD_NUMBERS * (2 * (NOPE + VALUE) + ROPE) + TOKENS * ROPE
HEADS = [
    heads("rotate", "rotate_", queries, 2 * HEAD_NUMBERS * ROPE),
    heads(
        "fill",
        "fill_keys_and_values",
        lambda tensors: (
            *heads_like(tensors)[:2],
            tensors.normal(TOKENS, NUM_HEADS * (NOPE + VALUE)),
            heads_like(tensors)[2],
            NOPE,
        ),
        BOTH,
    ),
    heads("gradient", "keys_and_values_gradient", lambda tensors: (*heads_like(tensors), NOPE, VALUE), BOTH),
]


def swiglu_fp8(num_rows: int, width: int, has_weights: bool, *, is_backward: bool) -> Launch:
    """From hidden values to the next product's operand and the cached codes, or from those to the gradients."""
    cached = quantized_bytes(num_rows, 2 * width)
    shape = f"{num_rows} x {width}{', weighted' if has_weights else ''}"

    def row_weights(tensors: Tensors) -> Tensor | None:
        """Returns a weight for each row, or None as in a dense layer."""
        return tensors.scales(num_rows) if has_weights else None

    if is_backward:
        return launch(
            "swiglu.triton",
            "swiglu_backward_codes",
            shape,
            8 * num_rows * (width + has_weights) + cached,
            "swiglu_backward_from_codes",
            lambda tensors: (tensors.normal(num_rows, width), tensors.rows(num_rows, 2 * width), row_weights(tensors)),
        )
    return launch(
        "swiglu.triton",
        "swiglu_quantize",
        shape,
        4 * num_rows * (width + has_weights) + quantized_bytes(num_rows, width) + cached,
        "swiglu_quantize",
        lambda tensors: (tensors.normal(num_rows, 2 * width), row_weights(tensors)),
        power_of_two=False,
    )


SWIGLU = [
    launch(
        "swiglu.triton",
        "swiglu",
        "4096 x 18432",
        6 * TOKENS * DENSE_WIDTH,
        "swiglu",
        lambda tensors: tensors.normal(TOKENS, 2 * DENSE_WIDTH).chunk(2, 1),
    ),
    launch(
        "swiglu.triton",
        "swiglu_backward",
        "4096 x 18432",
        10 * TOKENS * DENSE_WIDTH,
        "swiglu_backward",
        lambda tensors: (tensors.normal(TOKENS, DENSE_WIDTH), tensors.normal(TOKENS, 2 * DENSE_WIDTH)),
    ),
    swiglu_fp8(TOKENS, DENSE_WIDTH, False, is_backward=False),
    swiglu_fp8(ROWS, EXPERT_WIDTH, True, is_backward=False),
    swiglu_fp8(TOKENS, DENSE_WIDTH, False, is_backward=True),
    swiglu_fp8(ROWS, EXPERT_WIDTH, True, is_backward=True),
]


def rms_norms(width: int) -> list[Launch]:
    """Returns launches of forward and backward, in bf16 and in FP8."""
    numbers, codes, shape = TOKENS * width, quantized_bytes(TOKENS, width), f"4096 x {width}"
    return [
        launch(
            "rms_norm.triton",
            "rms_norm",
            shape,
            4 * numbers + 4 * TOKENS + 2 * width,
            "rms_norm",
            lambda tensors: (tensors.normal(TOKENS, width), tensors.normal(width), EPS),
            has_reference=False,
        ),
        launch(
            "rms_norm.triton",
            "rms_norm_backward",
            shape,
            6 * numbers + 4 * TOKENS + 4 * width,
            "normalize_backward",
            lambda tensors: (
                tensors.normal(TOKENS, width),
                tensors.normal(TOKENS, width),
                tensors.scales(TOKENS, 1),
                tensors.normal(width),
            ),
        ),
        launch(
            "rms_norm.triton",
            "rms_norm_quantize",
            shape,
            2 * numbers + 4 * TOKENS + 2 * width + codes,
            "rms_norm_quantize",
            lambda tensors: (tensors.normal(TOKENS, width), tensors.normal(width), EPS),
            power_of_two=False,
        ),
        launch(
            "rms_norm.triton",
            "rms_norm_backward_codes",
            shape,
            4 * numbers + 4 * TOKENS + 6 * width + codes,
            "rms_norm_backward_from_codes",
            lambda tensors: (
                tensors.normal(TOKENS, width),
                tensors.rows(TOKENS, width),
                tensors.scales(TOKENS, 1),
                tensors.normal(width),
            ),
        ),
    ]


CROSS_ENTROPY = launch(
    "cross_entropy.triton",
    "slopes",
    f"{CHUNK_ROWS} x {VOCABULARY}",
    4 * CHUNK_ROWS * VOCABULARY + 12 * CHUNK_ROWS,
    "nats_and_slopes_",
    lambda tensors: (
        tensors.normal(CHUNK_ROWS, VOCABULARY),
        tensors.indices(CHUNK_ROWS, VOCABULARY),
        torch.empty(CHUNK_ROWS, device=tensors.device),
        True,
    ),
    has_reference=False,
)


def adamw_step(functions: object, tensors: Tensors) -> Callable[[], tuple[Tensor, ...]]:
    """Returns a function that returns weights, gradients and moments after a step, in place."""
    by = compute_coefficients(10, learning_rate=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    state = (
        tensors.normal(NUM_WEIGHTS, dtype=torch.float32),
        tensors.normal(NUM_WEIGHTS, dtype=torch.float32),
        tensors.normal(NUM_WEIGHTS),
        tensors.scales(NUM_WEIGHTS, dtype=BF16),
    )

    def step() -> tuple[Tensor, ...]:
        functions.adamw_bf16_moments(*state, by)  # type: ignore[attr-defined]
        return state

    return step


ADAMW = Launch(
    module="kernels.adamw.triton",
    kernel="adamw_kernel",
    shape=f"{NUM_WEIGHTS}",
    bytes_moved=20 * NUM_WEIGHTS,
    prepare=adamw_step,
    reference="kernels.adamw.reference",
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


def gemm(name: str, inputs: int, outputs: int, tiling: Tiling | None = None) -> Launch:
    """Outputs of a map; or the gradient of the inputs of one with as many inputs as this has outputs."""
    return launch(
        "gemm.triton_fp8",
        "gemm",
        f"{TOKENS} x {inputs} x {outputs}, {name}",
        quantized_bytes(TOKENS, inputs) + blocks_bytes(outputs, inputs) + 2 * TOKENS * outputs,
        "gemm_fp8",
        lambda tensors: (tensors.rows(TOKENS, inputs), tensors.blocks(outputs, inputs), BF16),
        product=Product(num_rows=TOKENS, num_columns=outputs, depth=inputs),
        tiling=tiling,
    )


def gemm_columns(name: str, inputs: int, outputs: int, tiling: Tiling | None = None) -> Launch:
    """Returns the product of the gradient of a map's weight."""
    return launch(
        "gemm.triton_fp8",
        "gemm",
        f"{outputs} x {TOKENS} x {inputs}, gradient, {name}",
        quantized_bytes(inputs + outputs, TOKENS) + 4 * inputs * outputs,
        "gemm_fp8_columns",
        lambda tensors: (tensors.columns(outputs, TOKENS), tensors.columns(inputs, TOKENS)),
        product=Product(num_rows=outputs, num_columns=inputs, depth=TOKENS, is_gradient=True),
        tiling=tiling,
    )


GEMM_FP8 = [
    *(gemm(name, *sizes) for name, sizes in MAPS.items()),
    gemm(RAGGED, HIDDEN, 2049),
    *(gemm_columns(name, *sizes) for name, sizes in MAPS.items()),
    gemm_columns(RAGGED, 2049, HIDDEN),
    *(gemm(words(tiling), *MAPS[name], tiling) for name in TUNED for tiling in further(CANDIDATES)),
    *(gemm_columns(words(tiling), *MAPS[FIRST], tiling) for tiling in further(COLUMN_CANDIDATES)),
]

GATE_UP = "gate_up"
EXPERT_MAPS = {GATE_UP: (HIDDEN, 2 * EXPERT_WIDTH), "down": (EXPERT_WIDTH, HIDDEN)}
"""Inputs and outputs of an expert's linear maps."""


def grouped_rows(name: str, inputs: int, outputs: int, tiling: Tiling | None = None) -> Launch:
    """Outputs of all experts' maps; or the gradient of inputs of maps with as many inputs as these have outputs."""
    return launch(
        "gemm.triton_fp8",
        "grouped_rows_fp8",
        f"32 experts, {ROWS} x {inputs} x {outputs}, {name}",
        quantized_bytes(ROWS, inputs) + EXPERTS * blocks_bytes(outputs, inputs) + 2 * ROWS * outputs,
        "grouped_rows_fp8",
        lambda tensors: (tensors.rows(ROWS, inputs), tensors.blocks(EXPERTS, outputs, inputs), COUNTS, BF16),
        product=Product(num_rows=ROWS, num_columns=outputs, depth=inputs, counts=COUNTS),
        tiling=tiling,
    )


def grouped_weights(name: str, inputs: int, outputs: int, tiling: Tiling | None = None) -> Launch:
    """Returns the product of the gradients of all experts' weights."""
    return launch(
        "gemm.triton_fp8",
        "grouped_weight_fp8",
        f"32 experts, {outputs} x {ROWS} x {inputs}, gradient, {name}",
        quantized_bytes(inputs + outputs, PADDED) + 4 * EXPERTS * inputs * outputs,
        "grouped_weight_fp8",
        lambda tensors: (tensors.columns(outputs, PADDED), tensors.columns(inputs, PADDED), COUNTS),
        product=Product(num_rows=outputs, num_columns=inputs, depth=ROWS, counts=COUNTS, is_gradient=True),
        tiling=tiling,
    )


GROUPED_GEMM = [
    *(grouped_rows(name, *sizes) for name, sizes in EXPERT_MAPS.items()),
    *(grouped_weights(name, *sizes) for name, sizes in EXPERT_MAPS.items()),
    *(
        grouped_rows(words(tiling), *sizes, tiling)
        for sizes in EXPERT_MAPS.values()
        for tiling in further(GROUPED_CANDIDATES)
    ),
    *(grouped_weights(words(tiling), *EXPERT_MAPS[GATE_UP], tiling) for tiling in further(WEIGHT_CANDIDATES)),
]

LAUNCHES = (
    *QUANTIZE,
    *PERMUTE,
    *ROUTER,
    *HEADS,
    *SWIGLU,
    *rms_norms(HIDDEN),
    *rms_norms(LATENT),
    CROSS_ENTROPY,
    ADAMW,
    *GEMM_FP8,
    *GROUPED_GEMM,
)
