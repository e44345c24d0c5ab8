"""Plans rollouts: rounds, seconds, caches, and the passes of other networks. No torch here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, log
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base.decode import encode
from data.pack import best_fit_decreasing
from dualpipe.ir import Placement
from dualpipe.passes import forward_only
from dualpipe.simulation import makespan_of
from infer.cohorts import AnsweredPrompt, CohortSizes, RoundForecast, forecast_rounds
from model.config import BLOCK_TOKENS
from model.size import StageShape, held_parameters, stage_shapes
from planner.products import FLAT
from planner.scaling import REFERENCE_MEMORY_BYTES_PER_SECOND, KernelRates, Rates
from score.scorers import JudgeConfig, RewardModelScorerConfig
from train.config import TrainConfig
from train.config.tasks import RolloutConfig
from train.predict.cut import run_cut
from train.predict.layer_times import PartTimes, stage_costs
from train.predict.rank_bytes import value_bytes
from train.predict.timing import EfficiencyConfig, MeasuredRates, TimedPlan
from train.report.plan_comparison import Compared, read_sampled
from train.tasks.registry import TASKS

_ACCEPTED = 0.85
"""Share of drafts that is accepted without a run's journal: 85 to 90 % (arXiv:2412.19437, section 5.4.3)."""
_EXCHANGE_SECONDS = {1: 0.0, 8: 191e-6, 16: 313e-6, 32: 428e-6, 64: 487e-6, inf: 561e-6}
"""Least seconds of dispatch and combine, by ranks that share experts: DeepEP, docs/legacy.md, 128 tokens on H800."""
_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPlan:
    """The rollouts of a step. Times are None if the rates do not say them.

    Attributes:
        max_rows: most rows of a cohort, of which each direction has `cohorts`.
        cache_bytes: caches of the rank that holds most.
        batches: batches into which the answers of an update are packed, each trained with the whole schedule.
        reference_seconds: a pass of the reference over a batch; `reward_seconds` are of reward models, for all answers.
        passes_seconds: both in a step; 0 if the rates' measured time outside the passes contains them.
    """

    answers: int
    mean_tokens: float
    most_tokens: int
    tokens_per_pass: float
    cohorts: int
    max_rows: int
    rounds: int
    rows_per_visit: float
    sampling_seconds: float | None
    tokens_per_second_per_gpu: float | None
    idle_share: float | None
    cache_bytes: int
    batches: int
    reference_seconds: float
    reward_seconds: float
    passes_seconds: float
    notes: tuple[str, ...]


def plan_rollouts(config: TrainConfig, rates: Rates, timed: TimedPlan) -> RolloutPlan | None:
    """Returns the plan of a run's rollouts, or None if it has none."""
    rollout = config.rollout
    if rollout is None:
        return None
    measured = rates.rollouts if isinstance(rates, MeasuredRates) else None
    prompts, lengths = _answers(config, rollout, measured.prompts if measured else ())
    per_pass = 1.0
    if config.model.mtp_depth:
        per_pass = measured.tokens_per_pass if measured else 1 + _ACCEPTED
    placement = timed.schedule.placement if rollout.engine == "pipelined" else ((0,),)
    replicas = config.parallelism.data if rollout.engine == "pipelined" else config.parallelism.world_size
    sizes = CohortSizes.within(config.batch.micro_sequences * config.rank_sequence_tokens)
    forecast = forecast_rounds(prompts, placement, replicas, sizes, per_pass)
    visit = _Visit(config, rates, placement, fmean(prompt.prompt + fmean(prompt.answers) / 2 for prompt in prompts))
    seconds, idle_share = visit.seconds(forecast)
    tokens = [answer for prompt in prompts for answer in prompt.answers]
    forwards = _forward_seconds(config, rates, timed)
    batches = _count_batches(config, rollout, prompts)
    assert config.reward is not None
    reference = forwards * TASKS.get(config.task.kind).has_reference(config.task)
    models = sum(isinstance(part, RewardModelScorerConfig) and part.place == "pipeline" for part in config.reward.parts)
    reward = forwards * batches * rollout.updates * models
    return RolloutPlan(
        answers=len(tokens),
        mean_tokens=fmean(tokens),
        most_tokens=max(tokens),
        tokens_per_pass=per_pass,
        cohorts=forecast.cohorts,
        max_rows=forecast.max_rows,
        rounds=forecast.rounds,
        rows_per_visit=forecast.rows_per_visit,
        sampling_seconds=seconds,
        tokens_per_second_per_gpu=sum(tokens) / seconds / config.parallelism.world_size if seconds else None,
        idle_share=idle_share,
        cache_bytes=visit.cache_bytes(forecast, max(prompt.prompt + prompt.limit for prompt in prompts)),
        batches=batches,
        reference_seconds=reference,
        reward_seconds=reward,
        passes_seconds=batches * reference + reward / rollout.updates if isinstance(rates, KernelRates) else 0.0,
        notes=(f"tokens of answers: {lengths}", *_notes(config, rollout, rates)),
    )


