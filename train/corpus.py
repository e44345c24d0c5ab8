"""The corpus that a run reads: built by one rank of every machine, and checked against the run."""

import os
import threading
from collections.abc import Callable

from data.corpus import DataError
from data.prepare import Prepared, prepare
from data.progress import NoProgress, Progress
from train.config import TrainConfig

_NO_PROGRESS = NoProgress()
_ROUND_SECONDS = 1.0

Exchange = Callable[["State"], list["State"]]
"""Gathers every rank's state, in rank order; all ranks call it at the same point."""
State = tuple[bool, str]
"""Whether a rank's part of the preparation is over, and why it failed, or nothing."""


def prepare_corpus(config: TrainConfig, progress: Progress = _NO_PROGRESS) -> Prepared:
    """Opens the run's corpus, building what is not in the cache.

    Raises:
        DataError: as `data.prepare.prepare`, or validation is asked for and its part fills no forward pass.
    """
    batch, validation = config.batch, config.validation
    prepared = prepare(config.data, batch.sequence_length_tokens, progress)
    found = len(prepared.validation_tokens_NL)
    # A corpus that held nothing out, as one of a single document, trains without validation.
    if found and validation.sequences and found < batch.global_sequences:
        raise DataError(
            f"validation.sequences: a validation pass reads batch.global_sequences="
            f"{batch.global_sequences} sequences, but data.validation_fraction={config.data.validation_fraction} "
            f"leaves {found} of {batch.sequence_length_tokens} tokens; nearest valid: validation.sequences=0, "
            f"or a larger data.validation_fraction"
        )
    return prepared


def build_together(config: TrainConfig, exchange: Exchange, progress: Progress = _NO_PROGRESS) -> None:
    """Builds what the cache lacks on one rank of every machine, for as long as that takes. All ranks call it.

    The building runs on a thread of its own. Meanwhile all ranks exchange their state about once a second, so that no
    collective lasts longer than that, and a lost rank is found as in any other collective.

    Args:
        config: of the run.
        exchange: short; raises on every rank if the run is to end.
        progress: of this rank's building.

    Raises:
        DataError: on every rank, if the corpus of one of them cannot be prepared.
    """
    builds = os.environ.get("LOCAL_RANK", "0") == "0"
    build = _Build(lambda: prepare_corpus(config, progress)) if builds else None
    while True:
        own = (True, "") if build is None else build.wait(_ROUND_SECONDS)
        states = exchange(own)
        # Only once all ranks have been sent that it is over: what happened since then is for the next round.
        if own[0] and build is not None and build.error is not None:
            raise build.error
        for _, problem in states:
            if problem:
                raise DataError(problem)
        if all(is_over for is_over, _ in states):
            return


class _Build:
    """A thread that prepares the corpus, and its result."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.error: Exception | None = None
        self._act = act
        self._thread = threading.Thread(target=self._run, name="corpus", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> State:
        """Waits for at most so many seconds; returns the state after that."""
        self._thread.join(seconds)
        return not self._thread.is_alive(), str(self.error) if isinstance(self.error, DataError) else ""

    def _run(self) -> None:
        try:
            self._act()
        except Exception as error:
            self.error = error
