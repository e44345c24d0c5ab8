"""Continues prompts with a model that is spread over the ranks of a pipeline.

A stage unpacks a cohort's round, runs its layers and packs the result.

Shape legend: N new tokens of a cohort, D hidden size.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from dualpipe.runtime.execute import Execution
from dualpipe.runtime.program import ForwardOnlyRun, Lane, PipelineStage
from infer.batch import DraftChoice, GenerationBatch
from infer.cohorts import DEFAULT_SIZES, CohortSizes, assign_prompt, num_rounds
from infer.config import GenerateError, Speculative, check, sum_statistics
from infer.decoder import PartDecoder, RouteStore, join_routes
from infer.engines.local import to_rollouts
from infer.engines.rounds import (
    NOTHING,
    Cohort,
    CohortDecoder,
    DecodePipeline,
    PipelinePlace,
    Round,
    RoundFormat,
    RoundPlan,
)
from infer.protocol import NumberedPrompt, Request, Rollouts, Sample, SampledRoutes, StopToken
from infer.sequence import ActiveSequence, never_stop, start_sequences

MTP_CALLS_PER_ROUND = 2
"""Maximum number of runs of the MTP module in a round: over new prompts, and over the newest tokens."""


class InnerStage:
    """A stage of a direction: unpacks a cohort's round, runs its layers and packs the result."""

    def __init__(self, decoders: Sequence[PartDecoder], form: RoundFormat, place: PipelinePlace, stage: int) -> None:
        """Takes the decoder of each cohort. `stage`: its number."""
        self._decoders = decoders
        self._form = form
        self._is_first = stage == 0
        self._shares_experts = place.shares_experts

    def run(self, cohort: int, value: Tensor) -> Tensor:
        """Runs a cohort's round, given the packed value of the previous stage; returns the packed result."""
        plan, payload = self._form.unpack(value)
        next_round = NOTHING
        if plan.num_tokens:
            decoder = self._decoders[cohort]
            is_first = self._is_first
            hidden_ND = decoder.embed(self._form.token_ids(payload)) if is_first else self._form.hidden(payload)
            next_round = self._advance(cohort, plan, hidden_ND)
        elif self._shares_experts:
            self._decoders[cohort].run_idle_layers()
        return self._form.pack(*next_round, value.device)

    def _advance(self, cohort: int, plan: RoundPlan, hidden_ND: Tensor) -> Round:
        decoder = self._decoders[cohort]
        decoder.arrange(plan.sources, plan.lengths, plan.counts, plan.places)
        views = decoder.views(plan.kind, plan.rows, [plan.counts[row] for row in plan.rows])
        return plan, decoder.run_layers(hidden_ND, views)


class LastStage(InnerStage):
    """The last stage: runs the cohorts' programs, which choose tokens and so decide their next rounds."""

    def __init__(
        self, cohorts: Sequence[Cohort], decoders: Sequence[CohortDecoder], form: RoundFormat, place: PipelinePlace
    ) -> None:
        super().__init__(decoders, form, place, len(place.cut) - 1)
        self._cohorts = cohorts
        self._drafters = decoders if place.shares_experts and decoders[0].drafts else ()
        self.next_rounds = [form.pack(*cohort.start(), decoders[0].device) for cohort in cohorts]

    def run(self, cohort: int, value: Tensor) -> Tensor:
        """Does the same as `InnerStage.run`, and keeps the result as the cohort's next round."""
        calls = [decoder.mtp_calls for decoder in self._drafters]
        self.next_rounds[cohort] = super().run(cohort, value)
        if self._drafters:
            # The MTP module runs as often as on all ranks that share its experts.
            num_calls = self._drafters[cohort].mtp_calls - calls[cohort]
            assert num_calls <= MTP_CALLS_PER_ROUND, f"the MTP module ran {num_calls} times in a round"
            for _ in range(MTP_CALLS_PER_ROUND - num_calls):
                self._drafters[cohort].run_idle_mtp()
        return self.next_rounds[cohort]

    def _advance(self, cohort: int, plan: RoundPlan, hidden_ND: Tensor) -> Round:
        return self._cohorts[cohort].resume(hidden_ND)


class DirectedStages:
    """A stage of this rank for all directions; its micro-batches are rounds of cohorts."""

    lanes: Sequence[Lane] = ("compute",)

    def __init__(
        self,
        stages: Mapping[int, InnerStage],
        num_cohorts: int,
        first_rounds: Callable[[int, int], Tensor] | None,
    ) -> None:
        """Stores the arguments. `first_rounds` returns a cohort's packed first round; None if not stage 0."""
        self._stages = stages
        self._num_cohorts = num_cohorts
        self._first_rounds = first_rounds

    def start(self, direction: int, micro_batch: int) -> "CohortRun":
        """Starts a cohort's round. Its first round in a program does not arrive by a message."""
        cohort = micro_batch % self._num_cohorts
        first = None
        if self._first_rounds is not None and micro_batch < self._num_cohorts:
            first = self._first_rounds(direction, cohort)
        return CohortRun(self._stages[direction], cohort, first)


