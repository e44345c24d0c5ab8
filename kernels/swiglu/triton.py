"""SwiGLU's gate and its backward, also between two FP8 products, in Triton; see reference.py.

All are memory-bound: each number is read once and written once. A program owns its tiles of all results, so there are
no atomics. Results are rounded only once, at the end.

    kernel         grid                                tile                accumulator            rounding
    swiglu,        A / block_rows * M / block_columns  rows x              float32 (float64 of    once, to nearest even,
    swiglu_backward                                    block_columns       float64) in registers  into the result's type
    quantize       A / block_rows * tiles of M         rows x 128 columns  float32 in registers;  once, to e4m3, by the
                                                       of M, and two of H  amax in int32          rule of quantize
    backward_codes A / block_rows * tiles of M         rows x 128 columns  float32 in registers;  once, to nearest even,
                                                       of M                sums of a row per      into the gradient's
                                                                           tile, then over tiles  type

Tiles of the same rows are adjacent in the grid, so that concurrent programs read memory sequentially. The sigmoid has
an exact division; `exp` is the hardware instruction, which differs from torch's by a few units in the last place of
float32. So a product close to a rounding tie may get the other code.

Tiles of M coincide with tiles of H if 128 divides M. Otherwise `quantize` reads the up values twice, the second time
from a cache, and `backward_codes` reads a scale for every up value.
"""

# Shape legend: as there, T tiles of M.

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_kernel
from kernels.operation import check_columns
from kernels.quantize.layout import ROWS_MIN_AMAX, TILE, Quantized, empty_quantized, num_tiles
from kernels.quantize.triton import compute_codes, compute_scales, largest_bits, tile_of_program
from kernels.swiglu.reference import check_backward, check_backward_from_codes, check_halves, check_weights, check_width


