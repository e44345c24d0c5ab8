"""A run's folder: chosen, made once, locked, and the resolved configuration that its ranks read."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path

import yaml

from launch.config.run_config import read_config, write_config
from launch.ranks.folder_content import check_content
from train.checkpoint.locate import AUTO
from train.config import TrainConfig
from train.config.errors import ConfigError
from train.ownership.lock_file import LOCK_NAME, refuse_if_in_use
from train.ownership.run_lock import RunLock, acquire
from train.records.events import append_event

CONFIG_NAME = "config.yaml"
_LARGEST_BYTES = 2**20
_PARTIAL_NAME = f"{CONFIG_NAME}.partial"


def check_folder(config: TrainConfig) -> None:
    """Refuses an `out_dir` in which a run would overwrite something. Creates nothing.

    Raises:
        ConfigError: `out_dir` is a file, or a folder with content that is not the run that `resume` names, or any run
            for `resume=auto`; a link or a pipe stands under a name that a run writes.
        LockedError: another command on this machine uses it.
    """
    folder = Path(config.out_dir).expanduser()
    if not config.out_dir or not os.path.lexists(folder):
        return
    if not folder.is_dir():
        kind = "a link that leads nowhere" if folder.is_symlink() and not folder.exists() else "a file"
        raise ConfigError(f"out_dir: must be a folder, {config.out_dir!r} is {kind}; nearest valid: {folder}-run")
    refuse_if_in_use(folder)
    _check_holds(config, folder)


def _check_holds(config: TrainConfig, folder: Path) -> None:
    """Refuses a folder with content that the run must not touch."""
    check_content(folder)
    if all(path.name == _PARTIAL_NAME or path.name.startswith(LOCK_NAME) for path in folder.iterdir()):
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


@contextmanager
def held_folder(config: TrainConfig, now: datetime) -> Iterator[tuple[TrainConfig, RunLock]]:
    """Makes the run's folder, owns its lock meanwhile, and writes the resolved configuration into it.

    Args:
        config: checked.
        now: names the folder when `out_dir` is empty.

    Yields:
        The configuration with the folder that was made, and the lock.

    Raises:
        ConfigError: the folder cannot be made or written, or has got content since it was checked.
        LockedError: another command uses it.
    """
    with _system_refusals(config):
        folder = _make(config, now)
        lock = acquire(folder, _say)
    try:
        config = replace(config, out_dir=str(folder))
        with _system_refusals(config):
            _check_holds(config, folder)
            if lock.taken_from:
                append_event(folder, "lock_taken_over", 0, f"the lock of {lock.taken_from} was stale")
        yield claim_folder(config, now), lock
    finally:
        lock.release()


def claim_folder(config: TrainConfig, now: datetime) -> TrainConfig:
    """Makes the run's folder and writes the resolved configuration into it. Its lock is the caller's.

    Args:
        config: checked.
        now: names the folder when `out_dir` is empty.

    Returns:
        The configuration with the folder that was made.

    Raises:
        ConfigError: it cannot be made or written.
    """
    with _system_refusals(config):
        folder = _make(config, now)
        config = replace(config, out_dir=str(folder))
        text = yaml.dump(write_config(config), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
        # In one move: what a run before wrote stays where this cannot be written.
        (folder / _PARTIAL_NAME).write_text(text, encoding="utf-8")
        (folder / _PARTIAL_NAME).replace(folder / CONFIG_NAME)
    return config


@contextmanager
def _system_refusals(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = config.out_dir or "outputs"
        raise ConfigError(f"out_dir: {place!r} must be a folder that can be written: {error}") from error


def _make(config: TrainConfig, now: datetime) -> Path:
    if not config.out_dir:
        return _make_unique(Path("outputs") / config.name / now.strftime("%Y-%m-%d_%H-%M-%S"))
    folder = Path(config.out_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read_folder(folder: Path) -> TrainConfig:
    """Returns the configuration that a run's folder was claimed with. Its `out_dir` is the folder, whatever it says.

    Raises:
        ConfigError: as `read_config`; or the file is no YAML of plain values.
    """
    path = folder / CONFIG_NAME
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_BYTES:
            raise ValueError(f"it must be a file of at most {_LARGEST_BYTES} bytes")
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
        if not isinstance(values, dict):
            raise ValueError("it must hold keys and values")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: must be the configuration of a run, cannot be read: {reason}") from error
    return read_config({**values, "out_dir": str(folder)})


class _PlainLoader(yaml.SafeLoader):
    """Plain values only. What an anchor stands for may be used a billion times, and no run writes one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it holds an alias (*), which no run writes")
        return super().compose_node(parent, index)


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


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