def with_rollouts(timed: TimedPlan, plan: RolloutPlan, config: TrainConfig, efficiency: EfficiencyConfig) -> TimedPlan:
    """Returns the time of a step with its rollouts, and with as many batches as its answers fill."""
    rollout = config.rollout
    assert rollout is not None
    sampling = (plan.sampling_seconds or 0.0) / rollout.updates
    without = plan.batches * timed.simulation.makespan + timed.time.optimizer + sampling + plan.passes_seconds
    step = without * efficiency.unexplained
    slower = step / timed.time.step
    mfu = None if timed.time.mfu is None else timed.time.mfu * plan.batches / slower
    per_gpu = timed.time.tokens_per_second_per_gpu / slower
    time = replace(timed.time, step=step, without_factor=without, tokens_per_second_per_gpu=per_gpu, mfu=mfu)
    return replace(timed, time=time)


def _answers(
    config: TrainConfig, rollout: RolloutConfig, recorded: Sequence[AnsweredPrompt]
) -> tuple[tuple[AnsweredPrompt, ...], str]:
    """Returns the tokens of a rollout's prompts and answers, and where they are from."""
    longest = config.batch.sequence_length_tokens
    room = min(rollout.max_new_tokens, config.model.max_position_tokens - 1)
    given = config.plan.answer_tokens

    def repeated(prompt: AnsweredPrompt) -> AnsweredPrompt:
        least = min(prompt.prompt, longest - 1)
        limit = min(room, longest - least)
        answers = (prompt.answers[sample % len(prompt.answers)] for sample in range(rollout.samples))
        return replace(prompt, prompt=least, limit=limit, answers=tuple(min(limit, answer) for answer in answers))

    if recorded and given is None:
        return tuple(
            repeated(recorded[number % len(recorded)]) for number in range(rollout.prompts)
        ), "the run's journal"
    drawn = np.full((rollout.prompts, rollout.samples), float(room))
    source = "all have rollout.max_new_tokens; plan.answer_tokens={median, sigma} says otherwise"
    if given is not None:
        drawn = np.random.default_rng(_SEED).lognormal(log(given.median), given.sigma, drawn.shape)
        source = f"log-normal, median {given.median:g}, sigma {given.sigma:g}, at most {room:,}"
    counts = np.clip(np.ceil(drawn), 1, room).astype(int).tolist()
    prompt = max(1, longest - room)
    return tuple(AnsweredPrompt(prompt=prompt, answers=tuple(row), limit=room) for row in counts), source


