"""Tile sizes of FP8 products, TMA descriptors, persistent grids, and launches on meta tensors.

Every tiling gives the same numbers. TMA is the tensor memory accelerator of Hopper GPUs.
"""

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.operation import META_IS_CUDA, TILE, has_deep_gemm

SMALLEST_SIDE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Tile sizes of the result, and the resources of a program."""

    rows: int = 128  # rows per tile, a power of two; at least 64 for `wgmma` instructions
    outputs: int = 128  # columns per tile, a power of two, at most 128, so that one block scale covers a whole tile
    group: int = 8  # tile rows that are processed together, column by column
    specialize: bool = False  # whether some warps only load; `warps` must be 4 then, and twice as many multiply
    programs_per_sm: int = 1  # programs that run at the same time on a multiprocessor
    warps: int = 8  # warps per program
    stages: int = 4  # tiles of the operands in shared memory, in flight or in use

    def __post_init__(self) -> None:
        """Raises ValueError if a side is not a power of two in [16, 128]."""
        check_sides("Tiling", TILE, rows=self.rows, outputs=self.outputs)

    @property
    def resources(self) -> dict[str, Any]:
        """Arguments of a launch that are the same for all kernels with this tiling."""
        return resources(self.warps, self.stages) | {"SPECIALIZE": self.specialize}


def resources(warps: int, stages: int) -> dict[str, Any]:
    """Returns the arguments of a launch of a pipelined product."""
    return {"NUM_STAGES": stages, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def check_sides(subject: str, largest: int, **sides: int) -> None:
    """Raises ValueError if a side of a tile is not a power of two in [16, largest]."""
    for name, side in sides.items():
        if not SMALLEST_SIDE <= side <= largest or side & (side - 1):
            valid = (16, 32, 64, 128, 256)
            nearest = min((size for size in valid if size <= largest), key=lambda size: abs(size - side))
            rule = f"must be a power of two in [16, {largest}]"
            raise ValueError(f"{subject}: {name} {rule}, got {side}; nearest: {nearest}")


STORED_BY_DESCRIPTOR = Tiling()
# A scale per output in addition to one per row takes registers: under Triton 3.6 a tile of 128 x 128 spills.
OF_COLUMNS = Tiling(outputs=64)
# Addresses of a masked store take registers: a smaller tile avoids spills.
STORED_BY_MASK = Tiling(outputs=64)


ALIGNMENT_BYTES = 16
LARGEST_DESCRIBED_BYTES = 4  # of a number


def is_describable(matrix: Tensor) -> bool:
    """Whether tiles can be moved by descriptor: rows are contiguous, 16-byte aligned and do not overlap."""
    row_stride, column_stride = matrix.stride()
    in_order = column_stride == 1 and row_stride >= max(1, matrix.shape[1])
    row_bytes = row_stride * matrix.element_size()
    return in_order and row_bytes % ALIGNMENT_BYTES == 0 and matrix.data_ptr() % ALIGNMENT_BYTES == 0


def make_describable(matrices: Tensor) -> Tensor:
    """Returns a matrix, or matrices [E, N, K], if each `is_describable`, else a copy with aligned rows."""
    if matrices.dim() == 2:
        suits = is_describable(matrices)
    else:
        group_bytes = matrices.stride(0) * matrices.element_size()
        suits = is_describable(matrices[0]) and group_bytes > 0 and group_bytes % ALIGNMENT_BYTES == 0
    if suits:
        return matrices
    *leading, num_columns = matrices.shape
    granularity = ALIGNMENT_BYTES // matrices.element_size()
    width = granularity * max(1, -(-num_columns // granularity))
    return matrices.new_empty(*leading, width)[..., :num_columns].copy_(matrices)


def allow_descriptors(device: torch.device) -> None:
    """Lets this thread create descriptors in its next kernel launch; must be called before each launch."""
    if device.type == "meta":
        return
    import triton

    triton.set_allocator(partial(_workspace, device))


def _workspace(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    # Torch's allocator aligns to 512 bytes and reuses memory only on the same stream.
    return torch.empty(size, dtype=torch.int8, device=device)


def make_rows_contiguous(scales: Tensor) -> Tensor:
    """Returns scales if the columns of a row are contiguous, else a copy."""
    return scales if scales.stride(1) == 1 else scales.contiguous()


def count_programs(num_tiles: int, programs_per_sm: int, device: torch.device) -> int:
    """Returns how many programs share the tiles: as many as run at the same time, at most one per tile.

    They leave the reserved multiprocessors free: a program that waits for one would start after all others have ended.
    """
    if device.type != "cuda":
        return min(num_tiles, 2)  # Triton's interpreter runs one after the other; each one gets several tiles
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(num_tiles, programs_per_sm * (multiprocessors - reserved_sms(device)))


# Of the process, as the same numbers of torch and DeepGEMM are: autograd's threads launch kernels, too.
_RESERVED_SMS: dict[torch.device, int] = {}


def reserved_sms(device: torch.device) -> int:
    """Returns how many multiprocessors of a device `reserve_sms` keeps free."""
    return _RESERVED_SMS.get(device, 0)


def reserve_sms(device: torch.device, count: int) -> None:
    """Keeps multiprocessors of a GPU free of this process's products and attention."""
    if device.type != "cuda":
        return
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    if not 0 <= count < multiprocessors:
        raise ValueError(
            f"cluster.communication_sms: must be below the device's {multiprocessors} SMs, of which others compute, is "
            f"{count}; nearest valid: {multiprocessors - 1}"
        )
    _RESERVED_SMS[device] = count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that this may change
        torch._C._set_sm_carveout_experimental(count or None)
    if has_deep_gemm(device):
        import_module("deep_gemm").set_num_sms(multiprocessors - count)


