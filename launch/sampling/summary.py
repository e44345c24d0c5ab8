"""Formats the summary of `launch.sample` as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean

from infer.scoring.pass_rates import PassRates, compute_pass_rates
from launch.sampling.journal import ScoredSample
from launch.sampling.selection import SampleSelection, is_easy


def summary(samples: Mapping[int, Sequence[ScoredSample]], selection: SampleSelection, easy_rate: float) -> str:
    """Returns lines about problems, outcomes, parts of the reward, and the selection."""
    drawn = [sample for each in samples.values() for sample in each]
    outcomes = Counter(sample.sheet.outcome for sample in drawn)
    has_verdict = any(sample.sheet.is_verdict for sample in drawn)
    solved = [any(sample.sheet.outcome == "correct" for sample in each) for each in samples.values()]
    rates = measured_rates(samples)
    easy = sum(is_easy(each, easy_rate) for each in samples.values())
    rows = [
        ("problems", f"{len(samples)}: {sum(solved)} solved at least once, {easy} of them easy"),
        ("samples", f"{len(drawn)}: " + ", ".join(f"{count} {name}" for name, count in outcomes.most_common())),
        ("pass@1", f"{rates.pass_at_1:.3f}" if has_verdict else "no sample has a verdict"),
        ("solved", f"{rates.pass_at_n:.3f}"),
        (f"maj@{rates.num_samples}", f"{rates.maj_at_n:.3f}"),
        ("tokens", f"{rates.mean_tokens:.1f} a sample"),
        ("cut", f"{rates.cut_share:.3f}"),
        ("reward", f"{mean(sample.sheet.total for sample in drawn):.3f}"),
        *((f"  {kind}", f"{_part_mean(drawn, kind):.3f}") for kind in drawn[0].sheet.parts),
        ("kept", f"{len(selection.kept)} of {len({each.problem for each in selection.kept})} problems"),
        *((f"  {reason}", str(count)) for reason, count in sorted(selection.left_out.items())),
    ]
    wide = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{wide}}  {text}" for name, text in rows)


def measured_rates(samples: Mapping[int, Sequence[ScoredSample]]) -> PassRates:
    """Returns the pass rates of all problems that were sampled, at least one."""
    groups = [samples[number] for number in sorted(samples)]
    answers = [[sample.answer for sample in group] for group in groups]
    return compute_pass_rates(answers, [[sample.sheet for sample in group] for group in groups])


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
