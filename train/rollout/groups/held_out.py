"""Measures how many held-out problems a policy solves, during training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from infer.engines.protocol import Rollout
from infer.scoring.reward import ScoreSheet
from train.rollout.groups.draw import DrawnPrompt
from train.rollout.groups.statistics import is_right

if TYPE_CHECKING:
    from train.rollout.groups.make import RolloutMaker

PASS_AT_1 = "pass_at_1"
VALIDATION_STEP = 2**40
"""Number of the request of every validation: equal draws make validations comparable, and no step has them."""


class HeldOutProblems:
    """Held-out problems, which every validation answers with the same random numbers."""

    def __init__(self, drawn: Sequence[DrawnPrompt], samples: int) -> None:
        """Stores the problems.

        Args:
            drawn: the prompts, at least one.
            samples: number of answers to each.
        """
        self._drawn, self._samples = list(drawn), samples

    def measure(self, maker: "RolloutMaker") -> Mapping[str, float]:
        """Answers and scores all problems. All ranks call it.

        Returns:
            By name: share of judged answers that are correct (pass_at_1), share of problems with a correct answer
            (pass_at_n), mean reward, mean number of tokens, and share of cut answers. What no answer has is missing.
        """
        rollouts = maker.sample(self._drawn, self._samples, VALIDATION_STEP)
        scored = maker.begin_scores(self._drawn, rollouts, VALIDATION_STEP).wait()
        return summarize(rollouts, [group.sheets for group in scored])


def summarize(rollouts: Sequence[Sequence[Rollout]], sheets: Sequence[Sequence[ScoreSheet]]) -> dict[str, float]:
    """Returns what `HeldOutProblems.measure` does, from the answers and scores of each problem."""
    answers, scored = [each for group in rollouts for each in group], [each for group in sheets for each in group]
    is_correct = [[right for sheet in group if (right := is_right(sheet)) is not None] for group in sheets]
    is_correct = [group for group in is_correct if group]
    rewards = [sheet.total for sheet in scored if sheet.is_verdict]
    found: dict[str, float] = {}
    if is_correct:
        found[PASS_AT_1] = sum(map(sum, is_correct)) / sum(map(len, is_correct))
        found[f"pass_at_{len(sheets[0])}"] = sum(map(any, is_correct)) / len(is_correct)
    if rewards:
        found["reward"] = sum(rewards) / len(rewards)
    if len(rewards) < len(scored):
        found["no_verdict_share"] = 1 - len(rewards) / len(scored)
    return found | {
        "mean_tokens": sum(len(each.tokens) for each in answers) / len(answers),
        "cut_share": sum(each.finish == "length" for each in answers) / len(answers),
    }
