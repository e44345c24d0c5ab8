"""Launches of the Triton kernels with the shapes of DeepSeek-V3, and what each must move and compute at the least.

The same list is compiled without a GPU, and timed if there is one. On the CPU only shapes, types and strides of a
tensor matter: its memory is never touched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels.launch import Tiling
from kernels.quantize.layout import PackedE5M6, Quantized, QuantizedBlocks, QuantizedColumns, num_tiles

HIDDEN = 7168
DENSE_WIDTH = 18432
EXPERT_WIDTH = 2048
ATTENTION_WIDTH = 128 * 128
LATENT = 1536
VOCABULARY = 129280
TOKENS = 4096
TOP = 8
ROUTED_EXPERTS = 256
COUNTS = tuple(384 + 8 * (expert * 13 % 32) + (expert % 2) for expert in range(32))
"""Rows of 32 experts, 384 to 633 of them."""

Call = Callable[[], Any]
Prepare = Callable[[Any, "Tensors"], Call]


class Tensors:
    """Arguments for launches.

    Args:
        is_filled: whether they hold numbers, or only have a shape; by default on a GPU alone.
    """

    def __init__(self, device: torch.device, is_filled: bool | None = None) -> None:
        self.device = device
        self._is_filled = device.type == "cuda" if is_filled is None else is_filled
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Returns standard normal numbers."""
        made = torch.empty(*shape, dtype=dtype, device=self.device)
        if self._is_filled:
            for part in made.view(-1).split(2**28):
                part.copy_(torch.randn(part.shape, generator=self._generator, device=self.device))
        return made

    def codes(self, *shape: int) -> Tensor:
        """Codes as quantizing gives them: no NaN, every exponent."""
        return self.normal(*shape, dtype=torch.float8_e4m3fn)

    def scales(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns positive numbers near 1."""
        made = torch.empty(*shape, dtype=dtype, device=self.device)
        return made.uniform_(0.5, 1.5, generator=self._generator) if self._is_filled else made

    def indices(self, size: int, below: int) -> Tensor:
        """Returns int64 indices, each equally often, in random order."""
        if self._is_filled:
            return torch.randperm(size, generator=self._generator, device=self.device) % below
        return torch.empty(size, dtype=torch.int64, device=self.device)

    def rows(self, num_rows: int, num_columns: int) -> Quantized:
        """Rows in FP8."""
        return Quantized(self.codes(num_rows, num_columns), self.scales(num_rows, num_tiles(num_columns)))

    def packed(self, num_rows: int, num_columns: int) -> PackedE5M6:
        """Rows in 12 bits a number, an even number of them; one bit of the exponent is 0, so that all are finite."""
        codes = self.normal(num_rows, 3 * num_columns // 4).view(torch.uint8)
        if self._is_filled:
            codes &= 0xBB
        return PackedE5M6(codes, self.scales(num_rows, num_tiles(num_columns)))

    def blocks(self, *shape: int) -> QuantizedBlocks:
        """Returns one or several weights in FP8."""
        *leading, num_rows, num_columns = shape
        return QuantizedBlocks(self.codes(*shape), self.scales(*leading, num_tiles(num_rows), num_tiles(num_columns)))

    def columns(self, num_columns: int, num_padded: int) -> QuantizedColumns:
        """Rows in FP8, transposed."""
        return QuantizedColumns(self.codes(num_columns, num_padded), self.scales(num_columns, num_tiles(num_padded)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """The product that a launch computes, or the products of groups that follow each other in rows or depth.

    Attributes:
        depth: that is summed over; of all groups together in a weight's gradient.
        counts: rows, or depth, of each group; empty: one product.
        is_fp8: operands in FP8, else bf16.
    """

    num_rows: int
    num_columns: int
    depth: int
    counts: tuple[int, ...] = ()
    is_gradient: bool = False
    is_fp8: bool = True

    @property
    def operations(self) -> int:
        return 2 * self.num_rows * self.num_columns * self.depth


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        prepare: given a module, or what else has its functions, and a maker of tensors, gives a function that launches
            the kernel once.
        reference: module with the same function in plain PyTorch, if there is one.
        is_timed: whether it is a launch of its own, not one that a tuner tries.
    """

    module: str
    kernel: str
    shape: str
    bytes_moved: int
    prepare: Prepare
    reference: str | None = None
    product: Product | None = None
    is_timed: bool = True

    @property
    def name(self) -> str:
        """Name of the kernel, as in `quantize.quantize`."""
        folder, kernel = self.module.split(".")[1], self.kernel.removesuffix("_kernel")
        return f"{folder}.{kernel}"

    def call(self, device: torch.device, functions: object = None) -> Call:
        """Returns a function that launches the kernel once, with arguments on a device.

        Args:
            functions: what has them as attributes; by default the kernel's own module.
        """
        return self.prepare(import_module(self.module) if functions is None else functions, Tensors(device))


def quantized_bytes(num_rows: int, num_columns: int) -> int:
    return num_rows * (num_columns + 4 * num_tiles(num_columns))


def blocks_bytes(num_rows: int, num_columns: int) -> int:
    """Returns the bytes of codes and scales of a weight."""
    return num_rows * num_columns + 4 * num_tiles(num_rows) * num_tiles(num_columns)


def launch(
    module: str,
    kernel: str,
    shape: str,
    bytes_moved: int,
    function: str,
    arguments: Callable[[Tensors], tuple[Any, ...]],
    *,
    has_reference: bool = True,
    product: Product | None = None,
    tiling: Tiling | None = None,
    **keywords: Any,
) -> Launch:
    """Returns the launch by a function of a module of `kernels`; the reference's module has the same function.

    Args:
        tiling: that a tuner tries; None if the product chooses it itself.
    """
    if tiling is not None:
        keywords["tiling"] = tiling
    return Launch(
        module=f"kernels.{module}",
        kernel=f"{kernel}_kernel",
        shape=shape,
        bytes_moved=bytes_moved,
        prepare=lambda functions, tensors: partial(getattr(functions, function), *arguments(tensors), **keywords),
        reference=f"kernels.{module.partition('.')[0]}.reference" if has_reference else None,
        product=product,
        is_timed=tiling is None,
    )


def words(tiling: Tiling) -> str:
    """Returns the options in which a tiling differs."""
    specialized = ", loads apart" if tiling.specialize else ""
    return f"{tiling.rows} x {tiling.outputs} x {tiling.stages} stages, {tiling.warps} warps{specialized}"


def further(candidates: Sequence[Tiling]) -> list[Tiling]:
    """Returns the tilings whose machine code differs from that of the first and of each other.

    The number of programs is not a compile-time constant.
    """
    kinds = dict.fromkeys(replace(tiling, programs_per_sm=1) for tiling in candidates)
    return list(kinds)[1:]
