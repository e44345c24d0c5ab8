"""Tests of track.on_end: called once with the verdict, as a command or a URL; refused before a run."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from base.refusal import ConfigError
from train.files.run_end import is_last_attempt, report_end, words_of
from train.files.run_files import StatusFile, read_status, write_end

PROGRAM = "import json, os, sys; print(json.dumps([json.load(sys.stdin), os.environ['RUN_REASON']]))"


def place_run(folder: Path) -> StatusFile:
    (folder / "log").mkdir(exist_ok=True)
    file = StatusFile(folder, is_writer=True)
    file.starting()
    return file


def test_a_command_is_called_once_in_each_attempt_with_the_verdict(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROGRAM", PROGRAM)
    target = f"{sys.executable} -c $PROGRAM"
    for code in (78, 76):
        place_run(tmp_path)
        write_end(tmp_path, "lost", code, "rank 2 is lost", [2])
        for _ in range(2):  # rank 0 and the rank that found out
            report_end(target, tmp_path)
        (line,) = capfd.readouterr().err.splitlines()
        values, reason = json.loads(line)
        assert (values["state"], values["exit_code"], values["missing_ranks"]) == ("lost", code, [2])
        assert reason == "rank 2 is lost"


def test_an_error_without_a_verdict_becomes_the_verdict_of_a_post(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        place_run(tmp_path)
        report_end(f"http://127.0.0.1:{server.server_port}/hook", tmp_path, RuntimeError("no room"))
        thread.join()
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.exit_code, status.reason) == ("stopped", 1, "RuntimeError: no room")
    (body,) = bodies
    assert body["text"] == f"{tmp_path}: stopped with exit code 1 after step 0: RuntimeError: no room"


def test_a_command_that_fails_is_one_line(tmp_path: Path) -> None:
    place_run(tmp_path).ended("done", 0)
    lines: list[str] = []
    report_end("false", tmp_path, say=lines.append)
    (line,) = lines
    assert line.startswith("track.on_end: CalledProcessError: ")


@pytest.mark.parametrize("target", ["", "no-such-command-47 x", "http://", "echo 'open", "echo $NO_SUCH_VARIABLE_47"])
def test_a_target_that_cannot_be_called_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"^track\.on_end: must "):
        words_of(target)


def test_torchrun_ends_a_run_only_after_its_last_attempt() -> None:
    assert is_last_attempt({})
    assert is_last_attempt({"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "2"})
    assert not is_last_attempt({"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "2"})
