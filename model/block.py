"""A transformer layer as two computations, before dispatch and after it, and its SwiGLU networks.

Shape legend: N = B T, A received rows in the experts' order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from comm.protocol import ALONE, ContextGroup, CopyingDispatcher, Dispatcher, Handle, RankLocalDispatcher
from kernels.attention.documents import Documents
from kernels.few_rows import few_rows_experts, few_rows_linear
from kernels.swiglu.reference import swiglu
from model.attention.form import Attention
from model.config import ModelConfig
from model.copies import CopiedExperts
from model.linear import Projection, WeightSink, join_storage, widen
from model.norm import NormSource, RmsNorm, norm_and_map
from model.precision.linears import ExpertWeights, Linears, LocalRows, Rows, Wire
from model.router import Route, Router, Routing
from model.values import ExpertOutput, Received


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCopies:
    """Slots of a layer's experts on all ranks. An expert may have several, which divide its tokens.

    Attributes:
        slots_EC: slots of each expert, of which the first `copies_E` count.
        num_shared: last experts, which are the shared ones as routed experts of all tokens.
        load_E: tokens of each expert on this rank so far.
        first: copy that the first token of a pass takes. Ranks differ, so that a token on each uses all copies.
    """

    slots_EC: Tensor
    copies_E: Tensor
    load_E: Tensor
    first: int
    num_shared: int

    def choose(self, routing: Routing) -> Routing:
        """Counts the chosen experts, and returns slots in their place. Neighboring tokens take other copies."""
        num_experts = len(self.copies_E)
        # Shared experts follow the choices of the router, with weight 1: K grows by their number.
        shared_S = torch.arange(num_experts - self.num_shared, num_experts, device=routing.ids_TK.device)
        ids_TK = torch.cat((routing.ids_TK, shared_S.expand(len(routing.ids_TK), -1)), 1)
        weights_TK = functional.pad(routing.weights_TK, (0, self.num_shared), value=1.0)
        self.load_E.scatter_add_(0, ids_TK.flatten(), torch.ones_like(ids_TK.flatten()))
        numbers_T1 = torch.arange(self.first, self.first + len(ids_TK), device=ids_TK.device)[:, None]
        slots_TK = self.slots_EC[ids_TK, numbers_T1 % self.copies_E[ids_TK]]
        return replace(routing, ids_TK=slots_TK, weights_TK=weights_TK)


class Moe(nn.Module):
    """The feed-forward part of a MoE layer: router, routed experts of this rank, shared experts."""

    copies: ExpertCopies | None = None  # None: each expert has one slot, in the order of the experts

    def __init__(self, config: ModelConfig, experts: range, dtype: torch.dtype, linears: Linears) -> None:
        super().__init__()
        hidden = config.hidden_size
        narrow = config.expert_intermediate_size
        shared = config.num_shared_experts
        self.gate = Router(config, dtype)
        self.experts = RoutedExperts(hidden, narrow, experts, dtype, linears)
        self.shared_experts = Mlp(hidden, shared * narrow, dtype, linears) if shared else None

    def choose_slots(self, routing: Routing) -> Routing:
        """Returns the routing to slots of experts, which are the experts themselves if none was placed."""
        return routing if self.copies is None else self.copies.choose(routing)


@dataclass(frozen=True, slots=True)
class Attended:
    """Result of `Block.attend`: the residual, its norm as the experts' input, and the routing."""

    residual_BTD: Tensor
    rows: Rows
    routing: Routing


