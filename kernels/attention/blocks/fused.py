"""Attention of a block by torch's fused kernels, which return logarithms of sums of exponentials."""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention.blocks.reference import BlockKernel, Heads

_aten = torch.ops.aten
_EFFICIENT_MULTIPLE = 32  # the memory-efficient kernel pads logarithms to a multiple of this number of queries


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    mixed, log_sums = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)
    return mixed, log_sums


def _cpu_backward(grad: Tensor, heads: Heads, mixed: Tensor, log_sums: Tensor, scale: float, is_causal: bool) -> Heads:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
        grad, *heads, mixed, log_sums, 0.0, is_causal, scale=scale
    )


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    found = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)
    return found[0], found[1]


def _flash_backward(
    grad: Tensor, heads: Heads, mixed: Tensor, log_sums: Tensor, scale: float, is_causal: bool
) -> Heads:
    query, key, _ = heads
    # Without dropout the state of the random generator is not read; without packing there are no starts of sequences.
    seed = torch.zeros((), dtype=torch.int64, device=query.device)
    return _aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
        grad, *heads, mixed, log_sums, None, None, query.shape[2], key.shape[2], 0.0, is_causal, seed, seed, scale=scale
    )


def _efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    found = _aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, is_causal, scale=scale)
    return found[0], found[1][:, :, : query.shape[2]]


def _efficient_backward(
    grad: Tensor, heads: Heads, mixed: Tensor, log_sums: Tensor, scale: float, is_causal: bool
) -> Heads:
    padded = functional.pad(log_sums, (0, -log_sums.shape[-1] % _EFFICIENT_MULTIPLE), value=torch.inf)
    seed = torch.zeros((), dtype=torch.int64, device=grad.device)
    wants = [True, True, True, False]
    found = _aten._scaled_dot_product_efficient_attention_backward(
        grad, *heads, None, mixed, padded, seed, seed, 0.0, wants, is_causal, scale=scale
    )
    return found[0], found[1], found[2]


CPU_FLASH = BlockKernel(forward=_cpu_forward, backward=_cpu_backward, multiple=1)
CUDA_FLASH = BlockKernel(forward=_flash_forward, backward=_flash_backward, multiple=8)
CUDA_EFFICIENT = BlockKernel(forward=_efficient_forward, backward=_efficient_backward, multiple=8)
