"""Divides answers among cohorts, and forecasts the rounds of a pipelined engine. No torch here."""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from math import ceil
from typing import NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from dualpipe.ir import Placement
from infer.config import GenerateError

PROMPT_TOKENS = 8192  # maximum number of prompt tokens that are admitted together

FEW_ROWS = 32
"""Number of rows up to which one pass costs much less than two of half the rows, so that few rows are not divided."""

MAX_ROUNDS = 32  # rounds after which the ranks agree on whether to continue


@dataclass(frozen=True, kw_only=True, slots=True)
class CohortSizes:
    """Sizes of cohorts. They change no token.

    Attributes:
        cohorts: cohorts of each direction; None for 2 in flight for each rank, fewer if one would have fewer than
            `FEW_ROWS` rows, and 1 on a rank alone.
        max_rows: maximum number of continuations of a cohort.
        prefill_tokens: maximum number of tokens of a prompt in one round; a longer one is read in chunks.
    """

    cohorts: int | None = None
    max_rows: int = 64
    prefill_tokens: int = PROMPT_TOKENS

    @classmethod
    def within(cls, max_tokens: int) -> Self:
        """Returns the sizes of rounds of at most as many tokens as dispatchers are built for."""
        return cls(max_rows=min(cls().max_rows, max_tokens), prefill_tokens=min(PROMPT_TOKENS, max_tokens))

    def num_cohorts(self, placement: Placement, num_rows: int) -> int:
        """Returns the number of cohorts of a direction that continues at most `num_rows` sequences."""
        if self.cohorts is not None:
            return self.cohorts
        ranks = 1 + max(placement[0])
        # A rank alone waits for no other, so that its cohort can be as large as possible.
        most = 1 if ranks == 1 else -(-2 * ranks // len(placement))
        return max(1, min(most, -(-num_rows // min(FEW_ROWS, self.max_rows))))

    def num_rows(self, placement: Placement, num_rows: int) -> int:
        """Returns the most rows of a cohort of a direction that continues `num_rows` sequences."""
        return max(1, min(self.max_rows, -(-num_rows // self.num_cohorts(placement, num_rows))))

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise GenerateError.broken(name, "must be at least 1", value, 1)


DEFAULT_SIZES = CohortSizes()


def assign_prompt(position: int, num_data: int, num_directions: int) -> tuple[int, int]:
    """Returns the data index and the direction that continue the prompt at a position in its request."""
    share = position % (num_data * num_directions)
    return share % num_data, share // num_data


def num_rounds(longest: int) -> int:
    """Returns after how many rounds ranks agree again, given the most tokens that are left."""
    # Few different numbers, because each has its own program.
    return min(MAX_ROUNDS, 1 << (longest.bit_length() - 1)) if longest > 0 else 0


class WaitingAnswer(Protocol):
    """An answer that waits to be admitted: the number of its prompt, and the prompt."""

    index: int
    prompt: Sequence[int]


WaitingT = TypeVar("WaitingT", bound=WaitingAnswer)


def take_waiting(waiting: deque[WaitingT], free: int, max_tokens: int) -> list[WaitingT]:
    """Returns the sequences to admit next: at most `free`, with at most `max_tokens` prompt tokens."""
    taken: list[WaitingT] = []
    num_tokens = 0
    while waiting and len(taken) < free:
        is_new = not taken or taken[-1].index != waiting[0].index
        num_tokens += len(waiting[0].prompt) if is_new else 0
        if taken and num_tokens > max_tokens:
            break
        taken.append(waiting.popleft())
    return taken


def plan_reads(
    admitted: Sequence[WaitingT], read_prompts: Collection[int], max_tokens: int
) -> list[dict[WaitingT, int]]:
    """Returns the tokens of each prompt that each pass reads: short prompts together, chunks alone."""
    unread: dict[int, WaitingT] = {}
    for answer in admitted:
        if answer.index not in read_prompts:
            unread.setdefault(answer.index, answer)
    short = {answer: len(answer.prompt) for answer in unread.values() if len(answer.prompt) <= max_tokens}
    chunks = [
        {answer: min(max_tokens, len(answer.prompt) - first)}
        for answer in unread.values()
        if answer not in short
        for first in range(0, len(answer.prompt), max_tokens)
    ]
    return [short, *chunks] if short else chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredPrompt:
    """The number of tokens of a prompt and of each of its answers, and the most that an answer may have.

    `is_trained`: whether an update learns from the answers, which changes no round.
    """

    prompt: int
    answers: tuple[int, ...]
    limit: int
    is_trained: bool = True


@dataclass(slots=True, eq=False)
class _Row:
    """An answer: its limit of tokens, its passes, and the visits that choose its first and last token."""

    index: int
    prompt: Sequence[int]
    limit: int
    passes: int
    cohort: int = 0
    first: int = 0
    last: int = 0


class _Span(NamedTuple):
    """Visits of a cohort in consecutive rounds, with equal rows and tokens of prompts."""

    start: int
    length: int
    rows: int = 0
    prompt_tokens: int = 0


class _Share:
    """The cohorts of one direction of one pipeline, which share a queue of answers.

    `reads` are the visits in which a cohort reads prompts, while its rows wait.
    """

    def __init__(self, rows: Sequence[_Row], sizes: CohortSizes, max_rows: int, num_cohorts: int) -> None:
        """Runs all cohorts from event to event: an admission, or the end of answers."""
        self.rows = rows
        self.spans: list[_Span] = []
        self.num_prompts = 0
        self.reads: list[list[int]] = [[] for _ in range(num_cohorts)]
        self._sizes = sizes
        self._max_rows = max_rows
        self._waiting = deque(rows)
        # By cohort: its passes so far, and after how many each row ends.
        self._passes = [0] * num_cohorts
        self._active: list[list[tuple[int, int, _Row]]] = [[] for _ in range(num_cohorts)]
        events = [(0, cohort) for cohort in range(num_cohorts)]
        while events:
            start, cohort = heappop(events)
            end = self._run(start, cohort)
            if end > start or self._active[cohort] or self._waiting:
                heappush(events, (end, cohort))

    def _run(self, start: int, cohort: int) -> int:
        """Runs a cohort until its rows change, and returns the round of its next visit."""
        active = self._active[cohort]
        admitted = take_waiting(self._waiting, self._max_rows - len(active), self._sizes.prefill_tokens)
        if admitted:
            return self._admit(admitted, start, cohort)
        if not active:
            return start
        count = active[0][0] - self._passes[cohort]
        self._passes[cohort] += count
        self.spans.append(_Span(start, count, len(active)))
        while active and active[0][0] == self._passes[cohort]:
            heappop(active)[-1].last = start + count - 1
        return start + count

    def _admit(self, admitted: Sequence[_Row], start: int, cohort: int) -> int:
        """Reads the prompts of new rows that no row of the cohort has, and chooses the first tokens."""
        active = self._active[cohort]
        passes = plan_reads(admitted, {row.index for *_, row in active}, self._sizes.prefill_tokens)
        self.num_prompts += len({row.index for counts in passes for row in counts})
        self.spans += (_Span(start + at, 1, 0, sum(counts.values())) for at, counts in enumerate(passes))
        end = start + len(passes)
        self.reads[cohort] += range(start, end)
        for row in admitted:
            row.cohort = cohort
            row.first = row.last = end - 1
            if row.passes > 1:
                heappush(active, (self._passes[cohort] + row.passes - 1, id(row), row))
        return end


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoundForecast:
    """The rounds of a request: of all pipelines and directions together, by round.

    Attributes:
        cohorts: cohorts of each direction, of at most `max_rows` rows each.
        shares: pipelines times directions.
        visits_R: cohorts with new tokens; a cohort has at most one visit a round.
        rows_R: sequences that are continued.
        prompt_tokens_R: tokens of prompts that are read.
        num_prompts: prompts that are read; one that is admitted twice counts twice.
    """

    cohorts: int
    max_rows: int
    shares: int
    visits_R: NDArray[np.float64]
    rows_R: NDArray[np.float64]
    prompt_tokens_R: NDArray[np.float64]
    num_prompts: int

    @property
    def rounds(self) -> int:
        """Number of rounds, those included after which the last answer has ended."""
        return len(self.visits_R)

    @property
    def rows_per_visit(self) -> float:
        """Passes of sequences and of prompts for each visit, as in `Statistics`."""
        return float((self.rows_R.sum() + self.num_prompts) / max(1.0, self.visits_R.sum()))


def forecast_rounds(
    prompts: Sequence[AnsweredPrompt],
    placement: Placement,
    num_data: int,
    sizes: CohortSizes,
    tokens_per_pass: float = 1.0,
) -> RoundForecast:
    """Forecasts the rounds of `PipelinedEngine.generate`.

    Args:
        tokens_per_pass: mean tokens that a pass adds to a sequence: 1 without drafts, and then the forecast is exact.
    """
    directions = len(placement)
    most = -(-len(prompts) // (num_data * directions)) * max((len(prompt.answers) for prompt in prompts), default=0)
    cohorts = sizes.num_cohorts(placement, most)
    max_rows = sizes.num_rows(placement, most)
    rows: dict[tuple[int, int], list[_Row]] = {}
    for number, prompt in enumerate(prompts):
        rows.setdefault(assign_prompt(number, num_data, directions), []).extend(
            _Row(number, range(prompt.prompt), prompt.limit, 1 + ceil((tokens - 1) / tokens_per_pass))
            for tokens in prompt.answers
        )
    shares = [_Share(part, sizes, max_rows, cohorts) for part in rows.values()]
    rounds = _count_rounds(shares, tokens_per_pass)
    spans = [span for share in shares for span in share.spans]
    return RoundForecast(
        cohorts=cohorts,
        max_rows=max_rows,
        shares=num_data * directions,
        visits_R=_by_round(((span, 1) for span in spans), rounds),
        rows_R=_by_round(((span, span.rows) for span in spans), rounds),
        prompt_tokens_R=_by_round(((span, span.prompt_tokens) for span in spans), rounds),
        num_prompts=sum(share.num_prompts for share in shares),
    )


def _by_round(values: Iterable[tuple[_Span, float]], rounds: int) -> NDArray[np.float64]:
    """Returns the sum of the values of spans in each round."""
    changes = np.zeros(rounds + 1)
    for span, value in values:
        changes[span.start] += value
        changes[span.start + span.length] -= value
    return np.cumsum(changes)[:-1]


def _count_rounds(shares: Sequence[_Share], tokens_per_pass: float) -> int:
    """Returns the rounds that ranks run, which agree again only after some of them (`num_rounds`)."""
    reads = [cohort_reads for share in shares for cohort_reads in share.reads]
    cohorts = [number * len(share.reads) + row.cohort for number, share in enumerate(shares) for row in share.rows]
    rows = [row for share in shares for row in share.rows]
    first, last, limit = (np.array([getattr(row, key) for row in rows]) for key in ("first", "last", "limit"))
    before = np.array([bisect_right(reads[cohort], row.first) for cohort, row in zip(cohorts, rows, strict=True)])
    rounds = 0
    while (unfinished := last >= rounds).any():
        paused = np.array([bisect_left(cohort_reads, rounds) for cohort_reads in reads])[cohorts] - before
        passes = np.where(first < rounds, rounds - first - paused - 1, 0)
        tokens = np.where(first < rounds, 1 + passes * tokens_per_pass, 0)
        rounds += max(1, num_rounds(int((limit - tokens)[unfinished].max())))
    return rounds
