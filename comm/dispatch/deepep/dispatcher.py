"""The dispatcher over DeepEP's kernels: a token's row once to every rank that holds experts of the token.

For the interface of deep_ep 2.1.0 (github.com/deepseek-ai/DeepEP, `ElasticBuffer`). DeepEP learns the counts inside its
first dispatch: a plan only prepares, and that dispatch is the host synchronization. Its handle is made once for a plan
and used for every later exchange.

Shape legend: T tokens of this rank, K experts per token, R rows received (one for each token with experts here),
A arrived rows (one for each of those experts), D hidden size, E experts, M members of the group, N its nodes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from comm.dispatch.all_to_all.plan import num_local_experts
from comm.dispatch.deepep.buffer import ExpertBuffer, Library, ReceivedRows
from comm.dispatch.deepep.package import BufferShape, load_package
from comm.dispatch.deepep.route import DeepEPRoute
from comm.dispatch.node_cap import nodes_of_experts, touched_nodes, verify_cap
from comm.dispatch.process_group import ExchangeGroup, Observers
from comm.dispatch.traffic import Spread
from comm.lane import ClosesOnSuccess, Lane
from comm.layout import Layout
from comm.protocol import Arrived, Handle, Label, Work

_BYTES_PER_CHOICE = 8  # an id and a weight ride with each row, there and back


@dataclass(frozen=True, slots=True)
class _Planned:
    """What a plan prepares.

    ids_TK: choices as DeepEP takes them. touched_TN: the nodes that each token touches. numbers: tokens that reach each
    member and each node (M + N), then each member's tokens over the cap (M); on their way to the host.
    """

    ids_TK: Tensor
    touched_TN: Tensor
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class _PlannedTraffic:
    """How far one exchange of this rank's tokens goes; of these rows, `min_rows_across_nodes` must cross nodes."""

    rows: Spread
    min_rows_across_nodes: int