def launch_kernel(
    kernel: Any,
    tensors: Sequence[Any],
    sizes: Sequence[int],
    blocks: Sequence[int] = (),
    *,
    grid: tuple[int, ...] | None = None,
    **values: Any,
) -> None:
    """Launches a kernel; on meta tensors, or without programs, it does nothing.

    A kernel's parameters are its tensors, its sizes, further numbers, and constants in capitals, in this order.
    Parameters without a value: `x_stride` is the stride of the rows of tensor `x`, `WIDE` the type for sums of numbers
    of the last tensor's type, and `TILE` is 128. Products and sums are fused only if `enable_fp_fusion` is given.

    Args:
        tensors: None for an absent one, except for the last, a result.
        sizes: integers that follow the tensors.
        blocks: rows and columns of a program, `BLOCK_ROWS` and `BLOCK_COLUMNS`.
        grid: if None, one program per block of the first sizes; blocks of the same rows are adjacent.
        values: other parameters and the launch's options by name.
    """
    if grid is None:
        grid = (math.prod(-(-size // block) for size, block in zip(sizes, blocks, strict=False)),)
    launcher = kernel[grid]
    result: Tensor = tensors[-1]
    if result.is_meta or 0 in grid:
        return
    from triton import language

    wide = language.float64 if result.dtype == torch.float64 else language.float32
    derived: dict[str, Any] = {"TILE": TILE, "WIDE": wide}
    derived |= zip(("BLOCK_ROWS", "BLOCK_COLUMNS"), blocks, strict=False)
    names = kernel.arg_names
    numbers: list[float] = []
    constants: dict[str, Any] = {"enable_fp_fusion": False} | values
    for name in names[len(tensors) + len(sizes) :]:
        if name.isupper():
            constants[name] = values[name] if name in values else derived[name]
        elif name in values:
            numbers.append(constants.pop(name))
        else:
            numbers.append(tensors[names.index(name.removesuffix("_stride"))].stride(0))
    launcher(*tensors, *sizes, *numbers, **constants)


def launch_tiles(kernel: Any, tensors: Sequence[Tensor], sizes: Sequence[int], tiling: Tiling, **values: Any) -> None:
    """Launches programs that share the tiles of a product, whose number is the last size."""
    device = tensors[0].device
    allow_descriptors(device)
    grid = (count_programs(sizes[-1], tiling.programs_per_sm, device),)
    launch_kernel(kernel, tensors, sizes, grid=grid, **tiling.resources, **values)


@contextmanager
def without_launches() -> Iterator[None]:
    """Makes operations on meta tensors allocate what they do on CUDA; they launch nothing.

    Outside, they run the references.
    """
    if find_spec("triton") is None:
        _import_launchers()
    token = META_IS_CUDA.set(True)
    try:
        yield
    finally:
        META_IS_CUDA.reset(token)


class _AbsentTriton(ModuleType):
    """Triton on a machine without it: its kernels can be defined, and launching one does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *operands: Any, **constants: Any) -> Any:
        return self

    def __getitem__(self, grid: Any) -> Any:
        return self

    def cdiv(self, numerator: int, denominator: int) -> int:
        return -(-numerator // denominator)

    def next_power_of_2(self, number: int) -> int:
        return 1 << max(0, number - 1).bit_length()


@cache
def _import_launchers() -> None:
    """Imports all modules of Triton's kernels on a machine without Triton, where nothing else can."""
    names = ("triton", "triton.language")
    sys.modules |= dict.fromkeys(names, _AbsentTriton("triton"))
    try:
        for path in sorted(Path(__file__).parent.glob("*/triton*.py")):
            import_module(f"kernels.{path.parent.name}.{path.stem}")
    finally:
        for name in names:
            del sys.modules[name]
