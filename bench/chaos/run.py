"""Runs a fault to the end of its run, and compares the results with an uninterrupted run."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.chaos.attempt import NUM_STEPS, Attempt, Command, run_attempt
from bench.chaos.faults import DAMAGES, STOPPED_SECONDS, Begin, Fault, Moment
from bench.chaos.rank import DAMAGED_NAME, FILLER_NAME, INJECTED_NAME, PLAN_NAME, notes_of
from comm.exits import EXIT_PREEMPTED
from model.hf.reader import TORCH_DTYPES
from train.checkpoint.index import read_index
from train.checkpoint.locate import is_whole, newest_whole, step_folder
from train.checkpoint.manifest import read_model
from train.checkpoint.parts import PartReader, State, as_slice
from train.files.json_lines import read_events
from train.files.run_files import read_status

Samples = dict[int, dict[int, str]]
"""Hashes of the samples by step, from 1, and by index in the batch."""

_PREEMPTION = {"kind": "SIGTERM", "hits_command": False, "share": 0.0}
_SAME = ("loss", "grad_norm", "lr", "tokens", "max_violation", "validation_loss")
_MAX_ATTEMPTS = 4
_DISK_BYTES = 96 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class UninterruptedRun:
    """Run without faults. It is new, or it was preempted after its third step and resumes.

    Attributes:
        folder: run folder at the start; None for a new run.
    """

    folder: Path | None
    moments: list[list[Moment]]
    end: Path


@dataclass(kw_only=True, slots=True)
class Outcome:
    """Result of a run with a fault.

    Attributes:
        seconds: seconds from the fault to the end of that attempt's last rank.
        resumed_from: step from which the next attempt resumed; None if there was none.
    """

    fault: Fault
    codes: list[int] = field(default_factory=list)
    seconds: float = float("nan")
    resumed_from: int | None = None
    problems: list[str] = field(default_factory=list)


def run_uninterrupted(folder: Path, layout: str) -> dict[Begin, UninterruptedRun]:
    """Runs a layout without faults, in one attempt and with a preemption."""
    number = len(list(folder.glob("uninterrupted-*")))
    uninterrupted, half = (
        Command(folder=folder, name=f"uninterrupted-{number + place}", layout=layout) for place in (0, 1)
    )
    _begin(uninterrupted, None)
    _run_to_end(uninterrupted)
    _begin(half, None)
    _plan(half, {**_PREEMPTION, "rank": 0, "name": "update of the weights", "count": NUM_STEPS // 2})
    assert run_attempt(half).code == EXIT_PREEMPTED
    kept = folder / f"half-{number}"
    for source, target in ((half.out_dir, kept), (notes_of(half.out_dir), notes_of(kept))):
        shutil.copytree(source, target)
    _plan(half, None)
    _run_to_end(half)
    assert (problems := differences(half.out_dir, uninterrupted.out_dir)) == [], problems
    return {
        "new": UninterruptedRun(folder=None, moments=_moments(uninterrupted, 0), end=uninterrupted.out_dir),
        "half": UninterruptedRun(folder=kept, moments=_moments(half, 1), end=uninterrupted.out_dir),
    }


def run_fault(folder: Path, fault: Fault, uninterrupted: UninterruptedRun) -> Outcome:
    """Runs a fault until its run has ended, and returns the problems."""
    command = Command(folder=folder, name=f"fault-{fault.index:03d}", layout=fault.layout, restarts=fault.restarts)
    outcome = Outcome(fault=fault)
    with _disk(command.out_dir, is_small=fault.kind == "full disk"):
        _begin(command, uninterrupted.folder)
        _plan(command, asdict(fault))
        attempts = _run_attempts(command, fault)
        outcome.codes = [attempt.code for attempt in attempts]
        outcome.problems += [
            f"attempt {index}: {problem}"
            for index, attempt in enumerate(attempts)
            for problem in _attempt_problems(attempt)
        ]
        outcome.problems += _fault_problems(command, fault, attempts, outcome)
        if attempts[-1].code:
            outcome.problems.append(f"did not end well: {attempts[-1].output.strip().splitlines()[-1:]}")
        else:
            outcome.problems += differences(command.out_dir, uninterrupted.end)
    if not outcome.problems:
        shutil.rmtree(command.out_dir)
        shutil.rmtree(notes_of(command.out_dir))
    return outcome


def _begin(command: Command, start: Path | None) -> None:
    """Prepares the run folder and its folder of records."""
    if start is not None:
        shutil.copytree(start, command.out_dir, dirs_exist_ok=True)
        shutil.copytree(notes_of(start), notes_of(command.out_dir))
        for name in (PLAN_NAME, INJECTED_NAME):
            (notes_of(command.out_dir) / name).unlink(missing_ok=True)
    else:
        notes_of(command.out_dir).mkdir()
    _plan(command, None)


def _plan(command: Command, plan: Mapping[str, Any] | None) -> None:
    """Writes the fault that a rank injects when it reaches the moment."""
    (notes_of(command.out_dir) / PLAN_NAME).write_text(json.dumps(plan))


def _run_to_end(command: Command) -> None:
    attempt = run_attempt(command)
    assert attempt.code == 0, attempt.output


def _run_attempts(command: Command, fault: Fault) -> list[Attempt]:
    """Runs the command with the fault, then resumes it until the end, like a scheduler or user.

    If the first attempt ends without its fault, there are no others: the fault is still pending and would hit this
    process.
    """
    is_hit_alone = fault.kind == "SIGKILL" and fault.hits_command
    first = replace(command, timeout_seconds=STOPPED_SECONDS) if fault.kind == "SIGSTOP" else command
    attempts = [run_attempt(first, in_separate_process=is_hit_alone)]
    (command.out_dir / FILLER_NAME).unlink(missing_ok=True)
    is_injected = (notes_of(command.out_dir) / INJECTED_NAME).exists()
    while is_injected and attempts[-1].code and len(attempts) < _MAX_ATTEMPTS:
        attempts.append(run_attempt(command))
    return attempts


def _attempt_problems(attempt: Attempt) -> Iterator[str]:
    if attempt.is_hung:
        yield "it hung"
    if attempt.surviving_ranks:
        yield f"ranks {attempt.surviving_ranks} survived it"


def _fault_problems(command: Command, fault: Fault, attempts: list[Attempt], outcome: Outcome) -> Iterator[str]:
    injected = notes_of(command.out_dir) / INJECTED_NAME
    if not injected.exists():
        yield f"the fault was not injected: {attempts[0].output[-500:]!r}"
        return
    since, attempt = injected.stat().st_mtime, int(injected.read_text())
    later = [path for path in notes_of(command.out_dir).glob("pid-*") if int(path.name.split("-")[1]) > attempt]
    outcome.seconds = min([attempts[0].ended, *(path.stat().st_mtime for path in later)]) - since
    if outcome.seconds > fault.deadline_seconds:
        yield f"the attempt with the fault took {outcome.seconds:.1f} s to end, above {fault.deadline_seconds:g} s"
    if attempts[0].code not in fault.expected:
        expected = " or ".join(map(str, fault.expected))
        yield f"exit code {attempts[0].code}, must be {expected}: {attempts[0].output[-500:]!r}"
    if any(attempt.code for attempt in attempts[1:]):
        yield f"an attempt without a fault ended with {[attempt.code for attempt in attempts[1:]]}"
    begun = [
        min(read)
        for each in _attempts_of(notes_of(command.out_dir))
        if (read := _samples(notes_of(command.out_dir), each)) and each > attempt
    ]
    outcome.resumed_from = begun[0] - 1 if begun else None
    kinds = [event["kind"] for event in read_events(command.out_dir)]
    if attempts[0].code == EXIT_PREEMPTED and "preempted" not in kinds:
        yield f"there is no event of the preemption: {kinds}"
    if fault.restarts and "restarted" not in kinds:
        yield f"there is no event of the restart: {kinds}"
    if fault.kind in DAMAGES:
        damaged, _, name = (notes_of(command.out_dir) / DAMAGED_NAME).read_text().partition("/")
        if not any(f"resume: rejected {damaged}: " in " ".join(attempt.output.split()) for attempt in attempts):
            yield f"{damaged}/{name} was damaged, and not rejected"
    if fault.kind == "full disk" and attempts[0].code and "No space left on device" not in attempts[0].output:
        yield f"a full disk was not reported: {attempts[0].output[-500:]!r}"


def differences(ours: Path, uninterrupted: Path) -> list[str]:
    """Returns all differences between the folder of a finished run and that of the uninterrupted run."""
    return [
        *_record_problems(ours, uninterrupted),
        *_sample_problems(ours, uninterrupted),
        *_weight_problems(ours, uninterrupted),
    ]


def _record_problems(ours: Path, uninterrupted: Path) -> Iterator[str]:
    """Checks that each step is logged once with equal numbers, and that the run is complete."""
    lines, expected = _metrics(ours), _metrics(uninterrupted)
    if [line.get("step") for line in lines] != [*range(1, NUM_STEPS + 1)]:
        yield f"metrics.jsonl has steps {[line.get('step') for line in lines]}"
    elif wrong := [key for key in _SAME if [x.get(key) for x in lines] != [x.get(key) for x in expected]]:
        yield f"metrics.jsonl has other {', '.join(wrong)}"
    status = read_status(ours)
    if status is None or (status.state, status.step, status.exit_code) != ("done", NUM_STEPS, 0):
        yield f"status.json is {status}"
    if newest_whole(ours) != step_folder(ours, NUM_STEPS):
        yield f"the newest whole checkpoint is {newest_whole(ours)}"


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _sample_problems(ours: Path, uninterrupted: Path) -> Iterator[str]:
    """Yields steps whose samples differ from those of the uninterrupted run."""
    found, expected = _trajectory(ours), _trajectory(uninterrupted)
    for step in sorted(found.keys() | expected.keys()):
        if found.get(step) != expected.get(step):
            lost = len(expected.get(step, {}).items() - found.get(step, {}).items())
            more = len(found.get(step, {}).items() - expected.get(step, {}).items())
            yield f"step {step}: {lost} samples lost, {more} that are not its own"
    places = [hashed for step in found.values() for hashed in step.values()]
    uninterrupted_places = [hashed for step in expected.values() for hashed in step.values()]
    if sorted(places) != sorted(uninterrupted_places):
        yield "a sample was seen more often than in the uninterrupted run"


def _trajectory(run: Path) -> Samples:
    """Returns the samples of each step in the last attempt that ran it: later attempts may repeat steps."""
    led: Samples = {}
    for attempt in _attempts_of(notes_of(run)):
        read = _samples(notes_of(run), attempt)
        if read:
            led = {step: samples for step, samples in led.items() if step < min(read)}
            gap = set(range(max(led, default=0) + 1, min(read)))
            led |= {step: {} for step in gap} | read
    return led


def _samples(notes: Path, attempt: int) -> Samples:
    """Reads the training samples of an attempt. A killed rank may leave an incomplete line."""
    found: Samples = {}
    for path in notes.glob(f"samples-{attempt}-*"):
        for line in path.read_text().splitlines():
            step, place, hashed = (line.split() + [""] * 3)[:3]
            if len(hashed) == 64:
                found.setdefault(int(step), {})[int(place)] = hashed
    return found


def _attempts_of(notes: Path) -> list[int]:
    return sorted({int(path.name.split("-")[1]) for path in notes.glob("samples-*")})


def _moments(command: Command, attempt: int) -> list[list[Moment]]:
    notes = notes_of(command.out_dir)
    ranks = range(len(list(notes.glob(f"moments-{attempt}-*"))))
    return [[Moment(*each) for each in json.loads((notes / f"moments-{attempt}-{rank}").read_text())] for rank in ranks]


def _weight_problems(ours: Path, uninterrupted: Path) -> Iterator[str]:
    """Compares weights, router bias, moments and the average bitwise, if the checkpoint is complete."""
    if not is_whole(step_folder(ours, NUM_STEPS)):
        return
    a, b = (tensors_of(step_folder(run, NUM_STEPS)) for run in (ours, uninterrupted))
    if a.keys() != b.keys():
        yield f"the checkpoint holds {len(a)} tensors, not {len(b)}"
    elif wrong := [name for name in a if not torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))]:
        yield f"{len(wrong)} of {len(a)} tensors differ, {wrong[0]} among them"


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    index = read_index(checkpoint, read_model(checkpoint))
    state: State = {
        name: torch.zeros(entry.stored.shape, dtype=TORCH_DTYPES[entry.stored.dtype]) for name, entry in index.items()
    }
    PartReader(checkpoint, index).fill(state)
    return {name: as_slice(values).local for name, values in state.items()}


@contextmanager
def _disk(folder: Path, *, is_small: bool) -> Iterator[None]:
    """Creates the folder, on a small file system if requested."""
    folder.mkdir()
    if not is_small:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "chaos", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
