"""Defines sampled and scored answers as a rollout keeps them. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from infer.config import Finish
from infer.engines.protocol import SampledRoutes
from infer.scoring.reward import ScoreSheet


@dataclass(frozen=True, kw_only=True, slots=True)
class RolledAnswer:
    """A sampled answer with its reward.

    Attributes:
        sample: its number within the group, from 0.
        tokens: token ids, including the token that ended it.
        log_probs: log-probability of each token under the sampler.
        text: decoded tokens without the one that ended it.
        finish: why it ended.
        sheet: scores, each part by its kind.
        reward: total of the sheet, and the penalty of its length.
        advantage: reward compared with the group; 0 if the group is not trained.
        version: number of updates in the weights that sampled it.
        old_log_probs: log-probability of each token under the policy before the first update, if that was computed.
        kept: for each token, the tokens that top-k, top-p and min-p kept; empty if they are not recorded.
    """

    sample: int
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    finish: Finish
    sheet: ScoreSheet
    reward: float
    advantage: float
    version: int
    old_log_probs: tuple[float, ...] | None = None
    kept: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RolledGroup:
    """The answers to one prompt.

    Attributes:
        prompt: position of the prompt in the order of the whole job; no two groups share it.
        problem: key of the problem.
        text: the question.
        expected: the expected answer, if there is one.
        tokens: token ids of the prompt.
        answers: by sample.
        dropped: why the group is not trained; empty if it is.
    """

    prompt: int
    problem: str
    text: str
    expected: str | None
    tokens: tuple[int, ...]
    answers: tuple[RolledAnswer, ...]
    dropped: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutHeader:
    """What a rollout was made with, and numbers of it.

    Attributes:
        rollout: its number, from 0.
        step: first training step that learns from it, from 1.
        weights: fingerprint of the weights that sampled it.
        settings: digest of the settings that decide the answers and rewards.
        next_prompt: position of the first prompt after it.
        seconds: time of each part.
        counts: numbers, such as groups that are not trained, by reason.
    """

    rollout: int
    step: int
    weights: str
    settings: str
    next_prompt: int
    seconds: Mapping[str, float]
    counts: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RolloutRoutes:
    """A rank's records of the experts of a rollout's tokens.

    Attributes:
        sampled: records of this rank.
        requests: numbers of the prompts of each request to the engine, in order. They decide which rank has a record.
    """

    sampled: SampledRoutes
    requests: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRollout:
    """All groups of a rollout, equal on all ranks except for the records of experts, if there are any."""

    header: RolloutHeader
    groups: tuple[RolledGroup, ...]
    routes: RolloutRoutes | None = field(default=None, compare=False)

    @property
    def answers(self) -> list[RolledAnswer]:
        """All answers by group and sample."""
        return [answer for group in self.groups for answer in group.answers]