@dataclass(frozen=True, slots=True)
class _Visit:
    """The time of a stage's visit to a cohort. `context` is the mean number of tokens in a row's cache."""

    config: TrainConfig
    rates: Rates
    placement: Placement
    context: float

    def seconds(self, forecast: RoundForecast) -> tuple[float | None, float | None]:
        """Returns the time of all rounds and the idle share of the ranks, or None if the rates measured none.

        A round is as long as a cohort's way through the stages, or as the visits of the busiest rank.
        """
        visits_R = np.maximum(forecast.visits_R, 1)
        rows_R = forecast.rows_R / visits_R
        reads = 2 if self.config.model.mtp_depth else 1
        times_SR = self._stages(reads * rows_R + forecast.prompt_tokens_R / visits_R, rows_R)
        empty_S1 = self._stages(np.zeros(1), np.zeros(1))
        if times_SR is None or empty_S1 is None:
            return None, None
        visits_R = forecast.visits_R / forecast.shares
        # Ranks that share experts wait for each other in every visit, whether the cohort has tokens or not.
        is_joint = self.config.parallelism.expert > 1 and len(times_SR) > 1
        spent_SR = visits_R * times_SR + (forecast.cohorts - visits_R) * empty_S1 * is_joint
        ranks = np.zeros((1 + max(self.placement[0]), len(visits_R)))
        for row in self.placement:
            np.add.at(ranks, np.array(row), spent_SR)
        path_R = times_SR.sum(0) * (visits_R > 0)
        seconds = float(np.maximum(path_R, ranks.max(0)).sum())
        worked = float((visits_R * times_SR).sum()) * len(self.placement)
        return seconds, max(0.0, 1 - worked / (len(ranks) * seconds))

    def cache_bytes(self, forecast: RoundForecast, capacity: int) -> int:
        """Returns the bytes of the caches on the rank that holds most."""
        model = self.config.model
        drafts = min(1, model.mtp_depth)
        held = [0] * (1 + max(self.placement[0]))
        for row in self.placement:
            for stage, rank in zip(self._shapes, row, strict=True):
                held[rank] += len(stage.layers) + drafts * stage.is_last
        width = model.cached_values * value_bytes(self.config.precision)
        blocks = -(-min(capacity, model.max_position_tokens) // BLOCK_TOKENS)
        return max(held) * forecast.cohorts * forecast.max_rows * blocks * BLOCK_TOKENS * width

    @property
    def _shapes(self) -> tuple[StageShape, ...]:
        if len(self.placement[0]) == 1:
            return stage_shapes([range(self.config.model.num_layers)])
        return stage_shapes(run_cut(self.config, self.placement))

    def _stages(self, tokens_R: NDArray[np.float64], rows_R: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Returns the seconds of a visit to each stage, [S, R], given its tokens and its rows."""
        shapes = self._shapes
        if isinstance(self.rates, KernelRates):
            return np.stack([self._kernels(stage, tokens_R, rows_R) for stage in shapes])
        if (measured := self.rates.rollouts) is None:
            return None
        return np.stack([(measured.visit_seconds + measured.token_seconds * tokens_R) / len(shapes)] * len(shapes))

    def _kernels(
        self, stage: StageShape, tokens_R: NDArray[np.float64], rows_R: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Returns the longer of products and reads of weights and caches, plus exchange."""
        config = self.config
        model = config.model
        sharing = config.parallelism.expert if len(self.placement[0]) > 1 else 1
        assert isinstance(self.rates, KernelRates)
        # Reads of weights are counted below, so products take their FLOP at the measured rate.
        times = replace(self.rates, products=FLAT).part_seconds(config)
        share_R = tokens_R / (config.batch.micro_sequences * config.mean_part_tokens)
        num_moe = sum(layer >= model.num_dense_layers for layer in stage.layers)
        products = times.dense.forward * (len(stage.layers) - num_moe) + times.moe.forward * num_moe
        products += (times.head.forward + times.mtp.forward) * stage.is_last
        held = held_parameters(model, [stage], model.num_routed_experts // sharing)
        # All ranks that share experts send tokens to those of this rank.
        touched_R = 1 - (1 - model.num_experts_per_token / model.num_routed_experts) ** (tokens_R * sharing)
        weights_R = held.ordinary - held.embedding * (not stage.is_last) + held.routed * touched_R
        read_R = weights_R * (1 if config.precision.kind == "fp8" else value_bytes(self.config.precision))
        width = model.cached_values * value_bytes(self.config.precision)
        read_R = read_R * (tokens_R > 0) + rows_R * self.context * width * len(stage.layers)
        memory_R = read_R / (config.cluster.memory_bytes_per_second or REFERENCE_MEMORY_BYTES_PER_SECOND)
        least = next(time for ranks, time in _EXCHANGE_SECONDS.items() if sharing <= ranks)
        exchange_R = np.maximum(times.moe.forward_exchange * share_R, least) * num_moe
        visit_R: NDArray[np.float64] = np.maximum(products * share_R, memory_R) + exchange_R
        return visit_R


def compare_rollouts(plan: RolloutPlan | None, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Returns the plan of a run's last rollout next to its journal, as values; empty without a journal."""
    recorded = read_sampled(folder, config) if plan is not None else []
    if plan is None or not recorded or recorded[-1].counts["draws"] > 1:  # draws are planned as one
        return {}
    last = recorded[-1]
    compared = {
        "rounds": Compared.of(plan.rounds, last.counts["rounds"]),
        "rows_per_visit": Compared.of(plan.rows_per_visit, last.counts["passes"] / last.counts["visits"]),
        "sampling_seconds": Compared.of(plan.sampling_seconds or 0.0, median(each.seconds for each in recorded)),
    }
    return {name: encode(values) for name, values in compared.items()}


def _forward_seconds(config: TrainConfig, rates: Rates, timed: TimedPlan) -> float:
    """Returns the time of the forwards of a step without MTP modules."""
    times = replace(rates.part_seconds(config), mtp=PartTimes())
    costs = stage_costs(times, config, run_cut(config, timed.schedule.placement))
    return makespan_of(forward_only(timed.schedule), costs)


def _count_batches(config: TrainConfig, rollout: RolloutConfig, prompts: Sequence[AnsweredPrompt]) -> int:
    """Returns the most batches of an update, without groups that a run's journal dropped."""
    length = config.batch.sequence_length_tokens
    trained = [prompt for prompt in prompts if prompt.is_trained]
    updates = [trained[part :: rollout.updates] for part in range(rollout.updates)]
    sizes = [[min(each.prompt + tokens, length) for each in part for tokens in each.answers] for part in updates]
    rows = max(best_fit_decreasing(part, length)[1] for part in sizes)
    return max(1, ceil(rows / config.batch.global_sequences))


def _notes(config: TrainConfig, rollout: RolloutConfig, rates: Rates) -> Iterator[str]:
    """Yields what the times of rollouts do not contain."""
    if isinstance(rates, KernelRates):
        yield (
            "sampling is at least as long: weights and caches read at cluster.memory_bytes_per_second, products and "
            "exchange by the rates; launches of kernels and work of the host are not in it"
        )
    elif rates.rollouts is None:
        yield "sampling is unknown: rates must be of a run with rollouts, whose journal says how long it sampled"
    if config.model.mtp_depth and isinstance(rates, KernelRates):
        yield f"{100 * _ACCEPTED:.0f} % of the drafts are taken to be accepted (arXiv:2412.19437: 85 to 90 %)"
    if rollout.engine == "local":
        yield "rollout.engine=local copies all weights to each rank before it samples, which is not in it"
    if rollout.max_draws > 1:
        yield f"one draw of prompts; with rollout.max_draws={rollout.max_draws} sampling may take as many times as long"
    assert config.reward is not None
    if any(isinstance(part, JudgeConfig) for part in config.reward.parts):
        yield "the critiques of the judge are not in it"
