"""A pipeline stage: contiguous layers as phases, with embedding or heads at the ends."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from comm.protocol import ALONE, ContextGroup, Dispatcher, Label, Work
from kernels.attention.documents import Documents
from model.block import Attended, Block
from model.config import BalanceOver
from model.linear import GradientStore, WeightSink
from model.objective import BALANCE, LossSums, MicroBatch, Objective
from model.phases import (
    ActivationOffload,
    CombinePhase,
    Computed,
    ComputePhase,
    DispatchPhase,
    Exchange,
    HostMemoryLink,
)
from model.recomputed import (
    RecomputedAttend,
    RecomputedCombine,
    RecomputedExperts,
    RecomputedPhase,
)
from model.router import Route, Router, Routes, Routing
from model.slices import RunPlace, SlicedSequences
from model.transformer import Transformer
from model.values import (
    ExpertOutput,
    Gradients,
    Hidden,
    HiddenGradients,
    NoValues,
    Received,
    ReceivedGradients,
    Routed,
    Values,
)

Lane = Literal["compute", "comm"]
Phase = ComputePhase[Any, Any] | DispatchPhase | CombinePhase


@dataclass(frozen=True, slots=True)
class BalanceLoss:
    """Factor of the balance loss, the sums that take every layer's, unscaled, and its tokens."""

    factor: float
    sums: LossSums
    over: BalanceOver = "sequence"

    def record(self, balance: Tensor) -> Tensor:
        """Records a layer's balance loss, and returns its part of the step's loss."""
        self.sums.add(BALANCE, balance)
        return self.scale(balance)

    def scale(self, balance: Tensor) -> Tensor:
        """Returns the part of a layer's balance loss in the step's loss."""
        return self.factor * balance


def block_lanes(*, is_dense: bool) -> tuple[Lane, ...]:
    """Returns the lanes of a block's phases: attend, dispatch, experts, combine, or one if it is dense."""
    return ("compute",) if is_dense else ("compute", "comm", "compute", "comm")


def block_phases(
    block: Block,
    dispatcher: Dispatcher,
    store: GradientStore | None,
    balance: BalanceLoss,
    label: Label,
    documents: Documents | None = None,
    routes: Routes | None = None,
    context: ContextGroup = ALONE,
) -> list[Phase]:
    """Returns the phases of one micro-batch through one block; without a store nothing is kept."""
    choose = None if routes is None else partial(routes.route, label)
    parts = _BlockParts(block, documents, context, balance, choose)
    again = store if block.recomputes else None
    if block.moe is None:
        return [
            ComputePhase(parts.dense, store)
            if again is None
            else RecomputedPhase(parts.mix, parts.add_mlp, parts.add_mlp_again, again)
        ]
    # Dispatch plans the exchange; combine and both backwards use the same plan.
    exchange = Exchange(dispatcher, label, block.wire(), block.moe.experts.open_copies)
    dispatch = DispatchPhase(exchange)
    if again is None:
        return [ComputePhase(parts.attend, store), dispatch, ComputePhase(parts.experts, store), CombinePhase(exchange)]
    # With recomputation, the backward of combine sends the rows to their experts again.
    attend = RecomputedAttend(parts.mix, parts.route, parts.route_again, block.moe.gate.id_dtype, again)
    experts = RecomputedExperts(parts.experts, parts.experts_again, again)
    return [attend, dispatch, experts, RecomputedCombine(exchange, attend, dispatch, experts)]


@dataclass(frozen=True, slots=True)
class _BlockParts:
    """Computations of one micro-batch in one block; `choose` chooses experts instead of the router."""

    block: Block
    documents: Documents | None
    context: ContextGroup
    balance: BalanceLoss
    choose: Route | None

    def mix(self, hidden: Hidden, sink: WeightSink | None) -> Computed[Hidden]:
        return Computed(Hidden(self.block.mix(hidden.hidden_BTD, sink, self.documents, self.context)))

    def add_mlp(self, hidden: Hidden, sink: WeightSink | None) -> Computed[Hidden]:
        return Computed(Hidden(self.block.add_mlp(hidden.hidden_BTD, sink)))

    def add_mlp_again(self, hidden: Hidden, sink: WeightSink | None) -> Computed[Hidden]:
        return Computed(Hidden(self.block.add_mlp(hidden.hidden_BTD, sink, for_backward=True)))

    def dense(self, hidden: Hidden, sink: WeightSink | None) -> Computed[Hidden]:
        return Computed(Hidden(self.block.dense(hidden.hidden_BTD, sink, self.documents, self.context)))

    def attend(self, hidden: Hidden, sink: WeightSink | None) -> Computed[Routed]:
        attended = self.block.attend(hidden.hidden_BTD, sink, self.documents, self.choose, self.context)
        return self._routed(attended, self.balance.record)

    def route(self, hidden: Hidden) -> Routed:
        return self._routed(self.block.route(hidden.hidden_BTD, self.choose), self.balance.record).values

    def route_again(self, hidden: Hidden, ids_TK: Tensor) -> Computed[Routed]:
        """Computes what `route` did, for its choices."""

        def choose(router: Router, logits_BTE: Tensor) -> Routing:
            return router.route_again(logits_BTE, ids_TK)

        return self._routed(self.block.route(hidden.hidden_BTD, choose), self.balance.scale)

    def experts(self, received: Received, sink: WeightSink | None) -> Computed[ExpertOutput]:
        return Computed(self.block.apply_experts(received, sink))

    def experts_again(self, received: Received, sink: WeightSink | None) -> Computed[ExpertOutput]:
        return Computed(self.block.apply_experts(received, sink, for_backward=True))

    def _routed(self, attended: Attended, loss: Callable[[Tensor], Tensor]) -> Computed[Routed]:
        routing = attended.routing
        routed = Routed(attended.residual_BTD, attended.rows, routing.weights_TK, routing.ids_TK)
        return Computed(routed, loss(routing.balance(self.documents, self.context, self.balance.over)))


