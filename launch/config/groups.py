"""Finds and reads YAML files of commands, groups and options, in `conf/` and next to plugin files."""

from pathlib import Path
from typing import Any

import yaml

from kernels.registry import PluginError, load_plugins, loaded_plugins
from train.config.errors import ConfigError

PLUGINS = "plugins"  # key for Python files that register schedules, dispatchers, tasks and more


def config_dir() -> Path:
    """Returns the folder `conf/` of this checkout."""
    return Path(__file__).resolve().parents[2] / "conf"


def config_dirs() -> tuple[Path, ...]:
    """Returns the folders that are searched for options: this project's, then those of plugin files."""
    plugin_dirs = (path.parent / "conf" for path in loaded_plugins())
    return (config_dir(), *dict.fromkeys(folder for folder in plugin_dirs if folder.is_dir()))


def options(group: str) -> list[str]:
    """Returns the names of a group's options, sorted."""
    return sorted({path.stem for folder in config_dirs() for path in (folder / group).glob("*.yaml")})


def option_file(group: str, option: str) -> Path:
    """Returns the file of an option, from the first folder that has it."""
    files = [folder / group / f"{option}.yaml" for folder in config_dirs()]
    return next((file for file in files if file.is_file()), files[0])


def read_option(group: str, option: str) -> dict[str, Any]:
    """Returns the values in an option's file, or an empty dict if the file does not exist."""
    file = option_file(group, option)
    values = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    return values if isinstance(values, dict) else {}


def default_groups(command: str) -> dict[str, str]:
    """Returns the groups of a command, including inherited root files, each with its default option."""
    groups: dict[str, str] = {}
    for entry in _defaults(command):
        if isinstance(entry, dict):
            groups |= {group.removeprefix("override "): option for group, option in entry.items()}
        elif entry != "_self_":
            groups |= default_groups(entry)
    return groups


def included_roots(command: str) -> list[str]:
    """Returns the names of the root YAML files whose keys a command inherits."""
    return [entry for entry in _defaults(command) if isinstance(entry, str) and entry != "_self_"]


def own_keys(command: str) -> list[str]:
    """Returns the top-level keys that a root YAML file sets itself, without groups and inherited keys."""
    return [key for key in _root(command) if key != "defaults"]


def has_plugins(command: str) -> bool:
    """Returns whether a command has the key `plugins`."""
    return any(PLUGINS in own_keys(root) for root in (command, *included_roots(command)))


def load_plugin_files(paths: object) -> None:
    """Imports plugin files. The decoder later reports a value that is no list of paths."""
    if isinstance(paths, list | tuple) and all(isinstance(path, str) for path in paths):
        try:
            load_plugins(paths)
        except PluginError as error:
            raise ConfigError(str(error)) from error


def _defaults(command: str) -> list[str | dict[str, str]]:
    return list(_root(command)["defaults"])


def _root(command: str) -> dict[str, Any]:
    values = yaml.safe_load((config_dir() / f"{command}.yaml").read_text(encoding="utf-8"))
    return {str(key): value for key, value in values.items()}
