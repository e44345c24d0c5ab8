"""Emulates the package deep_ep 2.1.0 on torch.distributed, without its code and without its speed.

It has the signatures of `ElasticBuffer` and `EPHandle`, and rejects the arguments that the package's host code rejects.
It guarantees only what the package's documentation and kernels guarantee: received rows are grouped by the sender's
index within its node, and within a group their order differs at every dispatch that is not cached. Features that the
dispatcher does not use (expansion, alignment, bias, events, no CPU synchronization) are rejected.

Shape legend: T tokens, K experts per token, S rows sent, R rows received, D columns, M ranks, L local experts.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

_TMA_BYTES = 32


@dataclass
class EPHandle:
    """Handle with the attributes that callers may read, and private attributes of the emulation."""

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    recv_src_metadata: Tensor
    _num_channels: int
    _tokens_S: Tensor
    _sent: list[int]
    _received: list[int]
    _order_R: Tensor


@dataclass
class EventOverlap:
    """Event of a call that has completed when it returns."""

    event: None = None


@dataclass
class Emulation:
    """Emulation of the module. It counts calls by kind.

    `num_scaleup_ranks` is the number of ranks of a node, which the package gets from NCCL.
    """

    num_scaleup_ranks: int
    topk_idx_t: torch.dtype = torch.int64
    calls: list[str] = field(default_factory=list)

    def ElasticBuffer(self, *args: object, **kwargs: Any) -> "ElasticBuffer":
        """Opens a buffer, like the module's class."""
        return ElasticBuffer(*args, **kwargs, _module=self)  # type: ignore[arg-type]


