"""Causal attention on a CPU that computes only the scores within documents.

Consecutive documents of one length are the sequences of one call of torch's flash kernel, on views of the packed
tensors. A mask would cost the scores of all pairs of a packed sequence, and their memory.
"""

# Shape legend: as in kernels/attention/__init__.py. N = B T, S documents of one call, L tokens of each.

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention.documents import DocumentRun, Documents

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_by_document(
    query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents
) -> Tensor:
    """Computes causal attention within each document, BHTV; see `CausalAttention`.

    Saves its operands, its result and a float per query and head. Copies nothing if the heads of a token are side by
    side in memory and keys and values have the same width.
    """
    # The flash kernel requires one width; zeros change neither scores nor other values.
    width = max(query_BHTQ.shape[-1], value_BHTV.shape[-1])
    query, key, value = (
        each if each.shape[-1] == width else functional.pad(each, (0, width - each.shape[-1]))
        for each in (query_BHTQ, key_BHTQ, value_BHTV)
    )
    mixed: Tensor = _AttendByDocument.apply(query, key, value, scale, documents.runs)  # type: ignore[no-untyped-call]
    return mixed[..., : value_BHTV.shape[-1]]


class _AttendByDocument(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, runs: tuple[DocumentRun, ...]
    ) -> Tensor:
        # Each part: values SHLV, and the logarithm of the sum of exponentials of a query's scores, SHL.
        parts = [_flash(*heads, 0.0, True, scale=scale) for heads in _by_run(runs, query, key, value)]
        mixed_BHTV = _merge([part[0] for part in parts], value)
        ctx.save_for_backward(query, key, value, mixed_BHTV, *(part[1] for part in parts))
        ctx.scale, ctx.runs = scale, runs
        return mixed_BHTV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mixed, *log_sums = ctx.saved_tensors
        runs = _by_run(ctx.runs, grads[0], query, key, value, mixed)
        parts = [
            _flash_backward(*given, sums_SHL, 0.0, True, scale=ctx.scale)
            for given, sums_SHL in zip(runs, log_sums, strict=True)
        ]
        grad_query, grad_key, grad_value = (
            _merge(list(each), like) for each, like in zip(zip(*parts, strict=True), (query, key, value), strict=True)
        )
        return grad_query, grad_key, grad_value, None, None


def _by_run(runs: tuple[DocumentRun, ...], *tensors_BHTV: Tensor) -> Iterator[list[Tensor]]:
    """Yields, for each run of documents, the rows of each tensor, SHLV; views as in `attend_by_document`."""
    rows_NHV = [tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors_BHTV]
    for run in runs:
        size = run.num_documents * run.length
        yield [
            rows[run.start : run.start + size].unflatten(0, (run.num_documents, run.length)).transpose(1, 2)
            for rows in rows_NHV
        ]


def _merge(parts_SHLV: list[Tensor], like_BHTV: Tensor) -> Tensor:
    """Reverses `_by_run` for one tensor; a single part is not copied."""
    rows_NHV = [part.transpose(1, 2).flatten(0, 1) for part in parts_SHLV]
    whole_NHV = rows_NHV[0] if len(rows_NHV) == 1 else torch.cat(rows_NHV)
    batch, _, tokens, _ = like_BHTV.shape
    return whole_NHV.view(batch, tokens, *whole_NHV.shape[1:]).transpose(1, 2)
