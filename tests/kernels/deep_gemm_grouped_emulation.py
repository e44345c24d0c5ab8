"""An emulation of the grouped products of the package `deep_gemm` in plain PyTorch, for machines without a Hopper GPU.

It replaces the two functions that are called, with their documented parameters (DeepGEMM 2, `csrc/apis/gemm.hpp`
and `tests/generators.py`), and refuses what the package refuses on Hopper: it proves layouts, groups and scales, and
nothing about the package's own kernels. Sums are taken in float64.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from tests.kernels.agreement_gemm import values

ALIGNMENT = 128
BLOCK_ROWS = 64
Operand = tuple[Tensor, Tensor]


class Calls:
    """Number of calls of each of the two kernels, and the rows that the first received."""

    def __init__(self) -> None:
        self.num_rows: list[int] = []
        self.num_weights = 0


def emulated(calls: Calls) -> ModuleType:
    """Yields the module that replaces the package in `sys.modules`."""

    def m_grouped_fp8_gemm_nt_contiguous(a: Operand, b: Operand, d: Tensor, grouped_layout: Tensor) -> None:
        assert type(a) is tuple
        assert type(b) is tuple
        (rows, depth), (num_groups, outputs, depth_too) = a[0].shape, b[0].shape
        calls.num_rows.append(rows)
        assert depth == depth_too
        assert min(rows, depth, outputs, num_groups) > 0
        _check_codes(a[0])
        _check_codes(b[0])
        assert a[1].dtype == b[1].dtype == torch.float32
        assert a[1].shape == (rows, -(-depth // 128))
        assert b[1].shape == (num_groups, -(-outputs // 128), -(-depth // 128))
        assert b[1].is_contiguous()
        assert d.shape == (rows, outputs)
        assert d.dtype == torch.bfloat16
        assert d.stride(1) == 1
        assert grouped_layout.dtype == torch.int32
        assert grouped_layout.is_contiguous()
        assert grouped_layout.shape == (rows,)
        d.fill_(torch.nan)
        groups = grouped_layout.tolist()
        for first in range(0, rows, ALIGNMENT):
            block = groups[first : first + ALIGNMENT]
            filling = block.count(-1)
            assert len(block) == ALIGNMENT, "groups must be filled up to multiples of 128 rows"
            assert block == [block[0]] * (ALIGNMENT - filling) + [-1] * filling
            # Whole blocks of filling are left out.
            part = slice(first, first + BLOCK_ROWS * -(-(ALIGNMENT - filling) // BLOCK_ROWS))
            matrix = values(b[0][block[0]], b[1][block[0]], 128)
            d[part] = (values(a[0][part], a[1][part], 1) @ matrix.t()).to(d.dtype)

    def k_grouped_fp8_gemm_nt_contiguous(
        a: Operand, b: Operand, d: Tensor, ks_cpu: Sequence[int], grouped_layout: Tensor, c: Tensor
    ) -> None:
        calls.num_weights += 1
        assert type(ks_cpu) is list
        assert grouped_layout.dtype == torch.int32
        assert grouped_layout.tolist() == ks_cpu
        num_groups, outputs, inputs = d.shape
        assert len(ks_cpu) == num_groups
        assert d.dtype == torch.float32
        assert d.is_contiguous()
        assert c is d
        assert all(size % 128 == 0 for size in ks_cpu)
        total = sum(ks_cpu)
        assert total > 0
        for (codes, scales), width in ((a, outputs), (b, inputs)):
            _check_codes(codes)
            assert codes.shape == (total * width,)
            assert scales.dtype == torch.float32
            assert scales.shape == (width, total // 128)
            assert scales.stride() == (1, width), "as the kernel reads them, without the package's own transposition"
        first = 0
        for group, size in enumerate(ks_cpu):
            left, right = (_group(*operand, first, size) for operand in (a, b))
            d[group] = (d[group].double() + left @ right.t()).float()
            first += size

    module = ModuleType("deep_gemm", "An emulation: see tests/kernels/deep_gemm_grouped_emulation.py.")
    module.m_grouped_fp8_gemm_nt_contiguous = m_grouped_fp8_gemm_nt_contiguous  # type: ignore[attr-defined]
    module.k_grouped_fp8_gemm_nt_contiguous = k_grouped_fp8_gemm_nt_contiguous  # type: ignore[attr-defined]
    return module


def _check_codes(codes: Tensor) -> None:
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.is_contiguous()
    assert codes.data_ptr() % 16 == 0


def _group(codes: Tensor, scales: Tensor, first: int, size: int) -> Tensor:
    """Values of a group, a row for each column of the operand."""
    width = len(scales)
    part = codes[first * width : (first + size) * width].view(width, size)
    return values(part, scales[:, first // 128 : (first + size) // 128], 1)
