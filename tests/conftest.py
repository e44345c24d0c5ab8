"""Fixtures and hooks of all tests."""

import gc
import importlib
import signal
import threading
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from base.registry import PluginError, load_plugins
from tests import ROOT
from tests.covering import covering
from tests.stopping import Stop, make_folder

_STOP = pytest.StashKey[Stop]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Installs the signal handlers again, because a command that the last test called may have replaced them."""
    if _STOP in item.config.stash:
        item.config.stash[_STOP].install()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Collects without garbage collections, which took a fifth of the time of imports.

    Every second worker imports the last files first, so that in a fresh checkout each worker compiles one half.
    """
    worker: dict[str, str] = getattr(session.config, "workerinput", {"workerid": "gw0"})
    gc.disable()
    try:
        if worker["workerid"].endswith(("1", "3", "5", "7", "9")):
            import_backwards(session.config.args)
        return (yield)
    finally:
        gc.enable()


def import_backwards(arguments: Sequence[str]) -> None:
    """Imports the test files of pytest's arguments, the last one first. Collecting reports those that fail."""
    for argument in reversed(arguments):
        path = Path(argument.partition("::")[0]).resolve()
        for file in sorted(path.rglob("test_*.py") if path.is_dir() else [path], reverse=True):
            with suppress(Exception, pytest.skip.Exception):
                importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks parameters outside the covering sample `exhaustive`, and moves files with slow tests to the front."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("covering") is not None:
            cases[item.nodeid.partition("[")[0]].append(item)
    for same_test in cases.values():
        mark = same_test[0].get_closest_marker("covering")
        assert mark is not None
        parameters = [item.callspec.params for item in same_test]  # type: ignore[attr-defined]
        sample = covering(parameters, *mark.args)
        for index, item in enumerate(same_test):
            if index not in sample:
                item.add_marker(pytest.mark.exhaustive)
    # No worker should run a slow file alone at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Leaves what imports and collection made out of garbage collections, which took a sixth of the time of tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_unconfigure() -> None:
    """Leaves everything to the collections at the end, without which libraries would print that they leak."""
    gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--plugins FILE`, which may be repeated: suites over a registry also run over what the file registers."""
    parser.addoption(
        "--plugins",
        dest="plugin_files",
        action="append",
        default=[],
        metavar="FILE",
        help="python file that registers entries",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Installs the signal handlers, even for signals that background jobs and nohup ignore, and loads the plugins."""
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        is_worker = hasattr(config, "workerinput")
        if not is_worker:
            make_folder()
        config.stash[_STOP] = Stop(is_worker=is_worker)
        config.stash[_STOP].install()
    try:
        load_plugins(config.getoption("plugin_files"))
    except PluginError as error:
        raise pytest.UsageError(str(error)) from error
