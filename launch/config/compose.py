"""Composes YAML files and overrides of a command into plain values. The only module that uses Hydra.

YAML files of groups are in `conf/`, and next to plugin files.
"""

import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import compress
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from base.refusal import ConfigError, RuleError, UnknownKeyError, nearest, nearest_key, nearest_number
from base.registry import PluginError, load_plugins, loaded_plugins
from dualpipe.ir import ScheduleError
from model.config import CutError

# OmegaConf raises the last two for a key into a list that is no number.
_LIBRARY_ERRORS = (HydraException, OmegaConfBaseException, TypeError, ValueError)
_parsed = cache(yaml.safe_load)  # every composition asks several times for the same text

CONFIG_ONLY = "config_only"
"""Key of every command: with `true`, the command prints its configuration and does nothing else."""
DRY_RUN = "dry_run"
"""Key of `launch.train`: with `true`, the command prints a training sample with its targets and does nothing else."""

MISSING = "???"  # what a value without a default is written as

# Examples for error messages about values without a default.
_EXAMPLES = {
    "data.paths": "[FOLDER,FILE], the text to train on: .txt, .md, .py or .jsonl",
    "data.tokenizer": "PATH, a tokenizer.json or a folder that holds one, of at most model.vocab_size tokens",
}


class MissingValueError(ConfigError):
    """Keys without a default that have no value."""

    def __init__(self, keys: Sequence[str]) -> None:
        examples = " ".join(f"{key}={_EXAMPLES.get(key, '...')}" for key in keys)
        super().__init__(f"{' and '.join(keys)}: a value is needed; write {examples}")
        self.keys = keys


class SyntaxOverrideError(ConfigError):
    """An argument that is not an override. It cannot be recovered from the text at the first colon."""

    def __init__(self, argument: str, text: str) -> None:
        super().__init__(text)
        self.argument = argument


