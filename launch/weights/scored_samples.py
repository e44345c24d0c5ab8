"""Scored samples of `launch.sample`: their journal, the selection of those to train on, and a summary.

The first line of a journal says with what the samples were made. Each further line holds all samples of one problem, so
an incomplete last line is the only damage that an interruption can do.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from base import journal
from base.figures import aligned
from base.ranges import NonNegativeInt, Share
from base.refusal import ConfigError, broken
from data.chat.messages import ChatMessage
from data.chat.templates import ChatTemplate
from data.corpus import decode_line
from data.special_tokens import END_THINK, THINK
from score.ratings import PassRates, compute_pass_rates
from score.reward import ScoreSheet
from score.score import Score, TextAnswer

FORMAT = 1
JOURNAL_SUFFIX = ".samples"  # of the file of all samples, after the name of that of selected ones


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSample(TextAnswer):
    """A sampled answer with its scores. The text includes thoughts, and special tokens by name."""

    sheet: ScoreSheet


class SampleJournal(AbstractContextManager["SampleJournal"]):
    """The file of samples, open for appending. Use it as a context manager."""

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        self._path = path
        self.samples: dict[int, tuple[ScoredSample, ...]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"out: {str(path)!r} must be a file that can be written: {error}") from error
        try:
            if not journal.lock(self._file.fileno()):
                raise ConfigError(
                    f"out: another process samples into {str(path)!r}; wait for it, or choose another file"
                )
            self._read(json.loads(json.dumps({"format": FORMAT, **made_with})))
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, number: int, samples: tuple[ScoredSample, ...]) -> None:
        """Adds the samples of a problem; they are on the disk when this returns."""
        record = {"problem": number, "samples": [asdict(sample) for sample in samples]}
        journal.append_synced(self._file, [record])
        self.samples[number] = samples

    def _read(self, made_with: dict[str, Any]) -> None:
        lines = journal.read_whole_lines(self._path)
        for number, line in enumerate(lines):
            values = decode_line(line, f"{self._path}:{number + 1}")
            if number == 0:
                self._compare(values, made_with)
            else:
                self.samples[values["problem"]] = tuple(map(_to_sample, values["samples"]))
        journal.remove_cut_line(self._path)
        if not lines:
            journal.append_synced(self._file, [made_with])

    def _compare(self, found: dict[str, Any], made_with: dict[str, Any]) -> None:
        if (key := journal.changed_key(found, made_with)) is not None:
            rule = f"must be as in {str(self._path)!r}, which has samples made with {found.get(key)!r}"
            raise broken(key, rule, repr(made_with.get(key)), "another out, or remove this file")


def read_samples(path: Path) -> dict[int, tuple[ScoredSample, ...]]:
    """Reads the samples of a finished journal by the number of the problem."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: must be a journal of launch.sample, cannot be read: {error}") from error
    records = [decode_line(line, f"{path}:{number}") for number, line in enumerate(lines[1:], 2)]
    return {values["problem"]: tuple(map(_to_sample, values["samples"])) for values in records}


def _to_sample(values: Mapping[str, Any]) -> ScoredSample:
    sheet = values["sheet"]
    parts = {kind: Score(**score) for kind, score in sheet["parts"].items()}
    return ScoredSample(**{**values, "sheet": ScoreSheet(**{**sheet, "parts": parts})})


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepConfig:
    """The configuration of the selection. `conf/sample.yaml` explains the keys."""

    per_problem: NonNegativeInt
    easy_rate: Share
    easy_per_problem: NonNegativeInt
    min_reward: float | None
    system: bool
    originals: bool


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
    """Selects samples as a pure function: the good answers of a problem with the highest reward."""
    selected: list[KeptSample] = []
    left_out: Counter[str] = Counter()
    for number in sorted(samples):
        good = _good_samples(samples[number], config, template, left_out, thinking=thinking)
        limit = config.easy_per_problem if is_easy(samples[number], config.easy_rate) else config.per_problem
        best = sorted(good, key=lambda at: (-samples[number][at].sheet.total, at))[:limit]
        left_out["over the limit of a problem"] += len(good) - len(best)
        selected += [KeptSample(problem=number, sample=at, message=good[at]) for at in sorted(best)]
    return SampleSelection(
        kept=tuple(selected), left_out={reason: count for reason, count in left_out.items() if count}
    )


def is_easy(samples: Sequence[ScoredSample], easy_rate: float) -> bool:
    """Returns whether at least a share of a problem's samples is correct, of those with a verdict."""
    judged = [sample for sample in samples if sample.sheet.is_verdict]
    correct = sum(sample.sheet.outcome == "correct" for sample in judged)
    return correct > 0 and correct >= easy_rate * len(judged)


def to_message(text: str, template: ChatTemplate, *, thinking: bool) -> ChatMessage | None:
    """Returns an answer as a message, or None if the template cannot express it.

    Special tokens in the text are by name. With `thinking`, the prompt opened thoughts, with which the text begins.
    """
    thoughts = None
    if thinking and template.thoughts is not None:
        before, mark, text = text.removeprefix(THINK).partition(END_THINK)
        if not mark:
            return None
        lead, _, tail = "".join(template.thoughts.end).partition(END_THINK)
        thoughts = before.removesuffix(lead)
        text = text.removeprefix(tail)
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


def summary(samples: Mapping[int, Sequence[ScoredSample]], selection: SampleSelection, easy_rate: float) -> str:
    """Returns lines about problems, outcomes, parts of the reward, and the selection."""
    drawn = [sample for group in samples.values() for sample in group]
    outcomes = Counter(sample.sheet.outcome for sample in drawn)
    has_verdict = any(sample.sheet.is_verdict for sample in drawn)
    solved = [any(sample.sheet.outcome == "correct" for sample in group) for group in samples.values()]
    rates = measured_rates(samples)
    easy = sum(is_easy(group, easy_rate) for group in samples.values())
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
        ("kept", f"{len(selection.kept)} of {len({sample.problem for sample in selection.kept})} problems"),
        *((f"  {reason}", str(count)) for reason, count in sorted(selection.left_out.items())),
    ]
    return "\n".join(aligned(rows, text=[0, 1]))


def measured_rates(samples: Mapping[int, Sequence[ScoredSample]]) -> PassRates:
    """Returns the pass rates of all problems that were sampled, at least one."""
    groups = [samples[number] for number in sorted(samples)]
    return compute_pass_rates(groups, [[sample.sheet for sample in group] for group in groups])


def faults(samples: Mapping[int, Sequence[ScoredSample]]) -> str | None:
    """Returns a sentence about samples without a verdict, or None if there are none."""
    drawn = [sample for group in samples.values() for sample in group]
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
