"""Faults of `make chaos` change no results, and the comparison detects wrong runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.chaos.__main__ import can_mount
from bench.chaos.attempt import NUM_STEPS, Command
from bench.chaos.faults import DAMAGES, KINDS, PREEMPTIONS, Fault, Moment, draw
from bench.chaos.rank import notes_of
from bench.chaos.run import differences, tensors_of
from tests import ROOT
from tests.attacks.hostile import rehash
from tests.launch.checkpoints import write_tensors
from train.checkpoint.locate import step_folder

LAYOUT = "DualPipeV 2 x 1"
TRACE = [Moment(name, name != "syncing") for name in ("start", "sum of targets", "dispatch", "syncing", "dispatch")]


def drawn(number: int, seed: int = 0) -> list[Fault]:
    return draw({(LAYOUT, begin): [TRACE, TRACE] for begin in ("new", "half")}, number, seed)


def test_faults_depend_on_the_seed_and_have_every_kind_in_turn() -> None:
    faults = drawn(100)
    assert faults[:10] == drawn(10)
    assert faults != drawn(100, seed=1)
    assert [(fault.kind, fault.hits_command) for fault in faults] == list(KINDS) * 10
    assert {fault.name for fault in faults} == {moment.name for moment in TRACE}
    assert all(fault.begin == "half" for fault in faults if fault.kind in DAMAGES)


def test_faults_expect_the_documented_exit_codes() -> None:
    codes = {(fault.kind, fault.restarts, fault.expected) for fault in drawn(400) if not fault.hits_command}
    assert {each for each in codes if each[0] == "SIGKILL"} == {("SIGKILL", 0, (78,)), ("SIGKILL", 1, (0,))}
    assert {each for each in codes if each[0] == "SIGSTOP"} == {("SIGSTOP", 0, (76,)), ("SIGSTOP", 1, (0,))}
    for fault in drawn(400):
        if fault.kind in PREEMPTIONS and not fault.hits_command and fault.name != "syncing":
            # Only after "start" is there another agreement.
            assert fault.expected == ((75,) if fault.name == "start" else (0,))


ChaosRun = tuple[Path, subprocess.CompletedProcess[str]]


def run_chaos(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.chaos", f"--keep={folder}", "--layouts", LAYOUT, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def chaos_run(tmp_path_factory: pytest.TempPathFactory) -> ChaosRun:
    """Runs faults whose kinds no other test has: a damaged checkpoint, a full disk, a killed command."""
    folder = tmp_path_factory.mktemp("chaos")
    return folder, run_chaos(folder, "--faults=10", "--only", "4", "6", "7")


def check_outcomes(done: subprocess.CompletedProcess[str], number: int) -> None:
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{number} of {number} runs ended in time with the documented exit code" in done.stdout
    assert ("full disks are skipped" in done.stdout) == (not can_mount())


@pytest.mark.long
def test_three_faults_change_no_results(chaos_run: ChaosRun) -> None:
    check_outcomes(chaos_run[1], 3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("sample", f"step {NUM_STEPS}: 1 samples lost, 1 that are not its own"),
        ("lost", "step 2: 8 samples lost, 0 that are not its own"),
        ("twice", "a sample was seen more often than in the uninterrupted run"),
        ("metrics", "metrics.jsonl has other loss"),
        ("line", "metrics.jsonl has steps [2, 3, 4, 5, 6]"),
        ("status", "status.json is Status(state='running'"),
        ("weight", "1 of "),
        ("torn", "the newest whole checkpoint is "),
    ],
)
def test_differences_from_the_uninterrupted_run_are_detected(
    chaos_run: ChaosRun, change: str, expected: str, tmp_path: Path
) -> None:
    uninterrupted = chaos_run[0] / "uninterrupted-0"
    command = Command(folder=tmp_path, name="run", layout=LAYOUT)
    shutil.copytree(uninterrupted, command.out_dir)
    shutil.copytree(notes_of(uninterrupted), notes_of(command.out_dir))
    status = command.out_dir / "status.json"
    assert differences(command.out_dir, uninterrupted) == []
    lines = (notes_of(command.out_dir) / "samples-0-0").read_text().splitlines()
    metrics = command.out_dir / "metrics.jsonl"
    last = step_folder(command.out_dir, NUM_STEPS)
    match change:
        case "sample":
            for path in notes_of(command.out_dir).glob("samples-*"):
                seen = path.read_text()
                path.write_text(seen.replace(lines[-1].split()[2], "0" * 64))
        case "lost":
            for path in notes_of(command.out_dir).glob("samples-*"):
                kept = [line for line in path.read_text().splitlines() if not line.startswith("2 ")]
                path.write_text("\n".join(kept))
        case "twice":
            for path in notes_of(command.out_dir).glob("samples-*"):
                seen = [line.split() for line in path.read_text().splitlines()]  # type: ignore[assignment]
                first = {place: hashed for step, place, hashed in seen if step == "1"}  # type: ignore[str-unpack]
                again = [(step, place, first[place] if step == "2" else hashed) for step, place, hashed in seen]  # type: ignore[str-unpack]
                path.write_text("\n".join(" ".join(each) for each in again))
        case "metrics":
            record = json.loads(metrics.read_text().splitlines()[-1])
            rest = metrics.read_text().splitlines()[:-1]
            metrics.write_text("\n".join([*rest, json.dumps({**record, "loss": record["loss"] * (1 + 1e-7)})]))
        case "line":
            metrics.write_text("\n".join(metrics.read_text().splitlines()[1:]))
        case "status":
            status.write_text(status.read_text().replace('"done"', '"running"'))
        case "weight":
            state = tensors_of(last)
            name = sorted(state)[0]
            state[name].view(torch.uint8)[0] ^= 1
            for path in last.glob("*.safetensors"):
                path.unlink()
            write_tensors(last, state)
            rehash(last)
        case "torn":
            data = next(last.glob("*.safetensors"))
            data.write_bytes(data.read_bytes()[:-1])
    assert any(difference.startswith(expected) for difference in differences(command.out_dir, uninterrupted))
