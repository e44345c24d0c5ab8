"""Configuration of what the planner counts in addition to a run's steps, and of its check.

Configurations of runs from before these keys existed use the defaults.
"""

from dataclasses import dataclass

from kernels.ranges import NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class LongerStage:
    """A later training stage with longer sequences and another global batch.

    Attributes:
        sequence_length_tokens: tokens of a sequence.
        sequences: sequences of a global batch.
        steps: optimizer steps.
    """

    sequence_length_tokens: PositiveInt
    sequences: PositiveInt
    steps: PositiveInt

    @property
    def tokens(self) -> int:
        """The tokens of the whole stage."""
        return self.sequence_length_tokens * self.sequences * self.steps


@dataclass(frozen=True, kw_only=True, slots=True)
class CostConfig:
    """What the planner counts in addition to a run's own steps.

    Attributes:
        context_extension: later stages with longer sequences.
        post_training_gpu_hours: an input, not a prediction.
        watts_per_gpu: power of a GPU with its share of the node and cooling; None: unknown.
        gpu_mtbf_hours: mean time between failures of one GPU with its share of the node; None: unknown.
        checkpoint_seconds: time that training stops for one checkpoint.
        restart_seconds: time from a failure to the first new step.
    """

    context_extension: tuple[LongerStage, ...] = ()
    post_training_gpu_hours: NonNegativeFloat = 0.0
    watts_per_gpu: PositiveFloat | None = None
    gpu_mtbf_hours: PositiveFloat | None = None
    checkpoint_seconds: NonNegativeFloat = 0.0
    restart_seconds: NonNegativeFloat = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCheckConfig:
    """Whether a run that needs more memory than its devices have is rejected before it starts."""

    check: bool = True


DEFAULT_COST = CostConfig()
DEFAULT_PLAN_CHECK = PlanCheckConfig()
