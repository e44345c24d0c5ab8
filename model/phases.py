"""Phases of a block, each with its own forward and backward, between which the autograd graph is cut.

A compute phase runs a differentiable function. Two exchange phases take rows to the experts and back. Between forward
and backward, what a micro-batch keeps may wait in host memory. Only memory moves then: tensors, views and graphs stay
the same objects, so a tensor that is saved twice is copied once. Shape legend: N = B T, A received rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from comm.protocol import Arrived, CompletedWork, Dispatcher, Handle, Label, MappedWork, Work
from model.copies import CopiedExperts
from model.linear import GradientStore, WeightQueue, WeightSink
from model.precision.linears import Rows, Wire
from model.values import (
    ExpertGradients,
    ExpertOutput,
    Gradients,
    Hidden,
    HiddenGradients,
    Received,
    ReceivedGradients,
    Routed,
    RoutedGradients,
    Values,
)

In = TypeVar("In", bound=Values)
Out = TypeVar("Out", bound=Values)
_LEAST_BYTES = 4096
"""Size below which the memory of a tensor stays on the device: a copy would take longer than it is worth."""


@dataclass(frozen=True, slots=True)
class Computed(Generic[Out]):
    """Result of a computation: values for the next phase, and its part of the step's loss, if any."""

    values: Out
    loss: Tensor | None = None


class _Entry:
    """Holder of the gradients of a phase's inputs. The inputs themselves are kept only by the graph."""

    def __init__(self, size: int) -> None:
        self.gradients: tuple[Tensor | None, ...] = (None,) * size


class _Enter(torch.autograd.Function):
    """Identity at the start of a phase's graph, which stores the gradients in an entry."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, entry: _Entry, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.entry = entry
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.entry.gradients = grads
        return (None, None, *(None for _ in grads))


@dataclass(frozen=True, slots=True)
class Recording:
    """Both ends of a computation's graph until its backward. Only the graph holds tensors."""

    entry: _Entry
    ends: tuple[GradientEdge | None, ...]
    loss: Tensor | None
    gradients: type[Gradients]

    def backward(self, gradients: Gradients) -> Gradients:
        """Returns the gradients of the inputs from those of the outputs, and frees the graph."""
        # Outputs that do not depend on inputs or weights have no edge; some gradients are absent.
        roots: list[GradientEdge] = []
        seeds: list[Tensor] = []
        for end, gradient in zip(self.ends, gradients.tensors(), strict=True):
            if gradient is not None and end is not None:
                roots.append(end)
                seeds.append(gradient)
        # A loss inside the phase (balance) has slope 1 in the step's loss.
        if self.loss is not None:
            roots.append(get_gradient_edge(self.loss))
            seeds.append(torch.ones_like(self.loss))
        torch.autograd.backward(roots, seeds)
        # Closures that wait for W may still hold the graph, and with it the entry.
        tensors = self.entry.gradients
        self.entry.gradients = ()
        return self.gradients(*tensors)

    def kept(self) -> Iterator[Tensor]:
        """Yields the tensors that the graph keeps, including weights, maybe twice."""
        nodes = [end.node for end in self.ends if end is not None]
        loss = self.loss
        yield from graph_tensors([*nodes, *([] if loss is None or loss.grad_fn is None else [loss.grad_fn])])


def record(
    function: Callable[[In, WeightSink | None], Computed[Out]], values: In, sink: WeightSink
) -> tuple[Out, Recording]:
    """Returns a function's values, detached from its graph, and the recording for its backward."""
    tensors = values.tensors()
    entry = _Entry(len(tensors))
    with torch.enable_grad():
        # The anchor puts the inputs into a graph although, as leaves, they do not require a gradient. Nothing reads it.
        anchor = torch.empty((), requires_grad=True)
        if tensors:
            values = values.with_tensors(_Enter.apply(anchor, entry, *tensors))  # type: ignore[no-untyped-call]
        computed = function(values, sink)
    # Edges instead of tensors: outputs may be freed while the graph waits for its backward.
    outputs = computed.values.tensors()
    ends = tuple(get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in outputs)
    recording = Recording(entry, ends, computed.loss, values.gradients)
    return computed.values.with_tensors(tensor.detach() for tensor in outputs), recording


