"""Checks the rollout of a step before weights are updated, and names the cause of what it refuses.

Unlike a loss that is not finite, a broken limit is a property of the weights, not of the batch. No torch here.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import StepRefusal
from train.records.json_lines import number_of, read_lines
from train.rollout.config import RolloutConfig

KL = "kl"
_KL_STEPS = 3
"""Steps over which KL is averaged: an estimate from the samples of one step has rare values far above the mean."""
_ALMOST_ALL = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class BadWeights:
    """A broken limit.

    Attributes:
        reason: one line for people, with the likely cause.
        values: what was compared.
        last_good: number of updates after which the weights were still good as far as known.
    """

    reason: str
    values: Mapping[str, float]
    last_good: int

    def refusal(self, step: int) -> StepRefusal:
        """Returns the refusal of a step, from 0."""
        return StepRefusal(step=step, reason=self.reason, values=dict(self.values), ranks=(), last_good=self.last_good)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutFigures:
    """The numbers of a step's rollout that have limits. They are named as in `metrics.jsonl`."""

    reward: float
    entropy: float
    equal_share: float
    cut_share: float
    correct_share: float

    @classmethod
    def of_metrics(cls, metrics: Mapping[str, Any]) -> "RolloutFigures | None":
        """Returns the numbers of a step's record about rollouts, or None if it lacks one."""
        found = {name: number_of(metrics, name) for name in cls.__slots__}
        known = {name: value for name, value in found.items() if value is not None}
        return cls(**known) if len(known) == len(found) else None


