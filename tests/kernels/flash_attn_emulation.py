"""An emulation of the package `flash_attn` in plain PyTorch, for machines without CUDA.

It replaces the two functions that are called, with their documented parameters (flash-attention 2, README and
`flash_attn_interface.py`), and refuses what the package would refuse: it proves layout, masks and padding, and nothing
about the package's own kernels. Unlike the package it takes any floating type.

Shape legend: B sequences, T tokens, H heads, D size of a head, N tokens of all sequences.
"""

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor


class Calls:
    def __init__(self) -> None:
        self.num_whole = 0
        self.num_packed = 0


def emulated(calls: Calls) -> ModuleType:
    """Yields the module that replaces the package in `sys.modules`."""

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        calls.num_whole += 1
        assert q.dim() == 4
        _check(q, k, v, dropout_p, causal)
        assert softmax_scale is not None
        return torch.stack([_attend(*each, softmax_scale) for each in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        calls.num_packed += 1
        assert q.dim() == 3
        _check(q, k, v, dropout_p, causal)
        assert softmax_scale is not None
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        ends = cu_seqlens_q.tolist()
        assert (ends[0], ends[-1]) == (0, len(q))
        lengths = [end - start for start, end in pairwise(ends)]
        assert type(max_seqlen_q) is int
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([_attend(*each, softmax_scale) for each in parts])

    module = ModuleType("flash_attn", "An emulation: see tests/kernels/flash_attn_emulation.py.")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


def _check(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, causal: bool) -> None:
    assert q.shape == k.shape == v.shape, "the package requires values as wide as keys"
    assert q.shape[-1] <= 256
    assert all(each.stride(-1) == 1 for each in (q, k, v))
    assert dropout_p == 0
    assert causal


def _attend(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, scale: float) -> Tensor:
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THD, k_THD) * scale
    later_TT = torch.ones(len(q_THD), len(q_THD), dtype=torch.bool).triu(1)
    shares_HTT = scores_HTT.masked_fill(later_TT, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", shares_HTT, v_THD)
