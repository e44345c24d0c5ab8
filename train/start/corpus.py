"""Builds the corpus of a run on one rank per machine, and checks it against the run."""

import os
import threading
from collections.abc import Callable

from data.corpus import DataError
from data.prepare import prepare
from data.progress import NO_PROGRESS, Progress
from data.registry import DATA_SOURCES
from data.shards.open import Prepared
from train.config import TrainConfig
from train.tasks.registry import TASKS

MOST_REPEATS = 100
"""Number of times that a run may read its corpus unless `accept` has `repeated_corpus`."""

_ROUND_SECONDS = 1.0

Exchange = Callable[["State"], "State"]
"""Joins the states of all ranks: whether all parts are over, and the first reason. All ranks call it together."""
State = tuple[bool, str]
"""Whether a rank's part of the preparation is over, and why it failed; empty if it did not."""


def prepare_corpus(config: TrainConfig, progress: Progress = NO_PROGRESS) -> Prepared:
    """Opens the run's corpus, and builds what is not in the cache."""
    prepared = prepare(config.data, config.batch.sequence_length_tokens, progress)
    task = TASKS.get(config.task.kind)
    prepared = task.extend(config, prepared)
    for name in task.values:
        if name not in prepared.train.values:
            raise DataError(
                f"data.kind: must be a source whose samples have the value {name} for task.kind={config.task.kind}, is "
                f"{config.data.source.kind} with {', '.join(prepared.train.values) or 'no values'}"
            )
    check_repeats(config, len(prepared.train.tokens_NL))
    prepared.order.check_epochs(config.batch_sizes.sequences_before(config.task.steps))
    return prepared


def check_repeats(config: TrainConfig, num_sequences: float) -> None:
    """Rejects a run that reads its `num_sequences` more than 100 times, unless that is confirmed.

    Prompts of runs that sample their answers may be read any number of times.
    """
    sizes = config.batch_sizes
    steps = config.task.steps
    most = MOST_REPEATS * num_sequences
    read = sizes.sequences_before(steps)
    if read <= most or "repeated_corpus" in config.accept or TASKS.get(config.task.kind).has_rollouts:
        return
    valid = sizes.steps_for(most)
    valid -= sizes.sequences_before(valid) > most
    tokens = num_sequences * config.batch.sequence_length_tokens
    source = config.data.source
    raise DataError(
        f"{DATA_SOURCES.get(source.kind).place(source)}: a run must read its corpus at most {MOST_REPEATS} times, "
        f"task.steps={steps} reads about {tokens:,.0f} tokens {read / num_sequences:,.0f} times; "
        f"nearest valid: {f'task.steps={valid}' if valid else 'more text'}, or accept=[repeated_corpus]"
    )


def build_together(config: TrainConfig, exchange: Exchange, progress: Progress = NO_PROGRESS) -> None:
    """Builds what the cache lacks on one rank per machine. All ranks call it; it has no time limit.

    A separate thread builds. All ranks exchange their state about once a second, so no collective takes longer than
    that, and a lost rank is detected as in any other collective.

    Raises:
        DataError: on every rank, if one of them cannot prepare the corpus.
    """
    builds = os.environ.get("LOCAL_RANK", "0") == "0"
    build = _Build(lambda: prepare_corpus(config, progress)) if builds else None
    while True:
        state = (True, "") if build is None else build.wait(_ROUND_SECONDS)
        are_all_over, problem = exchange(state)
        # Raise only after all ranks have received this state; an error since then is reported in the next round.
        if state[0] and build is not None and build.error is not None:
            raise build.error
        if problem:
            raise DataError(problem)
        if are_all_over:
            return


class _Build:
    """A thread that prepares the corpus, and the error that it raised."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.error: Exception | None = None
        self._act = act
        self._thread = threading.Thread(target=self._run, name="corpus", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> State:
        self._thread.join(seconds)
        return not self._thread.is_alive(), str(self.error) if isinstance(self.error, DataError) else ""

    def _run(self) -> None:
        try:
            self._act()
        except Exception as error:
            self.error = error
