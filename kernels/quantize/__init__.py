"""Quantizes numbers to FP8 or E5M6 with a scale for every 128, or 128 x 128, and restores them."""

# Shape legend: as in kernels/quantize/layout.py.

from kernels.operation import operation
from kernels.quantize import reference

quantize_1x128 = operation(reference.quantize_1x128, cuda="triton")
dequantize_1x128 = operation(reference.dequantize_1x128, cuda="triton")
quantize_columns = operation(reference.quantize_columns, cuda="triton_columns")
quantize_both = operation(reference.quantize_both, cuda="triton_columns")
requantize_columns = operation(reference.requantize_columns, cuda="triton_columns")
quantize_128x128 = operation(reference.quantize_128x128, cuda="triton")
transpose_blocks = operation(reference.transpose_blocks, cuda="triton")
pack_e5m6 = operation(reference.pack_e5m6, cuda="triton_e5m6")
unpack_e5m6 = operation(reference.unpack_e5m6, cuda="triton_e5m6")
