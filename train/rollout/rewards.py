"""Scores the answers of a rollout on all ranks of a job."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import distributed as dist

from infer.scoring.models.parts import ModelScores, combine, host_parts
from infer.scoring.reward import AnswerGroup, GroupSheets, Reward, RewardConfig
from infer.scoring.score import ScoringError
from train.rollout.model_parts import ModelPart, SampledGroup
from train.world import World


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What rank 0 found with rules: the sheets of each group, none without rules, or an error."""

    sheets: list[GroupSheets] | None
    error: str = ""


class RolloutRewards:
    """The reward of a run. Rank 0 scores with rules, all ranks with models; all have all scores."""

    def __init__(self, config: RewardConfig, world: World, models: Mapping[str, ModelPart] | None = None) -> None:
        """Starts the scorers. All ranks call it.

        Args:
            models: parts that need models, by kind.

        Raises:
            ScoringError: this machine cannot run a scorer.
        """
        self._config, self._world, self._models = config, world, models or {}
        host = host_parts(config)
        self._reward = Reward(host) if world.rank == 0 and host is not None else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards") if world.rank == 0 else None

    def begin(self, groups: Sequence[SampledGroup], step: int) -> "PendingScores":
        """Scores the answers of groups with models, and starts to score them with rules, in a thread.

        All ranks call it. `PendingScores.wait` returns the scores.

        Args:
            step: decides the random numbers of judges.
        """
        # Rules do not depend on models, so both run at the same time.
        answered = [group.text for group in groups]
        host = None if self._thread is None else self._thread.submit(self._score, answered)
        models = {kind: part.score(groups, step) for kind, part in self._models.items()}
        return PendingScores(self._config, self._world, answered, models, host)

    def close(self) -> None:
        """Ends the scorers. All ranks call it at the same point."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._reward is not None:
            self._reward.close()
        for part in self._models.values():
            part.close()

    def _score(self, groups: Sequence[AnswerGroup]) -> _Outcome:
        try:
            return _Outcome(None if self._reward is None else self._reward.score_groups(groups))
        except ScoringError as error:
            return _Outcome(None, str(error))


class PendingScores:
    """Scores of models, and scores of rules that rank 0 is computing."""

    def __init__(
        self,
        config: RewardConfig,
        world: World,
        groups: Sequence[AnswerGroup],
        models: ModelScores,
        host: Future[_Outcome] | None,
    ) -> None:
        self._config, self._world, self._groups, self._models, self._host = config, world, groups, models, host

    def wait(self) -> list[GroupSheets]:
        """Returns the sheets of each group, in order. All ranks call it.

        Raises:
            ScoringError: on every rank, if the scorers failed.
        """
        found = [None if self._host is None else self._host.result()]
        with self._world.phase("scores of the answers"):
            dist.broadcast_object_list(found, src=0, group=self._world.groups.world)
        outcome = found[0]
        assert outcome is not None
        if outcome.error:
            raise ScoringError(outcome.error)
        return combine(self._config, self._groups, outcome.sheets, self._models)
