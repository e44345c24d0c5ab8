"""Scores the answers of a rollout on all ranks of a job."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import distributed as dist

from infer.scoring.reward import AnswerGroup, GroupSheets, Reward, RewardConfig
from infer.scoring.score import ScoringError
from train.world import World


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What rank 0 found: the sheets of each group, or why there are none."""

    sheets: list[GroupSheets]
    error: str = ""


class RolloutRewards:
    """The reward of a run. Rank 0 scores with rules, and all ranks receive the scores."""

    def __init__(self, config: RewardConfig, world: World) -> None:
        """Starts the scorers. All ranks call it.

        Args:
            config: of the reward.
            world: of this process.

        Raises:
            ScoringError: this machine cannot run a scorer.
        """
        self._world = world
        self._reward = Reward(config) if world.rank == 0 else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards") if world.rank == 0 else None

    def begin(self, groups: Sequence[AnswerGroup]) -> "PendingScores":
        """Starts to score the answers of groups, in a thread. `PendingScores.wait` returns the scores."""
        if self._thread is None:
            return PendingScores(self._world, None)
        return PendingScores(self._world, self._thread.submit(self._score, list(groups)))

    def close(self) -> None:
        """Ends the scorers."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._reward is not None:
            self._reward.close()

    def _score(self, groups: Sequence[AnswerGroup]) -> _Outcome:
        assert self._reward is not None
        try:
            return _Outcome(self._reward.score_groups(groups))
        except ScoringError as error:
            return _Outcome([], str(error))


class PendingScores:
    """Scores that rank 0 is computing."""

    def __init__(self, world: World, found: Future[_Outcome] | None) -> None:
        self._world, self._found = world, found

    def wait(self) -> list[GroupSheets]:
        """Returns the sheets of each group, in order. All ranks call it.

        Raises:
            ScoringError: on every rank, if the scorers failed.
        """
        found = [None if self._found is None else self._found.result()]
        with self._world.phase("scores of the answers"):
            dist.broadcast_object_list(found, src=0, group=self._world.groups.world)
        outcome = found[0]
        assert outcome is not None
        if outcome.error:
            raise ScoringError(outcome.error)
        return outcome.sheets
