"""Registries of named choices, filled by this project's modules and by plugin files. Imports no torch."""

import hashlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar
from weakref import WeakSet

T = TypeVar("T")

_PROJECT = (
    "base",
    "kernels",
    "comm",
    "data",
    "model",
    "dualpipe",
    "score",
    "infer",
    "evaluation",
    "train",
    "planner",
    "verify",
    "launch",
)
_registries: "WeakSet[Registry[Any]]" = WeakSet()


class UnknownNameError(ValueError):
    """A name that a registry does not hold; the message starts with the dotted key that selects an entry."""


class PluginError(ValueError):
    """A plugin file that cannot be loaded. The message starts with `plugins`."""


class Registry(Generic[T]):
    """Entries by name: those of `modules` in order, then others in the order of registration."""

    def __init__(self, place: str, modules: Sequence[str] = (), also: Sequence[str] = ()) -> None:
        """Creates an empty registry.

        Args:
            place: dotted configuration key that takes one of the names; errors begin with it.
            modules: modules that register this project's entries. They are imported when the registry is first used, so
                that they may import the registry's module.
            also: other values of the key, which have no entry, such as `auto`.
        """
        self.place = place
        self._also = tuple(also)
        self._modules = list(modules)
        self._is_complete = False
        self._entries: dict[str, T] = {}
        self._former: dict[str, tuple[str, T]] = {}
        self._sources: dict[str, str] = {}
        _registries.add(self)

    def __contains__(self, name: object) -> bool:
        self._complete()
        return name in self._entries or name in self._former

    def register(self, name: str, entry: T) -> T:
        """Adds an entry under a new name and returns it. Raises ValueError if the name is taken."""
        source = str(sys._getframe(1).f_globals.get("__name__"))
        if source not in self._modules:
            self._complete()
        if name in self._entries:
            holder = self._sources[name]
            raise ValueError(f"{self.place}: {name!r} is registered already, by {holder}; choose another name")
        self._entries[name] = entry
        self._sources[name] = source
        return entry

    def register_former(self, name: str, entry: T, current: str) -> None:
        """Accepts a former name with the entry that it selects now; it is valid, but not in `names`."""
        self._former[name] = (current, entry)

    def current_name(self, name: str) -> str:
        """Returns the name that replaced a former one, or the same name."""
        self._complete()
        return self._former[name][0] if name in self._former else name

    def get(self, name: str) -> T:
        """Returns the entry of a name, or raises UnknownNameError with the valid and the nearest names."""
        self._complete()
        if name in self._former:
            return self._former[name][1]
        if name not in self._entries:
            valid = ", ".join(self.choices()) or "none"
            raise UnknownNameError(f"{self.place}: must be one of {valid}, is {name!r}{_advice(name, self.choices())}")
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Returns all names in order."""
        self._complete()
        return tuple(self._entries)

    def choices(self) -> tuple[str, ...]:
        """Returns every value that the key may have: all names, then `also`, then former names."""
        return (*self.names(), *self._also, *self._former)

    def items(self) -> Iterator[tuple[str, T]]:
        """Iterates over names and entries in order."""
        self._complete()
        return iter(tuple(self._entries.items()))

    def from_plugins(self) -> tuple[str, ...]:
        """Returns the names that code outside this project registered."""
        return tuple(name for name, source in self._sources.items() if source.partition(".")[0] not in _PROJECT)

    def remove(self, names: Iterable[str]) -> None:
        """Removes entries, so that a changed plugin file can register them again."""
        for name in names:
            del self._entries[name], self._sources[name]

    def _complete(self) -> None:
        """Imports the modules that register this project's entries, once."""
        if self._is_complete:
            return
        self._is_complete = True  # set first, because the modules use the registry during their import
        for module in self._modules:
            importlib.import_module(module)
        # A module that was imported earlier must not change the order.
        order = {module: index for index, module in enumerate(self._modules)}
        names = sorted(self._entries, key=lambda name: order.get(self._sources[name], len(order)))
        self._entries = {name: self._entries[name] for name in names}


def closest(name: str, choices: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Returns at most two choices: those that begin with the name, then similar ones, ignoring case."""
    valid = list(choices)
    lower = {choice.lower(): choice for choice in reversed(valid)}
    prefixed = [choice for choice in valid if len(name) > 1 and choice.lower().startswith(name.lower())]
    alike = [lower[match] for match in get_close_matches(name.lower(), lower, n=2, cutoff=cutoff)]
    return list(dict.fromkeys([*prefixed, *alike]))[:2]


def list_modules(package: str, first: Sequence[str] = ()) -> list[str]:
    """Returns the full names of a package's modules, `first` first, without importing them."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"no package {package}"
    names = sorted(module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))
    return [f"{package}.{name}" for name in dict.fromkeys([*first, *names])]


def load_plugins(paths: Sequence[str | Path]) -> tuple[ModuleType, ...]:
    """Imports python files, absolute or relative to the working folder, that register entries.

    A loaded file is imported again only if its text has changed. Its new entries then replace the old ones, so a
    notebook can edit it. A module's name follows from its path, so that ranks agree on it. Raises PluginError if a file
    is missing, fails during its import, or registers nothing.
    """
    return tuple(_load(Path(path).expanduser().resolve()) for path in paths)


def loaded_plugins() -> tuple[Path, ...]:
    """Returns the plugin files that this process has imported, in their order."""
    modules = [module for name, module in sys.modules.items() if name.startswith("plugin_")]
    return tuple(Path(str(module.__file__)) for module in modules if "__plugin__" in module.__dict__)


@dataclass(frozen=True, slots=True)
class _Loaded:
    text: bytes
    registered: tuple[tuple[Registry[Any], str], ...]


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise PluginError(f"plugins: must be python files, {str(path)!r} does not exist{_advice(path.name, siblings)}")
    name = f"plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    text = path.read_bytes()
    module = sys.modules.get(name)
    if module is not None:
        loaded: _Loaded = module.__dict__["__plugin__"]
        if loaded.text == text:
            return module
        for registry, entry in loaded.registered:
            registry.remove([entry])
    return _import(path, name, text)


def _import(path: Path, name: str, text: bytes) -> ModuleType:
    """Runs a file as a module. If it fails, registries and the list of modules stay unchanged."""
    before = _plugin_entries()
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        # Compiled here because a cached .pyc may be older than an edit within the same second.
        exec(compile(text, path, "exec"), module.__dict__)
        registered = tuple(entry for entry in _plugin_entries() if entry not in before)
        if not registered:
            raise PluginError(
                f"plugins: {str(path)!r} registers nothing; call `register` of a registry, "
                "for example dualpipe.registry.SCHEDULES"
            )
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        for registry, entry in _plugin_entries():
            if (registry, entry) not in before:
                registry.remove([entry])
        if isinstance(error, PluginError):
            raise
        raise PluginError(f"plugins: {str(path)!r} fails{_line(error, path)}: {_summary(error)}") from error
    module.__dict__["__plugin__"] = _Loaded(text, registered)
    return module


def _plugin_entries() -> list[tuple[Registry[Any], str]]:
    return [(registry, name) for registry in _registries for name in registry.from_plugins()]


def _line(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f" at line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" at line {lines[-1]}" if lines else ""


def _summary(error: BaseException) -> str:
    words = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _advice(name: str, choices: Iterable[str]) -> str:
    near = closest(name, choices)
    return f"; did you mean {' or '.join(near)}?" if near else ""
