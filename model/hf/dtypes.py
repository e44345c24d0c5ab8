"""Maps the types of stored tensors to torch's types."""

import torch

from model.hf.names import StoredDtype

TORCH_DTYPES: dict[StoredDtype, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
}


def stored_dtype(dtype: torch.dtype) -> StoredDtype:
    """Returns the name that safetensors uses for a torch type, or raises a `ValueError`."""
    for word, candidate in TORCH_DTYPES.items():
        if candidate == dtype:
            return word
    raise ValueError(f"dtype: must be one of {', '.join(map(str, TORCH_DTYPES.values()))}, is {dtype}")
