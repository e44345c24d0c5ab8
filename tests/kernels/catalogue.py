"""Every launch that is compiled and timed."""

from tests.kernels.launches_adamw import ADAMW
from tests.kernels.launches_fused import CROSS_ENTROPY, RMS_NORM, SWIGLU
from tests.kernels.launches_grouped import GROUPED_GEMM
from tests.kernels.launches_products import GEMM_FP8
from tests.kernels.launches_quantize import PERMUTE, QUANTIZE

LAUNCHES = (*QUANTIZE, *PERMUTE, *SWIGLU, *RMS_NORM, *CROSS_ENTROPY, *ADAMW, *GEMM_FP8, *GROUPED_GEMM)
