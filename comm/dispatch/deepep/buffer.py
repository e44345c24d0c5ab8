"""DeepEP's buffer with a typed face: the calls that the dispatcher makes, and the rows that they can move.

For the interface of deep_ep 2.1.0 (github.com/deepseek-ai/DeepEP): `ElasticBuffer.dispatch` without expansion, with
choices and weights first and the cached `EPHandle` later, and `ElasticBuffer.combine`. `async_with_compute_stream`
stays off, so every call runs behind what the current stream holds and before what comes next on it.

Shape legend: T tokens of this rank, K experts per token, R rows received, D hidden size, B bytes of a row with scales.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.dispatch.deepep.package import BufferShape, DeepEPError
from comm.dispatch.deepep.route import Rows


class Library(Protocol):
    """What is used of the package `deep_ep`, or of an emulation."""

    topk_idx_t: torch.dtype

    @property
    def ElasticBuffer(self) -> Callable[..., Any]:
        """Opens a buffer over a process group."""
        ...


@dataclass(frozen=True, slots=True)
class ReceivedRows:
    """What a first dispatch brings: rows, local experts (RK, -1 elsewhere), weights (RK) if sent, and the handle."""

    rows: Rows
    ids_RK: Tensor
    weights_RK: Tensor | None
    handle: Any


class ExpertBuffer:
    """One buffer of an expert group, for calls in one order on all its ranks.

    Attributes:
        device: that holds it.
        ids_dtype: of the choices that `dispatch` takes.
        hops_between_nodes: a row crosses to a node once and is handed on there, instead of once to each rank.
    """

    device: torch.device
    ids_dtype: torch.dtype
    hops_between_nodes: bool

    def __init__(self, library: Library, group: ProcessGroup, num_experts: int, shape: BufferShape) -> None:
        """Opens the buffer; all ranks of the group together."""
        # DeepEP takes over the group's NCCL communicator, which torch opens at the first collective (DeepEP issue 726).
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
            explicitly_destroy=True,  # else an error would end in a barrier with ranks that are gone
        )
        self._num_experts = num_experts
        self._num_sms = self._buffer.get_theoretical_num_sms(num_experts, shape.num_choices)
        self.ids_dtype = library.topk_idx_t
        self.hops_between_nodes = self._buffer.get_logical_domain_size()[0] > 1

    def close(self) -> None:
        """Frees the memory; all ranks together."""
        self._buffer.destroy()

    def check_plan(self, ids_TK: Tensor) -> None:
        """Refuses more than the buffer holds.

        Raises:
            DeepEPError: too many tokens, or experts per token.
        """
        num_tokens, num_choices = ids_TK.shape
        if num_tokens > self._shape.max_tokens or num_choices > self._shape.num_choices:
            raise DeepEPError(
                f"dispatch: deepep's buffer holds {self._shape.max_tokens} tokens of a rank with "
                f"{self._shape.num_choices} experts each, got {num_tokens} tokens with {num_choices}"
            )

    def check_rows(self, rows: Tensor, name: str, *, may_be_codes: bool) -> None:
        """Refuses rows that DeepEP does not move.

        Args:
            rows: bfloat16, D columns; or as uint8, B columns: D codes of float8_e4m3fn, then float32 scales.
            name: of the exchange, for the message.
            may_be_codes: whether uint8 is allowed.

        Raises:
            DeepEPError: of another type or width.
        """
        hidden_size = self._shape.hidden_size
        scales_bytes = rows.shape[1] - hidden_size
        is_full = rows.dtype == torch.bfloat16 and scales_bytes == 0
        is_codes = may_be_codes and rows.dtype == torch.uint8 and scales_bytes > 0 and scales_bytes % 4 == 0
        if not is_full and not is_codes:
            or_codes = f", or {hidden_size} codes and float32 scales as uint8" if may_be_codes else ""
            raise DeepEPError(
                f"{name}: deepep moves rows of {hidden_size} bfloat16{or_codes}, got {rows.shape[1]} {rows.dtype}; "
                f"nearest valid: precision=bf16, or dispatch=two_hop, which moves any type"
            )

    def check_weights(self, weights: Tensor, name: str) -> None:
        """Refuses weights that DeepEP does not move.

        Raises:
            DeepEPError: other than float32.
        """
        if weights.dtype != torch.float32:
            raise DeepEPError(
                f"{name}: deepep moves float32 weights, got {weights.dtype}; nearest valid: precision=bf16, or "
                f"dispatch=two_hop, which moves any type"
            )

    def dispatch(self, rows: Tensor, ids_TK: Tensor, weights_TK: Tensor | None) -> ReceivedRows:
        """Exchanges counts, waits for them on the host, and sends each row to every rank with experts of its token.

        Args:
            rows: as `check_rows` has them.
            ids_TK: of `ids_dtype`, contiguous, -1 for none.
            weights_TK: float32.
        """
        received, ids_RK, weights_RK, handle, _ = self._buffer.dispatch(
            self._pack(rows),
            topk_idx=ids_TK,
            topk_weights=None if weights_TK is None else weights_TK.contiguous(),
            num_experts=self._num_experts,
            num_sms=self._num_sms,
        )
        return ReceivedRows(received, ids_RK, weights_RK, handle)

    def dispatch_again(self, rows: Tensor, handle: Any) -> Rows:
        """Sends other rows of the same tokens and type; they come in the same places."""
        # A cached dispatch that must find the number of experts itself fails (DeepEP pull request 685).
        received: Rows
        received, *_ = self._buffer.dispatch(
            self._pack(rows), num_experts=self._num_experts, num_sms=self._num_sms, handle=handle
        )
        return received

    def combine(self, rows_RD: Tensor, weights_RK: Tensor | None, handle: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the sum of each token's rows, TD, and its weights from their experts, TK (0 for an id of -1)."""
        rows_TD, weights_TK, _ = self._buffer.combine(rows_RD, handle, topk_weights=weights_RK, num_sms=self._num_sms)
        return rows_TD, weights_TK

    def _pack(self, rows: Tensor) -> Rows:
        if rows.dtype == torch.bfloat16:
            return rows.contiguous()
        codes, scales = rows.split([self._shape.hidden_size, rows.shape[1] - self._shape.hidden_size], 1)
        return codes.contiguous().view(torch.float8_e4m3fn), scales.contiguous().view(torch.float32)