@triton.jit  # type: ignore[untyped-decorator]
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Computes 1 / (1 + exp(-x)), with the division rounded to nearest even; 0 and 1 for large magnitudes."""
    denominator = 1 + tl.exp(-x)
    if x.dtype == tl.float64:
        share = 1 / denominator
    else:
        share = tl.div_rn(tl.full(denominator.shape, 1.0, tl.float32), denominator)
    return share


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def swiglu_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Computes a tile of `out`."""
    # A program owns one tile: rows x columns of M.
    row, column, _ = tile_of_program(num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = (row < num_rows) & (column < num_columns)
    gates = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(WIDE)
    ups = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(WIDE)
    # silu(gate) * up, rounded once when it is stored.
    product = gates * sigmoid(gates) * ups
    tl.store(out + row * num_columns + column, product.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def swiglu_backward_kernel(
    grad: tl.tensor,
    hidden: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    grad_stride: tl.tensor,
    hidden_stride: tl.tensor,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Computes the same tile of the gate half and of the up half of `out`; columns are those of `grad`."""
    # A program owns the same rows x columns in both halves of H.
    row, column, _ = tile_of_program(num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = (row < num_rows) & (column < num_columns)
    grads = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(WIDE)
    # Gates are in columns 0 to M - 1 of a row of H, ups in the M columns after them.
    gate_places = hidden + row * hidden_stride + column
    gates = tl.load(gate_places, mask=inside, other=0.0).to(WIDE)
    ups = tl.load(gate_places + num_columns, mask=inside, other=0.0).to(WIDE)
    # d silu(g) / dg = s (1 + g (1 - s)), where s = sigmoid(g).
    share = sigmoid(gates)
    grad_gates = grads * ups * share * (1 + gates * (1 - share))
    out_places = out + row * num_columns * 2 + column
    tl.store(out_places, grad_gates.to(out.dtype.element_ty), mask=inside)
    tl.store(out_places + num_columns, (gates * share * grads).to(out.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor, *, block_rows: int = 4, block_columns: int = 512, num_warps: int = 4) -> Tensor:
    """Implements `reference.swiglu` for contiguous columns, in tiles of `block_rows` x `block_columns`."""
    check_halves("swiglu", gate, up)
    num_columns = gate.shape[-1]
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    gate_AM = gate.reshape(-1, num_columns)
    up_AM = up.reshape(-1, num_columns)
    check_columns("swiglu", gate=gate_AM, up=up_AM)
    blocks = (block_rows, min(block_columns, triton.next_power_of_2(num_columns)))
    launch_kernel(swiglu_kernel, (gate_AM, up_AM, out), (len(gate_AM), num_columns), blocks, num_warps=num_warps)
    return out


def swiglu_backward(
    grad_AM: Tensor, hidden_AH: Tensor, *, block_rows: int = 4, block_columns: int = 512, num_warps: int = 4
) -> Tensor:
    """Implements `reference.swiglu_backward` for contiguous columns; tiles as `swiglu`."""
    check_backward("swiglu_backward", grad_AM, hidden_AH)
    out_AH = torch.empty_like(hidden_AH, memory_format=torch.contiguous_format)
    if out_AH.numel() == 0:
        return out_AH
    check_columns("swiglu_backward", grad_AM=grad_AM, hidden_AH=hidden_AH)
    blocks = (block_rows, min(block_columns, triton.next_power_of_2(grad_AM.shape[1])))
    launch_kernel(swiglu_backward_kernel, (grad_AM, hidden_AH, out_AH), grad_AM.shape, blocks, num_warps=num_warps)
    return out_AH


@triton.jit  # type: ignore[untyped-decorator]
def _store_tile(
    codes: tl.tensor,
    scales: tl.tensor,
    values: tl.tensor,
    row: tl.tensor,
    tile: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    MIN_AMAX: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Quantizes and stores one tile of each row if it exists; values beyond the last column are zeros."""
    column = tile * TILE + tl.arange(0, TILE)[None, :]
    scale = compute_scales(largest_bits(values, 1), MIN_AMAX, POWER_OF_TWO)
    inside = (row < num_rows) & (column < num_columns)
    tl.store(codes + row * num_columns + column, compute_codes(values, scale, POWER_OF_TWO), mask=inside)
    # The second tile of H may lie beyond the last one, which has no scale to store.
    tiles = tl.cdiv(num_columns, TILE)
    tl.store(scales + row * tiles + tile, scale, mask=row < tl.where(tile < tiles, num_rows, 0))


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def swiglu_quantize_kernel(
    hidden: tl.tensor,
    weights: tl.tensor,
    gated_codes: tl.tensor,
    gated_scales: tl.tensor,
    hidden_codes: tl.tensor,
    hidden_scales: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    hidden_stride: tl.tensor,
    weights_stride: tl.tensor,
    HAS_WEIGHTS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    ALIGNED: tl.constexpr,
    MIN_AMAX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Computes one tile of the product, and quantizes its share of the hidden values, two tiles."""
    tiles = tl.cdiv(width, TILE)
    row, column, tile = tile_of_program(width, BLOCK_ROWS, TILE)
    # Tile t of M reads tiles t and t + T of H, so that every tile of H is read and quantized once.
    further = tile + tiles
    in_rows = row < num_rows
    further_column = further * TILE + tl.arange(0, TILE)[None, :]
    places = hidden + row * hidden_stride
    first = tl.load(places + column, mask=in_rows & (column < 2 * width), other=0.0).to(tl.float32)
    second = tl.load(places + further_column, mask=in_rows & (further_column < 2 * width), other=0.0).to(tl.float32)
    inside = in_rows & (column < width)
    # If 128 divides M, the second tile holds exactly the ups of the gates in the first one.
    ups = second if ALIGNED else tl.load(places + width + column, mask=inside, other=0.0).to(tl.float32)
    product = first * sigmoid(first) * ups
    if HAS_WEIGHTS:
        factors = tl.load(weights + row * weights_stride, mask=in_rows, other=0.0).to(tl.float32)
        product = product * factors
    # Without this, values of the next half would raise the largest magnitude of the last tile.
    product = tl.where(inside, product, 0.0)
    _store_tile(gated_codes, gated_scales, product, row, tile, num_rows, width, POWER_OF_TWO, MIN_AMAX, TILE)
    _store_tile(hidden_codes, hidden_scales, first, row, tile, num_rows, 2 * width, POWER_OF_TWO, MIN_AMAX, TILE)
    _store_tile(hidden_codes, hidden_scales, second, row, further, num_rows, 2 * width, POWER_OF_TWO, MIN_AMAX, TILE)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def swiglu_backward_codes_kernel(
    grad: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    weights: tl.tensor,
    grad_hidden: tl.tensor,
    gated: tl.tensor,
    grad_weights: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    grad_stride: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    weights_stride: tl.tensor,
    HAS_WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Computes a tile of the product and of both gradient halves, and its share of the weights' gradient."""
    tiles = tl.cdiv(width, TILE)
    row, column, tile = tile_of_program(width, BLOCK_ROWS, TILE)
    in_rows = row < num_rows
    inside = in_rows & (column < width)
    grads = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    code_places = codes + row * codes_stride + column
    row_scales = scales + row * scales_stride
    # One scale covers the tile of gates. That of an up value depends on its column unless 128 divides M.
    gate_scales = tl.load(row_scales + tile, mask=in_rows, other=0.0)
    if ALIGNED:
        up_scales = tl.load(row_scales + tile + tiles, mask=in_rows, other=0.0)
    else:
        up_scales = tl.load(row_scales + (width + column) // TILE, mask=inside, other=0.0)
    gates = tl.load(code_places, mask=inside, other=0.0).to(tl.float32) * gate_scales
    ups = tl.load(code_places + width, mask=inside, other=0.0).to(tl.float32) * up_scales
    # The product is computed again from the codes, as only gate and up were kept.
    share = sigmoid(gates)
    silu = gates * share
    product = silu * ups
    if HAS_WEIGHTS:
        # The gradient of a weight: this tile's part, A T. The launcher adds the tiles of a row in a fixed order.
        sums = tl.sum(tl.where(inside, product * grads, 0.0), axis=1, keep_dims=True)
        tl.store(grad_weights + row * tiles + tile, sums, mask=in_rows)
        factors = tl.load(weights + row * weights_stride, mask=in_rows, other=0.0).to(tl.float32)
        product = product * factors
        grads = grads * factors
    # As in `swiglu_backward_kernel`, in float32.
    grad_gates = grads * ups * share * (1 + gates * (1 - share))
    out_type = gated.dtype.element_ty
    tl.store(gated + row * width + column, product.to(out_type), mask=inside)
    out_places = grad_hidden + row * width * 2 + column
    tl.store(out_places, grad_gates.to(out_type), mask=inside)
    tl.store(out_places + width, (silu * grads).to(out_type), mask=inside)


def swiglu_quantize(
    hidden_AH: Tensor, weights_A: Tensor | None, *, power_of_two: bool, block_rows: int = 8, num_warps: int = 4
) -> tuple[Quantized, Quantized]:
    """Implements `reference.swiglu_quantize` for contiguous columns; `block_rows` rows per program."""
    size, hidden = hidden_AH.shape
    width = check_width("swiglu_quantize: hidden_AH", hidden)
    check_weights("swiglu_quantize", weights_A, hidden_AH)
    gated = empty_quantized(hidden_AH, size, width)
    cached = empty_quantized(hidden_AH, size, hidden)
    check_columns("swiglu_quantize", hidden_AH=hidden_AH)
    launch_kernel(
        swiglu_quantize_kernel,
        (hidden_AH, cached.scales if weights_A is None else weights_A, *gated, *cached),
        (size, width),
        (block_rows, TILE),
        weights_stride=1 if weights_A is None else weights_A.stride(0),
        HAS_WEIGHTS=weights_A is not None,
        POWER_OF_TWO=power_of_two,
        ALIGNED=width % TILE == 0,
        MIN_AMAX=ROWS_MIN_AMAX,
        num_warps=num_warps,
    )
    return gated, cached


def swiglu_backward_from_codes(
    grad_AM: Tensor, hidden: Quantized, weights_A: Tensor | None, *, block_rows: int = 8, num_warps: int = 4
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Implements `reference.swiglu_backward_from_codes` for contiguous columns."""
    size, width = grad_AM.shape
    check_backward_from_codes("swiglu_backward_from_codes", grad_AM, hidden, weights_A)
    grad_hidden_AH = grad_AM.new_empty(size, 2 * width)
    gated_AM = grad_AM.new_empty(size, width)
    sums_AT = None if weights_A is None else grad_AM.new_empty(size, num_tiles(width), dtype=torch.float32)
    check_columns("swiglu_backward_from_codes", grad_AM=grad_AM, codes=hidden.codes, scales=hidden.scales)
    weights = hidden.scales if weights_A is None else weights_A
    sums = hidden.scales if sums_AT is None else sums_AT
    launch_kernel(
        swiglu_backward_codes_kernel,
        (grad_AM, *hidden, weights, grad_hidden_AH, gated_AM, sums),
        (size, width),
        (block_rows, TILE),
        weights_stride=1 if weights_A is None else weights_A.stride(0),
        HAS_WEIGHTS=weights_A is not None,
        ALIGNED=width % TILE == 0,
        num_warps=num_warps,
    )
    return grad_hidden_AH, gated_AM, None if sums_AT is None else sums_AT.sum(1)