class StageRun:
    """One micro-batch in one stage, run phase by phase, forward and backward."""

    def __init__(self, phases: list[Phase], offload: ActivationOffload | None = None) -> None:
        self._phases = phases
        self._offload = offload
        self._values: Values = NoValues()
        self._gradients = Gradients()
        self._under_way: Callable[[], None] | None = None

    def set_input(self, hidden_BTD: Tensor) -> None:
        """Sets the hidden state from the stage before."""
        self._values = Hidden(hidden_BTD)

    def output(self) -> Tensor:
        """Returns the hidden state for the next stage, and releases it."""
        values = self._values
        self._values = NoValues()
        assert isinstance(values, Hidden)
        return values.hidden_BTD

    def set_output_gradient(self, gradient_BTD: Tensor) -> None:
        """Sets the gradient of `output`, from the next stage."""
        self._gradients = HiddenGradients(gradient_BTD)

    def input_gradient(self) -> Tensor:
        """Returns the gradient of the input, for the stage before, and releases it."""
        gradients = self._gradients
        self._gradients = Gradients()
        assert isinstance(gradients, HiddenGradients)
        assert gradients.hidden_BTD is not None
        return gradients.hidden_BTD

    def gradient_tensors(self) -> Iterator[Tensor]:
        """Yields the gradients of the input of the last phase that has finished its backward."""
        yield from (tensor for tensor in self._gradients.tensors() if tensor is not None)

    def forward(self, phase: int) -> None:
        """Runs a computation, or starts an exchange that `wait` completes."""
        match self._phases[phase]:
            case ComputePhase() as compute:
                self._values = compute.forward(self._values)
            case DispatchPhase() as dispatch:
                assert isinstance(self._values, Routed)
                self._start(dispatch.forward(self._values), self._keep_values)
            case CombinePhase() as combine:
                assert isinstance(self._values, ExpertOutput)
                self._start(combine.forward(self._values), self._keep_values)

    def backward(self, phase: int) -> None:
        """Runs or starts the backward of a phase, for gradients of inputs."""
        match self._phases[phase]:
            case ComputePhase() as compute:
                self._gradients = compute.backward(self._gradients)
            case DispatchPhase() as dispatch:
                assert isinstance(self._gradients, ReceivedGradients)
                self._start(dispatch.backward(self._gradients), self._keep_gradients)
            case CombinePhase() as combine:
                assert isinstance(self._gradients, HiddenGradients)
                self._start(combine.backward(self._gradients), self._keep_gradients)

    def weight(self, phase: int) -> None:
        """Computes the weight gradients that the phase's backward deferred."""
        compute = self._phases[phase]
        assert isinstance(compute, ComputePhase)
        compute.weight()

    def wait(self) -> None:
        """Completes the exchange that is running."""
        assert self._under_way is not None
        complete = self._under_way
        self._under_way = None
        complete()

    def kept(self) -> Iterator[Tensor]:
        """Yields the tensors that phases keep for their backward, including weights, maybe twice."""
        for phase in self._phases:
            if isinstance(phase, ComputePhase):
                yield from phase.kept()

    def offload(self) -> None:
        """Starts to copy what the phases keep to host memory. Indices of exchanges stay on the device."""
        assert self._offload is not None
        self._offload.start(self.kept())

    def release(self) -> None:
        """Frees what was copied, after the copy."""
        assert self._offload is not None
        self._offload.release()

    def reload(self) -> None:
        """Allocates again what was freed, and starts to copy it back."""
        assert self._offload is not None
        self._offload.reload()

    def restore(self) -> None:
        """Completes the copy back."""
        assert self._offload is not None
        self._offload.restore()

    def _start(self, work: Work[Any], keep: Callable[[Any], None]) -> None:
        assert self._under_way is None
        self._under_way = lambda: keep(work.wait())

    def _keep_values(self, values: Values) -> None:
        self._values = values

    def _keep_gradients(self, gradients: Gradients) -> None:
        self._gradients = gradients


