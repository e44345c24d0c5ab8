"""Applies the SwiGLU gate to hidden values, in the rows' type or to FP8, and computes gradients."""

from kernels.operation import operation
from kernels.swiglu import reference

swiglu = operation(reference.swiglu, cuda="triton")
swiglu_backward = operation(reference.swiglu_backward, cuda="triton")
swiglu_quantize = operation(reference.swiglu_quantize, cuda="triton")
swiglu_backward_from_codes = operation(reference.swiglu_backward_from_codes, cuda="triton")
