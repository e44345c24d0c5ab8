"""Runs the stages of a rank that decodes: unpacks a cohort's round, runs layers, packs the result.

Shape legend: N new tokens of a cohort, D hidden size.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dualpipe.runtime.protocols import ForwardOnlyRun, Lane
from infer.decoder import PartDecoder
from infer.engines.pipelined.cohort import NOTHING, Cohort, CohortDecoder, Round
from infer.engines.pipelined.plan import RoundFormat

MTP_CALLS_PER_ROUND = 2
"""Maximum number of runs of the MTP module in a round: over new prompts, and over the newest tokens."""


class CohortStage(Protocol):
    """A stage of one direction for all of its cohorts."""

    def run(self, cohort: int, value: Tensor) -> Tensor:
        """Runs a cohort's round, given the packed value of the previous stage, and returns the packed result."""
        ...


class InnerStage:
    """A stage before the last one."""

    def __init__(
        self, decoders: Sequence[PartDecoder], form: RoundFormat, *, is_first: bool, shares_experts: bool
    ) -> None:
        self._decoders, self._form, self._is_first, self._shares_experts = decoders, form, is_first, shares_experts

    def run(self, cohort: int, value: Tensor) -> Tensor:
        """Implements `CohortStage.run`."""
        decoder, form = self._decoders[cohort], self._form
        plan, payload = form.unpack(value)
        if not plan.num_tokens:
            if self._shares_experts:
                decoder.run_idle_layers()
            return form.pack(plan, None, value.device)
        decoder.arrange(plan.sources, plan.lengths, plan.counts, plan.places)
        hidden_ND = decoder.embed(form.token_ids(payload)) if self._is_first else form.hidden(payload)
        views = decoder.views(plan.kind, plan.rows, [plan.counts[row] for row in plan.rows])
        return form.pack(plan, decoder.run_layers(hidden_ND, views), value.device)


class LastStage:
    """The last stage: runs the cohorts' programs, which choose tokens and so decide their next rounds."""

    def __init__(
        self,
        cohorts: Sequence[Cohort],
        decoders: Sequence[CohortDecoder],
        form: RoundFormat,
        *,
        is_first: bool,
        with_mtp: bool,
        shares_experts: bool,
    ) -> None:
        """Starts the programs."""
        self._cohorts, self._decoders, self._form = cohorts, decoders, form
        self._is_first, self._with_mtp, self._shares_experts = is_first, with_mtp, shares_experts
        starts = zip(cohorts, decoders, strict=True)
        self.next_rounds = [self._pack(cohort.start(), decoder.device) for cohort, decoder in starts]

    def run(self, cohort: int, value: Tensor) -> Tensor:
        """Implements `CohortStage.run`."""
        decoder, form = self._decoders[cohort], self._form
        plan, payload = form.unpack(value)
        calls = decoder.mtp_calls
        if plan.num_tokens:
            hidden_ND = decoder.embed(form.token_ids(payload)) if self._is_first else form.hidden(payload)
            found = self._cohorts[cohort].resume(hidden_ND)
        else:
            found = NOTHING
            if self._shares_experts:
                decoder.run_idle_layers()
        if self._shares_experts and self._with_mtp:
            self._pad_mtp(decoder, decoder.mtp_calls - calls)
        self.next_rounds[cohort] = self._pack(found, value.device)
        return self.next_rounds[cohort]

    @staticmethod
    def _pad_mtp(decoder: CohortDecoder, num_calls: int) -> None:
        """Runs the MTP module as often as on all ranks that share its experts."""
        assert num_calls <= MTP_CALLS_PER_ROUND, f"the MTP module ran {num_calls} times in a round"
        for _ in range(MTP_CALLS_PER_ROUND - num_calls):
            decoder.run_idle_mtp()

    def _pack(self, found: Round, device: torch.device) -> Tensor:
        plan, tokens_N = found
        return self._form.pack(plan, tokens_N, device)


class DirectedStages:
    """A stage of this rank for all directions, whose micro-batches are rounds of cohorts."""

    lanes: Sequence[Lane] = ("compute",)

    def __init__(
        self,
        stages: Mapping[int, CohortStage],
        num_cohorts: int,
        first_rounds: Callable[[int, int], Tensor] | None,
        min_seconds: float = 0.0,
    ) -> None:
        """Stores the arguments. `first_rounds` returns a cohort's packed first round; None if not stage 0."""
        self._stages, self._num_cohorts, self._first_rounds = stages, num_cohorts, first_rounds
        self._min_seconds = min_seconds

    def start(self, direction: int, micro_batch: int) -> "_StageRun":
        """Starts a cohort's round. Its first round in a program does not arrive by a message."""
        stage, cohort = self._stages[direction], micro_batch % self._num_cohorts
        first = None
        if self._first_rounds is not None and micro_batch < self._num_cohorts:
            first = self._first_rounds(direction, cohort)
        return _StageRun(stage, cohort, first, self._min_seconds)


class _StageRun(ForwardOnlyRun):
    """One round of a cohort in one stage."""

    def __init__(self, stage: CohortStage, cohort: int, value: Tensor | None, min_seconds: float) -> None:
        self._stage, self._cohort, self._value, self._min_seconds = stage, cohort, value, min_seconds

    def set_input(self, hidden_BTD: Tensor, /) -> None:
        self._value = hidden_BTD

    def forward(self, phase: int) -> None:
        assert self._value is not None
        began = time.perf_counter()
        self._value = self._stage.run(self._cohort, self._value)
        if self._min_seconds:
            time.sleep(max(0.0, began + self._min_seconds - time.perf_counter()))

    def output(self) -> Tensor:
        assert self._value is not None
        value, self._value = self._value, None
        return value
