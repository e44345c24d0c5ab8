"""Tests of Ctrl-C at any moment: one line, exit code 130, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comm.preemption import SIGNALS, handled_signals
from tests.launch.test_local import members, wait_for

ROOT = Path(__file__).parents[2]


def restore_interrupt() -> None:
    """A test run in the background of a shell inherits a Ctrl-C that is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """Starts a command in its own session and waits until it imports the project."""
    process = subprocess.Popen(
        [sys.executable, "-v", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=restore_interrupt, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("import 'launch'"):
            break
    return process


@pytest.mark.parametrize(
    ("name", "delays"),
    [("train", (0.0, 0.1, 0.4, 0.9, 1.6)), ("generate", (0.0, 0.3)), ("convert", (0.2,)), ("submit", (0.5,))],
)
def test_interrupt_while_a_command_is_imported_is_one_line(
    name: str, delays: tuple[float, ...], tmp_path: Path
) -> None:
    for delay in delays:
        process = start(["-m", f"launch.{name}", f"out_dir={tmp_path / 'run'}", "no_such_key=1"], tmp_path)
        time.sleep(delay)
        if process.poll() is not None:
            continue  # refused already: a fast machine
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (2, 130), err
        # Among the lines of python -v, which are written by pieces.
        assert "Traceback" not in err, err
        assert err.count("interrupted\n") == (process.returncode == 130), err
        assert wait_for(lambda: not members(process.pid), 20), members(process.pid)  # noqa: B023
    assert not (tmp_path / "run").exists()


def test_interrupt_that_a_library_answers_with_its_own_error_is_one_line() -> None:
    script = "import os, signal, time\nfrom launch.help.command import command\nimport sys\n"
    script += "def main(arguments):\n    try:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(5)\n"
    script += "    except KeyboardInterrupt as error:\n        raise ImportError('half a module') from error\n"
    script += "sys.exit(command('train', main))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, preexec_fn=restore_interrupt
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_second_interrupt_at_once_leaves_the_cleaning_up_alone() -> None:
    script = "import os, signal, sys, time\nfrom launch.help.command import command\ndef main(arguments):\n    try:\n"
    script += "        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(5)\n    finally:\n"
    script += "        os.kill(os.getpid(), signal.SIGINT)\n        print('cleaned up')\n"
    script += "sys.exit(command('train', main))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, preexec_fn=restore_interrupt
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "interrupted\n")


def test_import_of_the_package_changes_no_handler() -> None:
    code = "import signal, launch, launch.help.command; print(signal.getsignal(signal.SIGINT).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=restore_interrupt
    )
    assert done.stdout == "default_int_handler\n"


def test_closed_terminal_is_a_request_unless_it_is_ignored_as_under_nohup() -> None:
    assert handled_signals() == SIGNALS
    assert signal.SIGHUP in SIGNALS
    code = "import signal; from comm.preemption import Preemption; made = Preemption.of_process(); "
    code += "import os; os.kill(os.getpid(), signal.SIGHUP); print(made.is_requested)"
    for ignore, expected in ((False, "True\n"), (True, "False\n")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
            preexec_fn=(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignore else None,
        )  # fmt: skip
        assert done.stdout == expected, done.stderr
