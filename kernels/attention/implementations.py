"""Causal attention by fused kernels, and what they allocate. Imports torch late."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

from kernels.attention import (
    ATTENTION,
    SIZED,
    SIZED_CPU,
    SIZED_CUDA,
    SIZED_CUDA_PADDED,
    AttentionKernel,
    NoKernelError,
    module_folder,
)
from kernels.operation import HOPPER

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels.attention.documents import Documents

LOGGER = logging.getLogger("kernels")
_16_BITS = ("bfloat16", "float16")


def scaled_dot_product(
    query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
) -> Tensor:
    """Calls torch's `scaled_dot_product_attention`; on a CPU, each document is a separate sequence.

    On CUDA it takes the first kernel of `_SDPA_ORDER` that supports the operands: torch's order depends on versions.
    """
    from torch.nn import functional

    if documents is not None and query_BHTQ.device.type == "cpu":
        from kernels.attention.documents import attend_by_document

        return attend_by_document(query_BHTQ, key_BHTQ, value_BHTV, scale, documents)
    mask = None if documents is None else documents.bias_B1TT(query_BHTQ.dtype)
    attend = partial(functional.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None, scale=scale)
    if query_BHTQ.device.type != "cuda":
        return attend(query_BHTQ, key_BHTQ, value_BHTV)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([getattr(SDPBackend, name) for name in _SDPA_ORDER], set_priority=True):
        widths = query_BHTQ.shape[-1], value_BHTV.shape[-1]
        _log_sdpa(query_BHTQ.device, query_BHTQ.dtype, widths, is_masked=mask is not None)
        return attend(query_BHTQ, key_BHTQ, value_BHTV)


_SDPA_ORDER = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


@cache
def _log_sdpa(device: torch.device, dtype: torch.dtype, widths: tuple[int, int], *, is_masked: bool) -> None:
    """Logs which kernel torch takes for operands like these, once."""
    import torch
    from torch.nn.attention import SDPBackend

    query, key, value = (
        torch.empty(1, 1, 128, width, dtype=dtype, device=device, requires_grad=True)
        for width in (widths[0], widths[0], widths[1])
    )
    mask = torch.zeros(1, 1, 128, 128, dtype=dtype, device=device) if is_masked else None
    chosen = SDPBackend(torch._fused_sdp_choice(query, key, value, mask, 0.0, not is_masked))
    LOGGER.info("attention: sdpa, kernel %s for %s of %d and %d", chosen.name, dtype, *widths)


def flex(query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None) -> Tensor:
    """Calls torch's FlexAttention, compiled on CUDA, which skips fully masked blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def is_causal(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    if documents is None:
        size = query_BHTQ.shape[2]
        block_mask = create_block_mask(is_causal, None, None, size, size, device=query_BHTQ.device)
    else:
        block_mask = documents.block_mask
    call = _compiled_flex() if query_BHTQ.device.type == "cuda" else flex_attention
    mixed: Tensor = call(query_BHTQ, key_BHTQ, value_BHTV, block_mask=block_mask, scale=scale)
    return mixed


@cache
def _compiled_flex() -> Any:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flash_attention(
    query_BHTQ: Tensor,
    key_BHTQ: Tensor,
    value_BHTV: Tensor,
    scale: float,
    documents: Documents | None,
    *,
    package: str = "flash_attn",
) -> Tensor:
    """Calls a FlashAttention package, which takes documents as sequences of variable length."""
    module = import_module(package)
    rows_BTH = [tensor.transpose(1, 2) for tensor in (query_BHTQ, key_BHTQ, value_BHTV)]
    margin = {"sm_margin": _reserved_sms(query_BHTQ.device)}
    if documents is None:
        attend, offered = _offered(package, module.flash_attn_func)
        options = {name: value for name, value in margin.items() if name in offered}
        return _rows(attend(*rows_BTH, softmax_scale=scale, causal=True, **options)).transpose(1, 2)
    # All documents of the batch in one sequence, with the start of each.
    attend, offered = _offered(package, module.flash_attn_varlen_func)
    longest = documents.longest
    margin |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    packed = _rows(
        attend(
            *(tensor.flatten(0, 1) for tensor in rows_BTH),
            cu_seqlens_q=documents.starts,
            cu_seqlens_k=documents.starts,
            softmax_scale=scale,
            causal=True,
            **{name: value for name, value in margin.items() if name in offered},
        )
    )
    return packed.view(*rows_BTH[0].shape[:3], packed.shape[-1]).transpose(1, 2)


def _reserved_sms(device: torch.device) -> int:
    from kernels.launch import reserved_sms

    return reserved_sms(device)


def _rows(result: Any) -> Tensor:
    # Some versions return the logarithms of the sums, too.
    rows: Tensor = result[0] if isinstance(result, tuple) else result
    return rows


