"""Tests of the isolation: attacks as root and as an ordinary user, interpreters in any place, limits alone."""

import json
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from score import programs, supervision
from score.programs import CodeConfig, CodeScorer
from score.sandbox import Sandbox, seccomp_filter
from score.score import ScoringError
from tests import ROOT
from tests.covering import exhaustive
from tests.score.twelve_attacks import TWELVE

pytestmark = pytest.mark.slow
# Not used by any other run of these tests at the same time: the ordinary user's, and that of root's guests.
USER, GUEST = 30000 + os.getpid() % 4096, 61184 + os.getpid() % 4096
MOUNTS = {"/mnt/python": os.path.realpath(sys.base_prefix), "/mnt/checkout": str(ROOT)}
MOUNTS["/mnt/packages"] = sysconfig.get_path("purelib")


def as_ordinary_user() -> list[str]:
    """Returns a command that runs another one as an ordinary user, who can read the interpreter and the checkout."""
    mounts = [part for place, path in MOUNTS.items() for part in ("--ro-bind", path, place)]
    user = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--inh-caps=-all"]
    return ["bwrap", "--dev-bind", "/", "/", "--tmpfs", "/mnt", *mounts, "--", *user]


def open_to_all(folder: Path) -> None:
    """Lets other users reach a folder of a test, and leaves the machine's folder for temporary files as it is."""
    for each in (folder, *folder.parents):
        if each.stat().st_mode & stat.S_ISVTX or each == Path("/"):
            return
        each.chmod(0o755)


def run_attacks(user: str, canary: Path) -> dict:
    """Runs the attacks in a process of the user, whose environment has a secret."""
    open_to_all(canary.parent)
    canary.write_text("intact")
    canary.chmod(0o666)
    prefix, python, folder = [], sys.executable, ROOT
    if user == "user":
        prefix, python, folder = as_ordinary_user(), "/mnt/python/bin/python3", "/mnt/checkout"  # type: ignore[assignment]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{folder}:/mnt/packages",
        "SECRET_OF_THE_TRAINER": "SECRET",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = str(server.getsockname()[1])
        command = [*prefix, python, "-m", "tests.score.twelve_attacks", str(canary), port]
        command += [str(GUEST)] if user == "root" else []
        where = "/" if prefix else ROOT
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=where)
        assert done.returncode == 0, (done.stdout[-500:], done.stderr[-2000:])
        with pytest.raises(BlockingIOError):
            server.accept()
    return json.loads(done.stdout)


def processes_of(uid: int) -> list[str]:
    """Returns the processes of a user, except those that only wait to be reaped by the machine."""
    found = []
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                found.append(Path(entry.path, "stat").read_text())
        except OSError:
            continue
    return found


@pytest.fixture
def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("starts processes as two users, which only root can")
    if missing := [name for name in ("bwrap", "setpriv", "unshare") if shutil.which(name) is None]:
        pytest.skip(f"{missing[0]} is not installed (apt-get install bubblewrap util-linux)")
    with pytest.raises(KeyError):
        pwd.getpwuid(USER)


@pytest.mark.parametrize("user", ["user", *exhaustive("root")])
def test_isolation_stops_twelve_attacks(needs_root: None, tmp_path: Path, user: str) -> None:
    canary = tmp_path / "canary"
    found = run_attacks(user, canary)
    assert (found["level"], found["uid"]) == ("bubblewrap", 0 if user == "root" else USER)
    assert found["honest"]["outcome"] == "correct", found["honest"]
    for attack in TWELVE:
        assert found[attack]["outcome"] in ("wrong", "timeout"), (attack, found[attack])
        assert found[attack]["cpu"] < 1, (attack, found[attack])
    assert canary.read_text() == "intact"
    assert os.listdir(tmp_path) == ["canary"]
    assert not processes_of(GUEST if user == "root" else USER)


PLACES = ["/home/somebody/.pyenv/versions/3", "/var/lib/python", "/tmp/environment/python"]
SCORE_ONE = """
import sys
from score.programs import CodeConfig, CodeScorer
limits = dict(cpu_seconds=5, wall_seconds=60, memory_mib=512, num_sandboxes=1)
scorer = CodeScorer(CodeConfig(kind="code", weight=1.0, **limits))
program = "import ssl, ctypes, decimal, sqlite3, os\\ndef f(): return os.path.exists(PLACE)"
program = program.replace("PLACE", repr(sys.base_prefix))
print(scorer.isolation, sys.base_prefix, scorer.score_program(program, "assert f() is False").outcome)
"""


@pytest.mark.covering(1)
@pytest.mark.parametrize("user", ["root", "user"])
@pytest.mark.parametrize("place", PLACES)
def test_isolation_finds_the_interpreter_in_any_place(needs_root: None, place: str, user: str) -> None:
    """Folders of users, of services and for temporary files hold interpreters of pyenv, conda and uv."""
    top = f"/{place.split('/')[1]}"
    prefix = ["bwrap", "--dev-bind", "/", "/", "--tmpfs", top, "--perms", "0700" if user == "root" else "0755"]
    prefix += ["--dir", os.path.dirname(place), "--ro-bind", MOUNTS["/mnt/python"], place]
    command = [f"{place}/bin/python3", "-c", SCORE_ONE]
    if user == "user":
        prefix += ["--chmod", "1777", "/tmp"] if top == "/tmp" else []
        command = [*as_ordinary_user(), *command]
    folder = "/mnt/checkout" if user == "user" else str(ROOT)
    packages = "/mnt/packages" if user == "user" else MOUNTS["/mnt/packages"]
    # The checkout may be in the folder that is hidden here.
    prefix += ["--ro-bind", str(ROOT), str(ROOT), "--ro-bind", MOUNTS["/mnt/packages"], MOUNTS["/mnt/packages"]]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{folder}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*prefix, *command], capture_output=True, text=True, timeout=120, env=environment, cwd="/")
    assert done.stdout.split() == ["bubblewrap", place, "correct"], (done.stdout, done.stderr[-2000:])


