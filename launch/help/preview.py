"""Formats the output of `config_only=true`: the composed and checked configuration as reusable YAML."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from launch.config.compose import CONFIG_ONLY, chosen_options
from train.config.errors import ConfigError


def split_switch(arguments: Sequence[str], name: str = CONFIG_ONLY) -> tuple[list[str], bool]:
    """Returns the arguments without a switch, and its value."""
    rest, is_on = [], False
    for argument in arguments:
        key, has_value, value = argument.lstrip("+").partition("=")
        if key != name or not has_value:
            rest.append(argument)
        elif value.lower() in ("true", "false"):
            is_on = value.lower() == "true"
        else:
            raise ConfigError(f"{name}: must be true or false, is {value!r}; nearest valid: {name}=true")
    return rest, is_on


def plain_text(command: str, values: Mapping[str, Any]) -> str:
    """Returns the YAML of a command that has no groups, from its checked values."""
    return f"# python -m launch.{command}\n{_dump(values)}"


def experiment_text(
    command: str, overrides: Sequence[str], values: Mapping[str, Any], comments: Sequence[str] = ()
) -> str:
    """Returns a file for `conf/experiment/`: comments, the chosen options and all values."""
    options = {group: option for group, option in chosen_options(command, overrides).items() if group != "experiment"}
    lines = [
        "# @package _global_",
        f"# As conf/experiment/NAME.yaml: python -m launch.{command} experiment=NAME",
        *(f"# {line}".rstrip() for line in comments),
        "defaults:",
        *(f"  - override /{group}: {option}" for group, option in options.items()),
        "",
    ]
    return "\n".join(lines) + f"\n{_dump(values)}"


def _dump(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)
    return text