class CohortRun(ForwardOnlyRun):
    """A round of a cohort in a stage."""

    def __init__(self, stage: InnerStage, cohort: int, value: Tensor | None) -> None:
        self._stage = stage
        self._cohort = cohort
        self._value = value

    def set_input(self, hidden_BTD: Tensor, /) -> None:
        """Takes the packed value of the previous stage."""
        self._value = hidden_BTD

    def forward(self, phase: int) -> None:
        """Runs the round."""
        assert self._value is not None
        self._value = self._stage.run(self._cohort, self._value)

    def output(self) -> Tensor:
        """Returns the packed result, and drops its reference."""
        assert self._value is not None
        value = self._value
        self._value = None
        return value


_FAILED = 1 << 40


class PipelinedEngine:
    """An engine that leaves the weights where training has them. Every rank of the job has an equal one.

    Prompts are spread over pipelines and directions, and in each over cohorts, which are in different stages at a time.
    A cohort is continued by the same program as the batch of `LocalEngine`, on the rank of its last stage, which also
    calls the stop condition.
    """

    def __init__(
        self,
        pipeline: DecodePipeline,
        *,
        speculative: Speculative = "auto",
        sizes: CohortSizes = DEFAULT_SIZES,
        stop_condition: StopToken = never_stop,
    ) -> None:
        self._pipeline = pipeline
        self._wanted = speculative
        self._sizes = sizes
        self._stop_condition = stop_condition
        self._speculative = pipeline.model.config.mtp_depth > 0 if speculative == "auto" else speculative
        self.num_cohorts = self.num_rounds = self.plan_bytes = 0
        self.executions: list[Execution] = []

    @torch.no_grad()
    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Implements `Engine.generate`. Every rank returns all rollouts."""
        config = self._pipeline.model.config
        tokens = [prompt.tokens for prompt in prompts]
        check(config, tokens, request.max_new_tokens, self._wanted, self._sizes.max_rows)
        began = time.perf_counter()
        self.executions = []
        self.num_rounds = 0
        work = self._start(prompts, request)
        self.plan_bytes = work.form.plan_bytes
        try:
            self._run_rounds(work)
        finally:
            work.close()
        return self._collect(prompts, request, work, time.perf_counter() - began)

    def _start(self, prompts: Sequence[NumberedPrompt], request: Request) -> "_RankWork":
        pipeline = self._pipeline
        num_shares = pipeline.place.num_data * len(pipeline.place.placement)
        most = -(-len(prompts) // num_shares) * request.samples
        self.num_cohorts = self._sizes.num_cohorts(pipeline.place.placement, most)
        config = pipeline.model.config
        form = RoundFormat(
            max_rows=self._sizes.num_rows(pipeline.place.placement, most),
            hidden_size=config.hidden_size,
            dtype=next(pipeline.model.parameters()).dtype,
        )
        lengths = [len(prompt.tokens) for prompt in prompts]
        capacity = max(
            (min(length + request.max_new_tokens, config.max_position_tokens) for length in lengths), default=1
        )
        work = _RankWork(form)
        stages_by_number: dict[int, dict[int, InnerStage]] = {}
        for direction, row in enumerate(pipeline.place.placement):
            share = self._share(prompts, direction)
            if request.record_routes:
                work.stores[direction] = RouteStore(share, request.samples)
            for stage in (stage for stage, rank in enumerate(row) if rank == pipeline.place.rank):
                if stage == len(row) - 1:
                    work.sequences[direction] = start_sequences(share, request, config.max_position_tokens)
                    cohort_stage: InnerStage = self._last_stage(direction, work, capacity)
                else:
                    cohort_stage = self._inner_stage(stage, work, capacity, work.stores.get(direction))
                stages_by_number.setdefault(stage, {})[direction] = cohort_stage
        for stage, by_direction in stages_by_number.items():
            first = (lambda direction, cohort: work.first_rounds[direction, cohort]) if stage == 0 else None
            work.stages[stage] = DirectedStages(by_direction, self.num_cohorts, first)
        return work

    def _share(self, prompts: Sequence[NumberedPrompt], direction: int) -> list[NumberedPrompt]:
        place = self._pipeline.place
        share = (place.data_index, direction)
        num_directions = len(place.placement)
        return [
            prompt
            for position, prompt in enumerate(prompts)
            if assign_prompt(position, place.num_data, num_directions) == share
        ]

    def _inner_stage(self, stage: int, work: "_RankWork", capacity: int, routes: RouteStore | None) -> InnerStage:
        pipeline = self._pipeline
        form = work.form
        layers = pipeline.place.cut[stage]
        decoders = [
            PartDecoder(pipeline.model, form.max_rows, capacity, with_mtp=False, layers=layers, routes=routes)
            for _ in range(self.num_cohorts)
        ]
        work.inner_decoders += decoders
        return InnerStage(decoders, form, pipeline.place, stage)

    def _last_stage(self, direction: int, work: "_RankWork", capacity: int) -> LastStage:
        """Builds the last stage of a direction; its cohorts share one queue of sequences."""
        pipeline = self._pipeline
        form = work.form
        waiting = deque(sequence for sequence in work.sequences[direction] if sequence.num_left > 0)
        cohorts = []
        decoders = []
        for number in range(self.num_cohorts):
            decoder = CohortDecoder(
                pipeline.model,
                form.max_rows,
                capacity,
                with_mtp=self._speculative,
                layers=pipeline.place.cut[-1],
                routes=work.stores.get(direction),
            )
            batch = GenerationBatch(
                decoder,
                self._stop_condition,
                drafts=DraftChoice(self._speculative and self._wanted, is_timed=False),
                prefill_tokens=self._sizes.prefill_tokens,
            )
            program = partial(_run_batch, batch, waiting, form.max_rows)
            cohort = Cohort(program, f"cohort-{direction}-{number}")
            decoder.exchange = cohort.exchange
            cohorts.append(cohort)
            decoders.append(decoder)
            work.batches.append(batch)
        work.cohorts += cohorts
        last = LastStage(cohorts, decoders, form, pipeline.place)
        work.last_stages[direction] = last
        return last

    def _run_rounds(self, work: "_RankWork") -> None:
        """Runs rounds until no rank has a cohort that needs one."""
        pipeline = self._pipeline
        while num_rounds := pipeline.largest(work.num_rounds()):
            if num_rounds >= _FAILED:
                raise GenerateError(pipeline.first_report(work.error()))
            next_rounds = {direction: last.next_rounds for direction, last in work.last_stages.items()}
            work.first_rounds = pipeline.hand_over(work.form, next_rounds, self.num_cohorts)
            self.num_rounds += num_rounds
            self.executions.append(pipeline.run(work.form, work.stages, self.num_cohorts, num_rounds))

    def _collect(
        self, prompts: Sequence[NumberedPrompt], request: Request, work: "_RankWork", seconds: float
    ) -> Rollouts:
        samples = [to_rollouts(sequences, keeps_sets=request.keeps_sets) for sequences in work.sequences.values()]
        counts = sum_statistics([batch.statistics(0.0) for batch in work.batches], seconds)
        # Only the last stages continue sequences; the other ranks have nothing to send.
        gathered = self._pipeline.gather((samples, counts) if any(samples) else None)
        samples_by_key = {
            (rollout.prompt, rollout.sample): rollout for parts, _ in gathered for part in parts for rollout in part
        }
        order = [(prompt.number, sample) for prompt in prompts for sample in range(request.samples)]
        longest = max((rank_counts.seconds for _, rank_counts in gathered), default=seconds)
        statistics = sum_statistics([rank_counts for _, rank_counts in gathered], longest)
        statistics = replace(statistics, rounds=self.num_rounds)
        rollouts = tuple(samples_by_key[key] for key in order)
        return Rollouts(rollouts=rollouts, statistics=statistics, routes=work.collect_routes(rollouts))


@dataclass(slots=True, eq=False)
class _RankWork:
    """The work of one rank in one call. `stores` record routes by direction; empty if not recorded."""

    form: RoundFormat
    stages: dict[int, PipelineStage] = field(default_factory=dict)
    sequences: dict[int, list[ActiveSequence]] = field(default_factory=dict)
    last_stages: dict[int, LastStage] = field(default_factory=dict)
    first_rounds: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    cohorts: list[Cohort] = field(default_factory=list)
    batches: list[GenerationBatch] = field(default_factory=list)
    inner_decoders: list[PartDecoder] = field(default_factory=list)
    stores: dict[int, RouteStore] = field(default_factory=dict)

    def num_rounds(self) -> int:
        """Returns a number of rounds that the unfinished sequences need, a power of two, or `_FAILED`."""
        if self.error():
            return _FAILED
        lefts = [sequence.num_left for part in self.sequences.values() for sequence in part if sequence.finish is None]
        return num_rounds(max(lefts, default=0))

    def error(self) -> str:
        return next((str(cohort.error) for cohort in self.cohorts if cohort.error is not None), "")

    def collect_routes(self, rollouts: Sequence[Sample]) -> SampledRoutes | None:
        """Returns this rank's records of routes, or None if they are not recorded, given all rollouts."""
        for decoder in self.inner_decoders:
            decoder.recorder.finish()
        return join_routes(self.stores.values(), rollouts) if self.stores else None

    def close(self) -> None:
        for cohort in self.cohorts:
            cohort.close()


def _run_batch(batch: GenerationBatch, waiting: deque[ActiveSequence], max_rows: int) -> None:
    for _ in batch.run(waiting, max_rows):
        pass
