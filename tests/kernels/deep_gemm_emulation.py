"""An emulation of the package `deep_gemm` in plain PyTorch, for machines without a Hopper GPU.

It replaces the one function that is called, with its documented parameters (DeepGEMM 2, `csrc/apis/gemm.hpp`),
and refuses what the package refuses on Hopper: it proves layouts and scales, and nothing about the package's own
kernels. Sums are taken in float64.
"""

from types import ModuleType

import torch
from torch import Tensor

Operand = tuple[Tensor, Tensor]


class Calls:
    """Number of calls of each of the package's two kernels.

    One takes scales by rows and blocks, the other by rows on both sides.
    """

    def __init__(self) -> None:
        self.num_blocks = 0
        self.num_rows = 0


def emulated(calls: Calls) -> ModuleType:
    """Yields the module that replaces the package in `sys.modules`."""

    def fp8_gemm_nt(
        a: Operand,
        b: Operand,
        d: Tensor,
        c: Tensor | None = None,
        recipe: tuple[int, int, int] | None = None,
        compiled_dims: str = "nk",
        disable_ue8m0_cast: bool = False,
    ) -> None:
        assert type(a) is tuple
        assert type(b) is tuple
        (rows, depth), (outputs, depth_too) = a[0].shape, b[0].shape
        assert depth == depth_too
        assert d.shape == (rows, outputs)
        assert d.stride(1) == 1
        assert d.stride(0) * d.element_size() % 16 == 0
        rows_to_a_scale, outputs_to_a_scale, depth_to_a_scale = recipe or (1, 128, 128)
        assert depth_to_a_scale == 128
        _check_operand(*a, rows_to_a_scale)
        _check_operand(*b, outputs_to_a_scale)
        if outputs_to_a_scale == 1:
            calls.num_rows += 1
            assert d.dtype == torch.float32
            assert c is not None
            assert c.dtype == d.dtype
            if c is not d:
                d.copy_(c)
            assert a[0].is_contiguous()
            assert b[0].is_contiguous()
        else:
            calls.num_blocks += 1
            assert d.dtype == torch.bfloat16
            assert c is None
            assert b[1].is_contiguous() or b[1].t().is_contiguous()
        total = _values(*a, rows_to_a_scale) @ _values(*b, outputs_to_a_scale).t()
        d.copy_(total if c is None else d.double() + total)

    module = ModuleType("deep_gemm", "An emulation: see tests/kernels/deep_gemm_emulation.py.")
    module.fp8_gemm_nt = fp8_gemm_nt  # type: ignore[attr-defined]
    return module


def _check_operand(codes: Tensor, scales: Tensor, rows_to_a_scale: int) -> None:
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.stride(1) == 1, "on Hopper K must be contiguous"
    assert codes.stride(0) % 16 == 0
    assert codes.data_ptr() % 16 == 0
    assert scales.dtype == torch.float32
    assert scales.shape == (-(-codes.shape[0] // rows_to_a_scale), -(-codes.shape[1] // 128))


def _values(codes: Tensor, scales: Tensor, rows_to_a_scale: int) -> Tensor:
    rows, depth = codes.shape
    spread = scales.double().repeat_interleave(128, 1)[:, :depth].repeat_interleave(rows_to_a_scale, 0)[:rows]
    return codes.double() * spread
