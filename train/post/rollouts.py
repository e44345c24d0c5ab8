"""Makes rollouts: draws prompts, samples answers, scores them and compares the answers of each group."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from infer.config import ENGINE_COUNTS, Sampling
from infer.protocol import Group, Request, Rollouts, SampledRoutes
from score.ratings import length_penalty
from train.config.tasks import RolloutConfig
from train.post.pipeline import TrainingEngine
from train.post.sample import (
    AdvantageKind,
    PromptForm,
    PromptOrder,
    RolloutHeader,
    RolloutRoutes,
    ScoredRollout,
    with_advantages,
)
from train.post.score import PendingScores, RolloutRewards


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draw:
    """Prompts that were drawn together, the pending scores of their answers, and what was sampled."""

    numbers: tuple[int, ...]
    scores: PendingScores
    sampled: Rollouts


@dataclass(slots=True)
class PendingRollout:
    """A rollout with sampled answers, while their scores may still be computed."""

    header: RolloutHeader
    version: int
    draws: list[_Draw] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"sampling": 0.0, "scoring": 0.0})


class RolloutMaker:
    """Makes the rollouts of a run. All ranks have one and call it with the same arguments.

    Everything is a function of the weights, the seed and the numbers of step, prompt and sample.
    """

    def __init__(
        self,
        config: RolloutConfig,
        engine: TrainingEngine,
        rewards: RolloutRewards,
        order: PromptOrder,
        form: PromptForm,
        *,
        advantage: AdvantageKind,
        seed: int,
    ) -> None:
        self._config = config
        self._engine = engine
        self._rewards = rewards
        self._order = order
        self._form = form
        self._advantage: AdvantageKind = advantage
        self._seed = seed
        self._spent: dict[str, float] = {}

    def begin(self, header: RolloutHeader, version: int) -> PendingRollout:
        """Samples answers to the first prompts of a rollout, and starts to score them. All ranks call it."""
        pending = PendingRollout(header, version)
        self._draw(pending, header.next_prompt, self._config.prompts)
        return pending

    def finish(self, pending: PendingRollout) -> ScoredRollout:
        """Returns the rollout with scores and advantages. All ranks call it.

        As long as too few groups have different rewards, it draws further prompts, if configured.
        """
        config = self._config
        header = pending.header
        groups: list[Group] = []
        while True:
            began = time.perf_counter()
            groups += [self._rewarded(group, pending.version) for group in pending.draws[-1].scores.wait()]
            self._add_seconds(pending, "scoring", time.perf_counter() - began)
            missing = config.prompts - sum(not group.dropped for group in groups)
            if missing <= 0 or len(pending.draws) >= config.max_draws:
                break
            self._draw(pending, header.next_prompt + len(groups), missing)
        header = replace(
            header,
            next_prompt=header.next_prompt + len(groups),
            seconds=dict(pending.seconds),
            counts={"groups": len(groups), "draws": len(pending.draws), **_engine_counts(pending.draws)},
        )
        return ScoredRollout(header=header, groups=tuple(groups), routes=_join_routes(pending.draws))

    def take_seconds(self) -> dict[str, float]:
        """Returns the time that this rank spent on each part of rollouts since the last call."""
        taken = self._spent
        self._spent = {}
        return {part: taken.get(part, 0.0) for part in ("sampling", "scoring")}

    def close(self) -> None:
        """Ends the scorers and closes the engine. All ranks call it at the same point."""
        self._rewards.close()
        self._engine.close()

    def answer(self, groups: Sequence[Group], samples: int, step: int) -> list[Group]:
        """Returns groups with scored answers, from which no run learns. All ranks call it."""
        answered, _ = self._sample(groups, samples, step, records=False)
        return self._rewards.begin(answered, step).wait()

    def _draw(self, pending: PendingRollout, first: int, count: int) -> None:
        began = time.perf_counter()
        step = pending.header.step - 1
        drawn = self._order.take(first, count)
        answered, sampled = self._sample(drawn, self._config.samples, step, records=True)
        scores = self._rewards.begin(answered, step)
        self._add_seconds(pending, "sampling", time.perf_counter() - began)
        pending.draws.append(_Draw(numbers=tuple(group.number for group in drawn), scores=scores, sampled=sampled))

    def _sample(
        self, groups: Sequence[Group], samples: int, step: int, *, records: bool
    ) -> tuple[list[Group], Rollouts]:
        """Returns groups with answers and their text, and what the engine returned."""
        config = self._config
        sampling = Sampling(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            seed=self._seed,
        )
        request = Request(
            samples=samples,
            max_new_tokens=config.max_new_tokens,
            sampling=sampling,
            step=step,
            stop=frozenset([self._form.tokenizer.special.eos]),
            record_routes=records and config.keep_routing,
            record_kept=records and config.keep_sampling_mask,
        )
        sampled = self._engine.generate(groups, request)
        answers = [replace(answer, text=self._form.text(answer)) for answer in sampled.rollouts]
        parts = [tuple(answers[first : first + samples]) for first in range(0, len(answers), samples)]
        answered = [replace(group, answers=part) for group, part in zip(groups, parts, strict=True)]
        return answered, sampled

    def _add_seconds(self, pending: PendingRollout, part: str, spent: float) -> None:
        """Adds time to a rollout's and to that since `take_seconds`."""
        pending.seconds[part] += spent
        self._spent[part] = self._spent.get(part, 0.0) + spent

    def _rewarded(self, group: Group, version: int) -> Group:
        limit = self._config.max_new_tokens
        interval = self._config.length_penalty_tokens
        answers = tuple(
            replace(
                answer,
                reward=answer.sheet.total + (length_penalty(answer.num_tokens, limit, interval) if interval else 0.0),
                version=version,
            )
            for answer in group.answers
        )
        rewarded = replace(group, answers=answers)
        return with_advantages(rewarded, self._advantage, drop_equal=self._config.drop_equal_groups)


def _engine_counts(draws: Sequence[_Draw]) -> dict[str, int]:
    """Returns what the engine counted of all draws, from which `launch.plan` learns how it sampled."""
    statistics = [draw.sampled.statistics for draw in draws]
    return {name: sum(getattr(part, name) for part in statistics) for name in ENGINE_COUNTS}


def _join_routes(draws: Sequence[_Draw]) -> RolloutRoutes | None:
    """Returns this rank's records of experts of all draws; None if they are not recorded."""
    parts = [draw.sampled.routes for draw in draws if draw.sampled.routes is not None]
    if not parts:
        return None
    return RolloutRoutes(
        sampled=SampledRoutes(ids={key: ids_TK for part in parts for key, ids_TK in part.ids.items()}),
        requests=tuple(draw.numbers for draw in draws),
    )
