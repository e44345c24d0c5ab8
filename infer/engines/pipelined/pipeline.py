"""Defines what the engine needs of the ranks that hold a model together."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from dualpipe.ir import Placement
from dualpipe.runtime.execute import Execution
from dualpipe.runtime.protocols import PipelineStage
from infer.engines.pipelined.plan import RoundFormat
from model.transformer import Transformer

ValueT = TypeVar("ValueT")


class DecodePipeline(Protocol):
    """The ranks of a pipeline and of its copies along the data axis, as the engine uses them."""

    @property
    def placement(self) -> Placement:
        """The pipeline rank of each stage, for each direction."""
        ...

    @property
    def rank(self) -> int:
        """This rank within its pipeline."""
        ...

    @property
    def data_index(self) -> int:
        """Index of this pipeline along the data axis."""
        ...

    @property
    def num_data(self) -> int:
        """Number of pipelines."""
        ...

    @property
    def shares_experts(self) -> bool:
        """Whether several pipelines hold the experts of a layer together."""
        ...

    @property
    def cut(self) -> tuple[range, ...]:
        """Layers of each stage."""
        ...

    @property
    def model(self) -> Transformer:
        """This rank's part of the model."""
        ...

    def hand_over(
        self, form: RoundFormat, rounds: Mapping[int, Sequence[Tensor]], num_cohorts: int
    ) -> dict[tuple[int, int], Tensor]:
        """Sends packed rounds from the last stages to the first ones.

        Returns:
            The next round by direction and cohort, for the directions whose first stage is on this rank.
        """
        ...

    def run(
        self, form: RoundFormat, stages: Mapping[int, PipelineStage], num_cohorts: int, num_rounds: int
    ) -> Execution:
        """Runs a number of rounds of every cohort. All ranks call it with the same numbers."""
        ...

    def largest(self, number: int) -> int:
        """Returns the largest of the numbers of all ranks. All ranks call it."""
        ...

    def gather(self, value: ValueT | None) -> list[ValueT]:
        """Returns the values of the ranks that have one, in the order of ranks. All ranks call it."""
        ...

    def first_report(self, text: str) -> str:
        """Returns the text of the lowest rank whose text is not empty, or an empty one. All ranks call it."""
        ...
