"""Stores a teacher's most probable tokens for distillation: `python -m launch.score_teacher`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from base.decode import decode, encode
from base.ranges import PositiveFloat, PositiveInt
from base.refusal import ConfigError
from data.prepare import prepare
from data.shards.open import Prepared
from launch.cli.entry import command, experiment_text
from launch.config.compose import compose, own_keys, system_errors
from launch.config.run import check_data, read_config, resolve, write_config
from launch.weights.job import Device, find_weights, load_model
from train.checkpoint.sources import check_source
from train.config import TrainConfig
from train.tasks.distill import FORMAT_VERSION, ScoresMeta, ScoresWriter
from train.tasks.samples import check_samples
from train.terminal import progress_on

NAME = "score_teacher"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTeacherConfig:
    """The configuration of stored scores. `conf/score_teacher.yaml` explains the keys."""

    teacher: str
    scores: str
    kept: PositiveInt
    temperature: PositiveFloat
    dtype: Literal["float32", "bf16"]
    device: Device
    sequences: PositiveInt


def main(overrides: Sequence[str]) -> int:
    """Scores all targets of the samples. All user errors are reported before weights are read."""
    with system_errors():
        config, scores = _read(overrides)
        vocab_size = _check(config, scores)
        prepared = prepare(config.data, config.batch.sequence_length_tokens, progress_on())
        began = time.perf_counter()
        num_targets = _score(prepared, scores, vocab_size)
    print(f"{num_targets:,} targets scored in {time.perf_counter() - began:.1f} s; {scores.scores}")
    return 0


def preview(overrides: Sequence[str]) -> str:
    """Returns the configuration of the data and of the scores, checked, as YAML. Writes nothing."""
    with system_errors():
        config, scores = _read(overrides)
        _check(config, scores)
    return experiment_text(NAME, overrides, {**write_config(config), **encode(scores)})


def _read(overrides: Sequence[str]) -> tuple[TrainConfig, ScoreTeacherConfig]:
    values = compose(NAME, overrides)
    score_keys = own_keys(NAME)
    scores = decode(ScoreTeacherConfig, {key: values[key] for key in score_keys})
    run: dict[str, Any] = {key: value for key, value in values.items() if key not in score_keys}
    task = run["task"]
    if isinstance(task, Mapping) and task.get("steps") is None:
        run["task"] = {**task, "steps": 1}  # no step is made
    return read_config(resolve(run)), scores


def _check(config: TrainConfig, scores: ScoreTeacherConfig) -> int:
    check_samples(config)
    check_data(config)
    folder = Path(scores.scores).expanduser()
    if folder.exists():
        raise ConfigError(f"scores: must be a folder that does not exist, is {scores.scores!r}; choose another name")
    vocab_size = check_source(scores.teacher, "teacher", drop_mtp=True).vocab_size
    if vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"teacher: must have the vocabulary of the model, {config.model.vocab_size} tokens, {scores.teacher} has "
            f"{vocab_size}; nearest valid: a teacher with the same tokenizer, or model.vocab_size={vocab_size}"
        )
    return vocab_size


def _score(prepared: Prepared, scores: ScoreTeacherConfig, vocab_size: int) -> int:
    source = find_weights(scores.teacher, "trained", drop_mtp=True, needs_tokenizer=False)
    model = load_model(source, scores.dtype, scores.device)
    from train.tasks.distill import write_scores

    meta = ScoresMeta(
        format_version=FORMAT_VERSION,
        teacher=scores.teacher,
        fingerprint=prepared.fingerprint,
        vocab_size=vocab_size,
        kept=min(scores.kept, vocab_size),
        temperature=scores.temperature,
    )
    with ScoresWriter(Path(scores.scores).expanduser(), meta) as writer:
        return write_scores(model, prepared, meta, writer, scores.sequences, progress_on())


if __name__ == "__main__":
    sys.exit(command(NAME, main, preview))
