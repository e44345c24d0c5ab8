"""Multiplies matrices in FP8."""

from kernels.grouped_gemm import reference
from kernels.operation import operation

gemm_fp8 = operation(reference.gemm_fp8, cuda="tuned", hopper="deep_gemm")
gemm_fp8_columns = operation(reference.gemm_fp8_columns, cuda="tuned", hopper="deep_gemm")
