"""Checks a step before weights are updated: its loss, its gradient norm and its rollout.

A broken limit of a rollout is a property of the weights, not of the batch, unlike a loss that is not finite.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed as dist

from data.loader import Loader
from infer.config import GenerateError
from train.config import GuardConfig
from train.config.tasks import RolloutConfig
from train.core.replica import StepBatch, TaskHook
from train.core.world import World
from train.errors import RefusedStepError, StepRefusal
from train.files.json_lines import number_of, read_lines

LOSS = "loss"
NORM = "gradient norm"
LossAndNorm = tuple[float, float]
"""A step's loss and gradient norm."""

KL = "kl"
_KL_STEPS = 3
"""Steps over which KL is averaged: an estimate from the samples of one step has rare values far above the mean."""
_ALMOST_ALL = 0.5
_NO_VERDICT_STEPS = 3

Figures = Mapping[str, Any]
"""Numbers of a step's rollout by name, as `metrics.jsonl` has them. A reward may lack some, such as correct_share."""


class RolloutGuard:
    """The limits of a run that learns from rewards; all ranks have its numbers."""

    def __init__(self, config: RolloutConfig) -> None:
        self._config = config
        self._limits = config.limits
        self._num_kept = max(self._limits.window_steps, self._limits.equal_steps or 0, _NO_VERDICT_STEPS)
        self._first: list[Figures] = []
        self._last: deque[Figures] = deque(maxlen=self._num_kept)
        self._divergences: deque[float] = deque(maxlen=_KL_STEPS)

    def replace_history(self, history: Iterable[Figures]) -> None:
        """Replaces the earlier steps by all of a run, the oldest first. KL starts again."""
        self._first = []
        self._last.clear()
        self._divergences.clear()
        for figures in history:
            self.accept(figures)

    def accept(self, figures: Figures) -> None:
        """Adds a step that updated the weights."""
        if len(self._first) < self._limits.window_steps:
            self._first.append(figures)
        self._last.append(figures)

    def judge_rollout(self, figures: Figures, step: int) -> StepRefusal | None:
        """Returns the limit that a rollout breaks, or None. `step` is the index of the step, from 0."""
        steps = [*self._last, figures]
        judges = (self._judge_verdicts, self._judge_cut, self._judge_equal, self._judge_entropy, self._judge_reward)
        for judge in judges:
            if (refusal := judge(steps, step)) is not None:
                return refusal
        return None

    def judge_kl(self, means: Mapping[str, float], step: int, learning_rate: float) -> StepRefusal | None:
        """Returns the limit that the divergence among a step's losses breaks, or None. `step` counts from 0."""
        limit = self._limits.kl
        kl = means.get(KL)
        if limit is None or kl is None:
            return None
        self._divergences.append(kl)
        # Steps that are not known count as 0.
        mean = sum(self._divergences) / _KL_STEPS
        if mean <= limit:
            return None
        return StepRefusal(
            step=step,
            reason=f"KL is {mean:.3g} nats per token over {_KL_STEPS} steps after {step} updates, above "
            f"rollout.limits.kl={limit:g}: the learning rate of {learning_rate:.3g} is probably too high, or "
            f"task.loss.kl_weight too low",
            values={KL: mean},
            last_good=max(step - _KL_STEPS, 0),
        )

    def _judge_verdicts(self, steps: Sequence[Figures], step: int) -> StepRefusal | None:
        limit = self._limits.no_verdict_share
        shares = _last_values(steps, _NO_VERDICT_STEPS, "no_verdict_share")
        if limit is None or min(shares, default=0.0) < limit:
            return None
        reason = (
            f"{_percent(shares[-1])} of answers have no verdict, at least rollout.limits.no_verdict_share={limit:g} in "
            f"{_NO_VERDICT_STEPS} steps in a row; {_cause_of_no_verdict(steps)}"
        )
        return StepRefusal(
            step=step, reason=reason, values={"no_verdict_share": shares[-1]}, last_good=step, ends_run=True
        )

    def _judge_cut(self, steps: Sequence[Figures], step: int) -> StepRefusal | None:
        limit = self._limits.cut_share
        window = self._limits.window_steps
        shares = _last_values(steps, window, "cut_share")
        if limit is None or min(shares, default=0.0) < limit:
            return None
        reason = (
            f"{_percent(shares[-1])} of answers were cut at {self._config.max_new_tokens} tokens, at least "
            f"rollout.limits.cut_share={limit:g} in {window} steps in a row: raise rollout.max_new_tokens"
        )
        return StepRefusal(step=step, reason=reason, values={"cut_share": shares[-1]}, last_good=max(step - window, 0))

    def _judge_equal(self, steps: Sequence[Figures], step: int) -> StepRefusal | None:
        window = self._limits.equal_steps
        shares = [] if window is None else _last_values(steps, window, "idle_share")
        if window is None or min(shares, default=0.0) < 1:
            return None
        last = steps[-window:]
        what = "equal rewards or no verdict" if _mean(last, "no_verdict_groups") else "equal rewards"
        reason = (
            f"each group had {what} in {window} steps in a row (rollout.limits.equal_steps), so nothing is "
            f"learned; {self._cause_of_equal(last)}"
        )
        return StepRefusal(step=step, reason=reason, values={"idle_share": shares[-1]}, last_good=max(step - window, 0))

    def _cause_of_equal(self, steps: Sequence[Figures]) -> str:
        config = self._config
        cut = _mean(steps, "cut_share")
        skipped = _mean(steps, "skipped_share")
        reward = f"{_mean(steps, 'reward'):.3g}"
        correct = _mean(steps, "correct_share")
        if _mean(steps, "no_verdict_groups") >= _ALMOST_ALL:
            return _cause_of_no_verdict(steps)
        if cut >= _ALMOST_ALL:
            return (
                f"{_percent(cut)} of answers were cut at {config.max_new_tokens} tokens: raise rollout.max_new_tokens"
            )
        if skipped >= _ALMOST_ALL:
            return f"{_percent(skipped)} of answers are skipped, because no check of reward.parts fits their problems"
        if all("correct_share" not in figures for figures in steps):
            return f"the mean reward is {reward}, and all answers to a prompt have the same (see the run's rollouts/)"
        if correct >= 1:
            return "all answers are correct: the prompts are too easy by now"
        if correct <= 0:
            return (
                f"no answer is judged correct, the mean reward is {reward}: the prompts are too hard, or the reward "
                f"does not find the answers (see rollouts/ in the run's folder)"
            )
        return (
            f"{_percent(correct)} of answers are correct, always to the same prompts: raise rollout.samples="
            f"{config.samples} or rollout.temperature={config.temperature:g}"
        )

    def _judge_entropy(self, steps: Sequence[Figures], step: int) -> StepRefusal | None:
        cause = "answers have become nearly the same: the learning rate is probably too high, or task.loss.clip_high "
        cause += "or task.loss.kl_weight too low"
        return self._judge_mean("entropy", self._limits.entropy_share, steps, step, cause)

    def _judge_reward(self, steps: Sequence[Figures], step: int) -> StepRefusal | None:
        cut = _mean(steps[-self._limits.window_steps :], "cut_share")
        cause = "the learning rate is probably too high, or its warm-up too short"
        if cut >= _ALMOST_ALL:
            cause = f"{_percent(cut)} of answers were cut at {self._config.max_new_tokens} tokens: raise "
            cause += "rollout.max_new_tokens, or set rollout.length_penalty_tokens"
        return self._judge_mean("reward", self._limits.reward_share, steps, step, cause)

    def _judge_mean(
        self, name: str, limit: float | None, steps: Sequence[Figures], step: int, cause: str
    ) -> StepRefusal | None:
        """Compares the mean of the last steps with that of the first ones."""
        window = self._limits.window_steps
        if limit is None or not _last_values(self._first, window, name) or not _last_values(steps, window, name):
            return None
        start = _mean(self._first, name)
        mean = _mean(steps[-window:], name)
        if start <= 0 or mean >= limit * start:
            return None
        reason = (
            f"mean {name} of the last {window} steps is {mean:.3g}, below rollout.limits.{name}_share={limit:g} x "
            f"{start:.3g} at the start: {cause}"
        )
        return StepRefusal(
            step=step,
            reason=reason,
            values={name: mean, f"{name} at the start": start},
            last_good=max(step - window, 0),
        )