class ComputePhase(Generic[In, Out]):
    """A differentiable function of the values before it; keeps only the function's graph for the backward."""

    def __init__(self, function: Callable[[In, WeightSink | None], Computed[Out]], store: GradientStore | None) -> None:
        self._function = function
        self._store = store
        self._queue = WeightQueue()
        self._recorded: Recording | None = None

    def forward(self, values: In) -> Out:
        """Returns the function's values, detached from its graph; without a store nothing is kept."""
        # Forward-only runs record nothing.
        if self._store is None:
            with torch.no_grad():
                return self._function(values, None).values
        outputs, self._recorded = record(self._function, values, self._queue)
        return outputs

    def backward(self, gradients: Gradients) -> Gradients:
        """Returns the gradients of the inputs; weight gradients of linear layers wait in the queue."""
        assert self._recorded is not None
        # Taken out first, so that nothing of the micro-batch is held when its backward has ended.
        recorded = self._recorded
        self._recorded = None
        return recorded.backward(gradients)

    def kept(self) -> Iterator[Tensor]:
        """Yields the tensors that are kept between forward and backward, including weights, maybe twice."""
        if self._recorded is not None:
            yield from self._recorded.kept()

    def weight(self) -> None:
        """Computes the weight gradients of the last backward and adds them to the store."""
        assert self._store is not None
        self._queue.flush(self._store)


@dataclass(slots=True)
class Exchange:
    """Shared state of the three phases around one exchange: its plan and the form of its rows."""

    dispatcher: Dispatcher
    label: Label | None
    wire: Wire
    open_copies: Callable[[Dispatcher, Handle], CopiedExperts | None]
    handle: Handle | None = None
    copies: CopiedExperts | None = None

    def plan(self, ids_TK: Tensor, weights_TK: Tensor) -> Handle:
        """Starts the exchange of counts."""
        self.handle = self.dispatcher.plan(ids_TK, weights_TK, self.label)
        self.copies = self.open_copies(self.dispatcher, self.handle)
        return self.handle

    def fetch_copies(self) -> Work[None]:
        """Starts to send the weights of copied experts, before their forward or backward."""
        return CompletedWork(None) if self.copies is None else self.copies.fetch()

    def free_copies(self) -> None:
        """Frees the weights of copied experts, after their forward or backward."""
        if self.copies is not None:
            self.copies.free()

    def planned(self) -> Handle:
        """Returns the handle created by `plan`."""
        assert self.handle is not None
        return self.handle


class DispatchPhase:
    """Sends a copy of each token's row to each of its experts."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def forward(self, routed: Routed) -> Work[Received]:
        """Starts the exchange of rows and routing weights."""
        # Counts travel first: the exchange of rows needs their split sizes.
        wire = self._exchange.wire
        exchange = self._exchange
        handle = exchange.plan(routed.ids_TK, routed.weights_TK)
        work = exchange.dispatcher.dispatch(wire.pack(routed.rows), routed.weights_TK, handle)
        weights_work = exchange.fetch_copies()

        def finish(arrived: Arrived) -> Received:
            weights_work.wait()
            received = wire.unpack(arrived.rows_AD, routed.rows)
            return Received(
                routed.residual_BTD, routed.rows, received, arrived.weights_A, arrived.counts, exchange.copies
            )

        return MappedWork(work, finish)

    def send_again(self, routed: Routed) -> Work[Rows]:
        """Starts another exchange of the same rows, before the backward, if those that arrived were not kept."""
        wire = self._exchange.wire
        rows = routed.rows
        work = self._exchange.dispatcher.dispatch_again(wire.pack(rows), self._exchange.planned())
        return MappedWork(work, lambda received: wire.unpack(received, rows))

    def backward(self, gradients: ReceivedGradients) -> Work[RoutedGradients]:
        """Starts the return of the gradients of rows and weights to their tokens."""
        self._exchange.free_copies()
        residual_BTD = gradients.residual_BTD
        local_BTD = gradients.local_BTD

        def finish(back: tuple[Tensor, Tensor]) -> RoutedGradients:
            # Gradients of all copies of a token are summed; shared experts read the same rows locally.
            rows_BTD = back[0].view_as(residual_BTD)
            weights_TK = back[1]
            return RoutedGradients(residual_BTD, rows_BTD if local_BTD is None else local_BTD + rows_BTD, weights_TK)

        handle = self._exchange.planned()
        work = self._exchange.dispatcher.dispatch_backward(gradients.received_AD, gradients.weights_A, handle)
        return MappedWork(work, finish)


class CombinePhase:
    """Sums each token's rows from its experts, and adds residual and shared experts."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def forward(self, output: ExpertOutput) -> Work[Hidden]:
        """Starts the return of each token's rows."""
        self._exchange.free_copies()
        # Residual and shared experts of the rank's own tokens stay here.
        base_BTD = output.base_BTD
        work = self._exchange.dispatcher.combine(output.routed_AD, self._exchange.planned())
        return MappedWork(work, lambda summed_ND: Hidden(base_BTD + summed_ND.view_as(base_BTD)))

    def backward(self, gradients: HiddenGradients) -> Work[ExpertGradients]:
        """Starts the exchange of a copy of each token's gradient for each of its experts."""
        grad_BTD = gradients.hidden_BTD
        exchange = self._exchange
        assert grad_BTD is not None
        # The gradient of the base is the same tensor, so nothing is copied for it.
        grad_ND = grad_BTD.flatten(0, 1)

        packed = exchange.wire.pack_gradient(grad_ND)
        work = exchange.dispatcher.combine_backward(packed, exchange.planned())
        weights_work = exchange.fetch_copies()

        def finish(received: Tensor) -> ExpertGradients:
            weights_work.wait()
            return ExpertGradients(exchange.wire.unpack_gradient(received, grad_ND), grad_BTD)

        return MappedWork(work, finish)


