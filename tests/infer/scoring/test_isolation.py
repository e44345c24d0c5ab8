"""Tests of the levels of isolation: twelve attacks as root and as an ordinary user, and the order of the levels."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from infer.scoring.code import find
from infer.scoring.code.confined import ConfinedSandbox
from infer.scoring.code.sandbox import Isolation, Sandbox
from infer.scoring.code.seccomp import seccomp_filter
from infer.scoring.score import ScoringError
from tests.infer.scoring.twelve_attacks import TWELVE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
# Not used by any other run of these tests at the same time: the ordinary user's, and that of root's guests.
USER, GUEST = 30000 + os.getpid() % 4096, 61184 + os.getpid() % 4096
MOUNTS = {"/mnt/python": os.path.realpath(sys.base_prefix), "/mnt/checkout": str(ROOT)}
MOUNTS["/mnt/packages"] = sysconfig.get_path("purelib")


def as_ordinary_user() -> list[str]:
    """Returns a command that runs another one as an ordinary user, who can read the interpreter and the checkout."""
    mounts = [part for place, path in MOUNTS.items() for part in ("--ro-bind", path, place)]
    user = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--inh-caps=-all"]
    return ["bwrap", "--dev-bind", "/", "/", "--tmpfs", "/mnt", *mounts, "--", *user]


def run_attacks(level: str, user: str, canary: Path) -> dict:
    """Runs the attacks in a process of the user, whose environment has a secret."""
    for folder in (canary.parent, *canary.parents[1:4]):
        folder.chmod(0o755)
    canary.write_text("intact")
    canary.chmod(0o666)
    prefix, python, folder = [], sys.executable, ROOT
    if user == "user":
        prefix, python, folder = as_ordinary_user(), "/mnt/python/bin/python3", "/mnt/checkout"
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{folder}:/mnt/packages",
        "SECRET_OF_THE_TRAINER": "SECRET",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = str(server.getsockname()[1])
        command = [*prefix, python, "-m", "tests.infer.scoring.twelve_attacks", level, str(canary), port]
        command += [str(GUEST)] if user == "root" else []
        where = "/" if prefix else ROOT
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=where)
        assert done.returncode == 0, (done.stdout[-500:], done.stderr[-2000:])
        with pytest.raises(BlockingIOError):
            server.accept()
    return json.loads(done.stdout)


def processes_of(uid: int) -> list[str]:
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


WEAKER = pytest.mark.long
CASES = [
    ("bubblewrap", "root"),
    ("bubblewrap", "user"),
    pytest.param("namespaces", "root", marks=WEAKER),
    pytest.param("namespaces", "user", marks=WEAKER),
    pytest.param("landlock", "user", marks=WEAKER),
]


@pytest.mark.parametrize(("level", "user"), CASES)
def test_isolation_stops_twelve_attacks(needs_root: None, tmp_path: Path, level: str, user: str) -> None:
    canary = tmp_path / "canary"
    found = run_attacks(level, user, canary)
    assert (found["level"], found["uid"]) == (level, 0 if user == "root" else USER)
    assert found["honest"]["outcome"] == "correct", found["honest"]
    for attack in TWELVE:
        assert found[attack]["outcome"] in ("wrong", "timeout"), (attack, found[attack])
        assert found[attack]["cpu"] < 1, (attack, found[attack])
    assert canary.read_text() == "intact"
    assert os.listdir(tmp_path) == ["canary"]
    assert not processes_of(GUEST if user == "root" else USER)


LEVELS: tuple[Isolation, ...] = ("bubblewrap", "namespaces", "landlock")


def without(number: int) -> dict[Isolation, Callable[[], Sandbox]]:
    """Returns builders for a machine that lacks the first levels; the others are stand-ins that name their level."""

    def build(level: Isolation) -> Sandbox:
        if level in LEVELS[:number]:
            raise find._MissingError(f"no {level} here")
        return ConfinedSandbox(level, [], "")

    return {level: partial(build, level) for level in (*LEVELS, "limits")}


@pytest.mark.parametrize("number", range(4))
def test_isolation_levels_are_tried_in_order_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(find, "_check", lambda sandbox: None)
    monkeypatch.setattr(find, "_BUILDERS", without(number))
    reasons = [f"no {level} here" for level in LEVELS[:number]]
    for choice in ("auto", "accept_risk"):
        caplog.clear()
        if number == 3 and choice == "auto":
            with pytest.raises(ScoringError, match="isolation=accept_risk") as caught:
                find.find_sandbox(choice)
            assert all(reason in str(caught.value) for reason in reasons)
            assert "\n" not in str(caught.value)
            continue
        assert find.find_sandbox(choice).isolation == (*LEVELS, "limits")[number]
        messages = [record.message for record in caplog.records]
        assert len(messages) == (number > 0)
        assert all(reason in messages[0] for reason in reasons)
    for level in LEVELS[:number]:
        with pytest.raises(ScoringError, match=f"no {level} here"):
            find.find_sandbox(level)


def test_isolation_a_level_that_does_not_hold_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits alone let a program read and write, so the probe refuses them as a stronger level."""
    if os.geteuid() == 0:
        monkeypatch.setattr(find, "_as_unused_user", lambda: [])
    monkeypatch.setattr(find, "_BUILDERS", dict.fromkeys(find._BUILDERS, find._BUILDERS["limits"]))
    with pytest.raises(ScoringError, match="/etc/passwd can be read"):
        find.find_sandbox("landlock")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_isolation_jumps_of_the_filter_stay_inside_it(machine: str) -> None:
    for is_alone in (False, True):
        program = seccomp_filter(machine, is_alone=is_alone)
        assert program is not None
        count = len(program) // 8
        for at in range(count):
            code, if_true, if_false = program[8 * at], program[8 * at + 2], program[8 * at + 3]
            if code & 7 == 5:
                assert at + 1 + max(if_true, if_false) < count
    assert seccomp_filter("riscv64") is None
