"""Runs the generation of one cohort as a plain program whose passes travel through the pipeline.

A call to its decoder blocks while the cohort's tokens travel through the stages, and other cohorts use the last stage
in the meantime. The program therefore has a thread. Only one thread of a rank runs at a time.

Shape legend: N new tokens of the cohort, D hidden size.
"""

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch
from torch import Tensor

from infer.config import GenerateError
from infer.decoder import Decoder, PassKind, Views
from infer.engines.pipelined.plan import RoundPlan
from infer.routes import RouteStore
from model.transformer import Transformer

Round = tuple[RoundPlan, Tensor | None]
"""The plan of a cohort's next round and its token ids, N, or None if the plan is empty."""

NOTHING: Round = (RoundPlan(), None)


class _ClosedError(BaseException):
    """Ends a program whose cohort was closed."""


class Cohort:
    """The program of one cohort, and its error that the user can fix."""

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
        found = self._rounds.get()
        if isinstance(found, BaseException):
            self.is_running = False
            raise found
        self.is_running = found is not NOTHING
        return found

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

    def __init__(
        self,
        model: Transformer,
        max_sequences: int,
        capacity: int,
        *,
        with_mtp: bool,
        layers: Sequence[int],
        routes: RouteStore | None = None,
    ) -> None:
        super().__init__(model, max_sequences, capacity, with_mtp=with_mtp, layers=layers, routes=routes)
        self.mtp_calls = 0
        self.exchange: Callable[[RoundPlan, Tensor], Tensor] | None = None  # `Cohort.exchange`
        self._sources: list[int] = []
        self._places: list[int] = []

    def add(self, place: int = 0) -> int:
        """Adds an empty sequence. Returns its row, which is the same in all caches of all stages."""
        self._sources.append(-1)
        self._places.append(place)
        return super().add(place)

    def remove(self, row: int) -> None:
        """Removes a sequence and moves the last row into its place, in all stages from the next round on."""
        super().remove(row)
        last, last_place = self._sources.pop(), self._places.pop()
        if row < len(self._sources):
            self._sources[row], self._places[row] = last, last_place

    def copy_prompt(self, source: int, target: int, num_tokens: int) -> None:
        """Copies the first tokens of a sequence, which are its prompt, to an empty row of all stages."""
        super().copy_prompt(source, target, num_tokens)
        self._sources[target] = self._sources[source]

    def _enter(self, kind: PassKind, tokens_N: Tensor, rows: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Returns the input of the last stage, ND, after the tokens have passed all others."""
        assert self.exchange is not None
        new = dict(zip(rows, counts, strict=True))
        lengths = self.main.lengths
        plan = RoundPlan(
            kind=kind,
            sources=tuple(self._sources),
            lengths=tuple(lengths),
            counts=tuple(new.get(row, 0) for row in range(len(lengths))),
            places=tuple(self._places),
        )
        self._sources = list(range(len(lengths)))
        return self.exchange(plan, tokens_N)

    def _run_mtp(self, next_tokens_N: Tensor, state_ND: Tensor, views: Views) -> Tensor:
        self.mtp_calls += 1
        return super()._run_mtp(next_tokens_N, state_ND, views)
