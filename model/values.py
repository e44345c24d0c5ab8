"""What passes between the phases of a block, and the gradients that return in its place.

Shape legend: B sequences, T tokens (after B, of one sequence; else of the micro-batch), D hidden size, K experts per
token, A received rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Protocol, Self

from torch import Tensor

from model.precision.linears import Rows


@dataclass(frozen=True, slots=True)
class Gradients:
    """Base of gradients. A field is None if nothing reads the value or no gradient arrived."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Returns the fields, in the order of the values' tensors."""
        return tuple(getattr(self, field.name) for field in fields(self))


class Values(Protocol):
    """What one phase returns and the next takes.

    gradients: the class of its gradients, whose fields match `tensors` one by one.
    """

    gradients: ClassVar[type[Gradients]]

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors that take gradients; anything else travels with them unchanged."""
        ...

    def with_tensors(self, tensors: Iterable[Tensor]) -> Self:
        """Returns the same values with other tensors in the place of these."""
        ...


@dataclass(frozen=True, slots=True)
class NoValues:
    """What enters the first phase of the model and leaves the last one."""

    gradients: ClassVar[type[Gradients]] = Gradients

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns none."""
        return ()

    def with_tensors(self, tensors: Iterable[Tensor]) -> "NoValues":
        """Returns nothing again."""
        return self


@dataclass(frozen=True, slots=True)
class HiddenGradients(Gradients):
    """Of `Hidden`."""

    hidden_BTD: Tensor | None


@dataclass(frozen=True, slots=True)
class Hidden:
    """The hidden state between two blocks, or two stages."""

    hidden_BTD: Tensor
    gradients: ClassVar[type[Gradients]] = HiddenGradients

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the hidden state."""
        return (self.hidden_BTD,)

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Hidden":
        """Returns another hidden state."""
        return Hidden(*tensors)


@dataclass(frozen=True, slots=True)
class RoutedGradients(Gradients):
    """Of `Routed`."""

    residual_BTD: Tensor
    rows_BTD: Tensor
    weights_TK: Tensor


@dataclass(frozen=True, slots=True)
class Routed:
    """Tokens after attention, and where they go: from `attend` to `dispatch`.

    rows: the experts' input, [B, T, D]. ids_TK: the experts of each token, int64.
    """

    residual_BTD: Tensor
    rows: Rows
    weights_TK: Tensor
    ids_TK: Tensor
    gradients: ClassVar[type[Gradients]] = RoutedGradients

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns residual, rows and routing weights."""
        return self.residual_BTD, self.rows.values, self.weights_TK

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Routed":
        """Returns the same routing of other tensors."""
        residual_BTD, values, weights_TK = tensors
        return replace(self, residual_BTD=residual_BTD, rows=self.rows.with_values(values), weights_TK=weights_TK)


@dataclass(frozen=True, slots=True)
class ReceivedGradients(Gradients):
    """Of `Received`. own_BTD: None without shared experts."""

    residual_BTD: Tensor
    own_BTD: Tensor | None
    received_AD: Tensor
    weights_A: Tensor


@dataclass(frozen=True, slots=True)
class Received:
    """What a rank's experts work on: from `dispatch` to `experts`.

    own: the rank's own rows, [B, T, D], for shared experts. received: rows in the order of this rank's experts, AD.
    weights_A: their routing weights. counts: rows of each expert.
    """

    residual_BTD: Tensor
    own: Rows
    received: Rows
    weights_A: Tensor
    counts: tuple[int, ...]
    gradients: ClassVar[type[Gradients]] = ReceivedGradients

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns residual, own rows, received rows and their weights."""
        return self.residual_BTD, self.own.values, self.received.values, self.weights_A

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Received":
        """Returns the same counts of other tensors."""
        residual_BTD, own, received, weights_A = tensors
        return Received(
            residual_BTD, self.own.with_values(own), self.received.with_values(received), weights_A, self.counts
        )


@dataclass(frozen=True, slots=True)
class ExpertGradients(Gradients):
    """Of `ExpertOutput`."""

    routed_AD: Tensor
    base_BTD: Tensor


@dataclass(frozen=True, slots=True)
class ExpertOutput:
    """What experts made: from `experts` to `combine`.

    routed_AD: of received rows, times their weights. base_BTD: residual plus shared experts of the rank's own rows.
    """

    routed_AD: Tensor
    base_BTD: Tensor
    gradients: ClassVar[type[Gradients]] = ExpertGradients

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns both."""
        return self.routed_AD, self.base_BTD

    def with_tensors(self, tensors: Iterable[Tensor]) -> "ExpertOutput":
        """Returns other output."""
        return ExpertOutput(*tensors)
