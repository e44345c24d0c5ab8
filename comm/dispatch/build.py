"""Builds the dispatcher and the comm lane of a run; a wrapper sends rows to experts in FP8."""

# Shape legend: A arrived rows, B bytes of a packed row.

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.balance.rows import BalanceCosts, plan_rows
from comm.config import BalancedDispatchConfig, CappedDispatchConfig, DispatchConfig
from comm.dispatch.balanced import BalancedDispatcher, SlotLayout
from comm.dispatch.local import dense
from comm.dispatch.node_cap import ClippingDispatcher, nodes_of_experts
from comm.dispatch.process_group import ExchangeGroup, Observers
from comm.dispatch.registry import DISPATCHERS, TokenSizes
from comm.groups import EXCHANGING, GroupKernels
from comm.lane import Lane, StreamLane, ThreadLane
from comm.layout import Layout
from comm.protocol import Arrived, Dispatcher, Handle, Label, MappedWork, Work
from kernels.quantize import dequantize_1x128, quantize_1x128
from kernels.quantize.layout import GRADIENTS_MIN_AMAX, ROWS_MIN_AMAX, pack, unpack


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatcherParts:
    """Arguments for building a dispatcher.

    Attributes:
        num_experts: experts of a layer over all ranks.
        group: process group of the ranks that share a layer's experts, `layout.expert_group`.
        timeout_seconds: timeout of each collective in groups that the dispatcher creates.
        tokens: sizes of a rank's micro-batch, for which a dispatcher may allocate buffers.
        kernels: how NCCL runs the exchanges.
    """

    num_experts: int
    layout: Layout
    group: ProcessGroup
    lane: Lane
    observers: Observers
    timeout_seconds: float
    tokens: TokenSizes
    kernels: GroupKernels = EXCHANGING


def open_lane(device: torch.device, name: str = "comm") -> Lane:
    """Opens a lane: a stream on CUDA, else a worker thread. Its thread has the given name."""
    return StreamLane(device, name) if device.type == "cuda" else ThreadLane(name)


def build_dispatcher(config: DispatchConfig, parts: DispatcherParts) -> Dispatcher:
    """Builds the dispatcher of `config`, wrapped to clip or quantize. All ranks call it at the same point."""
    if isinstance(config, BalancedDispatchConfig) and config.balance != "none":
        return _build_balanced(config, parts)
    dispatcher = DISPATCHERS.get(config.kind).build(config, parts)
    if isinstance(config, CappedDispatchConfig) and config.node_cap == "clip":
        nodes = [parts.layout.node_of(rank) for rank in distributed.get_process_group_ranks(parts.group)]
        node_of_expert_E = nodes_of_experts(parts.num_experts, nodes)
        num_nodes = len(set(nodes))
        dispatcher = ClippingDispatcher(
            dispatcher, node_of_expert_E, num_nodes, config.max_nodes, parts.observers.clips
        )
    if config.payload == "fp8":
        dispatcher = Fp8Dispatcher(dispatcher)
    return dispatcher


def _build_balanced(config: BalancedDispatchConfig, parts: DispatcherParts) -> Dispatcher:
    """Builds a dispatcher of slots, and the wrapper that plans which experts they hold copies of."""
    group = ExchangeGroup("expert", parts.group, parts.layout, parts.observers)
    max_nodes = config.max_nodes if config.balance == "exact" else None
    layout = SlotLayout(parts.num_experts, group.nodes, config.balance_slots, max_nodes)
    inner = build_dispatcher(config.without_copies(), replace(parts, num_experts=layout.num_all))
    costs = BalanceCosts(copy=parts.tokens.copy_bytes, row=parts.tokens.row_bytes)
    assert config.balance != "none"
    plan = partial(plan_rows, nodes=group.nodes, slots=config.balance_slots, mode=config.balance, costs=costs)
    return BalancedDispatcher(inner, group, layout, plan, parts.lane, parts.observers.traffic)


class Fp8Dispatcher:
    """Wrapper of a dispatcher that sends rows to experts as e4m3 codes (arXiv:2412.19437, section 3.3).

    Each 128 columns of a row share a power-of-two scale. `dispatch` and `dispatch_again` quantize rows, and
    `combine_backward` quantizes the gradients of the experts' outputs. The backward treats quantization as the identity
    (straight-through). Results have the rows' own dtype; a NaN or an infinity turns its 128 columns into NaN.
    """

    num_local_experts: int

    def __init__(self, inner: Dispatcher) -> None:
        self.num_local_experts = inner.num_local_experts
        self._inner = inner

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Plans with the inner dispatcher."""
        return self._inner.plan(ids_TK, weights_TK, label)

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a quantized copy of each token's row, and the unchanged weight, to each of its experts."""
        restore = _restore_like(rows_TD)

        def finish(arrived: Arrived) -> Arrived:
            return Arrived(restore(arrived.rows_AD), arrived.weights_A, arrived.counts)

        return MappedWork(self._inner.dispatch(self._packed(rows_TD, ROWS_MIN_AMAX), weights_TK, handle), finish)

    def dispatch_again(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a quantized copy of each token's row to each of its experts; AD."""
        packed_TB = self._packed(rows_TD, ROWS_MIN_AMAX)
        return MappedWork(self._inner.dispatch_again(packed_TB, handle), _restore_like(rows_TD))

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Calls the inner dispatcher: these rows are never quantized."""
        return self._inner.combine(rows_AD, handle)

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Calls the inner dispatcher: these rows are never quantized."""
        return self._inner.dispatch_backward(grad_rows_AD, grad_weights_A, handle)

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a quantized copy of each token's gradient to each of its experts' rows; AD."""
        packed_TB = self._packed(grad_rows_TD, GRADIENTS_MIN_AMAX)
        return MappedWork(self._inner.combine_backward(packed_TB, handle), _restore_like(grad_rows_TD))

    def close(self) -> None:
        """Closes the inner dispatcher."""
        self._inner.close()

    def _packed(self, rows_TD: Tensor, min_amax: float) -> Tensor:
        # Codes, then scales, as bytes: the inner dispatcher moves rows of any type.
        return pack(quantize_1x128(dense(rows_TD.detach()), power_of_two=True, min_amax=min_amax))


def _restore_like(rows_TD: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the conversion of packed bytes to rows like these, of which it keeps none alive."""
    hidden_size = rows_TD.shape[1]
    dtype = rows_TD.dtype
    return lambda packed_AB: dequantize_1x128(unpack(packed_AB, hidden_size), dtype)