def read_figures(metrics: Path, num_done: int) -> dict[int, Figures]:
    """Reads the numbers of the rollouts of up to `num_done` steps from a `metrics.jsonl`, by step."""
    by_step: dict[int, Figures] = {}
    for values in read_lines(metrics):
        rollouts = values.get("rollouts")
        if isinstance(rollouts, dict) and values["step"] <= num_done:
            by_step[values["step"]] = {name: value for name, value in rollouts.items() if not isinstance(value, dict)}
    return by_step


def _cause_of_no_verdict(steps: Sequence[Figures]) -> str:
    reasons = [figures["no_verdict_reason"] for figures in steps if "no_verdict_reason" in figures]
    return f"the first of them: {reasons[-1]}" if reasons else "rollouts/ in the run's folder has the reasons"


def _last_values(steps: Sequence[Figures], count: int, name: str) -> list[float]:
    """Returns a figure of the last steps; nothing if there are fewer steps, or one of them lacks it."""
    values = [value for figures in steps[-count:] if (value := number_of(figures, name)) is not None]
    return values if len(values) == count else []


def _mean(steps: Sequence[Figures], name: str) -> float:
    """Returns the mean of a figure over the steps that have it; 0 if none has."""
    values = [value for figures in steps for value in _last_values([figures], 1, name)]
    return sum(values) / max(len(values), 1)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


