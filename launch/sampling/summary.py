"""Formats the summary of `launch.sample` as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean

from launch.sampling.journal import ScoredSample
from launch.sampling.selection import SampleSelection, is_easy


def summary(samples: Mapping[int, Sequence[ScoredSample]], selection: SampleSelection, easy_rate: float) -> str:
    """Returns lines about problems, outcomes, parts of the reward, and the selection.

    Args:
        samples: of each problem.
        selection: of them.
        easy_rate: share of correct answers from which a problem is easy.
    """
    drawn = [sample for each in samples.values() for sample in each]
    outcomes = Counter(sample.sheet.outcome for sample in drawn)
    judged = [sample for sample in drawn if sample.sheet.is_verdict]
    solved = [any(sample.sheet.outcome == "correct" for sample in each) for each in samples.values()]
    easy = sum(is_easy(each, easy_rate) for each in samples.values())
    rows = [
        ("problems", f"{len(samples)}: {sum(solved)} solved at least once, {easy} of them easy"),
        ("samples", f"{len(drawn)}: " + ", ".join(f"{count} {name}" for name, count in outcomes.most_common())),
        ("pass@1", _share(outcomes["correct"], len(judged))),
        ("solved", _share(sum(solved), len(solved))),
        ("tokens", f"{mean(sample.num_tokens for sample in drawn):.1f} a sample"),
        ("cut", _share(sum(not sample.is_finished for sample in drawn), len(drawn))),
        ("reward", f"{mean(sample.sheet.total for sample in drawn):.3f}"),
        *((f"  {kind}", f"{_part_mean(drawn, kind):.3f}") for kind in drawn[0].sheet.parts),
        ("kept", f"{len(selection.kept)} of {len({each.problem for each in selection.kept})} problems"),
        *((f"  {reason}", str(count)) for reason, count in sorted(selection.left_out.items())),
    ]
    wide = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{wide}}  {text}" for name, text in rows)


def faults(samples: Mapping[int, Sequence[ScoredSample]]) -> str | None:
    """Returns a sentence about samples without a verdict, or None if there are none."""
    drawn = [sample for each in samples.values() for sample in each]
    without = [sample for sample in drawn if not sample.sheet.is_verdict]
    if not without:
        return None
    details = Counter(
        score.detail
        for sample in without
        for score in sample.sheet.parts.values()
        if score.outcome in ("error", "unknown")
    )
    return f"{len(without)} of {len(drawn)} samples have no verdict, most often: {details.most_common(1)[0][0]}"


def _part_mean(samples: Sequence[ScoredSample], kind: str) -> float:
    values = [sample.sheet.parts[kind].value for sample in samples if sample.sheet.parts[kind].outcome != "skipped"]
    return mean(values) if values else 0.0


def _share(count: int, total: int) -> str:
    return f"{count / total:.3f}" if total else "no sample has a verdict"
