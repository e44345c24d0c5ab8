"""Errors of a command line: invalid overrides, and errors of the operating system."""

from collections.abc import Iterator
from contextlib import contextmanager

from dualpipe.ir import ScheduleError
from model.config import CutError
from train.config.errors import ConfigError


class SyntaxOverrideError(ConfigError):
    """An argument that is not an override. It cannot be recovered from the text at the first colon."""

    def __init__(self, argument: str, text: str) -> None:
        super().__init__(text)
        self.argument = argument


def user_errors() -> tuple[type[ValueError], ...]:
    """Returns the error types that a user can fix; they are printed as one line without a traceback."""
    from comm.watchdog.membership import JobKeyError
    from data.corpus import DataError
    from infer.config import GenerateError
    from infer.evaluate.protocol import EvaluationError
    from infer.scoring.score import ScoringError
    from model.hf.files import HfError
    from train.checkpoint.manifest import CheckpointError
    from train.files.run_lock import LockedError

    of_commands = (ConfigError, ScheduleError, DataError, CheckpointError, CutError, HfError, GenerateError)
    return (*of_commands, ScoringError, EvaluationError, LockedError, JobKeyError)


@contextmanager
def system_errors() -> Iterator[None]:
    """Turns an OSError other than a broken pipe into a user error."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        place = "output" if error.filename is None else error.filename
        raise ConfigError(f"{place}: must be readable or writable, is not ({error.strerror or error})") from error