class HostMemoryLink(Protocol):
    """Copies tensors between the device and host memory, next to computation."""

    def to_host(self, tensors: Sequence[Tensor]) -> Work[Sequence[Tensor]]:
        """Starts to copy tensors to host memory. They must stay unchanged until the work is complete."""

    def to_device(self, hosts: Sequence[Tensor], tensors: Sequence[Tensor]) -> Work[None]:
        """Starts to copy host tensors into tensors of the same shape."""


def graph_tensors(nodes: Iterable[Node]) -> Iterator[Tensor]:
    """Yields the tensors that autograd graphs keep for their backward, including weights, maybe twice.

    A custom function names those that it keeps outside `save_for_backward` in the context's attribute `inner_tensors`.
    """
    # Walk of the graph from its ends; a node may be reached on several ways.
    left = list(nodes)
    seen = set[Node]()
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        left += [before for before, _ in node.next_functions if before is not None]
        for name in _saved_names(type(node)):
            yield from _tensors_in(getattr(node, name))
        for tensor in getattr(node, "inner_tensors", ()):
            yield tensor
            if tensor.grad_fn is not None:
                left.append(tensor.grad_fn)


@cache
def _saved_names(kind: type[Node]) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors")


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        yield from (item for item in value if isinstance(item, Tensor))


class ActivationOffload:
    """Offload of the activation of one micro-batch in one stage: start, release, reload, restore.

    Shared tensors never move: weights, tokens, masks and tables, which other micro-batches read meanwhile.
    """

    def __init__(self, link: HostMemoryLink, shared: Callable[[], Iterable[Tensor]]) -> None:
        self._link = link
        self._shared = shared
        self._storages: list[torch.UntypedStorage] = []
        self._to_host: Work[Sequence[Tensor]] | None = None
        self._hosts: Sequence[Tensor] = ()
        self._to_device: Work[None] | None = None

    def start(self, tensors: Iterable[Tensor]) -> None:
        """Starts to copy the memory of kept tensors to the host."""
        self._storages = movable_storages(tensors, self._shared())
        self._to_host = self._link.to_host([_bytes_of(storage) for storage in self._storages])

    def release(self) -> None:
        """Waits for the copy, and frees the memory on the device."""
        assert self._to_host is not None
        self._hosts = self._to_host.wait()
        self._to_host = None
        for storage in self._storages:
            # Views and graph keep their objects; only the bytes go.
            storage.resize_(0)

    def reload(self) -> None:
        """Allocates the memory again, and starts to copy it back."""
        for storage, host in zip(self._storages, self._hosts, strict=True):
            storage.resize_(host.nbytes)
        self._to_device = self._link.to_device(self._hosts, [_bytes_of(storage) for storage in self._storages])

    def restore(self) -> None:
        """Waits for the copy back, and frees the memory on the host."""
        assert self._to_device is not None
        self._to_device.wait()
        self._storages = []
        self._hosts = ()
        self._to_device = None


def movable_storages(tensors: Iterable[Tensor], shared: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Returns the memory of kept tensors, each once, that torch allocated and that is not shared or small."""
    # Views share memory, so memory is identified by address, not by tensor.
    fixed = {tensor.untyped_storage().data_ptr() for tensor in shared}
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= _LEAST_BYTES and storage.data_ptr() not in fixed and storage.resizable():
            storages.setdefault(storage.data_ptr(), storage)
    return list(storages.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
