"""Selects the samples to train on: correct, well-formed, different, and few of each problem."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.chat.messages import ChatMessage
from data.chat.templates import ChatTemplate
from data.special_tokens import END_THINK, THINK
from kernels.ranges import PositiveInt, Share
from launch.sampling.journal import ScoredSample


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepConfig:
    """The configuration of the selection.

    Attributes:
        per_problem: maximum number of answers of a problem.
        easy_rate: share of correct answers from which a problem is easy.
        easy_per_problem: maximum number of answers of an easy problem.
        min_reward: least reward; None: any.
    """

    per_problem: PositiveInt
    easy_rate: Share
    easy_per_problem: PositiveInt
    min_reward: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptSample:
    """A selected sample: its problem, its number among the problem's samples, and the message to train on."""

    problem: int
    sample: int
    message: ChatMessage


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSelection:
    """The selected samples by problem and sample, and how many were left out for each reason."""

    kept: tuple[KeptSample, ...]
    left_out: Mapping[str, int]


def select(
    samples: Mapping[int, Sequence[ScoredSample]], config: KeepConfig, template: ChatTemplate, *, thinking: bool
) -> SampleSelection:
    """Selects samples. It is a pure function, so that a new selection needs no new samples.

    Among the good answers of a problem, those with the highest reward are kept, and the first ones among equals.
    """
    kept: list[KeptSample] = []
    left_out: Counter[str] = Counter()
    for number in sorted(samples):
        good = _good_samples(samples[number], config, template, left_out, thinking=thinking)
        limit = config.easy_per_problem if is_easy(samples[number], config.easy_rate) else config.per_problem
        best = sorted(good, key=lambda at: (-samples[number][at].sheet.total, at))[:limit]
        left_out["over the limit of a problem"] += len(good) - len(best)
        kept += [KeptSample(problem=number, sample=at, message=good[at]) for at in sorted(best)]
    return SampleSelection(kept=tuple(kept), left_out={reason: count for reason, count in left_out.items() if count})


def is_easy(samples: Sequence[ScoredSample], easy_rate: float) -> bool:
    """Returns whether at least a share of a problem's samples is correct, of those with a verdict."""
    judged = [sample for sample in samples if sample.sheet.is_verdict]
    correct = sum(sample.sheet.outcome == "correct" for sample in judged)
    return correct > 0 and correct >= easy_rate * len(judged)


def to_message(text: str, template: ChatTemplate, *, thinking: bool) -> ChatMessage | None:
    """Returns an answer as a message, or None if the template cannot express it.

    Args:
        text: with special tokens by name.
        thinking: whether the prompt opened thoughts, so that the text begins with them.
    """
    thoughts = None
    if thinking and template.thoughts is not None:
        before, mark, text = text.removeprefix(THINK).partition(END_THINK)
        if not mark:
            return None
        lead, _, tail = "".join(template.thoughts.end).partition(END_THINK)
        thoughts, text = before.removesuffix(lead), text.removeprefix(tail)
    if any(name in part for name in template.special_names for part in (text, thoughts or "")):
        return None
    return ChatMessage(role="assistant", content=text, thoughts=thoughts) if text.strip() else None


def _good_samples(
    samples: Sequence[ScoredSample],
    config: KeepConfig,
    template: ChatTemplate,
    left_out: Counter[str],
    *,
    thinking: bool,
) -> dict[int, ChatMessage]:
    """Returns the messages of a problem's good and different samples, by number, and counts the others."""
    good: dict[int, ChatMessage] = {}
    seen: set[str] = set()
    for number, sample in enumerate(samples):
        message = to_message(sample.text, template, thinking=thinking)
        plain = " ".join(sample.text.split())
        if not sample.is_finished:
            left_out["cut at the limit of tokens"] += 1
        elif sample.sheet.outcome not in ("correct", "rated"):
            left_out[sample.sheet.outcome] += 1
        elif message is None:
            left_out["not well-formed"] += 1
        elif config.min_reward is not None and sample.sheet.total < config.min_reward:
            left_out["below the least reward"] += 1
        elif plain in seen:
            left_out["duplicate"] += 1
        else:
            seen.add(plain)
            good[number] = message
    return good
