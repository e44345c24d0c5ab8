"""Makes rollouts: draws prompts, samples answers, scores them and compares the answers of each group."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from infer.config import Sampling
from infer.engines.protocol import Request, Rollout, Rollouts, SampledRoutes
from infer.scoring.answer_text import THINK
from infer.scoring.length import length_penalty
from infer.scoring.reward import AnswerGroup, GroupSheets
from infer.scoring.score import Answer, problem_of
from train.rollout.config import RolloutConfig
from train.rollout.engine import TrainingEngine
from train.rollout.groups.advantages import NO_VERDICT, AdvantageKind, with_advantages
from train.rollout.groups.draw import DrawnPrompt, PromptForm, PromptOrder
from train.rollout.groups.records import RolledAnswer, RolledGroup, RolloutHeader, RolloutRoutes, ScoredRollout
from train.rollout.model_parts import SampledGroup
from train.rollout.rewards import PendingScores, RolloutRewards


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutOrigin:
    """Which rollout is made, and from what.

    Attributes:
        rollout: its number, from 0.
        step: index of the first training step that learns from it, from 0.
        version: updates in the weights.
        weights: fingerprint of the weights.
        settings: digest of the settings.
        first_prompt: position of its first prompt.
    """

    rollout: int
    step: int
    version: int
    weights: str
    settings: str
    first_prompt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draw:
    """Prompts that were drawn together, their answers and the scores that are computed."""

    drawn: list[DrawnPrompt]
    rollouts: list[list[Rollout]]
    scores: PendingScores
    routes: SampledRoutes | None


@dataclass(slots=True)
class PendingRollout:
    """A rollout whose answers are sampled, while their scores may still be computed.

    Attributes:
        origin: of the rollout.
        seconds: time of each part so far.
    """

    origin: RolloutOrigin
    draw: _Draw
    seconds: dict[str, float] = field(default_factory=dict)


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
        """Stores the arguments."""
        self._config, self._engine, self._rewards, self._order, self._form = config, engine, rewards, order, form
        self._advantage, self._seed = advantage, seed
        self._spent: dict[str, float] = {}

    def begin(self, origin: RolloutOrigin) -> PendingRollout:
        """Samples answers to the first prompts of a rollout, and starts to score them. All ranks call it."""
        seconds: dict[str, float] = {"sampling": 0.0, "scoring": 0.0}
        return PendingRollout(origin, self._draw(origin, origin.first_prompt, self._config.prompts, seconds), seconds)

    def finish(self, pending: PendingRollout) -> ScoredRollout:
        """Returns the rollout with scores and advantages. All ranks call it.

        As long as too few groups have different rewards, it draws further prompts, if configured.

        Raises:
            ScoringError: on every rank, if the scorers failed or a reward is not finite.
        """
        config, origin, draw, seconds = self._config, pending.origin, pending.draw, pending.seconds
        groups: list[RolledGroup] = []
        draws: list[_Draw] = []
        while True:
            began = time.perf_counter()
            draws.append(draw)
            groups += self._score(draw, origin.version)
            self._add_seconds("scoring", time.perf_counter() - began, seconds)
            missing = config.prompts - sum(not group.dropped for group in groups)
            if missing <= 0 or len(draws) >= config.max_draws:
                break
            draw = self._draw(origin, origin.first_prompt + len(groups), missing, seconds)
        header = RolloutHeader(
            rollout=origin.rollout,
            step=origin.step + 1,
            weights=origin.weights,
            settings=origin.settings,
            next_prompt=origin.first_prompt + len(groups),
            seconds=dict(seconds),
            counts={"groups": len(groups), "draws": len(draws)},
        )
        return ScoredRollout(header=header, groups=tuple(groups), routes=_join_routes(draws))

    def take_seconds(self) -> dict[str, float]:
        """Returns the time that this rank spent on each part of rollouts since the last call."""
        taken, self._spent = self._spent, {}
        return {part: taken.get(part, 0.0) for part in ("sampling", "scoring")}

    def close(self) -> None:
        """Ends the scorers and closes the engine. All ranks call it at the same point."""
        self._rewards.close()
        self._engine.close()

    def sample(self, drawn: Sequence[DrawnPrompt], samples: int, step: int) -> list[list[Rollout]]:
        """Samples answers to prompts. All ranks call it and get all answers by prompt.

        Args:
            samples: number of answers to each.
        """
        return _by_prompt(self._generate(drawn, samples, step, records=False), samples)

    def _generate(self, drawn: Sequence[DrawnPrompt], samples: int, step: int, *, records: bool) -> Rollouts:
        """Samples answers to prompts. `records`: whether to record what training replays."""
        config = self._config
        request = Request(
            samples=samples,
            max_new_tokens=config.max_new_tokens,
            sampling=Sampling(
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                min_p=config.min_p,
                seed=self._seed,
            ),
            step=step,
            stop=frozenset([self._form.tokenizer.end_of_sentence_id]),
            record_routes=records and config.keep_routing,
            record_kept=records and config.keep_sampling_mask,
        )
        return self._engine.generate([each.prompt for each in drawn], request)

    def begin_scores(
        self, drawn: Sequence[DrawnPrompt], rollouts: Sequence[Sequence[Rollout]], step: int
    ) -> PendingScores:
        """Starts to score answers. All ranks call it.

        Args:
            step: as in `sample`.
        """
        groups = [
            SampledGroup(
                prompt=each.prompt,
                rollouts=tuple(group),
                text=AnswerGroup(
                    problem=problem_of(each.problem),
                    answers=tuple(to_answer(rollout, self._form) for rollout in group),
                ),
            )
            for each, group in zip(drawn, rollouts, strict=True)
        ]
        return self._rewards.begin(groups, step)

    def _draw(self, origin: RolloutOrigin, first: int, count: int, seconds: dict[str, float]) -> _Draw:
        began = time.perf_counter()
        drawn = self._order.take(first, count)
        found = self._generate(drawn, self._config.samples, origin.step, records=True)
        rollouts = _by_prompt(found, self._config.samples)
        scores = self.begin_scores(drawn, rollouts, origin.step)
        self._add_seconds("sampling", time.perf_counter() - began, seconds)
        return _Draw(drawn=drawn, rollouts=rollouts, scores=scores, routes=found.routes)

    def _add_seconds(self, part: str, spent: float, seconds: dict[str, float]) -> None:
        """Adds time to a rollout's and to that since `take_seconds`."""
        seconds[part] += spent
        self._spent[part] = self._spent.get(part, 0.0) + spent

    def _score(self, draw: _Draw, version: int) -> list[RolledGroup]:
        """Returns the groups of a draw with rewards and advantages."""
        found = zip(draw.drawn, draw.rollouts, draw.scores.wait(), strict=True)
        groups = [self._to_group(each, rollouts, sheets, version) for each, rollouts, sheets in found]
        return [with_advantages(group, self._advantage, drop_equal=self._config.drop_equal_groups) for group in groups]

    def _to_group(
        self, drawn: DrawnPrompt, rollouts: Sequence[Rollout], scored: GroupSheets, version: int
    ) -> RolledGroup:
        limit, interval = self._config.max_new_tokens, self._config.length_penalty_tokens
        answers = [
            RolledAnswer(
                sample=rollout.sample,
                tokens=rollout.tokens,
                log_probs=rollout.log_probs,
                text=to_answer(rollout, self._form).text,
                finish=rollout.finish,
                sheet=sheet,
                reward=sheet.total + (length_penalty(len(rollout.tokens), limit, interval) if interval else 0.0),
                advantage=0.0,
                version=version,
                kept=rollout.kept,
            )
            for rollout, sheet in zip(rollouts, scored.sheets, strict=True)
        ]
        return RolledGroup(
            prompt=drawn.prompt.number,
            problem=drawn.problem.key,
            text=drawn.problem.prompt,
            expected=drawn.problem.answer,
            tokens=drawn.prompt.tokens,
            answers=tuple(answers),
            dropped="" if scored.dropped is None else f"{NO_VERDICT}: {scored.dropped}",
        )


def to_answer(rollout: Rollout, form: PromptForm) -> Answer:
    """Decodes a rollout. Thoughts that the prompt opened are opened again, so that scorers see them."""
    is_finished = rollout.finish == "stop"
    text = form.tokenizer.decode(rollout.tokens[:-1] if is_finished else rollout.tokens)
    return Answer(text=THINK + text if form.thinking else text, num_tokens=len(rollout.tokens), is_finished=is_finished)


def _by_prompt(rollouts: Rollouts, samples: int) -> list[list[Rollout]]:
    found = rollouts.rollouts
    return [list(found[first : first + samples]) for first in range(0, len(found), samples)]


def _join_routes(draws: Sequence[_Draw]) -> RolloutRoutes | None:
    """Returns this rank's records of experts of all draws; None if they are not recorded."""
    parts = [draw.routes for draw in draws if draw.routes is not None]
    if not parts:
        return None
    return RolloutRoutes(
        sampled=SampledRoutes(ids={key: ids_TK for part in parts for key, ids_TK in part.ids.items()}),
        requests=tuple(tuple(each.prompt.number for each in draw.drawn) for draw in draws),
    )
