"""Emulations of the packages of FlashAttention 2, 3 and 4 in plain PyTorch, for machines without CUDA.

They replace the two functions that are called, with their documented parameters (flash-attention, README,
`flash_attn_interface.py`, `hopper/flash_attn_interface.py` and `flash_attn/cute/interface.py`), and refuse what the
package would refuse: they prove layout, masks and padding, and nothing about the package's own kernels. Unlike the
packages they take any floating type.

Shape legend: B sequences, T tokens, H heads, D size of a head, N tokens of all sequences.
"""

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional


class Calls:
    def __init__(self) -> None:
        self.num_whole = 0
        self.num_packed = 0
        self.num_deterministic = 0


def emulated(calls: Calls) -> ModuleType:
    """Yields the module that replaces the package in `sys.modules`."""

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Tensor:
        calls.num_whole += 1
        calls.num_deterministic += deterministic
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
        deterministic: bool = False,
    ) -> Tensor:
        calls.num_packed += 1
        calls.num_deterministic += deterministic
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


def _of_one_width(*tensors: Tensor) -> list[Tensor]:
    width = max(tensor.shape[-1] for tensor in tensors)
    return [functional.pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors]


def emulated_3(calls: Calls) -> ModuleType:
    """Yields the module `flash_attn_interface`: values need not be as wide as keys."""

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> Tensor:
        whole = emulated(calls).flash_attn_func
        assert sm_margin == 0
        result: Tensor = whole(*_of_one_width(q, k, v), 0.0, softmax_scale, causal, deterministic)
        return result[..., : v.shape[-1]]

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> Tensor:
        packed = emulated(calls).flash_attn_varlen_func
        assert sm_margin == 0
        starts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        result: Tensor = packed(*_of_one_width(q, k, v), *starts, 0.0, softmax_scale, causal, deterministic)
        return result[..., : v.shape[-1]]

    module = ModuleType("flash_attn_interface", "An emulation: see tests/kernels/flash_attn_emulation.py.")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


def emulated_4(calls: Calls) -> ModuleType:
    """Yields the module `flash_attn.cute`: as version 3, without lengths, and with sums next to the result."""

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> tuple[Tensor, None]:
        return emulated_3(calls).flash_attn_func(q, k, v, softmax_scale, causal, deterministic), None

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> tuple[Tensor, None]:
        assert cu_seqlens_q is not None
        longest = int(cu_seqlens_q.diff().max())
        packed = emulated_3(calls).flash_attn_varlen_func
        starts = cu_seqlens_q, cu_seqlens_k, longest, longest
        return packed(q, k, v, *starts, softmax_scale, causal, deterministic), None

    module = ModuleType("flash_attn.cute", "An emulation: see tests/kernels/flash_attn_emulation.py.")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


PACKAGES = {"flash_attn": emulated, "flash_attn_interface": emulated_3, "flash_attn.cute": emulated_4}


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
