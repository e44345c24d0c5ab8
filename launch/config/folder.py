"""Creates, checks and locks a run's folder, and stores the resolved configuration that its ranks read."""

import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import chain, count
from pathlib import Path

import yaml

from base.files import replace_text
from base.refusal import ConfigError
from launch.config.run import read_config, write_config
from train.checkpoint.locate import AUTO
from train.config import TrainConfig
from train.files.json_lines import append_event
from train.files.run_files import is_node_folder
from train.files.run_lock import LOCK_NAME, RunLock, refuse_if_in_use

CONFIG_NAME = "config.yaml"
SCRIPT_NAME = "job.sbatch"
_LARGEST_BYTES = 2**20
_SEVERAL = re.compile(r"^run=([^\[\]{}()'\"\s]+,[^\[\]{}()'\"\s]+)$")
"""Runs with a comma between them, which Hydra's grammar takes for a sweep."""
_FILES = frozenset(
    [
        CONFIG_NAME,
        "metrics.jsonl",
        "loads.jsonl",
        "events.jsonl",
        "status.json",
        "report.html",
        "rollouts.html",
        "schedule.svg",
        "schedule.html",
        "trace.json",
        "probe.json",
        "measured.json",
        SCRIPT_NAME,
        "overrides.txt",
        "lock.json",
        "certificate.json",
        "certificate.txt",
    ]
)
_FOLDERS = frozenset(("log", "checkpoints", "profile", "rollouts", "wandb", "tensorboard", "checkpoint_check"))


def check_folder(config: TrainConfig) -> None:
    """Rejects an `out_dir` in which the run would overwrite other files. Creates nothing."""
    folder = Path(config.out_dir).expanduser()
    if not config.out_dir or not os.path.lexists(folder):
        return
    if not folder.is_dir():
        kind = "a link that leads nowhere" if folder.is_symlink() and not folder.exists() else "a file"
        raise ConfigError(f"out_dir: must be a folder, {config.out_dir!r} is {kind}; nearest valid: {folder}-run")
    refuse_if_in_use(folder)
    _check_holds(config, folder)


def _check_holds(config: TrainConfig, folder: Path) -> None:
    check_content(folder)
    if all(path.suffix == ".partial" or path.name.startswith(LOCK_NAME) for path in folder.iterdir()):
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
            f"leave it out for outputs/<name>/<time>, or continue that run with resume={config.out_dir}"
        )


@contextmanager
def locked_run_folder(config: TrainConfig, now: datetime) -> Iterator[tuple[TrainConfig, RunLock]]:
    """Creates and locks a run's folder; yields the configuration with it as `out_dir`, and the lock."""
    with _system_refusals(config):
        folder = _make(config, now)
        lock = RunLock(folder, partial(print, file=sys.stderr, flush=True))
    try:
        config = replace(config, out_dir=str(folder))
        with _system_refusals(config):
            _check_holds(config, folder)
            if lock.taken_from:
                append_event(folder, "lock_taken_over", 0, f"the lock of {lock.taken_from} was stale")
        yield write_run_folder(config, now), lock
    finally:
        lock.release()


def write_run_folder(config: TrainConfig, now: datetime) -> TrainConfig:
    """Creates the run's folder and writes the resolved configuration into it. The caller holds the lock."""
    with _system_refusals(config):
        folder = _make(config, now)
        config = replace(config, out_dir=str(folder))
        text = yaml.dump(write_config(config), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
        # Atomic replacement: if the new file cannot be written, the previous configuration stays.
        replace_text(folder / CONFIG_NAME, text)
    return config


@contextmanager
def _system_refusals(config: TrainConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = config.out_dir or "outputs"
        raise ConfigError(f"out_dir: {folder!r} must be a folder that can be written: {error}") from error


def _make(config: TrainConfig, now: datetime) -> Path:
    if config.out_dir:
        folder = Path(config.out_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path("outputs") / config.name / now.strftime("%Y-%m-%d_%H-%M-%S")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The name ends in a number if others have it already.
    for candidate in chain([folder], (folder.with_name(f"{folder.name}-{number}") for number in count(2))):
        with suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise AssertionError("unreachable: candidates never end")


def with_listed_runs(overrides: Sequence[str]) -> list[str]:
    """Returns overrides with `run=A,B` as `run=[A,B]`."""
    return [_SEVERAL.sub(r"run=[\1]", text) for text in overrides]


def read_folder(folder: Path) -> TrainConfig:
    """Returns the configuration in a run's folder, with `out_dir` set to this folder."""
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
    """YAML loader for plain values. Rejects aliases, which could expand to a billion nodes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it contains an alias (*), which runs never write")
        return super().compose_node(parent, index)


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def check_content(folder: Path) -> None:
    """Rejects a folder in which a name that a run writes is a link, a pipe or a device.

    A link to a folder of this user is accepted, because checkpoints may be on another disk.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name
        if name in _FILES or name.endswith((".partial", ".takeover")):
            _check_file(entry)
        elif name in _FOLDERS:
            is_own_link = entry.is_symlink() and entry.is_dir() and entry.stat().st_uid == os.geteuid()
            if not entry.is_dir(follow_symlinks=False) and not is_own_link:
                raise _refusal(entry, "folder")
    if (folder / "log").is_dir():
        # Large jobs have a subfolder for each node.
        for entry in sorted(os.scandir(folder / "log"), key=lambda entry: entry.name):
            is_node = is_node_folder(entry.name) and entry.is_dir(follow_symlinks=False)
            for file in os.scandir(entry) if is_node else (entry,):
                _check_file(file)


def _check_file(entry: "os.DirEntry[str]") -> None:
    if not entry.is_file(follow_symlinks=False):
        raise _refusal(entry, "file")


def _refusal(entry: "os.DirEntry[str]", wanted: str) -> ConfigError:
    mode = entry.stat(follow_symlinks=False).st_mode
    kinds = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISREG, "a file"))
    kind = next((words for is_kind, words in kinds if is_kind(mode)), "a pipe, a socket or a device")
    return ConfigError(
        f"out_dir: {entry.name} in it must be a {wanted}, {entry.path!r} is {kind}; nearest valid: remove it, or "
        f"choose another out_dir"
    )