class ElasticBuffer:
    def __init__(
        self,
        group: ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
        *,
        _module: Emulation,
    ) -> None:
        assert num_bytes is None, "not emulated"
        assert not num_cpu_bytes, "not emulated"
        assert not deterministic, "not emulated"
        assert num_max_tokens_per_rank > 0
        assert hidden > 0
        assert type(num_cpu_timeout_secs) is type(num_gpu_timeout_secs) is int
        self.group, self.rank_idx, self.num_ranks = group, distributed.get_rank(group), group.size()
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.explicitly_destroy = explicitly_destroy
        self._num_scaleup = _module.num_scaleup_ranks if allow_hybrid_mode else self.num_ranks
        assert self.num_ranks % self._num_scaleup == 0
        self._bytes_per_token, self._num_topk = 2 * hidden, num_topk
        self._module: Emulation | None = _module

    def destroy(self) -> None:
        """Frees the buffer. All ranks must call it once, together."""
        assert self.explicitly_destroy
        assert self._module is not None
        distributed.barrier(self.group)
        self._module = None

    def get_logical_domain_size(self) -> tuple[int, int]:
        """Returns the number of nodes and of ranks per node."""
        return self.num_ranks // self._num_scaleup, self._num_scaleup

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        """Returns an even number."""
        assert num_experts % self.num_ranks == 0
        return 4 + 0 * num_topk

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: object | None = None,
        previous_event_before_epilogue: object | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Sends each row to every rank with experts of its token."""
        events = (previous_event, previous_event_before_epilogue, async_with_compute_stream, allocate_on_comm_stream)
        others = (cumulative_local_expert_recv_stats, num_max_tokens_per_rank, expert_alignment, do_expand)
        assert not any((*events, *others, do_zero_padding, use_tma_aligned_col_major_sf)), "not emulated"
        assert do_handle_copy, "not emulated"
        assert do_cpu_sync is None or do_cpu_sync == (handle is None), "not emulated"
        num_topk = (handle.topk_idx if topk_idx is None else topk_idx).shape[1]  # type: ignore[union-attr]
        num_sms = num_sms or self.get_theoretical_num_sms(num_experts, num_topk)  # type: ignore[arg-type]
        num_channels = self._check_rows(x, num_sms)
        assert self._module is not None, "destroyed"
        self._module.calls.append("cached dispatch" if handle else "dispatch")
        if handle is None:
            assert topk_idx is not None
            assert num_experts is not None
            handle = self._lay_out(topk_idx, num_experts, num_sms, num_channels)
        else:
            # The package's documentation is contradictory about weights in a cached dispatch.
            assert topk_idx is None
            assert topk_weights is None
            assert num_experts in (None, handle.num_experts)
            assert num_channels == handle._num_channels, "num_channels == num_channels_"
        rows = x if isinstance(x, tuple) else (x,)
        assert all(len(part) == len(handle.topk_idx) for part in rows)
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert topk_weights.shape == handle.topk_idx.shape
        received = tuple(self._send(part, handle) for part in rows)
        weights_RK = None if topk_weights is None else self._send(topk_weights, handle)
        first, ids_RK = self._first_expert(handle.num_experts), self._send(handle.topk_idx, handle)
        here_RK = (ids_RK >= first) & (ids_RK < first + handle.num_experts // self.num_ranks)
        ids_RK = torch.where(here_RK, ids_RK - first, -1)
        rows_R = received if isinstance(x, tuple) else received[0]
        return rows_R, ids_RK, weights_RK, handle, EventOverlap()  # type: ignore[return-value]

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: object | None = None,
        previous_event_before_epilogue: object | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sums each token's rows in float32, rounded over the ranks of a node and again over nodes."""
        events = (previous_event, previous_event_before_epilogue, async_with_compute_stream, allocate_on_comm_stream)
        assert not any((bias, *events)), "not emulated"
        assert self._module is not None, "destroyed"
        self._module.calls.append("combine")
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.shape[1] % 256 == 0
        assert num_sms in (0, handle.num_sms), "you may use a different SM count than dispatch"
        assert len(x) == len(handle.recv_src_metadata)
        num_tokens, num_topk = handle.topk_idx.shape
        rows_SD = self._send_back(x, handle)
        ranks_S = torch.arange(self.num_ranks).repeat_interleave(torch.tensor(handle._sent))
        sum_TD = torch.zeros(num_tokens, x.shape[1])
        for node in range(self.num_ranks // self._num_scaleup):
            of_node_S = ranks_S // self._num_scaleup == node
            part_TD = torch.zeros_like(sum_TD).index_add_(0, handle._tokens_S[of_node_S], rows_SD[of_node_S].float())
            sum_TD += part_TD.bfloat16().float()
        if topk_weights is None:
            return sum_TD.bfloat16(), None, EventOverlap()
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        assert topk_weights.shape == (len(x), num_topk)
        weights_SK = self._send_back(topk_weights, handle)
        owners_TK = handle.topk_idx // (handle.num_experts // self.num_ranks)  # -1 stays -1
        weights_TK = torch.zeros(num_tokens, num_topk)
        for token, rank, weights_K in zip(handle._tokens_S.tolist(), ranks_S.tolist(), weights_SK, strict=True):
            of_rank_K = owners_TK[token] == rank
            weights_TK[token, of_rank_K] = weights_K[of_rank_K]
        return sum_TD.bfloat16(), weights_TK, EventOverlap()

    def _check_rows(self, x: Tensor | tuple[Tensor, Tensor], num_sms: int) -> int:
        """Rejects unsupported rows, and returns the number of channels for rows of this size."""
        rows, scales = x if isinstance(x, tuple) else (x, None)
        assert rows.dtype == (torch.bfloat16 if scales is None else torch.float8_e4m3fn)
        assert rows.dim() == 2
        assert rows.is_contiguous()
        assert len(rows) <= self.num_max_tokens_per_rank
        bytes_per_token = rows.shape[1] * rows.itemsize
        assert bytes_per_token % _TMA_BYTES == 0
        if scales is not None:
            assert scales.dim() == 2
            assert scales.itemsize == 4
            assert len(scales) == len(rows)
            bytes_per_token += -(-scales.shape[1] * 4 // _TMA_BYTES) * _TMA_BYTES
        assert bytes_per_token <= self._bytes_per_token, "the buffer is too small"
        is_hybrid = self._num_scaleup < self.num_ranks
        return num_sms * (8 if scales is not None else 7) if is_hybrid else 1

    def _lay_out(self, topk_idx: Tensor, num_experts: int, num_sms: int, num_channels: int) -> EPHandle:
        assert self._module is not None
        assert topk_idx.dtype == self._module.topk_idx_t
        assert topk_idx.is_contiguous()
        assert topk_idx.shape[1] <= self._num_topk
        assert num_experts % self.num_ranks == 0
        num_local = num_experts // self.num_ranks
        ranks_TK = topk_idx // num_local
        goes_MT = torch.stack([(ranks_TK == rank).any(1) for rank in range(self.num_ranks)])
        tokens_S = goes_MT.nonzero()[:, 1]
        sent = goes_MT.sum(1)
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=self.group)
        handle = EPHandle(
            do_expand=False,
            num_experts=num_experts,
            expert_alignment=1,
            num_max_tokens_per_rank=self.num_max_tokens_per_rank,
            num_sms=num_sms,
            topk_idx=topk_idx.clone(),
            num_recv_tokens=int(received.sum()),
            num_recv_tokens_per_expert_list=[],
            recv_src_metadata=torch.empty(0),
            _num_channels=num_channels,
            _tokens_S=tokens_S,
            _sent=sent.tolist(),
            _received=received.tolist(),
            _order_R=self._arrival(received),
        )
        sources_T = self.rank_idx * self.num_max_tokens_per_rank + torch.arange(len(topk_idx), dtype=torch.int32)
        sources_R = self._send(sources_T[:, None].contiguous(), handle)
        unused = torch.full((len(sources_R), 1 + topk_idx.shape[1]), -1, dtype=torch.int32)
        handle.recv_src_metadata = torch.cat([sources_R, unused], 1)
        ids_R = self._send(handle.topk_idx, handle).flatten() - self._first_expert(num_experts)
        handle.num_recv_tokens_per_expert_list = [int((ids_R == expert).sum()) for expert in range(num_local)]
        return handle

    def _first_expert(self, num_experts: int) -> int:
        return self.rank_idx * (num_experts // self.num_ranks)

    def _arrival(self, received: Tensor) -> Tensor:
        """Returns the source positions of rows in their order of arrival."""
        assert self._module is not None
        generator = torch.Generator().manual_seed(1000 * len(self._module.calls) + self.rank_idx)
        sources_R = torch.arange(self.num_ranks).repeat_interleave(received)
        groups_R = sources_R % self._num_scaleup
        return (groups_R + torch.rand(len(groups_R), generator=generator)).argsort()

    def _send(self, rows_T: Tensor, handle: EPHandle) -> Tensor:
        rows_S = rows_T[handle._tokens_S]
        rows_R = self._exchange(rows_S, handle._sent, handle._received)
        return rows_R[handle._order_R]

    def _send_back(self, rows_R: Tensor, handle: EPHandle) -> Tensor:
        by_source_R = torch.empty_like(rows_R)
        by_source_R[handle._order_R] = rows_R
        return self._exchange(by_source_R, handle._received, handle._sent)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        result = rows.new_empty(sum(received), rows.shape[1])
        distributed.all_to_all_single(
            result.view(torch.uint8), rows.view(torch.uint8), received, sent, group=self.group
        )
        return result
