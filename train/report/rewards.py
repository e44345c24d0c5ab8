"""Draws the rewards, held-out problems, lengths and policy of a run that learns from its answers."""

import re
from collections.abc import Sequence

from train.report.chart import ChartedRun, Line, Unit, chart

REWARD, PASS_AT_1, HELD_OUT_REWARD = "rollouts.reward", "validation_pass_at_1", "validation_reward"
_PARTS = "rollouts.parts."
_PASS = re.compile(r"validation_pass_at_(\d+)")
_NUM_COLORS = 6


def reward_charts(runs: Sequence[ChartedRun]) -> list[str]:
    """Returns charts of rewards, of held-out problems, and of how far the policy moves."""
    reward = [
        Line(key=REWARD, name="training", color=1),
        Line(key=HELD_OUT_REWARD, name="held out", color=3, dots=True),
    ]
    parts = [(key, key.removeprefix(_PARTS)) for key in _keys(runs) if key.startswith(_PARTS)]
    passes = [(key, f"pass@{found[1]}") for key in _keys(runs) if (found := _PASS.fullmatch(key))]
    return [
        chart(runs, "Mean reward of an answer", reward, y="reward", has_marks=True, is_wide=True),
        chart(runs, "Parts of the reward before weights", _lines(parts), y="mean value"),
        chart(runs, "Held-out problems", _lines(passes, dots=True), y="share solved", unit="percent", from_zero=True),
        _chart(runs, "KL from the reference", [("kl", "KL")], y="nats per token"),
        _chart(runs, "Entropy of the policy, estimated from its answers", [("entropy", "entropy")], y="nats per token"),
        _share(runs, "Clipped tokens", [("clip_fraction", "clipped")], "share of tokens"),
        _share(runs, "Answers too far off the policy", [("off_policy_share", "masked")], "share of answers"),
        _chart(runs, "Sampler against trainer", [("sampler_difference", "|log-probability|")], y="nats per token"),
    ]


def answer_charts(runs: Sequence[ChartedRun]) -> list[str]:
    """Returns charts of sampled answers and their groups."""
    lengths = [
        ("rollouts.mean_tokens", "mean"),
        ("rollouts.most_tokens", "longest"),
        ("validation_mean_tokens", "mean, held out"),
    ]
    cut = [("rollouts.cut_share", "training"), ("validation_cut_share", "held out")]
    groups = [("rollouts.equal_share", "equal rewards"), ("rollouts.no_verdict_groups", "no verdict")]
    correct = [Line(key="rollouts.correct_share", name="correct", color=1)]
    unjudged = [("rollouts.no_verdict_share", "no verdict"), ("rollouts.skipped_share", "skipped")]
    return [
        _chart(runs, "Length of an answer", lengths, y="tokens"),
        _share(runs, "Answers cut at the limit of tokens", cut, "share of answers"),
        _share(runs, "Groups from which nothing is learned", groups, "share of groups"),
        _share(runs, "Answers that no check has judged", unjudged, "share of answers"),
        chart(runs, "Correct answers in training", correct, y="share of answers", unit="percent", from_zero=True),
    ]


def _keys(runs: Sequence[ChartedRun]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.history.keys))


def _chart(
    runs: Sequence[ChartedRun], title: str, named: Sequence[tuple[str, str]], y: str, unit: Unit = "plain"
) -> str:
    """Returns a chart from zero of numbers by key and name, or nothing if all are 0 in all steps."""
    tallies = [tally for run in runs for key, _ in named for _, tally in run.history.tallies(key)]
    if not any(tally.least or tally.most for tally in tallies):
        return ""
    return chart(runs, title, _lines(named), y=y, unit=unit, from_zero=True)


def _share(runs: Sequence[ChartedRun], title: str, named: Sequence[tuple[str, str]], y: str) -> str:
    return _chart(runs, title, named, y, "percent")


def _lines(named: Sequence[tuple[str, str]], *, dots: bool = False) -> list[Line]:
    """Returns lines by key and name. Those of held-out problems are dots."""
    return [
        Line(key=key, name=name, color=place % _NUM_COLORS + 1, dots=dots or key.startswith("validation_"))
        for place, (key, name) in enumerate(named)
    ]
