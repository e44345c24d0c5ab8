"""Runs commands in order and compares what they learned: `python -m launch.workflow`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launch.config.errors import system_errors
from launch.help.command import command
from launch.help.preview import plain_text
from launch.workflows.config import WorkflowCommand, plain_values, read_workflow, workflow_commands
from launch.workflows.progress import WorkflowProgress
from launch.workflows.table import workflow_table


def main(overrides: Sequence[str]) -> int:
    """Runs the commands of a workflow that are not done, and prints a table of all parts."""
    config = read_workflow(overrides)
    with system_errors():
        lines = workflow_commands(config)
        progress = WorkflowProgress(Path(config.out_dir).expanduser())
        left = [line for line in lines if not progress.is_done(line)]
        for line in left:
            print(
                f"\n{config.workflow.name}, {lines.index(line) + 1} of {len(lines)}, {line.name}:\n{line}", flush=True
            )
            if code := _run(line, progress):
                print(f"{line.name} ended with exit code {code}; the same command continues there", file=sys.stderr)
                return code
        print("\n" + workflow_table(config, lines, progress), flush=True)
    return 0


def preview(overrides: Sequence[str]) -> str:
    """Returns the command's configuration as YAML."""
    return plain_text("workflow", plain_values(read_workflow(overrides)))


def _run(line: WorkflowCommand, progress: WorkflowProgress) -> int:
    """Runs a command and returns its exit code. Its seconds are kept if this process is interrupted."""
    began, code = time.monotonic(), -1
    process = subprocess.Popen([sys.executable, "-m", *line.arguments])
    try:
        with _terminated_with(process):
            code = process.wait()
    except KeyboardInterrupt:
        # A terminal sends Ctrl-C to both processes. The command saves what it has.
        code = process.wait()
        raise
    finally:
        progress.add(line, time.monotonic() - began, is_done=code == 0)
    return code if code >= 0 else 128 - code


@contextmanager
def _terminated_with(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Passes SIGTERM on to a command, so that it does not outlive this process."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(command("workflow", main, preview))
