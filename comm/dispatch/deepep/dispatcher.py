"""Implements the dispatcher over DeepEP's kernels, which send a row once to each rank of its experts.

Counts are exchanged, and the host waits for them, in the first dispatch of a plan. It makes the handle that every later
exchange uses.

The interface is that of deep_ep 2.1.0 (github.com/deepseek-ai/DeepEP). `ElasticBuffer.dispatch` runs without expansion,
first with choices and weights and later with the cached `EPHandle`. `async_with_compute_stream` stays off, so every
call is ordered with the other work on the current stream.
"""

# Shape legend: R rows received (one for each token with experts here), A arrived rows (one for each of those experts),
# M members of the group, N its nodes, B bytes of a row with scales.

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.dispatch.all_to_all import num_local_experts
from comm.dispatch.deepep.package import BufferShape, DeepEPError, load_package
from comm.dispatch.local import ExpertOrder
from comm.dispatch.node_cap import nodes_of_experts, touched_nodes, verify_cap
from comm.dispatch.process_group import ExchangeGroup, Observers
from comm.dispatch.traffic import Spread
from comm.lane import ClosesOnSuccess, Lane
from comm.layout import Layout
from comm.protocol import Arrived, Handle, Label, Work, own_handle
from comm.watchdog.collective_log import group_name
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
        # DeepEP's own number is not made for routers that limit groups of experts. Kernels run on pairs of SMs.
        self._num_sms = max(2, shape.num_sms // 2 * 2)
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


_BYTES_PER_CHOICE = 8  # an id and a weight are sent with each row in both directions


@dataclass(frozen=True, slots=True)
class _Planned:
    ids_TK: Tensor  # choices in DeepEP's dtype
    touched_TN: Tensor  # mask of the nodes that each token touches
    # tokens that reach each member and each node (M + N), then each member's tokens over the cap (M). The copy to the
    # host may still be running.
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class _PlannedTraffic:
    rows: Spread
    min_rows_across_nodes: int


class DeepEPHandle:
    """Routing of one micro-batch. Owns DeepEP's handles; only the lane uses its contents.

    `traffic`, the predicted rows, is None until the first dispatch. There is a route for each dtype of rows: between
    nodes, DeepEP splits its work by the bytes of a row, and a handle is only valid for the split that made it.
    """

    def __init__(self, num_tokens: int, label: Label | None, work: Work[_Planned]) -> None:
        self.label = label
        self.traffic: _PlannedTraffic | None = None
        self.routes: dict[torch.dtype, DeepEPRoute] = {}
        self._num_tokens = num_tokens
        self._work = work

    @property
    def num_tokens(self) -> int:
        """Number of tokens of this rank, T."""
        return self._num_tokens

    def planned(self) -> _Planned:
        """Returns the prepared choices. Called on the lane."""
        return self._work.wait()


class DeepEPDispatcher(ClosesOnSuccess):
    """Dispatcher over an expert group with DeepEP's kernels. Member i holds experts i*L to (i+1)*L - 1.

    Rows of one local expert arrive by source rank, then by token. They are bfloat16; those to experts may also be
    uint8: `hidden_size` codes of float8_e4m3fn, then float32 scales. Weights are float32.
    """

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        layout: Layout,
        lane: Lane,
        observers: Observers,
        shape: BufferShape,
        max_nodes: int | None = None,
        library: Library | None = None,
    ) -> None:
        """Builds the dispatcher of one member. All members build and close theirs at the same points.

        DeepEP does not report what it sends, so rows and bytes are only predicted, on the rank that owns the tokens. If
        a token reaches more than `max_nodes` nodes, the first dispatch of the plan raises NodeCapError on all ranks.
        `library` replaces the installed package.
        """
        self._group = ExchangeGroup("expert", group, layout, observers)
        self.num_local_experts = num_local_experts(num_experts, len(self._group.members))
        self._buffer = ExpertBuffer(library or load_package(), group, num_experts, shape)
        self._num_sources = shape.max_tokens * len(self._group.members)
        self._lane = lane
        self._observers = observers
        device = self._buffer.device
        self._num_nodes = len(set(self._group.nodes))
        self._max_nodes = self._num_nodes if max_nodes is None else max_nodes
        self._member_of_expert_E = nodes_of_experts(num_experts, range(len(self._group.members))).to(device)
        self._node_of_expert_E = nodes_of_experts(num_experts, self._group.nodes).to(device)

    def close(self) -> None:
        """Frees the buffer. All members call it at the same point, after the lane has finished."""
        self._buffer.close()

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Prepares the choices, which the first dispatch exchanges; raises DeepEPError if they do not fit."""
        self._buffer.check_plan(ids_TK)
        return DeepEPHandle(len(ids_TK), label, self._lane.submit(lambda: self._prepare(ids_TK, label)))

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a copy of each token's row, with its weight, to each of the token's experts."""
        routing = own_handle(handle, DeepEPHandle)
        self._buffer.check_rows(rows_TD, "dispatch", may_be_codes=True)
        self._buffer.check_weights(weights_TK, "dispatch")

        def run() -> Arrived:
            received = self._lay_out(routing, rows_TD, weights_TK, "dispatch")
            assert received.weights_RK is not None
            route = routing.routes[rows_TD.dtype]
            return Arrived(route.copy_rows(received.rows), route.order.copy_weights(received.weights_RK), route.counts)

        return self._lane.submit(run)

    def dispatch_again(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's row to each of its experts; AD."""
        return self._send_rows("dispatch again", rows_TD, handle)

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Returns the unweighted sum over each token's experts, TD; rounded per rank, node and in all."""
        routing = own_handle(handle, DeepEPHandle)
        self._buffer.check_rows(rows_AD, "combine", may_be_codes=False)
        return self._lane.submit(lambda: self._to_tokens(routing, rows_AD, None, "combine")[0])

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Computes the gradients of rows, summed per token like `combine` (TD), and of weights (TK)."""
        routing = own_handle(handle, DeepEPHandle)
        self._buffer.check_rows(grad_rows_AD, "dispatch backward", may_be_codes=False)
        self._buffer.check_weights(grad_weights_A, "dispatch backward")

        def run() -> tuple[Tensor, Tensor]:
            grad_rows_TD, grad_weights_TK = self._to_tokens(routing, grad_rows_AD, grad_weights_A, "dispatch backward")
            assert grad_weights_TK is not None
            return grad_rows_TD, grad_weights_TK

        return self._lane.submit(run)

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's gradient to each of its experts' rows; AD."""
        return self._send_rows("combine backward", grad_rows_TD, handle)

    def _send_rows(self, name: str, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        routing = own_handle(handle, DeepEPHandle)
        self._buffer.check_rows(rows_TD, name, may_be_codes=True)

        def run() -> Tensor:
            if rows_TD.dtype not in routing.routes:
                rows = self._lay_out(routing, rows_TD, None, name).rows
                return routing.routes[rows_TD.dtype].copy_rows(rows)
            route = routing.routes[rows_TD.dtype]
            with self._exchanging(routing, rows_TD, name):
                rows = self._buffer.dispatch_again(rows_TD, route.handle)
            return route.copy_rows(rows)

        return self._lane.submit(run)

    def _prepare(self, ids_TK: Tensor, label: Label | None) -> _Planned:
        num_members = len(self._group.members)
        # Members and nodes that each token reaches, TM and TN; then each member's number of tokens over the cap, M 1.
        reached_TM = touched_nodes(ids_TK, self._member_of_expert_E, num_members)
        touched_TN = touched_nodes(ids_TK, self._node_of_expert_E, self._num_nodes)
        num_over_M1 = (touched_TN.sum(1) > self._max_nodes).sum().repeat(num_members, 1)
        if self._max_nodes < self._num_nodes:
            num_over_M1 = self._group.exchange_numbers(num_over_M1, label)
        numbers = torch.cat([reached_TM.sum(0), touched_TN.sum(0), num_over_M1.flatten()])
        sent_TK = ids_TK.to(self._buffer.ids_dtype).contiguous()
        return _Planned(sent_TK, touched_TN, numbers.to("cpu", non_blocking=True))

    def _lay_out(self, routing: DeepEPHandle, rows_TD: Tensor, weights_TK: Tensor | None, name: str) -> ReceivedRows:
        """Runs the first dispatch of rows of this dtype, which makes DeepEP's handle and the route."""
        planned = routing.planned()
        if rows_TD.is_cuda:
            # The plan's numbers must be on the host. DeepEP holds the GIL while it waits for the counts, so this thread
            # waits here for the work queued before them.
            torch.cuda.current_stream().synchronize()  # host sync
        routing.traffic = routing.traffic or self._complete(planned, routing.label)
        with self._exchanging(routing, rows_TD, name):
            received = self._buffer.dispatch(rows_TD, planned.ids_TK, weights_TK)
        routing.routes[rows_TD.dtype] = DeepEPRoute.of(received.handle, received.ids_RK, self._num_sources)
        return received

    def _complete(self, planned: _Planned, label: Label | None) -> _PlannedTraffic:
        """Verifies the node cap on all ranks, and predicts the rows of an exchange."""
        num_members = len(self._group.members)
        nodes = self._group.nodes
        home = self._group.nodes[self._group.index]
        numbers = planned.numbers.tolist()
        per_member = numbers[:num_members]
        per_node = numbers[num_members:-num_members]
        verify_cap(numbers[-num_members:], self._group, planned.touched_TN, self._max_nodes, label)
        layer = None if label is None else label.layer
        self._observers.traffic.add_plan(layer, len(planned.ids_TK), sum(per_node))
        crossing = sum(per_node) - per_node[sorted(set(nodes)).index(home)]
        if not self._buffer.hops_between_nodes:
            return _PlannedTraffic(Spread.of(per_member, nodes, self._group.index), crossing)
        # A row is sent to the rank with this rank's index on the other node, and forwarded from there.
        index_M = [nodes[:member].count(node) for member, node in enumerate(nodes)]
        forwarded = sum(
            rows for rows, index in zip(per_member, index_M, strict=True) if index != index_M[self._group.index]
        )
        return _PlannedTraffic(
            Spread(on_member=per_member[self._group.index], within_node=forwarded, across_nodes=crossing), crossing
        )

    def _to_tokens(
        self, routing: DeepEPHandle, rows_AD: Tensor, weights_A: Tensor | None, name: str
    ) -> tuple[Tensor, Tensor | None]:
        route = next(iter(routing.routes.values()))  # arrived rows have the same order in each
        weights_RK = None if weights_A is None else route.order.restore_weights(weights_A)
        with self._exchanging(routing, rows_AD, name):
            return self._buffer.combine(route.order.sum_rows(rows_AD), weights_RK, route.handle)

    @contextmanager
    def _exchanging(self, routing: DeepEPHandle, rows: Tensor, name: str) -> Iterator[None]:
        """Counts the predicted rows of an exchange, and logs it while inside."""
        assert routing.traffic is not None
        layer = None if routing.label is None else routing.label.layer
        num_choices = routing.planned().ids_TK.shape[1]
        bytes_per_row = rows.shape[1] * rows.itemsize + _BYTES_PER_CHOICE * num_choices
        planned = routing.traffic
        self._observers.traffic.add_predicted(layer, planned.rows, bytes_per_row, planned.min_rows_across_nodes)
        members = self._group.members
        log = self._observers.log
        with log.awaiting(log.start(group_name("deepep", members), members, name, routing.label)):
            yield
