"""Splits a source's problems into training part and held-out part. Imports no torch."""

from data.config import DataConfig, with_parts
from data.corpus import DataError
from data.problems.records import ProblemRecord
from data.registry import DATA_SOURCES


def split_problems(config: DataConfig) -> tuple[list[ProblemRecord], list[ProblemRecord]]:
    """Returns the problems to train on, and those that are held out, each in the source's order.

    A problem is held out exactly if its sample is. Raises DataError if the source has no problems, cannot be read, or
    the training part would be empty.
    """
    entry = DATA_SOURCES.get(config.source.kind)
    if entry.problems is None:
        valid = [name for name, each in DATA_SOURCES.items() if each.problems is not None]
        raise DataError(
            f"data.kind: must be a source with problems, is {config.source.kind}; nearest valid: {', '.join(valid)}"
        )
    train: list[ProblemRecord] = []
    held_out: list[ProblemRecord] = []
    for part, record in with_parts(config, entry.problems):
        (train if part == "train" else held_out).append(record)
    if not train:
        raise DataError(
            f"data.validation_fraction: {config.validation_fraction} of {len(held_out)} problems, selected by hash "
            f"with data.seed {config.seed}, leaves none to train on; nearest: a smaller fraction, or more problems"
        )
    return train, held_out
