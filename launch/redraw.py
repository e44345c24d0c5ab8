"""Draws a run's report again, or compares several runs: `python -m launch.redraw`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from base.decode import decode, encode
from base.refusal import ConfigError
from launch.cli.entry import command, preview_of
from launch.config.compose import compose, system_errors
from launch.config.folder import CONFIG_NAME, read_folder, with_listed_runs
from train.config import TrainConfig

_MOST_RUNS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class RedrawConfig:
    """Configuration of the command; see `conf/redraw.yaml`."""

    run: tuple[str, ...]
    plugins: tuple[str, ...]


def main(overrides: Sequence[str]) -> int:
    """Draws the report of one run, or one page that compares several, and prints its path."""
    chosen = _decode(overrides)
    with system_errors():
        configs = [_read_run(run) for run in chosen.run]
        from train.report.page import Report, compare

        print(Report(configs[0]).write() if len(configs) == 1 else compare(configs))
    return 0


def read_request(overrides: Sequence[str]) -> RedrawConfig:
    """Decodes the configuration, whose runs need not exist yet.

    `run=A`, `run=[A,B]` and `run=A,B` are all lists of folders.
    """
    values = compose("redraw", with_listed_runs(overrides))
    runs = values["run"]
    chosen = decode(RedrawConfig, {**values, "run": runs if isinstance(runs, list) else [runs]})
    if not 1 <= len(chosen.run) <= _MOST_RUNS:
        raise ConfigError(f"run: must be one to {_MOST_RUNS} folders, is {len(chosen.run)} of them")
    return chosen


def _decode(overrides: Sequence[str]) -> RedrawConfig:
    chosen = read_request(overrides)
    with system_errors():
        for run in chosen.run:
            if not (Path(run).expanduser() / CONFIG_NAME).is_file():
                raise ConfigError(f"run: must be a run's folder, {run!r} holds no {CONFIG_NAME}")
    return chosen


def _read_run(run: str) -> TrainConfig:
    folder = Path(run).expanduser()
    return replace(read_folder(folder), out_dir=str(folder))


def _to_plain(config: RedrawConfig) -> dict[str, Any]:
    return {**encode(config), "run": config.run[0] if len(config.run) == 1 else [*config.run]}


preview = preview_of("redraw", _decode, to_plain=_to_plain)

if __name__ == "__main__":
    sys.exit(command("redraw", main, preview))
