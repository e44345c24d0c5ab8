"""The functions that a model in FP8 is computed with, by the module of their reference and of their Triton kernel."""

FP8_FUNCTIONS = {
    "quantize_1x128": ("kernels.quantize.reference", "kernels.quantize.triton"),
    "quantize_columns": ("kernels.quantize.reference_columns", "kernels.quantize.triton_columns"),
    "requantize_columns": ("kernels.quantize.reference_columns", "kernels.quantize.triton_columns"),
    "quantize_128x128": ("kernels.quantize.reference", "kernels.quantize.triton"),
    "transpose_blocks": ("kernels.quantize.reference", "kernels.quantize.triton"),
    "pack_e5m6": ("kernels.quantize.reference", "kernels.quantize.triton_e5m6"),
    "unpack_e5m6": ("kernels.quantize.reference", "kernels.quantize.triton_e5m6"),
    "gemm_fp8": ("kernels.gemm_fp8.reference", "kernels.gemm_fp8.tuned"),
    "gemm_fp8_columns": ("kernels.gemm_fp8.reference", "kernels.gemm_fp8.tuned"),
    "grouped_rows_fp8": ("kernels.grouped_gemm.reference", "kernels.grouped_gemm.tuned"),
    "grouped_weight_fp8": ("kernels.grouped_gemm.reference", "kernels.grouped_gemm.tuned"),
    "swiglu_quantize": ("kernels.swiglu.reference", "kernels.swiglu.triton_fp8"),
    "swiglu_backward_from_codes": ("kernels.swiglu.reference", "kernels.swiglu.triton_fp8"),
    "rms_norm_quantize": ("kernels.rms_norm.reference", "kernels.rms_norm.triton_fp8"),
    "rms_norm_backward_from_codes": ("kernels.rms_norm.reference", "kernels.rms_norm.triton_fp8"),
}
