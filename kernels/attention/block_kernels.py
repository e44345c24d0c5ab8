"""Attention of a block: by its definition, a few queries at a time, and by torch's fused kernels.

All return the logarithm of each query's sum of exponentials. The definition never stores the scores of all pairs.
"""

# Shape legend: B sequences, T tokens, H heads, Q size of a query or key, V size of a value, S sequences of one call, L
# queries and K keys of each.

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_MOST_SCORES = 2**24  # scores that are in memory at a time

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values: SHLQ, SHKQ, SHKV

BlockForward = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
"""Forward of a block; see `forward`."""

BlockBackward = Callable[[Tensor, Heads, Tensor, Tensor, float, bool], Heads]  # backward of a block; see `backward`


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockKernel:
    """Forward and backward of a block."""

    forward: BlockForward
    backward: BlockBackward
    multiple: int  # queries, keys and values are padded to one width, a multiple of this; 0: they are not padded

    def widths(self, key: int, value: int) -> tuple[int, int]:
        """Returns the widths of keys and values in memory, from those of the model."""
        if self.multiple == 0:
            return key, value
        return (-(-max(key, value) // self.multiple) * self.multiple,) * 2


def forward(
    query_SHLQ: Tensor, key_SHKQ: Tensor, value_SHKV: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Returns the mixed values, SHLV, and logarithms of sums of exponentials, SHL, in float32 or wider."""
    mixed = []
    log_sums = []
    for rows in _parts(query_SHLQ, key_SHKQ):
        scores_SHlK = _scores(query_SHLQ, key_SHKQ, scale, rows, is_causal=is_causal)
        log_sums_SHl = scores_SHlK.logsumexp(-1)
        shares_SHlK = (scores_SHlK - log_sums_SHl[..., None]).exp()
        mixed.append(shares_SHlK @ _wide(value_SHKV))
        log_sums.append(log_sums_SHl)
    return torch.cat(mixed, 2).to(value_SHKV.dtype), torch.cat(log_sums, 2)


def backward(
    grad_SHLV: Tensor, heads: Heads, mixed_SHLV: Tensor, log_sums_SHL: Tensor, scale: float, is_causal: bool
) -> Heads:
    """Returns the gradients of `heads`, given values and logarithms that are merged over all blocks."""
    query, key, value = heads
    grad_query, grad_key, grad_value = (torch.zeros_like(_wide(operand)) for operand in heads)
    for rows in _parts(query, key):
        scores_SHlK = _scores(query, key, scale, rows, is_causal=is_causal)
        shares_SHlK = (scores_SHlK - log_sums_SHL[..., rows, None]).exp()
        grad_SHlV = _wide(grad_SHLV[:, :, rows])
        # Softmax over all blocks: a score's slope is its share times how much its value exceeds the mean.
        mean_SHl1 = (grad_SHlV * _wide(mixed_SHLV[:, :, rows])).sum(-1, keepdim=True)
        slopes_SHlK = shares_SHlK * (grad_SHlV @ _wide(value).mT - mean_SHl1) * scale
        grad_query[:, :, rows] = slopes_SHlK @ _wide(key)
        grad_key += slopes_SHlK.mT @ _wide(query[:, :, rows])
        grad_value += shares_SHlK.mT @ grad_SHlV
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _parts(query_SHLQ: Tensor, key_SHKQ: Tensor) -> Iterator[slice]:
    sequences, heads, queries, _ = query_SHLQ.shape
    step = max(1, _MOST_SCORES // max(1, sequences * heads * key_SHKQ.shape[2]))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))


def _scores(query: Tensor, key: Tensor, scale: float, rows: slice, *, is_causal: bool) -> Tensor:
    scores_SHlK = _wide(query[:, :, rows]) @ _wide(key).mT * scale
    if is_causal:
        places = torch.arange(key.shape[2], device=key.device)
        scores_SHlK.masked_fill_(places[rows, None] < places, -torch.inf)
    return scores_SHlK


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


REFERENCE = BlockKernel(forward=forward, backward=backward, multiple=0)  # works on every device and in every type


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
    results = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)
    return results[0], results[1]


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
    results = _aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, is_causal, scale=scale)
    return results[0], results[1][:, :, : query.shape[2]]


def _efficient_backward(
    grad: Tensor, heads: Heads, mixed: Tensor, log_sums: Tensor, scale: float, is_causal: bool
) -> Heads:
    padded = functional.pad(log_sums, (0, -log_sums.shape[-1] % _EFFICIENT_MULTIPLE), value=torch.inf)
    seed = torch.zeros((), dtype=torch.int64, device=grad.device)
    wants = [True, True, True, False]
    grads = _aten._scaled_dot_product_efficient_attention_backward(
        grad, *heads, None, mixed, padded, seed, seed, 0.0, wants, is_causal, scale=scale
    )
    return grads[0], grads[1], grads[2]


CPU_FLASH = BlockKernel(forward=_cpu_forward, backward=_cpu_backward, multiple=1)
CUDA_FLASH = BlockKernel(forward=_flash_forward, backward=_flash_backward, multiple=8)
CUDA_EFFICIENT = BlockKernel(forward=_efficient_forward, backward=_efficient_backward, multiple=8)