class Stage:
    """Contiguous layers of a model as phases. `lanes` names the lane of every phase in forward order."""

    def __init__(self, model: Transformer, layers: range, *, first: bool, last: bool) -> None:
        self._model = model
        self._layers = layers
        self._first = first
        self._last = last
        depth = model.config.mtp_depth if last else 0
        # Order of phases: embedding, the blocks' phases, then head and MTP modules.
        lanes: list[Lane] = ["compute"] if first else []
        for layer in layers:
            lanes += block_lanes(is_dense=model.block(layer).moe is None)
        if last:
            lanes += ["compute", *(*block_lanes(is_dense=False), "compute") * depth]
        self.lanes: tuple[Lane, ...] = tuple(lanes)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that the stage reads, some of them twice. Others may read the embedding too."""
        model = self._model
        depth = self._model.config.mtp_depth
        # The layers first, then what only the ends of the pipeline read.
        modules: list[nn.Module | None] = [model.block(layer) for layer in self._layers]
        if self._last:
            modules += [model.model.norm, model.output_head, *(model.mtp_block(index + 1) for index in range(depth))]
        if self._first or (self._last and depth):
            modules.append(model.model.embed_tokens)
        for module in modules:
            assert module is not None
            yield from module.parameters()

    def start(
        self,
        batch: MicroBatch | None,
        objective: Objective,
        sums: LossSums,
        store: GradientStore | None,
        *,
        place: RunPlace = RunPlace(),  # noqa: B008  frozen
        routes: Routes | None = None,
        link: HostMemoryLink | None = None,
    ) -> StageRun:
        """Returns a run of one micro-batch; without a store it is forward only.

        Args:
            batch: required at both ends, and in every stage if it has documents.
            place: identifies the run in logs of its exchanges and for `routes`, which record or replay routers'
                choices.
            link: copies the activation to host memory and back; None if the run is not offloaded.
        """
        documents = None if batch is None else batch.documents

        model = self._model
        balance = BalanceLoss(objective.balance, sums, model.balance_over)

        def add_block(block: Block, layer: int) -> None:
            # The label names the exchange in logs, and the layer for recorded routes.
            label = Label(layer, place.direction, place.micro_batch)
            slices = place.sequences
            context = model.context if slices is None else slices.context(layer, place.index, model.context)
            phases.extend(block_phases(block, model.dispatcher, store, balance, label, documents, routes, context))

        phases: list[Phase] = []
        if self._first:
            assert batch is not None
            phases.append(ComputePhase(self._embedding(batch.inputs_BT[0]), store))
        for layer in self._layers:
            add_block(self._model.block(layer), layer)
        if self._last:
            assert batch is not None
            for depth in range(self._model.config.mtp_depth + 1):
                if depth:
                    add_block(self._model.mtp_block(depth), self._model.config.num_layers + depth - 1)
                phases.append(ComputePhase(self._head(depth, batch, objective, sums, place), store))
        slices = place.sequences
        return StageRun(phases, None if link is None else ActivationOffload(link, lambda: self._shared(batch, slices)))

    def _shared(self, batch: MicroBatch | None, slices: SlicedSequences | None = None) -> Iterator[Tensor]:
        yield from self._model.parameters()
        yield from self._model.buffers()
        # Later slices read or add to tensors of a slice whose others are in host memory.
        yield from () if slices is None else slices.shared()
        if batch is not None:
            yield from (*batch.inputs_BT, *batch.targets_BT, *batch.extras.values())
            yield from (rows for rows in batch.target_rows if rows is not None)
            if batch.documents is not None:
                yield from batch.documents.tensors()

    def _embedding(self, tokens_BT: Tensor) -> Callable[[NoValues, WeightSink | None], Computed[Hidden]]:
        return lambda values, sink: Computed(Hidden(self._model.embed(tokens_BT, sink)))

    def _head(
        self, depth: int, batch: MicroBatch, objective: Objective, sums: LossSums, place: RunPlace
    ) -> Callable[[Hidden, WeightSink | None], Computed[Any]]:
        def compute(values: Hidden, sink: WeightSink | None) -> Computed[Any]:
            hidden_BTD = values.hidden_BTD
            loss, onward_BTD = self._model.head_loss(depth, hidden_BTD, batch, objective, sums, sink, place=place)
            return Computed(NoValues() if onward_BTD is None else Hidden(onward_BTD), loss)

        return compute
