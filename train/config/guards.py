"""Configuration of the guard: what happens to a step that it refuses. No torch here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from kernels.ranges import PositiveInt, ZeroOrAbove


@dataclass(frozen=True, kw_only=True, slots=True)
class StopGuardConfig:
    """A guard that ends the run if a step's loss or gradient norm is not finite, or is a spike.

    A spike is larger than `spike_factor` times the median of the previous `spike_window_steps` steps. Steps before the
    window is full are not spikes, and with `spike_factor` 0 no step is.
    """

    kind: Literal["stop"]
    spike_factor: Annotated[float, ZeroOrAbove(1)]
    spike_window_steps: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipGuardConfig:
    """A guard that skips refused steps, and ends the run after more than `max_consecutive` in a row."""

    kind: Literal["skip"]
    spike_factor: Annotated[float, ZeroOrAbove(1)]
    spike_window_steps: PositiveInt
    max_consecutive: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class RollBackGuardConfig:
    """A guard that rolls back to the newest checkpoint, and skips the refused batch on the second pass.

    The run ends after more than `max_consecutive` rollbacks without a step beyond the last refused one.
    """

    kind: Literal["roll_back"]
    spike_factor: Annotated[float, ZeroOrAbove(1)]
    spike_window_steps: PositiveInt
    max_consecutive: PositiveInt


GuardConfig = StopGuardConfig | SkipGuardConfig | RollBackGuardConfig