def test_isolation_takes_the_interpreter_of_a_virtual_environment(tmp_path: Path, sandboxed: None) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{MOUNTS['/mnt/packages']}"}
    command = [tmp_path / "venv" / "bin" / "python", "-c", SCORE_ONE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd="/")  # type: ignore[arg-type]
    assert done.stdout.split() == ["bubblewrap", MOUNTS["/mnt/python"], "correct"], (done.stdout, done.stderr[-2000:])


@pytest.fixture
def sandboxed() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")


def missing() -> Sandbox:
    raise programs._MissingError("no bubblewrap here")


def test_isolation_limits_alone_need_consent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(programs, "_build_bubblewrap", missing)
    with pytest.raises(
        ScoringError, match=r"no bubblewrap here.*apt-get install bubblewrap.*accept_risk: gen"
    ) as caught:
        programs.find_sandbox("bubblewrap")
    assert "\n" not in str(caught.value)
    sandbox = programs.find_sandbox("accept_risk")
    assert sandbox.isolation == "limits"
    assert [record.message for record in caplog.records] == [
        "programs can read and change what their user can: no bubblewrap here"
    ]


@pytest.mark.parametrize("is_seen", [True, False])
def test_isolation_limits_alone_leave_no_orphan(monkeypatch: pytest.MonkeyPatch, is_seen: bool) -> None:
    """Also not one that was never seen among the children of the program."""
    monkeypatch.setattr(programs, "_build_bubblewrap", missing)
    if not is_seen:
        monkeypatch.setattr(supervision, "_read_times", lambda pid: {})
    limits: dict[str, Any] = {"cpu_seconds": 5, "wall_seconds": 20, "memory_mib": 512, "num_sandboxes": 1}
    scorer = CodeScorer(CodeConfig(kind="code", weight=1.0, isolation="accept_risk", **limits))
    # Other test processes have sandboxes of their own: this one's orphan is known by its argument.
    argument = f"7654.{os.getpid()}"
    orphan = (
        "import os\nend, kept = os.pipe()\n"
        f"if os.fork() == 0:\n    os.setsid()\n    os.execvp('sleep', ['sleep', '{argument}'])\n"
        "os.close(kept)\nos.read(end, 1)\ndef f(x): return x * x"
    )
    # The pipe ends when `sleep` has started.
    assert scorer.score_program(orphan, "assert f(3) == 9").outcome == "correct"
    until = time.monotonic() + 10  # a killed process may wait for a processor before it ends
    while orphans := [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if argument.encode() in _read(entry)]:
        assert time.monotonic() < until, orphans
        time.sleep(0.05)


def test_isolation_limits_alone_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_build_bubblewrap", missing)
    limits: dict[str, Any] = {"cpu_seconds": 0.5, "wall_seconds": 20, "memory_mib": 512, "num_sandboxes": 1}
    scorer = CodeScorer(CodeConfig(kind="code", weight=1.0, isolation="accept_risk", **limits))
    tests = "assert f(3) == 9"
    assert scorer.score_program("def f(x): return x * x", tests).outcome == "correct"
    assert scorer.score_program("def f(x): return x", tests).outcome == "wrong"
    assert scorer.score_program("while True: pass", tests).outcome == "timeout"
    assert scorer.score_program("x = bytearray(2**30)\ndef f(x): return x * x", tests).outcome == "wrong"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_isolation_a_sandbox_that_does_not_hold_is_not_used(monkeypatch: pytest.MonkeyPatch, sandboxed: None) -> None:
    """The probe finds a file of this machine if its folder is visible, wherever the interpreter is."""
    real = programs._check
    if os.geteuid() == 0:
        monkeypatch.setattr(programs, "_as_unused_user", lambda: [])

    def check(sandbox: Sandbox) -> None:
        build = sandbox._bubblewrap
        sandbox._bubblewrap = lambda *values: [*build(*values), "--bind", "/tmp", "/tmp"]  # type: ignore[method-assign]
        real(sandbox)

    monkeypatch.setattr(programs, "_check", check)
    with pytest.raises(ScoringError, match=r"does not hold: \S+canary-\S+ can be read"):
        programs.find_sandbox()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_isolation_jumps_of_the_filter_stay_inside_it(machine: str) -> None:
    program = seccomp_filter(machine)
    assert program is not None
    count = len(program) // 8
    for at in range(count):
        code, if_true, if_false = program[8 * at], program[8 * at + 2], program[8 * at + 3]
        if code & 7 == 5:
            assert at + 1 + max(if_true, if_false) < count
    assert seccomp_filter("riscv64") is None