class Block(nn.Module):
    """One layer; dense if `experts` is None. Submodules have the released checkpoint's names."""

    def __init__(
        self, config: ModelConfig, experts: range | None, dtype: torch.dtype, attention: Attention, linears: Linears
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        eps = config.norm_eps
        self._linears = linears
        self.input_layernorm = RmsNorm(hidden, eps, dtype)
        self.self_attn = attention
        self.post_attention_layernorm = RmsNorm(hidden, eps, dtype)
        self.mlp: Moe | Mlp = (
            Mlp(hidden, config.dense_intermediate_size, dtype, linears)
            if experts is None
            else Moe(config, experts, dtype, linears)
        )

    @property
    def moe(self) -> Moe | None:
        """The MoE part, None in a dense layer."""
        return self.mlp if isinstance(self.mlp, Moe) else None

    @property
    def recomputes(self) -> bool:
        """Whether the backward of a stage computes everything again but attention."""
        return self._linears.recomputes_layers

    def wire(self) -> Wire:
        """Returns the wire format of one exchange of this layer, for one micro-batch."""
        return self._linears.wire()

    def dense(
        self,
        hidden_BTD: Tensor,
        sink: WeightSink | None,
        documents: Documents | None = None,
        context: ContextGroup = ALONE,
    ) -> Tensor:
        """Runs a whole dense layer, BTD -> BTD."""
        return self.add_mlp(self.mix(hidden_BTD, sink, documents, context), sink)

    def mix(
        self,
        hidden_BTD: Tensor,
        sink: WeightSink | None,
        documents: Documents | None = None,
        context: ContextGroup = ALONE,
    ) -> Tensor:
        """Adds attention of the norm to the hidden state, BTD -> BTD: the first part of every layer."""
        residual_BTD: Tensor = self.self_attn(hidden_BTD, self.input_layernorm, sink, documents, context)
        return residual_BTD

    def add_mlp(self, residual_BTD: Tensor, sink: WeightSink | None, *, for_backward: bool = False) -> Tensor:
        """Adds the network of the norm to the residual, BTD -> BTD: the second part of a dense layer."""
        assert isinstance(self.mlp, Mlp)
        return self.mlp.add(residual_BTD, self.post_attention_layernorm, sink, for_backward=for_backward)

    def attend(
        self,
        hidden_BTD: Tensor,
        sink: WeightSink | None,
        documents: Documents | None = None,
        route: Route | None = None,
        context: ContextGroup = ALONE,
    ) -> Attended:
        """Runs norm, attention, residual, norm and router; `route` chooses experts instead of the router."""
        return self.route(self.mix(hidden_BTD, sink, documents, context), route)

    def route(self, residual_BTD: Tensor, route: Route | None = None) -> Attended:
        """Runs norm and router of the residual; `route` chooses experts instead of the router."""
        assert isinstance(self.mlp, Moe)
        gate = self.mlp.gate
        # Norm and router share one pass over the residual; logits are float32: a rounded one could choose another
        # expert.
        normal_BTD, logits_BTE = norm_and_map(residual_BTD, self.post_attention_layernorm, gate.weight)
        rows = self._linears.make_rows(normal_BTD)
        return Attended(residual_BTD, rows, gate.route(logits_BTE) if route is None else route(gate, logits_BTE))

    def decode_few(self, residual_ND: Tensor) -> tuple[Tensor, Routing]:
        """Returns a MoE layer's output of few tokens after attention, ND, and their routing.

        All experts must be on this rank, and the linear layers must not have to decode as they were trained.
        """
        assert isinstance(self.mlp, Moe)
        gate, experts, shared = self.mlp.gate, self.mlp.experts, self.mlp.shared_experts
        normal_ND = self.post_attention_layernorm.decode(residual_ND)
        routing = gate.route(few_rows_linear(widen(normal_ND), widen(gate.weight))[None])
        weights_TK = routing.weights_TK.to(normal_ND.dtype)
        routed_ND = few_rows_experts(normal_ND, routing.ids_TK, weights_TK, experts.gate_up_proj, experts.down_proj)
        out_ND = routed_ND.add_(residual_ND)
        return (out_ND if shared is None else out_ND.add_(shared.decode_rows(normal_ND))), routing

    def apply_experts(self, received: Received, sink: WeightSink | None, *, for_backward: bool = False) -> ExpertOutput:
        """Runs routed experts on received rows, and adds residual and shared experts of the rank's own rows."""
        assert isinstance(self.mlp, Moe)
        routed_AD = self.mlp.experts.of_received(received, sink, for_backward=for_backward)
        base_BTD = self.add_shared(received.residual_BTD, received.local, sink, for_backward=for_backward)
        return ExpertOutput(routed_AD, base_BTD)

    def add_shared(
        self, residual_BTD: Tensor, rows: Rows, sink: WeightSink | None, *, for_backward: bool = False
    ) -> Tensor:
        """Returns the residual plus shared experts of its norm, BTD."""
        assert isinstance(self.mlp, Moe)
        experts = self.mlp.shared_experts
        norm = self.post_attention_layernorm
        if experts is None:
            return residual_BTD
        return experts.add_to(residual_BTD, rows, norm, sink, for_backward=for_backward)


class _Dispatch(torch.autograd.Function):
    """Autograd function of `Dispatcher.dispatch`. `arrivals` takes values without gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        values_BTD: Tensor,
        rows: Rows,
        weights_TK: Tensor,
        dispatcher: Dispatcher,
        handle: Handle,
        wire: Wire,
        arrivals: list[tuple[Rows, tuple[int, ...]]],
    ) -> tuple[Tensor, Tensor]:
        ctx.dispatcher = dispatcher
        ctx.handle = handle
        ctx.shape = values_BTD.shape
        # One copy of each token's row for each of its experts, in the order of the experts: AD.
        arrived = dispatcher.dispatch(wire.pack(rows), weights_TK, handle).wait()
        received = wire.unpack(arrived.rows_AD, rows)
        arrivals.append((received, arrived.counts))
        return received.values, arrived.weights_A

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients of all copies of a token are summed on the token's rank: ND.
        rows_ND, weights_TK = ctx.dispatcher.dispatch_backward(grads[0], grads[1], ctx.handle).wait()
        return rows_ND.view(ctx.shape), None, weights_TK, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_AD: Tensor, dispatcher: Dispatcher, handle: Handle, wire: Wire) -> Tensor:
        ctx.dispatcher = dispatcher
        ctx.handle = handle
        ctx.wire = wire
        return dispatcher.combine(rows_AD, handle).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND = grads[0]
        wire = ctx.wire
        # The gradient of a sum is a copy for each summand: AD.
        received = ctx.dispatcher.combine_backward(wire.pack_gradient(grad_ND), ctx.handle).wait()
        return wire.unpack_gradient(received, grad_ND), None, None, None


def run_block(
    block: Block,
    dispatcher: Dispatcher,
    hidden_BTD: Tensor,
    documents: Documents | None,
    context: ContextGroup = ALONE,
) -> tuple[Tensor, Routing | None]:
    """Runs a whole layer under plain autograd, BTD -> BTD; returns the routing too if it is a MoE layer."""
    if block.moe is None:
        return block.dense(hidden_BTD, None, documents, context), None
    # Norm, attention, residual, norm, router.
    attended = block.attend(hidden_BTD, None, documents, context=context)
    residual_BTD = attended.residual_BTD
    rows = attended.rows
    routing = attended.routing
    slots = block.moe.choose_slots(routing)
    handle = dispatcher.plan(slots.ids_TK, slots.weights_TK)
    # All experts are here: rows are read by index instead of copied, and results summed by token.
    if isinstance(dispatcher, RankLocalDispatcher):
        counts, order = dispatcher.local_order(handle)
        local = LocalRows(NormSource.of(residual_BTD, block.post_attention_layernorm), order)
        summed_ND = block.moe.experts(rows, slots.weights_TK, counts, None, local)
        base_BTD = block.add_shared(residual_BTD, rows, None)
        return base_BTD + summed_ND.view_as(base_BTD), routing
    wire = block.wire()
    arrivals: list[tuple[Rows, tuple[int, ...]]] = []
    # Autograd sees only `values`; the counts and FP8 codes come through `arrivals`.
    values_AD, weights_A = _Dispatch.apply(  # type: ignore[no-untyped-call]
        rows.values, rows, slots.weights_TK, dispatcher, handle, wire, arrivals
    )
    ((received, counts),) = arrivals
    expert_input = Received(residual_BTD, rows, received.with_values(values_AD), weights_A, counts)
    output = block.apply_experts(expert_input, None)
    # Weighted results return to their tokens and are summed: ND.
    summed_ND = _Combine.apply(output.routed_AD, dispatcher, handle, wire)  # type: ignore[no-untyped-call]
    return output.base_BTD + summed_ND.view_as(output.base_BTD), routing


class Mlp(nn.Module):
    """Computes down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype, linears: Linears) -> None:
        super().__init__()
        self._linears = linears
        self.gate_proj = Projection(hidden, intermediate, dtype)
        self.up_proj = Projection(hidden, intermediate, dtype)
        join_storage(self.gate_proj, self.up_proj)
        self.down_proj = Projection(intermediate, hidden, dtype)

    def forward(self, x: Tensor, sink: WeightSink | None) -> Tensor:
        """Returns the network of x in the weights' type, [..., D]."""
        gated = swiglu(self.gate_proj(x, sink), self.up_proj(x, sink))
        return self.down_proj(gated, sink)  # type: ignore[no-any-return]

    def decode(self, x: Tensor, norm: RmsNorm, rows: Rows | None = None) -> Tensor:
        """Returns x plus the network of norm(x), [..., D], without gradients. `rows`: norm(x), if it is given."""
        if self._linears.decodes_as_trained:
            return self.add(x, norm, None) if rows is None else self.add_to(x, rows, norm, None)
        # Joining the weights for one product, as training does, would copy them for every token.
        normal = norm.decode(x) if rows is None else rows.values
        return x + self.decode_rows(normal.flatten(0, -2)).view_as(x)

    def decode_rows(self, x_AD: Tensor) -> Tensor:
        """Returns the network of x, AD, without gradients."""
        gated_AM = functional.silu(few_rows_linear(x_AD, self.gate_proj.weight))
        gated_AM.mul_(few_rows_linear(x_AD, self.up_proj.weight))
        return few_rows_linear(gated_AM, self.down_proj.weight)

    def add(self, x: Tensor, norm: RmsNorm, sink: WeightSink | None, *, for_backward: bool = False) -> Tensor:
        """Returns x plus the network of norm(x), [..., D]."""
        # Gate and up in one product of the norm: [..., 2 M].
        hidden = self._linears.normed_linear(x, norm, self._gate_up(), sink)
        return self._linears.gated_down(x, hidden, self.down_proj.weight, sink, for_backward=for_backward)

    def add_to(
        self, x: Tensor, rows: Rows, norm: RmsNorm, sink: WeightSink | None, *, for_backward: bool = False
    ) -> Tensor:
        """Returns x plus the network of norm(x), [..., D], given norm(x), which takes the gradient."""
        hidden = self._linears.linear_of_rows(rows, NormSource.of(x, norm), self._gate_up(), sink)
        return self._linears.gated_down(x, hidden, self.down_proj.weight, sink, for_backward=for_backward)

    def _gate_up(self) -> tuple[Tensor, Tensor]:
        return self.gate_proj.weight, self.up_proj.weight


