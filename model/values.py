"""Values between the phases of a block, and their gradients.

Shape legend: A received rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Protocol, Self

from torch import Tensor

from model.copies import CopiedExperts
from model.precision.linears import Rows


@dataclass(frozen=True, slots=True)
class Gradients:
    """Base of gradients. A field is None if the value is not read or no gradient arrived."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Returns the fields, in the order of the values' tensors."""
        return tuple(getattr(self, field.name) for field in fields(self))


class Values(Protocol):
    """Output of one phase and input of the next. The fields of class `gradients` match `tensors`."""

    gradients: ClassVar[type[Gradients]]

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors that take gradients; all other values are passed on unchanged."""

    def with_tensors(self, tensors: Iterable[Tensor]) -> Self:
        """Returns the same values with these tensors replaced."""


@dataclass(frozen=True, slots=True)
class NoValues:
    """Empty input of the model's first phase and output of its last phase."""

    gradients: ClassVar[type[Gradients]] = Gradients

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns no tensors."""
        return ()

    def with_tensors(self, tensors: Iterable[Tensor]) -> "NoValues":
        """Returns an empty value."""
        return self


@dataclass(frozen=True, slots=True)
class HiddenGradients(Gradients):
    """Gradients of `Hidden`."""

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
        """Returns the hidden state that is given."""
        return Hidden(*tensors)


@dataclass(frozen=True, slots=True)
class RoutedGradients(Gradients):
    """Gradients of `Routed`."""

    residual_BTD: Tensor
    rows_BTD: Tensor
    weights_TK: Tensor


@dataclass(frozen=True, slots=True)
class Routed:
    """Tokens after attention: from `attend` to `dispatch`. `rows` is the experts' input; ids are int64."""

    residual_BTD: Tensor
    rows: Rows
    weights_TK: Tensor
    ids_TK: Tensor
    gradients: ClassVar[type[Gradients]] = RoutedGradients

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns residual, rows and routing weights."""
        return self.residual_BTD, self.rows.values, self.weights_TK

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Routed":
        """Returns the same routing with other tensors."""
        residual_BTD, values, weights_TK = tensors
        return replace(self, residual_BTD=residual_BTD, rows=self.rows.with_values(values), weights_TK=weights_TK)


@dataclass(frozen=True, slots=True)
class ReceivedGradients(Gradients):
    """Gradients of `Received`. `local_BTD` is None without shared experts."""

    residual_BTD: Tensor
    local_BTD: Tensor | None
    received_AD: Tensor
    weights_A: Tensor


@dataclass(frozen=True, slots=True)
class Received:
    """Input of a rank's experts: own rows, and received ones in the order of its experts, AD."""

    residual_BTD: Tensor
    local: Rows
    received: Rows
    weights_A: Tensor
    counts: tuple[int, ...]
    copies: CopiedExperts | None = None  # copies in this rank's slots, which the last rows are for
    gradients: ClassVar[type[Gradients]] = ReceivedGradients

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns residual, own rows, received rows and their weights."""
        return self.residual_BTD, self.local.values, self.received.values, self.weights_A

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Received":
        """Returns the same counts with other tensors."""
        residual_BTD, local, received, weights_A = tensors
        return replace(
            self,
            residual_BTD=residual_BTD,
            local=self.local.with_values(local),
            received=self.received.with_values(received),
            weights_A=weights_A,
        )


@dataclass(frozen=True, slots=True)
class ExpertGradients(Gradients):
    """Gradients of `ExpertOutput`."""

    routed_AD: Tensor
    base_BTD: Tensor


@dataclass(frozen=True, slots=True)
class ExpertOutput:
    """Output of the experts: weighted results of received rows, and residual plus shared experts."""

    routed_AD: Tensor
    base_BTD: Tensor
    gradients: ClassVar[type[Gradients]] = ExpertGradients

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns both tensors."""
        return self.routed_AD, self.base_BTD

    def with_tensors(self, tensors: Iterable[Tensor]) -> "ExpertOutput":
        """Returns an output with other tensors."""
        return ExpertOutput(*tensors)
