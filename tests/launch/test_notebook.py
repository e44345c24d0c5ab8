"""Tests of notebooks: this project's packages and Jupyter's `comm` work in one real kernel."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.convert import main as convert
from tests import ROOT
from tests.commands import run_python
from tests.docs.pages import blocks
from tests.launch.checkpoints import write_run

jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel_launcher")
MAIN = '__name__ == "__main__"'
COMMANDS = [path for path in sorted((ROOT / "launch").glob("*.py")) if MAIN in path.read_text()]

IMPORTS = """
import sys
assert "comm" in sys.modules, "the kernel has imported its own before"
import model.size, infer.config, launch.config.compose, dualpipe.ir, data.tokenizer, train.checkpoint.manifest
import comm.protocol, comm.exits
from comm.layout import Layout
print(comm.exits.EXIT_LOST, launch.config.compose.options("model")[:1])
"""
WIDGET = """
import comm
from comm.base_comm import BaseComm
made = comm.create_comm(target_name="a.widget", data={"value": 1})
made.send({"value": 2})
print(type(made).__module__, isinstance(made, BaseComm), made.comm_id in comm.get_comm_manager().comms)
made.close()
"""


FAILING_CALLBACK = """
import os, signal
from pathlib import Path
from train.errors import CallbackError
from train.files.run_files import read_status
handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
try:
    train(config, Callbacks(on_step=lambda record: [][1]))
except CallbackError as error:
    ended = read_status(max(Path("outputs/run").iterdir(), key=lambda run: run.stat().st_mtime))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    print(error, type(error.__cause__).__name__, ended.state, ended.exit_code, "RANK" * ("RANK" not in os.environ))
"""


class Kernel:
    def __init__(self, client: "jupyter_client.BlockingKernelClient") -> None:  # type: ignore[name-defined]
        self._client = client
        self.comm_messages: list[str] = []

    def run(self, code: str) -> str:
        """Runs a cell and returns its output. Fails with the cell's traceback."""
        request, printed = self._client.execute(code), ""
        while True:
            message = self._client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "error":
                pytest.fail("\n".join(content["traceback"]))
            if kind.startswith("comm_"):
                self.comm_messages.append(kind)
            if kind == "stream" and content["name"] == "stdout":
                printed += content["text"]
            if kind == "status" and content["execution_state"] == "idle":
                return printed


@contextmanager
def kernel(folder: Path) -> Iterator[Kernel]:
    """Starts a kernel in a folder, as a notebook would."""
    manager = jupyter_client.KernelManager()
    manager.kernel_spec.argv[:] = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    manager.start_kernel(cwd=str(folder), env=environment)
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=120)
        yield Kernel(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_kernel_in_the_checkout_imports_every_package_and_keeps_its_own_comm() -> None:
    with kernel(ROOT) as notebook:
        assert notebook.run(IMPORTS).startswith("78 [")
        assert notebook.run(WIDGET) == "ipykernel.comm.comm True True\n"
        assert notebook.comm_messages == ["comm_open", "comm_msg", "comm_close"]


@pytest.mark.long
def test_kernel_elsewhere_runs_the_python_of_the_documentation(tmp_path: Path) -> None:
    """The checkout is on the path; the working folder is another one, with the weights that docs/generate.md names."""
    write_run(tmp_path / "run")
    convert(["from=checkpoint", f"path={tmp_path / 'run'}", f"to={tmp_path / 'quickstart_hf'}"])
    shown = [each for each in blocks(ROOT / "docs/generate.md") if each.language == "python" and each.mode != "not run"]
    assert shown
    with kernel(tmp_path) as notebook:
        notebook.run(f"import sys; sys.path.append({str(ROOT)!r})")
        printed = [notebook.run(block.text) for block in shown]
        assert notebook.run(WIDGET) == "ipykernel.comm.comm True True\n"
    assert [bool(each) for each in printed] == ["print(" in block.text for block in shown]
    assert (tmp_path / "copy_hf" / "config.json").is_file()


@pytest.mark.long
def test_kernel_trains_again_and_again_with_the_lines_of_the_documentation(tmp_path: Path) -> None:
    """A callback fails before the second run; the kernel continues as if there had been no run."""
    shown = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.M | re.S)
    (block,) = (block for block in shown if "Callbacks(" in block)
    with kernel(tmp_path) as notebook:
        notebook.run(f"import sys; sys.path.append({str(ROOT)!r})")
        first = notebook.run(block)
        failed = notebook.run(FAILING_CALLBACK)
        again = notebook.run(block)
        assert notebook.run(WIDGET) == "ipykernel.comm.comm True True\n"
    last = [re.sub(r"folder.*", "", printed.splitlines()[-1]) for printed in (first, again)]
    assert last[0] == last[1]
    assert re.fullmatch(r"loss [\d.]+ -> [\d.]+, held-out [\d.]+ nats per token, ", last[0])
    assert failed.splitlines()[-1] == "on_step: IndexError: list index out of range IndexError stopped 1 RANK"


def test_command_that_is_started_as_a_file_says_how_to_start_it(tmp_path: Path) -> None:
    assert len(COMMANDS) >= 6
    places = [(ROOT, path, f"launch/{path.name}") for path in COMMANDS]
    for folder, path, place in [*places, (tmp_path, COMMANDS[-1], str(COMMANDS[-1]))]:
        done = run_python(place, "a=1", cwd=folder, changes={"PYTHONPATH": ""})
        there = "" if folder == ROOT else f"cd {ROOT} && "
        name = "launch" if path.stem == "__main__" else f"launch.{path.stem}"
        advice = f"write {there}python -m {name} ...\n"
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: {place}: must be started as a module; {advice}"