def compose(command: str, overrides: Sequence[str], unread: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Composes `conf/<command>.yaml` with the overrides: group choices and values.

    Args:
        overrides: Hydra's override grammar: `group=option`, `a.b=value`, `+a.b=value`, `~a.b`.
        unread: values for dotted keys that the command does not read, used if they have none. `*` is an item's number.
    """
    config = _checked(command, overrides).config
    if unread:
        for key in [key for key, value in _raw_keys(config).items() if value == MISSING]:
            if (pattern := re.sub(r"\.\d+\.", ".*.", key)) in unread:
                OmegaConf.update(config, key, unread[pattern])
    raw = _raw_keys(config)
    try:
        values = _string_keys(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise MissingValueError([key for key, value in raw.items() if value == MISSING]) from error
    except OmegaConfBaseException as error:
        # An override names an item of a list by its number alone.
        key = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key))
        raise ConfigError(_unresolved(key, raw)) from error
    load_plugin_files(values.get(PLUGINS))
    return values


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns plain values with overrides of single keys; raises ConfigError for one that does not apply."""
    config = OmegaConf.create(dict(values), flags={"struct": True})
    for override in map(_parse, overrides):
        try:
            _set_value(config, override)
        except _LIBRARY_ERRORS as error:
            raise ConfigError(_broken_rule(override, _raw_keys(config))) from error
    return _string_keys(OmegaConf.to_container(config))


def compose_defaults(command: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns a command's values before interpolation. A value without a default stays `???`."""
    return _string_keys(OmegaConf.to_container(_checked(command, overrides).config, resolve=False))


def chosen_options(command: str, overrides: Sequence[str]) -> dict[str, str]:
    """Returns the option of each group, chosen by the command line, an experiment or the defaults."""
    chosen = _checked(command, overrides).choices
    return {group: chosen[group] for group in default_groups(command)}


def switches(command: str) -> dict[str, str]:
    """Returns the keys with which a command prints something and starts nothing, each with what it does."""
    effects = {CONFIG_ONLY: "prints the composed, checked configuration"}
    if command == "train":
        effects[DRY_RUN] = "prints a training sample with its targets marked"
    return effects


def quoted_override(key: str, value: str) -> str:
    """Returns an override with special characters, quoted for a shell."""
    is_list = value.startswith("[") and value.endswith("]")
    items = [text.strip().replace("'", "\\'") for text in (value[1:-1].split(",") if is_list else [value])]
    quoted = ",".join(f"'{text}'" for text in items)
    inner = f"{key}=[{quoted}]" if is_list else f"{key}={quoted}"
    escaped = re.sub(r'(["$`\\])', r"\\\1", inner)
    return f'"{escaped}"'


def key_of(override: str) -> str:
    """Returns the dotted key or the group that an override sets."""
    return str(_parse(override).key_or_group)


@dataclass(frozen=True, slots=True)
class _Composed:
    """Values of a command before interpolation, and the option of every group."""

    config: DictConfig
    choices: Mapping[str, str]


def _checked(command: str, overrides: Sequence[str]) -> _Composed:
    """Composes the configuration and replaces Hydra's errors with this project's messages."""
    groups = default_groups(command)
    parsed = [_parse(text) for text in overrides]
    if has_plugins(command):
        # Plugin files of the command line or its experiment can add options to groups.
        for override in parsed:
            if override.key_or_group == "experiment":
                load_plugin_files(read_option("experiment", override.get_value_string()).get(PLUGINS))
            elif override.key_or_group == PLUGINS:
                load_plugin_files(override.value())
    for override in parsed:
        _check_override(command, override, groups)
    try:
        return _compose(command, parsed)
    except _LIBRARY_ERRORS as error:
        _raise_unknown_key(command, groups, parsed)
        raise ConfigError(_inapplicable(command, groups, parsed)) from error


def _string_keys(values: object) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _compose(command: str, overrides: Sequence[Override]) -> _Composed:
    """Composes as Hydra does, but the same options only once, because that takes most of the time."""
    folders = config_dirs()
    is_choice = [any((folder / override.key_or_group).is_dir() for folder in folders) for override in overrides]
    choices = tuple(override.input_line or "" for override in compress(overrides, is_choice))
    options_alone = _compose_options(command, choices, folders, _stamps())
    config = deepcopy(options_alone.config)
    for override, has_option in zip(overrides, is_choice, strict=True):
        if not has_option:
            _set_value(config, override)
    return replace(options_alone, config=config)


def _stamps() -> Hashable:
    """Returns path, size and time of every file that can be composed, so that edits are noticed."""
    files = (file for folder in config_dirs() for file in folder.rglob("*.yaml"))
    return tuple((str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in files)


@lru_cache(maxsize=64)
def _compose_options(command: str, choices: tuple[str, ...], folders: tuple[Path, ...], stamps: Hashable) -> _Composed:
    """Composes options without further values. `stamps` makes an edited file be read again."""
    first, *others = folders
    paths = ",".join(f"'file://{folder}'" for folder in others)
    search = [f"hydra.searchpath=[{paths}]"] if others else []
    with initialize_config_dir(str(first), version_base="1.3", job_name=command), _fast_yaml():
        config = hydra_compose(command, [*search, *choices], return_hydra_config=True)
    chosen = {group: str(option) for group, option in config.hydra.runtime.choices.items()}
    with open_dict(config):
        del config["hydra"]
    return _Composed(config, chosen)


@contextmanager
def _fast_yaml() -> Iterator[None]:
    """Lets OmegaConf's loader, which derives from `yaml.SafeLoader`, parse with libyaml if installed."""
    names = vars(yaml)
    slow = names["SafeLoader"]
    names["SafeLoader"] = names.get("CSafeLoader", slow)
    try:
        yield
    finally:
        names["SafeLoader"] = slow


def _set_value(config: DictConfig, override: Override) -> None:
    """Applies an override as Hydra does: without `+`, its key must exist, and with one `+`, it must not."""
    key = override.key_or_group
    value = override.value()
    current = OmegaConf.select(config, key) if override.is_delete() or override.is_add() else None
    if override.is_delete():
        if current is None or value not in (None, current):
            raise ConfigKeyError(key)
        parent, _, name = key.rpartition(".")
        with open_dict(config):
            del (OmegaConf.select(config, parent) if parent else config)[name]
    elif current is not None and not isinstance(value, dict | list):
        raise ConfigKeyError(key)
    else:
        is_new = override.is_add() or override.is_force_add()
        OmegaConf.update(config, key, value, merge=True, force_add=is_new)


def _parse(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
        if not override.key_or_group:
            raise HydraException("no key")
        return override
    except HydraException as error:
        key, has_value, value = text.partition("=")
        raise SyntaxOverrideError(
            text,
            f"{text}: is not an override; write name=value, a list as name=[a,b], and quote text that holds any of "
            f",=:{{}}[]() like {quoted_override(key, value) if key and has_value else quoted_override('name', 'a,b')}",
        ) from error


def _one_value(command: str, key: str, sweep: str) -> str:
    """Returns the end of an error about several values: what one value looks like, by the default's type."""
    default = known_keys(command).get(key)
    first = sweep.partition(",")[0]
    if isinstance(default, list):
        return f"nearest valid: {key}=[{sweep}]"
    if first in options(key):
        return f"nearest valid: {key}={first}"
    is_number = isinstance(default, int | float) and nearest_number(first, key)
    text = f"a list is {key}=[a,b], and text is quoted: {quoted_override(key, sweep)}"
    return nearest_number(sweep, key) or is_number or text


def _check_override(command: str, override: Override, groups: Mapping[str, str]) -> None:
    key = override.key_or_group
    if override.is_sweep_override():
        sweep = override.get_value_string()
        raise ConfigError(f"{key}: one run takes one value, is {sweep}; {_one_value(command, key, sweep)}")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise ConfigError(f"{key}: Hydra's own settings have no effect here; leave it out")
    if override.package is not None:
        raise ConfigError(f"{key}@{override.package}: packages cannot be renamed; write {key}=option")
    if key not in groups:
        _check_not_nested_group(override, groups)
        return
    names = options(key)
    if override.is_add() or override.is_force_add() or override.is_delete():
        choices = ", ".join(names)
        raise ConfigError(f"{override.input_line}: a group has one option; write {key}=option with one of {choices}")
    value = override.value()
    if not isinstance(value, str) or value not in names:
        text = override.get_value_string()
        near = nearest(text, names)
        others = "" if near.startswith("valid") else f" (options: {', '.join(names)})"
        raise ConfigError(f"{key}: no option {text or 'without a name'}; {near}{others}")


def _check_not_nested_group(override: Override, groups: Mapping[str, str]) -> None:
    """Rejects a value for a nested group, as in `optim.schedule=wsd`, which would replace its keys."""
    key = override.key_or_group
    group = key.replace(".", "/")
    if group in groups:
        text = override.get_value_string()
        names = options(group)
        hint = f"write {group}={text}" if text in names else nearest(text, names)
        raise ConfigError(f"{key}: is a group of keys; {hint} (options: {', '.join(names)})")


def _raise_unknown_key(command: str, groups: Mapping[str, str], parsed: Sequence[Override]) -> None:
    """Raises an error for the first override of an unknown key, with the nearest key that exists."""
    choices = [override.input_line or "" for override in parsed if override.key_or_group in groups]
    try:
        valid_keys = known_keys(command, tuple(choices))
    except _LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{' '.join(choices) or command}: files of conf/ must compose, do not: {reason}") from error
    keys = [*valid_keys, *(group for group in groups if group not in valid_keys), *switches(command)]
    for override in parsed:
        key = override.key_or_group
        _check_parents(key, valid_keys, groups)
        if override.is_add() and key in valid_keys:
            line = (override.input_line or "").lstrip("+")
            raise ConfigError(f"+{key}: exists already, + adds a key that does not; nearest valid: {line}")
        if key in groups or override.is_add() or override.is_force_add() or key in keys:
            continue
        elsewhere = _other_options(key)
        # The keys of a model with a kind follow from that.
        if elsewhere and key.startswith("model.") and "model.kind" in valid_keys:
            raise ConfigError(f"{key}: not among the keys of this model; to change it write +{override.input_line}")
        if elsewhere:
            raise UnknownKeyError(f"{key}: unknown key here; it comes with {elsewhere}")
        if key.lower() in keys:
            raise ConfigError(f"{key}: unknown key, keys are lower case; nearest valid: {_lower(override, groups)}")
        raise UnknownKeyError(f"{key}: unknown key; {nearest_key(key, keys)}")


def _check_parents(key: str, known: Mapping[str, Any], groups: Mapping[str, str]) -> None:
    """Rejects a key into a list without an item's number, into a null group, or into a single value."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if isinstance(known.get(parent), list) and f"{parent}.{parts[depth]}" not in known:
            items = [name for name in known if name.startswith(f"{parent}.")]
            near = nearest_key(f"{parent}.0.{'.'.join(parts[depth:])}", items) if items else f"write {parent}=[...]"
            rule = f"{parent} is a list, whose items are named by their numbers from 0"
            raise ConfigError(f"{key}: {rule}, is {parts[depth]}; {near}")
        if known.get(parent, {}) is None and parent in groups:
            choices = ", ".join(f"{parent}={name}" for name in options(parent) if name != "none")
            raise ConfigError(f"{key}: needs {parent}, which is null; nearest valid: {choices}")
        if not isinstance(known.get(parent, {}), dict | list):
            raise ConfigError(f"{key}: unknown key, as {parent} is one value; nearest valid: {parent}=VALUE")


def _inapplicable(command: str, groups: Mapping[str, str], parsed: Sequence[Override]) -> str:
    """Returns what is wrong with the first override that cannot be applied after those before it."""
    applied = [override for override in parsed if override.key_or_group in groups]
    for override in parsed:
        if override.key_or_group in groups:
            continue
        valid_keys = _raw_keys(_compose(command, applied).config)
        applied.append(override)
        try:
            _compose(command, applied)
        except _LIBRARY_ERRORS:
            return _broken_rule(override, valid_keys)
    return f"{command}: the overrides must compose, do not: {' '.join(text.input_line or '' for text in applied)}"


def _broken_rule(override: Override, known: Mapping[str, Any]) -> str:
    """Returns the error of an override that cannot be applied to values with these dotted keys."""
    key = override.key_or_group
    text = (override.input_line or "").partition("=")[2]
    present = json.dumps(known.get(key)).replace('"', "").replace(" ", "").replace(MISSING, "...")
    if override.is_delete() and key in known:
        rule = "must name a key with a value to delete, and that value or none"
        return f"{override.input_line}: {rule}, is {text or present}; nearest valid: {key}={present}"
    if key not in known and not override.is_add():
        return (
            f"{key}: must be a key that exists, is none after the overrides before it; {nearest_key(key, list(known))}"
        )
    if "${" in text:
        return f"{key}: must close what it opens with ${{, is {text}; nearest valid: {key}=${{name}}"
    if isinstance(known.get(key), dict):
        inner = next((name for name in known if name.startswith(f"{key}.")), f"{key}.KEY")
        return f"{key}: must hold keys and values, is {text}; nearest valid: {inner}=..."
    return f"{key}: must be a value that fits here, is {text}; nearest valid: {key}={present}"


_REFERENCE = re.compile(r"\$\{([\w./]+)(?:\[\d+\])*\}")
"""Reference to the value of a key, perhaps to an item of it."""


def _unresolved(key: str, known: Mapping[str, Any]) -> str:
    """Returns the error of a value that refers, perhaps over others, to a value that does not exist."""
    text = known.get(key)
    # The key may be one on the way to another value that cannot be resolved.
    for place, value in {key: text, **known}.items():
        for name in _REFERENCE.findall(value) if isinstance(value, str) else ():
            parents = (name[: dot.start()] for dot in re.finditer(r"\.", name))
            if (parent := next((each for each in parents if known.get(each, "") is None), None)) is not None:
                choices = _other_options(name) or f"{parent}=VALUE"
                return f"{parent}: must have values, because {place} has ${{{name}}}, is null; nearest valid: {choices}"
    for name in _REFERENCE.findall(str(text)):
        if name not in known:
            return f"{key}: must refer to a key that exists, is {text}; {nearest_key(name, list(known))}"
        if "${" in str(known[name]):
            return _unresolved(name, {**known, key: "itself"})
    return f"{key}: must refer to a value that exists, is {text}; nearest valid: {key}=VALUE"


def _lower(override: Override, groups: Mapping[str, str]) -> str:
    """Returns an override with its key in lower case, and its value too if that is an option of a group."""
    key = override.key_or_group.lower()
    value = override.get_value_string()
    is_option = key in groups and value.lower() in options(key)
    return f"{key}={value.lower() if is_option else value}"


def _other_options(key: str) -> str:
    """Returns the options that have the key, of the innermost such group that the key names."""
    parts = key.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        group = "/".join(parts[:depth])
        rest = ".".join(parts[depth:])
        matches = [option for option in options(group) if rest in dict(dotted_keys(read_option(group, option)))]
        if matches:
            return ", ".join(f"{group}={option}" for option in matches)
    return ""


def dotted_keys(values: object, prefix: str = "", *, has_items: bool = False) -> Iterable[tuple[str, Any]]:
    """Yields every dotted key of nested dicts with its value; a dict precedes the keys inside it."""
    items = enumerate(values) if has_items and isinstance(values, list) else ()
    for key, value in values.items() if isinstance(values, dict) else items:
        yield f"{prefix}{key}", value
        yield from dotted_keys(value, f"{prefix}{key}.", has_items=has_items)


def known_keys(command: str, choices: Sequence[str] = ()) -> Mapping[str, Any]:
    """Returns every dotted key of a command with its value."""
    return _known_keys(command, tuple(choices), config_dirs())


@cache
def _known_keys(command: str, choices: tuple[str, ...], folders: tuple[Path, ...]) -> Mapping[str, Any]:
    """Returns the keys, given also the folders in which options were searched."""
    return _raw_keys(_compose(command, [_parse(text) for text in choices]).config)


def _raw_keys(config: DictConfig) -> dict[str, Any]:
    """Returns every dotted key, also those of items of lists, with its value before interpolation."""
    return dict(dotted_keys(OmegaConf.to_container(config, resolve=False), has_items=True))


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
    """Returns the names of the root YAML files from which a command inherits keys."""
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
    values = _parsed((config_dir() / f"{command}.yaml").read_text(encoding="utf-8"))
    return {str(key): value for key, value in values.items()}


def user_errors() -> tuple[type[ValueError], ...]:
    """Returns the error types that a user can fix; they are printed as one line without a traceback."""
    from comm.watchdog.membership import JobKeyError
    from model.hf.files import HfError
    from train.checkpoint.manifest import CheckpointError
    from train.files.run_lock import LockedError

    return (RuleError, ScheduleError, CheckpointError, CutError, HfError, LockedError, JobKeyError)


@contextmanager
def system_errors() -> Iterator[None]:
    """Turns an OSError other than a broken pipe into a user error."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        path = "output" if error.filename is None else error.filename
        raise ConfigError(f"{path}: must be readable or writable, is not ({error.strerror or error})") from error
