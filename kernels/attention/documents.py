"""Documents of packed sequences: a token sees only tokens of the same document."""

# Shape legend: as in kernels/attention/__init__.py. N = B T, S documents of one call, L tokens of each.

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRun:
    """Consecutive documents of one length, in tokens of the flattened batch."""

    start: int
    length: int
    num_documents: int


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of one micro-batch; all layers share the object, which caches the masks that kernels need."""

    ids_BT: Tensor  # document of each token, int64; the tokens of a document are consecutive
    starts: Tensor  # first token of each document in the flattened batch, then the number of tokens, int32
    longest: int  # tokens of the longest document
    is_padding_BT: Tensor  # whether a token fills the rest of a sequence
    num_real: int  # documents that are not padding

    @classmethod
    def from_positions(cls, positions_BT: Tensor) -> "Documents":
        """Builds the documents from each token's position within its document.

        A document begins at each position that does not follow the position before. Padding, at position -1,
        becomes documents of one token each. Pass positions on the host and move the documents afterwards: this avoids a
        host sync.
        """
        # A token begins a document if its position does not follow that before it, or is 0 or padding.
        begins_BT = torch.ones_like(positions_BT)
        begins_BT[:, 1:] = (positions_BT[:, 1:] != positions_BT[:, :-1] + 1) | (positions_BT[:, 1:] <= 0)
        ends = torch.tensor([begins_BT.numel()], device=begins_BT.device)
        # Host syncs unless positions are on the host: nonzero, the longest document and the number of documents.
        starts = torch.cat((begins_BT.flatten().nonzero().flatten(), ends)).to(torch.int32)
        is_padding_BT = positions_BT < 0
        num_real = len(starts) - 1 - int(is_padding_BT.sum())
        return cls(begins_BT.cumsum(1), starts, int(starts.diff().max()), is_padding_BT, num_real)

    def to(self, device: torch.device) -> "Documents":
        """Returns the documents on a device."""
        moved = Documents(
            self.ids_BT.to(device),
            self.starts.to(device),
            self.longest,
            self.is_padding_BT.to(device),
            self.num_real,
        )
        if self.starts.device.type == "cpu":
            vars(moved)["first_tokens"] = self.first_tokens
        return moved

    def tensors(self) -> Iterator[Tensor]:
        """Yields all tensors of the object, including those of its cached masks."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                yield value
            elif not isinstance(value, int | tuple):  # biases by type, or a block mask
                parts = value if isinstance(value, dict) else vars(value)
                yield from (part for part in parts.values() if isinstance(part, Tensor))

    @cached_property
    def numbers_BT(self) -> Tensor:
        """Number of each token's document among those that are not padding, from 0; `num_real` for padding."""
        is_padding_BT = self.is_padding_BT
        # Numbers count documents that are not padding, over the flattened batch.
        begins_BT = self.ids_BT.diff(dim=1, prepend=torch.zeros_like(self.ids_BT[:, :1])) > 0
        numbers_N = (begins_BT & ~is_padding_BT).flatten().cumsum(0) - 1
        return numbers_N.view_as(is_padding_BT).masked_fill_(is_padding_BT, self.num_real)

    @cached_property
    def lengths(self) -> Tensor:
        """Number of tokens of each document that is no padding, by `numbers_BT`, then of all padding together."""
        numbers_N = self.numbers_BT.flatten()
        return numbers_N.new_zeros(self.num_real + 1).scatter_add_(0, numbers_N, torch.ones_like(numbers_N))

    @cached_property
    def first_tokens(self) -> tuple[int, ...]:
        """The numbers of `starts` on the host. No host sync if the documents were moved from there."""
        return tuple(self.starts.tolist())

    @cached_property
    def runs(self) -> tuple[DocumentRun, ...]:
        """Runs of consecutive documents of one length. A host sync unless the documents are on the host."""
        lengths, counts = torch.unique_consecutive(self.starts.diff(), return_counts=True)
        runs = list[DocumentRun]()
        start = 0
        for length, num_documents in zip(lengths.tolist(), counts.tolist(), strict=True):
            runs.append(DocumentRun(start=start, length=length, num_documents=num_documents))
            start += length * num_documents
        return tuple(runs)

    @cached_property
    def mask_B1TT(self) -> Tensor:
        """Boolean mask: True if the query (third dim) may see the key (fourth dim) of the same document."""
        ids_BT = self.ids_BT
        return (ids_BT[:, :, None] == ids_BT[:, None, :]).tril_()[:, None]

    def bias_B1TT(self, dtype: torch.dtype) -> Tensor:
        """Returns the mask as a bias of the scores, 0 or minus infinity: one tensor, which all layers share."""
        if dtype not in self._biases:
            zeros = torch.zeros(self.mask_B1TT.shape, dtype=dtype, device=self.ids_BT.device)
            self._biases[dtype] = zeros.masked_fill_(~self.mask_B1TT, -torch.inf)
        return self._biases[dtype]

    @cached_property
    def _biases(self) -> dict[torch.dtype, Tensor]:
        return {}

    @cached_property
    def block_mask(self) -> "BlockMask":
        """Mask for FlexAttention, by blocks of tokens."""
        from torch.nn.attention.flex_attention import create_block_mask

        ids_BT = self.ids_BT
        batch, size = ids_BT.shape

        def sees(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (ids_BT[b, query] == ids_BT[b, key])

        return create_block_mask(sees, batch, None, size, size, device=ids_BT.device)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_by_document(
    query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents
) -> Tensor:
    """Computes causal attention on a CPU, only the scores within documents, BHTV; see `CausalAttention`.

    Consecutive documents of one length are the sequences of one call of torch's flash kernel. A mask would cost the
    scores of all pairs of a packed sequence, and their memory. Saves its operands, its result and a float per query and
    head. Copies nothing if the heads of a token are side by side in memory and keys and values have the same width.
    """
    # The flash kernel requires one width; zeros change neither scores nor other values.
    width = max(query_BHTQ.shape[-1], value_BHTV.shape[-1])
    query, key, value = (
        operand if operand.shape[-1] == width else functional.pad(operand, (0, width - operand.shape[-1]))
        for operand in (query_BHTQ, key_BHTQ, value_BHTV)
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
        ctx.scale = scale
        ctx.runs = runs
        return mixed_BHTV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mixed, *log_sums = ctx.saved_tensors
        runs = _by_run(ctx.runs, grads[0], query, key, value, mixed)
        parts = [
            _flash_backward(*run_operands, sums_SHL, 0.0, True, scale=ctx.scale)
            for run_operands, sums_SHL in zip(runs, log_sums, strict=True)
        ]
        grads_by_operand = zip(*parts, strict=True)
        grad_query, grad_key, grad_value = (
            _merge(list(grads_of_runs), operand)
            for grads_of_runs, operand in zip(grads_by_operand, (query, key, value), strict=True)
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
