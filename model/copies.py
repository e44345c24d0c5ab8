"""Holds copies of other ranks' experts while one micro-batch of one layer needs them."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from comm.protocol import CopyingDispatcher, Handle, Work
from model.linear import CopiedProduct, WeightProduct, WeightSink
from model.precision.linears import ExpertWeights, Linears


class CopiedExperts:
    """Slots of this rank for copies.

    The weights arrive before each use, and their memory is freed after it. The tensors stay, as the graph of a forward
    holds them until its backward.
    """

    def __init__(self, dispatcher: CopyingDispatcher, handle: Handle, linears: Linears, experts: ExpertWeights) -> None:
        """Allocates the slots, without numbers."""
        self._dispatcher = dispatcher
        self._handle = handle
        self._linears = linears
        self._experts = experts
        self._parts = [part.new_empty(dispatcher.num_slots, *part.shape[1:]) for part in linears.parts_to_copy(experts)]
        self._num_bytes = [part.nbytes for part in self._parts]
        self.weights = linears.copied_experts(self._parts, experts)

    @property
    def are_used(self) -> bool:
        """Whether any rank has a copy; the same on all ranks. Waits on the host until this is known."""
        return self._dispatcher.has_copies(self._handle)

    def fetch(self) -> Work[None]:
        """Starts to send the weights of all copies to their slots."""
        for part, num_bytes in zip(self._parts, self._num_bytes, strict=True):
            part.untyped_storage().resize_(num_bytes)
        # The graph of the forward must not see that its tensors change: they get the same numbers again.
        slots = [part.data for part in self._parts]
        return self._dispatcher.copy_weights(self._linears.parts_to_copy(self._experts), slots, self._handle)

    def free(self) -> None:
        """Frees the memory of the weights after their last use in a forward or backward."""
        for part in self._parts:
            part.untyped_storage().resize_(0)

    def sink(self, sink: WeightSink | None) -> WeightSink | None:
        """Returns a sink that sends gradients of copies to their experts' ranks when they are computed."""
        if sink is None:
            return None
        experts = {id(copy): weight for copy, weight in zip(self.weights, self._experts, strict=True)}
        return _CopySink(sink, experts, partial(self._dispatcher.return_gradients, handle=self._handle))


class _CopySink:
    def __init__(
        self,
        sink: WeightSink,
        experts: dict[int, Tensor],
        send: Callable[[Tensor], Work[list[tuple[int, Tensor]]]],
    ) -> None:
        self._sink = sink
        self._experts = experts
        self._send = send

    def defer(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        assert isinstance(gradient, WeightProduct)
        self._sink.defer(self._experts[id(weight)], CopiedProduct(gradient, weight.shape, self._send))
