"""Describes and runs the rounds of a cohort, and names what the ranks of a pipeline do together.

Shape legend: N new tokens of a cohort, D hidden size.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol, Self, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualpipe.ir import Placement, ValueKind
from dualpipe.runtime.execute import Execution
from dualpipe.runtime.program import PipelineStage
from infer.config import GenerateError
from infer.decoder import Decoder, PassKind, Views
from model.transformer import Transformer

ValueT = TypeVar("ValueT")

_KINDS: tuple[PassKind, ...] = get_args(PassKind)
_BYTES_PER_NUMBER = 8
_HEADER_NUMBERS = 2
_NUMBERS_PER_ROW = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundPlan:
    """What every stage computes for a cohort in its next round. Empty if the cohort has nothing to do.

    Attributes:
        sources: for each row of the caches, the row that held its tokens in the previous round, or -1 if it is new.
        lengths: number of cached tokens of each row that stay. Fewer than before if a draft was rejected.
    """

    kind: PassKind = "step"
    sources: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    places: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of new tokens of all rows, N."""
        return sum(self.counts)

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows with new tokens."""
        return tuple(row for row, count in enumerate(self.counts) if count)

    def write(self, numbers: NDArray[np.int64]) -> None:
        """Writes the plan to the start of an array of enough numbers."""
        columns = np.array((self.sources, self.lengths, self.counts, self.places), dtype=np.int64)
        numbers[:_HEADER_NUMBERS] = _KINDS.index(self.kind), len(self.counts)
        numbers[_HEADER_NUMBERS : _HEADER_NUMBERS + columns.size] = columns.ravel(order="F")

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Self:
        """Reads what `write` wrote. Further numbers may follow."""
        end = _HEADER_NUMBERS + _NUMBERS_PER_ROW * numbers[1]
        sources, lengths, counts, places = (
            tuple(numbers[_HEADER_NUMBERS + at : end : _NUMBERS_PER_ROW]) for at in range(_NUMBERS_PER_ROW)
        )
        return cls(kind=_KINDS[numbers[0]], sources=sources, lengths=lengths, counts=counts, places=places)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundFormat:
    """Format of a cohort's values between stages: a plan of fixed size, then a row for each new token.

    A row is a hidden state, or a token id on the way from the last stage to the first.
    """

    max_rows: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def plan_bytes(self) -> int:
        """Number of bytes of a plan."""
        return _BYTES_PER_NUMBER * (_HEADER_NUMBERS + _NUMBERS_PER_ROW * self.max_rows)

    def row_bytes(self, kind: ValueKind) -> int:
        """Returns the number of bytes of a token's row."""
        return torch.int64.itemsize if kind == "tokens" else self.hidden_size * self.dtype.itemsize

    def num_payload_bytes(self, kind: ValueKind, plan_bytes: Tensor) -> int:
        """Returns the number of bytes that follow a plan, given its bytes."""
        return self._plan(plan_bytes).num_tokens * self.row_bytes(kind)

    def pack(self, plan: RoundPlan, rows: Tensor | None, device: torch.device) -> Tensor:
        """Returns a plan and its rows (ids [N] or states [N, D], None if empty) as bytes, a flat uint8 tensor."""
        numbers = np.zeros(self.plan_bytes // _BYTES_PER_NUMBER, dtype=np.int64)
        plan.write(numbers)
        head = torch.from_numpy(numbers).view(torch.uint8).to(device)
        return head if rows is None else torch.cat((head, rows.contiguous().flatten().view(torch.uint8)))

    def unpack(self, value: Tensor) -> tuple[RoundPlan, Tensor]:
        """Returns the plan and the bytes of the rows of a packed value."""
        return self._plan(value[: self.plan_bytes]), value[self.plan_bytes :]

    def token_ids(self, payload: Tensor) -> Tensor:
        """Returns the token ids in the bytes of rows, N."""
        return payload.view(torch.int64)

    def hidden(self, payload: Tensor) -> Tensor:
        """Returns the hidden states in the bytes of rows, ND."""
        return payload.view(self.dtype).view(-1, self.hidden_size)

    def _plan(self, plan_bytes: Tensor) -> RoundPlan:
        return RoundPlan.from_numbers(plan_bytes.view(torch.int64).tolist())  # host sync


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelinePlace:
    """The place of this rank among those that hold a model together.

    Attributes:
        placement: the pipeline rank of each stage, for each direction.
        data_index: index of this pipeline along the data axis, among `num_data`.
        shares_experts: whether several pipelines hold the experts of a layer together.
        cut: layers of each stage.
    """

    placement: Placement
    rank: int
    data_index: int
    num_data: int
    shares_experts: bool
    cut: tuple[range, ...]


class DecodePipeline(Protocol):
    """The ranks of a pipeline and of its copies along the data axis, as the engine uses them."""

    place: PipelinePlace

    @property
    def model(self) -> Transformer:
        """This rank's part of the model."""

    def hand_over(
        self, form: RoundFormat, rounds: Mapping[int, Sequence[Tensor]], num_cohorts: int
    ) -> dict[tuple[int, int], Tensor]:
        """Sends packed rounds from the last stages to the first ones.

        Args:
            rounds: next round of each cohort, by direction, for the directions that end on this rank.

        Returns:
            The next round by direction and cohort, for the directions that begin on this rank.
        """

    def run(
        self, form: RoundFormat, stages: Mapping[int, PipelineStage], num_cohorts: int, num_rounds: int
    ) -> Execution:
        """Runs a number of rounds of every cohort. All ranks call it with the same numbers."""

    def largest(self, number: int) -> int:
        """Returns the largest of the numbers of all ranks. All ranks call it."""

    def gather(self, value: ValueT | None) -> list[ValueT]:
        """Returns the values of the ranks that have one, in the order of ranks. All ranks call it."""

    def first_report(self, text: str) -> str:
        """Returns the text of the lowest rank that has one, or an empty one. All ranks call it."""


Round = tuple[RoundPlan, Tensor | None]
"""The plan of a cohort's next round and its token ids, N, or None if the plan is empty."""

NOTHING: Round = (RoundPlan(), None)


class _ClosedError(BaseException):
    """Ends a program after its cohort was closed."""


class Cohort:
    """The program of one cohort, and its error that the user can fix.

    A call to its decoder blocks while the cohort's tokens travel through the stages, and other cohorts use the last
    stage in the meantime. The program therefore has a thread. Only one thread of a rank runs at a time.
    """

    def __init__(self, program: Callable[[], None], name: str) -> None:
        """Prepares to run a program, which calls `exchange` for every pass."""
        self.error: GenerateError | None = None
        self._program = program
        self._inputs: SimpleQueue[Tensor | None] = SimpleQueue()
        self._rounds: SimpleQueue[Round | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.is_running = False

    def start(self) -> Round:
        """Runs the program up to its first pass, and returns that."""
        self.is_running = True
        self._thread.start()
        return self._await()

    def resume(self, hidden_ND: Tensor) -> Round:
        """Gives the program the input of the last stage, and returns its next pass or raises its error."""
        self._inputs.put(hidden_ND)
        return self._await()

    def exchange(self, plan: RoundPlan, tokens_N: Tensor) -> Tensor:
        """Waits until tokens have passed all stages but the last; returns the last stage's input, ND."""
        self._rounds.put((plan, tokens_N))
        hidden_ND = self._inputs.get()
        if hidden_ND is None:
            raise _ClosedError
        return hidden_ND

    def close(self) -> None:
        """Ends the program if it has not ended."""
        if self.is_running:
            self._inputs.put(None)
            self._thread.join()
            self.is_running = False

    def _await(self) -> Round:
        next_round = self._rounds.get()
        if isinstance(next_round, BaseException):
            self.is_running = False
            raise next_round
        self.is_running = next_round is not NOTHING
        return next_round

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._program()
        except _ClosedError:
            return
        except GenerateError as error:
            self.error = error
        except BaseException as error:
            self._rounds.put(error)
            return
        self._rounds.put(NOTHING)


class CohortDecoder(Decoder):
    """Decoder of one cohort on the rank of the last stage. Earlier stages run on other ranks."""

    def __init__(self, *args: Any, with_mtp: bool, **options: Any) -> None:
        super().__init__(*args, with_mtp=with_mtp, **options)
        self.drafts = with_mtp
        self.mtp_calls = 0
        self.exchange: Callable[[RoundPlan, Tensor], Tensor] | None = None  # `Cohort.exchange`
        self._sources: list[int] = []

    def add(self, place: int = 0) -> int:
        """Adds an empty sequence. Returns its row, which is the same in all caches of all stages."""
        self._sources.append(-1)
        return super().add(place)

    def remove(self, row: int) -> None:
        """Removes a sequence and moves the last row into its place, in all stages from the next round on."""
        super().remove(row)
        last = self._sources.pop()
        if row < len(self._sources):
            self._sources[row] = last

    def swap(self, row: int, other: int) -> None:
        """Exchanges two sequences, in all stages from the next round on."""
        super().swap(row, other)
        self._sources[row], self._sources[other] = self._sources[other], self._sources[row]

    def copy_prompt(self, source: int, target: int, num_tokens: int, num_pairs: int) -> None:
        """Copies the first tokens of a sequence, which are its prompt, to an empty row of all stages."""
        super().copy_prompt(source, target, num_tokens, num_pairs)
        self._sources[target] = self._sources[source]

    def _enter(self, kind: PassKind, tokens_N: Tensor, rows: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Returns the input of the last stage, ND, after the tokens have passed all others."""
        assert self.exchange is not None
        lengths = self.main.lengths
        new = [0] * len(lengths)
        for row, count in zip(rows, counts, strict=True):
            new[row] = count
        plan = RoundPlan(
            kind=kind,
            sources=tuple(self._sources),
            lengths=tuple(lengths),
            counts=tuple(new),
            places=tuple(self.recorder.places),
        )
        self._sources = list(range(len(lengths)))
        return self.exchange(plan, tokens_N)

    def _run_mtp(self, next_tokens_N: Tensor, state_ND: Tensor, views: Views) -> Tensor:
        self.mtp_calls += 1
        return super()._run_mtp(next_tokens_N, state_ND, views)