@cache
def _offered(package: str, function: Callable[..., Any]) -> tuple[Callable[..., Any], frozenset[str]]:
    """Returns a function with a deterministic backward, and its parameters; refuses one without."""
    names = frozenset(signature(function).parameters)
    if "deterministic" not in names:
        raise NoKernelError(
            f"attention: {package} must have a deterministic backward, this version has none; nearest valid: a newer "
            "version, or attention=sdpa"
        )
    LOGGER.info("attention: %s with a deterministic backward", package)
    return partial(function, deterministic=True), names


def _capability() -> int:
    """Returns the major compute capability of this process's GPU, 0 without one."""
    from torch import cuda

    return cuda.get_device_capability()[0] if cuda.is_available() else 0


@cache
def _has_deterministic_hopper_backward() -> bool:
    """Whether the installed FlashAttention-4 has one: earlier versions ignore the argument on Hopper."""
    folder = module_folder("flash_attn", "cute")
    path = None if folder is None else folder / "cute" / "flash_bwd_sm90.py"
    return path is not None and path.is_file() and "deterministic" in path.read_text(encoding="utf-8")


def _suits_flash_4(device: str, dtype: str, is_packed: bool) -> bool:
    capability = _capability() if device == "cuda" and dtype in _16_BITS else 0
    return capability > HOPPER or (capability == HOPPER and _has_deterministic_hopper_backward())


ATTENTION.register(
    "sdpa",
    AttentionKernel(
        summary="torch's scaled_dot_product_attention",
        attend=scaled_dot_product,
        has_blocks=True,
        is_deterministic=lambda device: device == "cpu",  # of a GPU's kernels, cuDNN's and others add in any order
        pads_values=lambda device: device == "cpu",
        makes_dense_masks=lambda device: device != "cpu",
        suits=lambda device, dtype, is_packed: True,
    ),
)
ATTENTION.register(
    "flex",
    AttentionKernel(
        summary="torch's FlexAttention, compiled",
        attend=flex,
        devices=("cuda",),
        suits=lambda device, dtype, is_packed: device == "cuda" and is_packed,
    ),
)
ATTENTION.register(
    "flash_attention",
    AttentionKernel(
        summary="FlashAttention-2, package flash_attn",
        attend=flash_attention,
        devices=("cuda",),
        package="flash_attn",
        module="flash_attn_2_cuda",  # FlashAttention-4 has the same import name
        dtypes=_16_BITS,
        is_deterministic=lambda device: True,
        pads_values=lambda device: True,
        # It is compiled for GPUs before Hopper, where torch has cuDNN's kernel except for documents.
        suits=lambda device, dtype, is_packed: (
            device == "cuda" and dtype in _16_BITS and (is_packed or _capability() < HOPPER)
        ),
    ),
)
ATTENTION.register(
    "flash_attention_4",
    AttentionKernel(
        summary="FlashAttention-4, package flash_attn.cute",
        attend=partial(flash_attention, package="flash_attn.cute"),
        devices=("cuda",),
        package="flash_attn.cute",
        dtypes=_16_BITS,
        is_deterministic=lambda device: _capability() != HOPPER or _has_deterministic_hopper_backward(),
        suits=_suits_flash_4,
    ),
)
ATTENTION.register(
    "flash_attention_3",
    AttentionKernel(
        summary="FlashAttention-3, package flash_attn_interface",
        attend=partial(flash_attention, package="flash_attn_interface"),
        devices=("cuda",),
        package="flash_attn_interface",
        dtypes=_16_BITS,
        is_deterministic=lambda device: True,
        suits=lambda device, dtype, is_packed: device == "cuda" and dtype in _16_BITS and _capability() == HOPPER,
    ),
)


def _on_cpu(
    query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
) -> Tensor:
    import torch

    results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_BHTQ, key_BHTQ, value_BHTV, 0.0, True, scale=scale
    )
    mixed_BHTV: Tensor = results[0]
    return mixed_BHTV


def _on_cuda(
    query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
) -> Tensor:
    import torch

    # Keeps as much as the other kernels, and takes values that are not as wide as keys.
    results = torch.ops.aten._scaled_dot_product_efficient_attention(
        query_BHTQ, key_BHTQ, value_BHTV, None, True, 0.0, True, scale=scale
    )
    mixed_BHTV: Tensor = results[0]
    return mixed_BHTV


SIZED.register(SIZED_CPU, AttentionKernel(summary="sizes on a CPU", attend=_on_cpu, pads_values=lambda device: True))
SIZED.register(SIZED_CUDA, AttentionKernel(summary="sizes on CUDA", attend=_on_cuda))
SIZED.register(
    SIZED_CUDA_PADDED, AttentionKernel(summary="sizes on CUDA", attend=_on_cuda, pads_values=lambda device: True)
)