class RoutedExperts(nn.Module):
    """SwiGLU experts of a layer on this rank; gate and up projections share one matrix, gate rows first."""

    def __init__(self, hidden: int, intermediate: int, experts: range, dtype: torch.dtype, linears: Linears) -> None:
        super().__init__()
        self._linears = linears
        self.experts: Sequence[int] = experts
        self.gate_up_proj = nn.Parameter(torch.empty(len(experts), 2 * intermediate, hidden, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(len(experts), hidden, intermediate, dtype=dtype))

    def forward(
        self,
        rows: Rows,
        weights: Tensor,
        counts: Sequence[int],
        sink: WeightSink | None,
        local: LocalRows | None = None,
        *,
        for_backward: bool = False,
    ) -> Tensor:
        """Returns the experts' results times their routing weights, as `Linears.experts`."""
        return self._linears.experts(rows, weights, self.weights, counts, sink, local, for_backward=for_backward)

    @property
    def weights(self) -> ExpertWeights:
        """The stacked weights."""
        return ExpertWeights(self.gate_up_proj, self.down_proj)

    def of_received(self, received: Received, sink: WeightSink | None, *, for_backward: bool = False) -> Tensor:
        """Returns the weighted results of received rows, AD: of this rank's experts, then of copies on it."""
        rows = received.received
        weights_A = received.weights_A
        num_experts = len(self.gate_up_proj)
        counts = received.counts[:num_experts]
        copies = received.copies
        if copies is None or not copies.are_used:
            out_AD: Tensor = self(rows, weights_A, counts, sink, for_backward=for_backward)
            return out_AD
        # Every rank computes its copies, even without rows, because all exchange their gradients.
        num_rows = sum(counts)
        own_rows, copied_rows = rows.split(num_rows)
        own_weights, copied_weights = weights_A.split([num_rows, len(weights_A) - num_rows])
        own_AD = self(own_rows, own_weights, counts, sink, for_backward=for_backward)
        copied_AD = self._linears.experts(
            copied_rows,
            copied_weights,
            copies.weights,
            received.counts[num_experts:],
            copies.sink(sink),
            for_backward=for_backward,
        )
        return torch.cat((own_AD, copied_AD))

    def open_copies(self, dispatcher: Dispatcher, handle: Handle) -> CopiedExperts | None:
        """Returns the slots for copies of other ranks' experts in one micro-batch, if the dispatcher has any."""
        if isinstance(dispatcher, CopyingDispatcher):
            return CopiedExperts(dispatcher, handle, self._linears, self.weights)
        return None

    def per_expert(self) -> list[tuple[str, Tensor]]:
        """Returns (released name below `experts.`, view of its matrix) for each expert of this rank."""
        # Views, so that loading writes into the stacked matrices.
        half = self.gate_up_proj.shape[1] // 2
        named = []
        for index, expert in enumerate(self.experts):
            named.append((f"{expert}.gate_proj.weight", self.gate_up_proj[index, :half]))
            named.append((f"{expert}.up_proj.weight", self.gate_up_proj[index, half:]))
            named.append((f"{expert}.down_proj.weight", self.down_proj[index]))
        return named
