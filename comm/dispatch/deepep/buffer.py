"""Wraps DeepEP's buffer: the typed calls that the dispatcher makes, checks of rows, and their order.

It uses the interface of deep_ep 2.1.0 (github.com/deepseek-ai/DeepEP). `ElasticBuffer.dispatch` runs without expansion,
first with choices and weights and later with the cached `EPHandle`. `async_with_compute_stream` stays off, so every
call is ordered with the other work on the current stream.
"""

# Shape legend: R rows received, one for each token with experts here; A arrived rows, one for each of those experts; B
# bytes of a row with scales.

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.dispatch.deepep.package import BufferShape, DeepEPError
from comm.dispatch.local import ExpertOrder
from kernels.permute import permute

Rows = Tensor | tuple[Tensor, Tensor]  # rows in DeepEP's form: bfloat16, or codes of float8_e4m3fn and float32 scales


@dataclass(frozen=True, slots=True)
class DeepEPRoute:
    """Handle of DeepEP and the expert order of its received rows, which arrive in no fixed order.

    An atomic counter assigns a row's slot, and between nodes the rows of several sources mix.
    """

    handle: Any  # DeepEP's `EPHandle`; received rows keep their order as long as it is used
    order: ExpertOrder  # choices r * K + k of received rows in expert order; those of other ranks are dropped
    counts: tuple[int, ...]  # number of rows of each local expert

    @classmethod
    def of(cls, handle: Any, ids_RK: Tensor, num_sources: int) -> Self:
        """Sorts by local expert, then source rank, then token, without a host synchronization.

        Reads the handle's `num_recv_tokens_per_expert_list` and `recv_src_metadata`, whose first column is the source
        token of each row, below `num_sources`. `ids_RK` holds local experts, -1 if the expert is on another rank.
        """
        counts = tuple(handle.num_recv_tokens_per_expert_list)
        sources_R = handle.recv_src_metadata[:, 0].long()
        # Keys sort choices by local expert, then by source token; choices of other ranks come last. RK.
        keys_RK = torch.where(ids_RK < 0, len(counts), ids_RK.long()) * num_sources + sources_R[:, None]
        choices_A = keys_RK.flatten().argsort()[: sum(counts)]
        # The inverse: the position of each choice, -1 for choices of other ranks. RK.
        places_RK = torch.full_like(keys_RK, -1)
        places_RK.view(-1).scatter_(0, choices_A, torch.arange(len(choices_A), device=ids_RK.device))
        order = ExpertOrder(choices_A, choices_A // ids_RK.shape[1], places_RK)
        return cls(handle=handle, order=order, counts=counts)

    def copy_rows(self, rows: Rows) -> Tensor:
        """Copies received rows in expert order: AD, or AB as uint8 with codes, then scales."""
        if isinstance(rows, Tensor):
            return self.order.copy_rows(rows)
        parts = [part.view(torch.uint8) for part in rows]
        rows_AB = parts[0].new_empty(len(self.order.tokens_A), sum(part.shape[1] for part in parts))
        for part, out in zip(parts, rows_AB.split([part.shape[1] for part in parts], 1), strict=True):
            permute(part, self.order.tokens_A, out)
        return rows_AB


class Library(Protocol):
    """Part of the package `deep_ep`, or of an emulation, that is used here."""

    topk_idx_t: torch.dtype

    @property
    def ElasticBuffer(self) -> Callable[..., Any]:
        """Opens a buffer over a process group."""
        ...


@dataclass(frozen=True, slots=True)
class ReceivedRows:
    """Result of a first dispatch."""

    rows: Rows  # received rows
    ids_RK: Tensor  # local expert of each choice, -1 if the expert is on another rank
    weights_RK: Tensor | None  # routing weights, if they were sent
    handle: Any  # DeepEP's `EPHandle`


class ExpertBuffer:
    """Buffer of an expert group. All ranks of the group must make their calls in the same order."""

    device: torch.device  # device of the buffer
    ids_dtype: torch.dtype  # dtype of the choices that `dispatch` takes
    hops_between_nodes: bool  # whether a row is sent once to a node and forwarded there, instead of once to each rank

    def __init__(self, library: Library, group: ProcessGroup, num_experts: int, shape: BufferShape) -> None:
        """Opens the buffer. All ranks of the group call it together."""
        # DeepEP uses the group's NCCL communicator, which torch creates in the first collective (DeepEP issue 726).
        on_cuda = "nccl" in distributed.get_backend(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        distributed.all_reduce(torch.zeros(1, device=self.device), group=group)
        timeout_seconds = math.ceil(shape.timeout_seconds)
        self._shape = shape
        self._buffer = library.ElasticBuffer(
            group,
            num_max_tokens_per_rank=shape.max_tokens,
            hidden=shape.hidden_size,
            num_topk=shape.num_choices,
            num_cpu_timeout_secs=timeout_seconds,
            num_gpu_timeout_secs=timeout_seconds,
            explicitly_destroy=True,  # else an error would end in a barrier with ended ranks
        )
        self._num_experts = num_experts
        self._num_sms = self._buffer.get_theoretical_num_sms(num_experts, shape.num_choices)
        self.ids_dtype = library.topk_idx_t
        self.hops_between_nodes = self._buffer.get_logical_domain_size()[0] > 1

    def close(self) -> None:
        """Frees the memory. All ranks of the group call it together."""
        self._buffer.destroy()

    def check_plan(self, ids_TK: Tensor) -> None:
        """Raises DeepEPError if there are more tokens or experts per token than the buffer holds."""
        num_tokens, num_choices = ids_TK.shape
        if num_tokens > self._shape.max_tokens or num_choices > self._shape.num_choices:
            raise DeepEPError(
                f"dispatch: deepep's buffer holds {self._shape.max_tokens} tokens of a rank with "
                f"{self._shape.num_choices} experts each, has {num_tokens} tokens with {num_choices}"
            )

    def check_rows(self, rows: Tensor, name: str, *, may_be_codes: bool) -> None:
        """Raises DeepEPError unless rows are D bfloat16, or, if `may_be_codes`, D codes and scales as uint8."""
        hidden_size = self._shape.hidden_size
        scales_bytes = rows.shape[1] - hidden_size
        is_full = rows.dtype == torch.bfloat16 and scales_bytes == 0
        is_codes = may_be_codes and rows.dtype == torch.uint8 and scales_bytes > 0 and scales_bytes % 4 == 0
        if not is_full and not is_codes:
            or_codes = f", or {hidden_size} codes and float32 scales as uint8" if may_be_codes else ""
            raise DeepEPError(
                f"{name}: deepep sends rows of {hidden_size} bfloat16{or_codes}, has {rows.shape[1]} {rows.dtype}; "
                f"nearest valid: precision=bf16, or dispatch=two_hop, which sends any dtype"
            )

    def check_weights(self, weights: Tensor, name: str) -> None:
        """Raises DeepEPError if the weights are not float32."""
        if weights.dtype != torch.float32:
            raise DeepEPError(
                f"{name}: deepep sends float32 weights, has {weights.dtype}; nearest valid: precision=bf16, or "
                f"dispatch=two_hop, which sends any dtype"
            )

    def dispatch(self, rows: Tensor, ids_TK: Tensor, weights_TK: Tensor | None) -> ReceivedRows:
        """Exchanges counts, waits for them on the host, and sends each row to its experts' ranks."""
        received, ids_RK, weights_RK, handle, _ = self._buffer.dispatch(
            self._pack(rows),
            topk_idx=ids_TK,
            topk_weights=None if weights_TK is None else weights_TK.contiguous(),
            num_experts=self._num_experts,
            num_sms=self._num_sms,
        )
        return ReceivedRows(received, ids_RK, weights_RK, handle)

    def dispatch_again(self, rows: Tensor, handle: Any) -> Rows:
        """Sends other rows of the same tokens and dtype. They arrive in the same order."""
        # Without num_experts a cached dispatch fails (DeepEP pull request 685).
        received: Rows
        received, *_ = self._buffer.dispatch(
            self._pack(rows), num_experts=self._num_experts, num_sms=self._num_sms, handle=handle
        )
        return received

    def combine(self, rows_RD: Tensor, weights_RK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the sum of each token's rows, TD, and its experts' weights, TK (0 for an id of -1)."""
        rows_TD, weights_TK, _ = self._buffer.combine(rows_RD, handle, topk_weights=weights_RK, num_sms=self._num_sms)
        return rows_TD, weights_TK

    def _pack(self, rows: Tensor) -> Rows:
        if rows.dtype == torch.bfloat16:
            return rows.contiguous()
        codes, scales = rows.split([self._shape.hidden_size, rows.shape[1] - self._shape.hidden_size], 1)
        return codes.contiguous().view(torch.float8_e4m3fn), scales.contiguous().view(torch.float32)
