"""What holds for every test."""

import signal
import threading

import pytest

from kernels.registry import PluginError, load_plugins


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
    """A run in the background of a shell inherits a Ctrl-C that is ignored, and so would commands under test."""
    is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if is_ignored and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        load_plugins(config.getoption("plugin_files"))
    except PluginError as error:
        raise pytest.UsageError(str(error)) from error
