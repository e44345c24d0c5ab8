"""A run's folder: chosen, made once, and the resolved configuration that its ranks read."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path

import yaml

from launch.config import read_config, write_config
from launch.errors import ConfigError
from train.config import TrainConfig
from train.newest import AUTO

CONFIG_NAME = "config.yaml"
_PARTIAL_NAME = f"{CONFIG_NAME}.partial"


def check_folder(config: TrainConfig) -> None:
    """Refuses an `out_dir` in which a run would overwrite something. Creates nothing.

    Raises:
        ConfigError: `out_dir` is a file, or a folder with content that is not the run that `resume` names, or any run
            for `resume=auto`.
    """
    folder = Path(config.out_dir).expanduser()
    if not config.out_dir or not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"out_dir: must be a folder, {config.out_dir!r} is a file; nearest valid: {folder}-run")
    if all(path.name == _PARTIAL_NAME for path in folder.iterdir()):
        return
    if config.resume == AUTO:
        if not (folder / CONFIG_NAME).is_file():
            raise ConfigError(
                f"out_dir: must be new, empty or a run's folder for resume=auto, {config.out_dir!r} holds files and no "
                f"{CONFIG_NAME}; choose another"
            )
        return
    resumed = Path(config.resume).expanduser().resolve() if config.resume is not None else None
    if resumed is None or not resumed.is_relative_to(folder.resolve()):
        raise ConfigError(
            f"out_dir: must be new or empty, {config.out_dir!r} holds files; choose another, "
            f"leave it out for outputs/<name>/<time>, or go on with that run by resume={config.out_dir}"
        )


def claim_folder(config: TrainConfig, now: datetime) -> TrainConfig:
    """Makes the run's folder and writes the resolved configuration into it.

    Args:
        config: checked.
        now: names the folder when `out_dir` is empty.

    Returns:
        The configuration with the folder that was made.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        return _claim(config, now)
    except OSError as error:
        place = config.out_dir or "outputs"
        raise ConfigError(f"out_dir: {place!r} must be a folder that can be written: {error}") from error


def _claim(config: TrainConfig, now: datetime) -> TrainConfig:
    if config.out_dir:
        folder = Path(config.out_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = _make_unique(Path("outputs") / config.name / now.strftime("%Y-%m-%d_%H-%M-%S"))
    config = replace(config, out_dir=str(folder))
    text = yaml.safe_dump(write_config(config), sort_keys=False, allow_unicode=True)
    # In one move: what a run before wrote stays where this cannot be written.
    (folder / _PARTIAL_NAME).write_text(text, encoding="utf-8")
    (folder / _PARTIAL_NAME).replace(folder / CONFIG_NAME)
    return config


def read_folder(folder: Path) -> TrainConfig:
    """The configuration that a run's folder was claimed with.

    Raises:
        ConfigError: as `read_config`.
    """
    return read_config(yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8")))


def _make_unique(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for candidate in _candidates(folder):
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable: candidates never end")


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder
    for number in count(2):
        yield folder.with_name(f"{folder.name}-{number}")