class Guard:
    """The rules by which a run refuses steps.

    Loss and norm are sums over all ranks, so all ranks decide the same without another collective.
    """

    values: dict[str, float]
    rollouts: RolloutGuard | None

    def __init__(
        self, config: GuardConfig, history: Iterable[LossAndNorm] = (), rollouts: RolloutGuard | None = None
    ) -> None:
        self.rollouts = rollouts
        self._figures: Figures | None = None
        self._factor = config.spike_factor
        self._window = config.spike_window_steps
        self._history: dict[str, deque[float]] = {}
        self.values = {}
        self.replace_history(history)

    def replace_history(self, history: Iterable[LossAndNorm]) -> None:
        """Replaces the earlier steps with which later steps are compared."""
        losses = deque[float](maxlen=self._window)
        norms = deque[float](maxlen=self._window)
        for loss, norm in history:
            losses.append(loss)
            norms.append(norm)
        self._history = {LOSS: losses, NORM: norms}

    def judge(self, name: str, value: float) -> str:
        """Returns why a step with this value is refused, or an empty text if it is accepted."""
        if name == LOSS:
            self.values = {}
        self.values[name] = value
        if not math.isfinite(value):
            return f"{name} is {value}"
        before = self._history[name]
        if not self._factor or len(before) < self._window:
            return ""
        middle = median(before)
        self.values[f"median {name}"] = middle
        if value <= self._factor * middle:
            return ""
        return f"{name} is {value:.6g}, above {self._factor:g} x its median of {self._window} steps, {middle:.6g}"

    def judged_batch(self, hook: TaskHook, loader: Loader, step: int) -> StepBatch:
        """Returns a step's batches. All ranks call it."""
        try:
            batch = hook.prepare(loader, step)
        except GenerateError as error:
            # All ranks raise it: logits that are not finite are a property of the weights.
            reason = f"answers cannot be sampled: {error}"
            refusal = StepRefusal(step=step, reason=reason, last_good=max(step - 1, 0))
            raise RefusedStepError(refusal) from error
        broken = self.judge_rollout(batch.metrics, step)
        if broken is not None:
            hook.finish()
            raise RefusedStepError(broken)
        return batch

    def judge_rollout(self, metrics: Figures | None, step: int) -> StepRefusal | None:
        """Returns the limit that a step's rollout, if it has one, breaks, or None."""
        if self.rollouts is None or metrics is None:
            return None
        self._figures = metrics
        return self.rollouts.judge_rollout(metrics, step)

    def judge_kl(self, means: Mapping[str, float], step: int, learning_rate: float) -> StepRefusal | None:
        """Returns the limit that the divergence from the reference breaks, or None."""
        return None if self.rollouts is None else self.rollouts.judge_kl(means, step, learning_rate)

    def accept(self, loss: float, norm: float) -> None:
        """Adds the step that was checked last, and updated the weights, to the history."""
        if self.rollouts is not None and self._figures is not None:
            self.rollouts.accept(self._figures)
        self._figures = None
        self._history[LOSS].append(loss)
        self._history[NORM].append(norm)


def describe_refusal(
    world: World, guard: Guard, step: int, reason: str, own: float, *, is_finite_here: bool
) -> StepRefusal:
    """Returns the reason and the ranks that caused a refused step. All ranks call it."""
    group = world.groups.world
    norm_here = torch.tensor([own if is_finite_here else math.nan], dtype=torch.float64, device=world.device)
    norms = [torch.empty_like(norm_here) for _ in world.ranks]
    with world.log.collective("world", group, "search for a refused step's cause"):
        dist.all_gather(norms, norm_here, group=group)
    rank_norms = [float(norm) for norm in norms]
    odd = tuple(rank for rank, norm in enumerate(rank_norms) if not math.isfinite(norm))
    ranks = odd or (max(range(len(rank_norms)), key=rank_norms.__getitem__),)
    return StepRefusal(step=step, reason=reason, values=dict(guard.values), ranks=ranks)


def read_loss_and_norm(metrics: Path, num_done: int, window: int) -> list[LossAndNorm]:
    """Reads the loss and norm of up to `window` steps before `num_done` from a `metrics.jsonl`."""
    history: deque[LossAndNorm] = deque(maxlen=window)
    for values in read_lines(metrics):
        loss = number_of(values, "loss")
        norm = number_of(values, "grad_norm")
        if values["step"] <= num_done and loss is not None and norm is not None:
            history.append((loss, norm))
    return list(history)


def to_json_values(values: Mapping[str, float]) -> dict[str, float | str]:
    """Returns numbers as JSON values. Numbers that are not finite become text."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