class RolloutGuard:
    """The limits of a run that learns from rewards.

    All ranks have the same numbers, so all decide the same.
    """

    def __init__(self, config: RolloutConfig) -> None:
        """Starts without earlier steps."""
        self._config, self._limits = config, config.limits
        self._num_kept = max(self._limits.window_steps, self._limits.equal_steps or 0)
        self._first: list[RolloutFigures] = []
        self._last: deque[RolloutFigures] = deque(maxlen=self._num_kept)
        self._divergences: deque[float] = deque(maxlen=_KL_STEPS)

    def replace_history(self, history: Iterable[RolloutFigures]) -> None:
        """Replaces the earlier steps by all of a run, the oldest first. KL starts again."""
        self._first = []
        self._last.clear()
        self._divergences.clear()
        for figures in history:
            self.accept(figures)

    def accept(self, figures: RolloutFigures) -> None:
        """Adds a step that updated the weights."""
        if len(self._first) < self._limits.window_steps:
            self._first.append(figures)
        self._last.append(figures)

    def judge_rollout(self, figures: RolloutFigures, step: int) -> BadWeights | None:
        """Returns the limit that a step's rollout breaks, or None.

        Args:
            figures: of the rollout.
            step: index of the step, from 0.
        """
        steps = [*self._last, figures]
        for judge in (self._judge_cut, self._judge_equal, self._judge_entropy, self._judge_reward):
            if (found := judge(steps, step)) is not None:
                return found
        return None

    def judge_kl(self, means: Mapping[str, float], step: int, learning_rate: float) -> BadWeights | None:
        """Returns the limit that the divergence from the reference breaks, or None.

        Args:
            means: of the step's losses, by name.
            step: index of the step, from 0.
            learning_rate: of the step.
        """
        limit, kl = self._limits.kl, means.get(KL)
        if limit is None or kl is None:
            return None
        self._divergences.append(kl)
        # Steps that are not known count as 0.
        mean = sum(self._divergences) / _KL_STEPS
        if mean <= limit:
            return None
        return BadWeights(
            reason=f"KL is {mean:.3g} nats per token over {_KL_STEPS} steps after {step} updates, above "
            f"rollout.limits.kl={limit:g}: the learning rate of {learning_rate:.3g} is probably too high, or "
            f"task.loss.kl_weight too low",
            values={KL: mean},
            last_good=max(step - _KL_STEPS, 0),
        )

    def _judge_cut(self, steps: Sequence[RolloutFigures], step: int) -> BadWeights | None:
        limit, window = self._limits.cut_share, self._limits.window_steps
        shares = [each.cut_share for each in steps[-window:]]
        if limit is None or len(shares) < window or min(shares) < limit:
            return None
        reason = (
            f"{_percent(shares[-1])} of answers were cut at {self._config.max_new_tokens} tokens, at least "
            f"rollout.limits.cut_share={limit:g} in {window} steps in a row: raise rollout.max_new_tokens"
        )
        return BadWeights(reason=reason, values={"cut_share": shares[-1]}, last_good=max(step - window, 0))

    def _judge_equal(self, steps: Sequence[RolloutFigures], step: int) -> BadWeights | None:
        window = self._limits.equal_steps
        if window is None or len(steps) < window or any(each.equal_share < 1 for each in steps[-window:]):
            return None
        reason = (
            f"each group had equal rewards in {window} steps in a row (rollout.limits.equal_steps), so nothing is "
            f"learned; {self._cause_of_equal(steps[-window:])}"
        )
        return BadWeights(reason=reason, values={"equal_share": 1.0}, last_good=max(step - window, 0))

    def _cause_of_equal(self, steps: Sequence[RolloutFigures]) -> str:
        config = self._config
        cut, correct = (_mean(steps, lambda each: each.cut_share), _mean(steps, lambda each: each.correct_share))
        if cut >= _ALMOST_ALL:
            return (
                f"{_percent(cut)} of answers were cut at {config.max_new_tokens} tokens: raise rollout.max_new_tokens"
            )
        if correct >= 1:
            return "all answers are correct: the prompts are too easy by now"
        if correct <= 0:
            return (
                f"no answer is judged correct, the mean reward is {_mean(steps, lambda each: each.reward):.3g}: the "
                f"prompts are too hard, or the reward does not find the answers (see rollouts/ in the run's folder)"
            )
        return (
            f"{_percent(correct)} of answers are correct, always to the same prompts: raise rollout.samples="
            f"{config.samples} or rollout.temperature={config.temperature:g}"
        )

    def _judge_entropy(self, steps: Sequence[RolloutFigures], step: int) -> BadWeights | None:
        cause = "answers have become nearly the same: the learning rate is probably too high, or task.loss.clip_high "
        cause += "or task.loss.kl_weight too low"
        return self._judge_mean("entropy", self._limits.entropy_share, lambda each: each.entropy, steps, step, cause)

    def _judge_reward(self, steps: Sequence[RolloutFigures], step: int) -> BadWeights | None:
        cut = _mean(steps[-self._limits.window_steps :], lambda each: each.cut_share)
        cause = "the learning rate is probably too high, or its warm-up too short"
        if cut >= _ALMOST_ALL:
            cause = f"{_percent(cut)} of answers were cut at {self._config.max_new_tokens} tokens: raise "
            cause += "rollout.max_new_tokens, or set rollout.length_penalty_tokens"
        return self._judge_mean("reward", self._limits.reward_share, lambda each: each.reward, steps, step, cause)

    def _judge_mean(
        self,
        name: str,
        limit: float | None,
        value: Callable[[RolloutFigures], float],
        steps: Sequence[RolloutFigures],
        step: int,
        cause: str,
    ) -> BadWeights | None:
        """Compares the mean of the last steps with that of the first ones."""
        window = self._limits.window_steps
        if limit is None or len(self._first) < window:
            return None
        start, mean = _mean(self._first, value), _mean(steps[-window:], value)
        if start <= 0 or mean >= limit * start:
            return None
        reason = (
            f"mean {name} of the last {window} steps is {mean:.3g}, below rollout.limits.{name}_share={limit:g} x "
            f"{start:.3g} at the start: {cause}"
        )
        return BadWeights(
            reason=reason, values={name: mean, f"{name} at the start": start}, last_good=max(step - window, 0)
        )


def read_figures(metrics: Path, num_done: int) -> dict[int, RolloutFigures]:
    """Reads the numbers of the rollouts of up to `num_done` steps from a `metrics.jsonl`, by step."""
    found = {}
    for values in read_lines(metrics):
        rollouts = values.get("rollouts")
        figures = RolloutFigures.of_metrics(rollouts) if isinstance(rollouts, dict) else None
        if figures is not None and values["step"] <= num_done:
            found[values["step"]] = figures
    return found


def _mean(steps: Sequence[RolloutFigures], value: Callable[[RolloutFigures], float]) -> float:
    return sum(map(value, steps)) / len(steps)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