class DeepEPHandle:
    """One routing of one micro-batch. Owns DeepEP's handles; only the lane touches what it holds.

    Attributes:
        label: of the exchange.
        traffic: known once the first dispatch has begun.
        routes: one for each type of row. Between nodes DeepEP divides its work by the bytes of a row, and refuses a
            handle that another division has made.
    """

    def __init__(self, num_tokens: int, label: Label | None, work: Work[_Planned]) -> None:
        self.label = label
        self.traffic: _PlannedTraffic | None = None
        self.routes: dict[torch.dtype, DeepEPRoute] = {}
        self._num_tokens = num_tokens
        self._work = work

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank, T."""
        return self._num_tokens

    def planned(self) -> _Planned:
        """Returns what the plan has prepared. Called on the lane."""
        return self._work.wait()


class DeepEPDispatcher(ClosesOnSuccess):
    """`comm.protocol.Dispatcher` over an expert group; the member at place i holds experts i*L to (i+1)*L - 1.

    Rows of one local expert arrive by source rank, then by token, independent of timing. Rows are bfloat16 or, to
    experts only, uint8: `hidden_size` codes of float8_e4m3fn and float32 scales behind them. Weights are float32.
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
        """Opens one member's part; every member makes and closes its own at the same point.

        Args:
            group: of the ranks that share a layer's experts; used by this lane alone.
            num_experts: of the layer, over all ranks.
            layout: of the world, for the members' nodes.
            lane: where all exchanges run.
            observers: who logs exchanges and accounts for them. DeepEP does not report what it sends, so rows and bytes
                are only predicted, at the rank whose tokens they belong to.
            shape: of the buffer.
            max_nodes: that a token may touch, or the first dispatch of its plan raises NodeCapError on all ranks; any
                number if None.
            library: instead of the installed package.

        Raises:
            DispatchError: the group does not divide the experts.
            DeepEPError: the package is missing or too old.
        """
        self._group = ExchangeGroup("expert", group, layout, observers)
        self.num_local_experts = num_local_experts(num_experts, len(self._group.members))
        self._buffer = ExpertBuffer(library or load_package(), group, num_experts, shape)
        self._num_sources = shape.max_tokens * len(self._group.members)
        self._lane = lane
        self._observers = observers
        device, self._num_nodes = self._buffer.device, len(set(self._group.nodes))
        self._max_nodes = self._num_nodes if max_nodes is None else max_nodes
        self._member_of_expert_E = nodes_of_experts(num_experts, range(len(self._group.members))).to(device)
        self._node_of_expert_E = nodes_of_experts(num_experts, self._group.nodes).to(device)

    def close(self) -> None:
        """Frees the buffer; all members at the same point, when the lane is through."""
        self._buffer.close()

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Prepares the choices; their exchange is part of the first dispatch.

        Raises:
            DeepEPError: more tokens or choices than the buffer is made for.
        """
        self._buffer.check_plan(ids_TK)
        return DeepEPHandle(len(ids_TK), label, self._lane.submit(lambda: self._prepare(ids_TK, label)))

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a copy of each token's row, and the weight, to each of its experts.

        Raises:
            DeepEPError: rows or weights of a type that DeepEP does not move.
        """
        own = _own(handle)
        self._buffer.check_rows(rows_TD, "dispatch", may_be_codes=True)
        self._buffer.check_weights(weights_TK, "dispatch")

        def run() -> Arrived:
            received = self._lay_out(own, rows_TD, weights_TK, "dispatch")
            assert received.weights_RK is not None
            route = own.routes[rows_TD.dtype]
            return Arrived(route.copy_rows(received.rows), route.copy_weights(received.weights_RK), route.counts)

        return self._lane.submit(run)

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sums over each token's experts, unweighted: of a rank, a node, all; each rounded to bfloat16. TD.

        Raises:
            DeepEPError: rows other than bfloat16.
        """
        own = _own(handle)
        self._buffer.check_rows(rows_AD, "combine", may_be_codes=False)
        return self._lane.submit(lambda: self._to_tokens(own, rows_AD, None, "combine")[0])

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Gradients of rows, summed per token as by `combine` (TD), and of weights (TK).

        Raises:
            DeepEPError: rows other than bfloat16, weights other than float32.
        """
        own = _own(handle)
        self._buffer.check_rows(grad_rows_AD, "dispatch backward", may_be_codes=False)
        self._buffer.check_weights(grad_weights_A, "dispatch backward")

        def run() -> tuple[Tensor, Tensor]:
            grad_rows_TD, grad_weights_TK = self._to_tokens(own, grad_rows_AD, grad_weights_A, "dispatch backward")
            assert grad_weights_TK is not None
            return grad_rows_TD, grad_weights_TK

        return self._lane.submit(run)

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's gradient to each of its experts' rows; AD.

        Raises:
            DeepEPError: rows of a type that DeepEP does not move.
        """
        own, name = _own(handle), "combine backward"
        self._buffer.check_rows(grad_rows_TD, name, may_be_codes=True)

        def run() -> Tensor:
            if grad_rows_TD.dtype not in own.routes:
                rows = self._lay_out(own, grad_rows_TD, None, name).rows
                return own.routes[grad_rows_TD.dtype].copy_rows(rows)
            route = own.routes[grad_rows_TD.dtype]
            with self._exchanging(own, grad_rows_TD, name):
                rows = self._buffer.dispatch_again(grad_rows_TD, route.handle)
            return route.copy_rows(rows)

        return self._lane.submit(run)

    def _prepare(self, ids_TK: Tensor, label: Label | None) -> _Planned:
        num_members = len(self._group.members)
        reached_TM = touched_nodes(ids_TK, self._member_of_expert_E, num_members)
        touched_TN = touched_nodes(ids_TK, self._node_of_expert_E, self._num_nodes)
        num_over_M1 = (touched_TN.sum(1) > self._max_nodes).sum().repeat(num_members, 1)
        if self._max_nodes < self._num_nodes:
            num_over_M1 = self._group.exchange_numbers(num_over_M1, label)
        numbers = torch.cat([reached_TM.sum(0), touched_TN.sum(0), num_over_M1.flatten()])
        sent_TK = ids_TK.to(self._buffer.ids_dtype).contiguous()
        return _Planned(sent_TK, touched_TN, numbers.to("cpu", non_blocking=True))

    def _lay_out(self, own: DeepEPHandle, rows_TD: Tensor, weights_TK: Tensor | None, name: str) -> ReceivedRows:
        """Dispatches for the first time, which makes DeepEP's handle and a route for rows of this type."""
        planned = own.planned()
        if rows_TD.is_cuda:
            # The plan's numbers must be on the host. And DeepEP waits for the counts while no other thread may run, so
            # the wait for what is queued before them is better done here.
            torch.cuda.current_stream().synchronize()
        own.traffic = own.traffic or self._complete(planned, own.label)
        with self._exchanging(own, rows_TD, name):
            received = self._buffer.dispatch(rows_TD, planned.ids_TK, weights_TK)
        own.routes[rows_TD.dtype] = DeepEPRoute.of(received.handle, received.ids_RK, self._num_sources)
        return received

    def _complete(self, planned: _Planned, label: Label | None) -> _PlannedTraffic:
        """Verifies the cap, on all ranks alike, and accounts for the plan."""
        num_members, nodes, home = len(self._group.members), self._group.nodes, self._group.nodes[self._group.place]
        numbers = planned.numbers.tolist()
        per_member, per_node = numbers[:num_members], numbers[num_members:-num_members]
        verify_cap(numbers[-num_members:], self._group, planned.touched_TN, self._max_nodes, label)
        layer = None if label is None else label.layer
        self._observers.traffic.add_plan(layer, len(planned.ids_TK), sum(per_node))
        crossing = sum(per_node) - per_node[sorted(set(nodes)).index(home)]
        if not self._buffer.hops_between_nodes:
            return _PlannedTraffic(Spread.of(per_member, nodes, self._group.place), crossing)
        # A row crosses to the rank of this rank's index on the other node, and is handed on from there.
        index_M = [nodes[:place].count(node) for place, node in enumerate(nodes)]
        handed_on = sum(
            rows for rows, index in zip(per_member, index_M, strict=True) if index != index_M[self._group.place]
        )
        return _PlannedTraffic(
            Spread(kept=per_member[self._group.place], within_node=handed_on, across_nodes=crossing), crossing
        )

    def _to_tokens(
        self, own: DeepEPHandle, rows_AD: Tensor, weights_A: Tensor | None, name: str
    ) -> tuple[Tensor, Tensor | None]:
        route = next(iter(own.routes.values()))  # arrived rows lie the same way in each
        weights_RK = None if weights_A is None else route.restore_weights(weights_A)
        with self._exchanging(own, rows_AD, name):
            return self._buffer.combine(route.sum_rows(rows_AD), weights_RK, route.handle)

    @contextmanager
    def _exchanging(self, own: DeepEPHandle, rows: Tensor, name: str) -> Iterator[None]:
        """Accounts for an exchange by its plan, and logs it while inside."""
        assert own.traffic is not None
        layer, num_choices = None if own.label is None else own.label.layer, own.planned().ids_TK.shape[1]
        bytes_per_row = rows.shape[1] * rows.itemsize + _BYTES_PER_CHOICE * num_choices
        self._observers.traffic.add_predicted(layer, own.traffic.rows, bytes_per_row, own.traffic.min_rows_across_nodes)
        members, log = self._group.members, self._observers.log
        with log.awaiting(log.start(f"deepep {list(members)}", members, name, own.label)):
            yield


def _own(handle: Handle) -> DeepEPHandle:
    assert isinstance(handle, DeepEPHandle)
    return handle
