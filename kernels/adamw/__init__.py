"""Updates float32 weights by AdamW with both moments in bf16."""

from kernels.adamw import reference
from kernels.adamw.reference import compute_coefficients as compute_coefficients
from kernels.operation import operation

adamw_bf16_moments = operation(reference.adamw_bf16_moments, cuda="triton")
