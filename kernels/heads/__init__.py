"""Turns queries, and arranges keys and values of latent attention for its kernel, and back."""

from typing import Any

import torch
from torch import Tensor

from kernels.heads import reference
from kernels.operation import operation


def _fits(first: Tensor | tuple[Tensor, Tensor], turns_TP: Tensor, *rest: Any) -> bool:
    # Positions are the same in all sequences, turns are in float32, and numbers of a head follow each other.
    tensors = (*first, *rest) if isinstance(first, tuple) else (first, *rest)
    is_dense = all(tensor.stride(-1) == 1 for tensor in tensors if isinstance(tensor, Tensor))
    return is_dense and turns_TP.dim() == 2 and turns_TP.dtype == torch.complex64


rotate_ = operation(reference.rotate_, cuda="triton", fits=_fits)
fill_keys_and_values = operation(reference.fill_keys_and_values, cuda="triton", fits=_fits)
keys_and_values_gradient = operation(reference.keys_and_values_gradient, cuda="triton", fits=_fits)
