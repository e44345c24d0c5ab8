"""Multiplies matrices in FP8, and rows sorted by group with one matrix per group."""

from kernels.gemm import reference
from kernels.operation import operation

gemm_fp8 = operation(reference.gemm_fp8, cuda="tuned", hopper="deep_gemm")
gemm_fp8_columns = operation(reference.gemm_fp8_columns, cuda="tuned", hopper="deep_gemm")
grouped_rows_fp8 = operation(reference.grouped_rows_fp8, cuda="tuned", hopper="deep_gemm")
grouped_weight_fp8 = operation(reference.grouped_weight_fp8, cuda="tuned", hopper="deep_gemm")
