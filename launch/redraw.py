"""Draws the report of a run again from the files in its folder: `python -m launch.redraw`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.command import command
from launch.config.compose import compose
from launch.config.errors import system_errors
from launch.help.preview import plain_text
from launch.ranks.run_folder import CONFIG_NAME, read_folder
from train.config.decode import decode, encode
from train.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RedrawConfig:
    """Configuration of the command; see `conf/redraw.yaml`."""

    run: str
    plugins: tuple[str, ...]


def main(overrides: Sequence[str]) -> int:
    """Draws the report and prints its path.

    Args:
        overrides: overrides for `conf/redraw.yaml`.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: `run` is not a run's folder, or the folder cannot be read or written.
    """
    chosen = decode(RedrawConfig, compose("redraw", overrides))
    folder = Path(chosen.run).expanduser()
    with system_errors():
        if not (folder / CONFIG_NAME).is_file():
            raise ConfigError(f"run: must be a run's folder, {chosen.run!r} holds no {CONFIG_NAME}")
        config = replace(read_folder(folder), out_dir=str(folder))
        from train.report.write import Report

        print(Report(config).write())
    return 0


def preview(overrides: Sequence[str]) -> str:
    """Returns the command's configuration as YAML.

    Args:
        overrides: overrides for `conf/redraw.yaml`.

    Raises:
        ConfigError: as `main`.
    """
    return plain_text("redraw", encode(decode(RedrawConfig, compose("redraw", overrides))))


if __name__ == "__main__":
    sys.exit(command("redraw", main, preview))
