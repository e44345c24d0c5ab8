"""Checks the loss and gradient norm of a step before weights are updated."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import distributed as dist

from data.loader import Loader
from infer.config import GenerateError
from train.config import GuardConfig
from train.errors import RefusedStepError, StepRefusal
from train.files.json_lines import number_of, read_lines
from train.guard.rollout_guard import Figures, RolloutGuard
from train.replica import StepBatch, TaskHook
from train.world import World

LOSS = "loss"
NORM = "gradient norm"
LossAndNorm = tuple[float, float]
"""A step's loss and gradient norm."""


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
    mine = torch.tensor([own if is_finite_here else math.nan], dtype=torch.float64, device=world.device)
    norms = [torch.empty_like(mine) for _ in world.ranks]
    with world.log.collective("world", group, "search for a refused step's cause"):
        dist.all_gather(norms, mine, group=group)
    found = [float(norm) for norm in norms]
    odd = tuple(rank for rank, norm in enumerate(found) if not math.isfinite(norm))
    ranks = odd or (max(range(len(found)), key=found.__getitem__),)
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
