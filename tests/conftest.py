"""Fixtures and hooks of all tests."""

import signal
import threading

import pytest

from kernels.registry import PluginError, load_plugins
from tests.stopping import Stop, make_folder

_STOP = pytest.StashKey[Stop]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Installs the signal handlers again, because a command that the last test called may have replaced them."""
    if _STOP in item.config.stash:
        item.config.stash[_STOP].install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves files with slow tests to the front, so that no worker runs a slow file alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


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
