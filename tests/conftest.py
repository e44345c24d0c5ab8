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
    """Restores signals that background jobs and nohup ignore, as commands under test would; then loads the plugins."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, handler)
    try:
        load_plugins(config.getoption("plugin_files"))
    except PluginError as error:
        raise pytest.UsageError(str(error)) from error
