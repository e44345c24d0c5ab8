"""A run that meets its fault and goes on until it is done, held against the run that was left alone."""

import json
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from comm.exit_codes import EXIT_PREEMPTED
from tests.chaos.faults import DAMAGES, STOPPED_SECONDS, Begin, Fault, Moment
from tests.chaos.life import NUM_STEPS, Command, Life, run_life
from tests.chaos.rank import DAMAGED_NAME, FILLER_NAME, PLAN_NAME, STRUCK_NAME, notes_of
from train.checkpoint.locate import newest_whole, step_folder
from train.checkpoint.verify import is_whole
from train.records.events import read_events
from train.records.status import read_status

Samples = dict[int, dict[int, str]]
"""By step, from 1: what was read at each place of the batch."""

_ASKED = {"kind": "SIGTERM", "hits_command": False, "share": 0.0}
_SAME = ("loss", "grad_norm", "lr", "tokens", "max_violation", "validation_loss")
_MOST_LIVES = 4
_DISK_BYTES = 96 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Calm:
    """A run that was left alone, or that was asked to make room after its third step and then left alone.

    Attributes:
        folder: of the run as it begins; None for a new one.
        moments: what each rank does from there on.
        end: the folder at its end.
    """

    folder: Path | None
    moments: list[list[Moment]]
    end: Path


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of a run.

    Attributes:
        codes: exit codes of its commands, in order.
        seconds: from the fault to the end of the last rank of that life.
        went_on_from: the step from which the life after the fault went on; None where there was none.
        problems: everything that is not as it must be, in words.
    """

    fault: Fault
    codes: list[int] = field(default_factory=list)
    seconds: float = float("nan")
    went_on_from: int | None = None
    problems: list[str] = field(default_factory=list)


def calm_runs(folder: Path, layout: str) -> dict[Begin, Calm]:
    """Both kinds of run under a layout, without a fault."""
    number = len(list(folder.glob("calm-*")))
    calm, half = (Command(folder=folder, name=f"calm-{number + place}", layout=layout) for place in (0, 1))
    _begin(calm, None)
    _left_alone(calm)
    _begin(half, None)
    _plan(half, {**_ASKED, "rank": 0, "name": "update of the weights", "count": NUM_STEPS // 2})
    assert run_life(half).code == EXIT_PREEMPTED
    kept = folder / f"half-{number}"
    for source, target in ((half.out_dir, kept), (notes_of(half.out_dir), notes_of(kept))):
        shutil.copytree(source, target)
    _plan(half, None)
    _left_alone(half)
    assert (problems := differences(half.out_dir, calm.out_dir)) == [], problems
    return {
        "new": Calm(folder=None, moments=_moments(calm, 0), end=calm.out_dir),
        "half": Calm(folder=kept, moments=_moments(half, 1), end=calm.out_dir),
    }


def run_fault(folder: Path, fault: Fault, calm: Calm) -> Outcome:
    """One run from its beginning, through its fault, to its end."""
    command = Command(folder=folder, name=f"fault-{fault.index:03d}", layout=fault.layout, restarts=fault.restarts)
    outcome = Outcome(fault=fault)
    with _disk(command.out_dir, is_small=fault.kind == "full disk"):
        _begin(command, calm.folder)
        _plan(command, asdict(fault))
        lives = _all_lives(command, fault)
        outcome.codes = [life.code for life in lives]
        outcome.problems += [f"life {index}: {said}" for index, life in enumerate(lives) for said in _seen_in(life)]
        outcome.problems += _of_strike(command, fault, lives, outcome)
        if lives[-1].code:
            outcome.problems.append(f"did not end well: {lives[-1].said.strip().splitlines()[-1:]}")
        else:
            outcome.problems += differences(command.out_dir, calm.end)
    if not outcome.problems:
        shutil.rmtree(command.out_dir)
        shutil.rmtree(notes_of(command.out_dir))
    return outcome


def _begin(command: Command, start: Path | None) -> None:
    """Puts the run's folder and its notes in place."""
    if start is not None:
        shutil.copytree(start, command.out_dir, dirs_exist_ok=True)
        shutil.copytree(notes_of(start), notes_of(command.out_dir))
        for name in (PLAN_NAME, STRUCK_NAME):
            (notes_of(command.out_dir) / name).unlink(missing_ok=True)
    else:
        notes_of(command.out_dir).mkdir()
    _plan(command, None)


def _plan(command: Command, plan: Mapping[str, Any] | None) -> None:
    """What ranks will read, which are then the judges of when they are hit."""
    (notes_of(command.out_dir) / PLAN_NAME).write_text(json.dumps(plan))


def _left_alone(command: Command) -> None:
    life = run_life(command)
    assert life.code == 0, life.said


def _all_lives(command: Command, fault: Fault) -> list[Life]:
    """Runs the command that is hit, then as many as the run needs, as a scheduler or a user starts them.

    If the first ends without its fault, no other runs: the fault is still pending, and would hit this process.
    """
    is_hit_alone = fault.kind == "SIGKILL" and fault.hits_command
    first = replace(command, timeout_seconds=STOPPED_SECONDS) if fault.kind == "SIGSTOP" else command
    lives = [run_life(first, apart=is_hit_alone)]
    (command.out_dir / FILLER_NAME).unlink(missing_ok=True)
    has_struck = (notes_of(command.out_dir) / STRUCK_NAME).exists()
    while has_struck and lives[-1].code and len(lives) < _MOST_LIVES:
        lives.append(run_life(command))
    return lives


def _seen_in(life: Life) -> Iterator[str]:
    if life.hung:
        yield "it hung"
    if life.left_alive:
        yield f"ranks {life.left_alive} went on after it"


def _of_strike(command: Command, fault: Fault, lives: list[Life], outcome: Outcome) -> Iterator[str]:
    """What is wrong with how the run took its fault."""
    struck = notes_of(command.out_dir) / STRUCK_NAME
    if not struck.exists():
        yield f"it was never struck: {lives[0].said[-500:]!r}"
        return
    since, life = struck.stat().st_mtime, int(struck.read_text())
    later = [path for path in notes_of(command.out_dir).glob("pid-*") if int(path.name.split("-")[1]) > life]
    outcome.seconds = min([lives[0].ended, *(path.stat().st_mtime for path in later)]) - since
    if outcome.seconds > fault.deadline_seconds:
        yield f"the life that was hit took {outcome.seconds:.1f} s to end, above {fault.deadline_seconds:g} s"
    if lives[0].code not in fault.expected:
        yield f"exit code {lives[0].code}, must be {' or '.join(map(str, fault.expected))}: {lives[0].said[-500:]!r}"
    if any(life.code for life in lives[1:]):
        yield f"a life without a fault ended with {[life.code for life in lives[1:]]}"
    begun = [
        min(read)
        for each in _lives_of(notes_of(command.out_dir))
        if (read := _samples(notes_of(command.out_dir), each)) and each > life
    ]
    outcome.went_on_from = begun[0] - 1 if begun else None
    kinds = [event["kind"] for event in read_events(command.out_dir)]
    if lives[0].code == EXIT_PREEMPTED and "preempted" not in kinds:
        yield f"no event tells that it was preempted: {kinds}"
    if fault.restarts and "restarted" not in kinds:
        yield f"no event tells that it was restarted: {kinds}"
    if fault.kind in DAMAGES:
        damaged, _, name = (notes_of(command.out_dir) / DAMAGED_NAME).read_text().partition("/")
        if not any(f"resume: rejected {damaged}: " in life.said for life in lives):
            yield f"{damaged}/{name} was damaged, and not rejected"
    if fault.kind == "full disk" and lives[0].code and "No space left on device" not in lives[0].said:
        yield f"a full disk was not told: {lives[0].said[-500:]!r}"


def differences(ours: Path, calm: Path) -> list[str]:
    """Everything in which the folder of a run that is done is not that of the calm one, in words."""
    return [*_told(ours, calm), *_samples_off(ours, calm), *_weights_off(ours, calm)]


def _told(ours: Path, calm: Path) -> Iterator[str]:
    """Each step once, with the same numbers; a run that says that it is done, and has the checkpoint of its end."""
    lines, expected = _metrics(ours), _metrics(calm)
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


def _samples_off(ours: Path, calm: Path) -> Iterator[str]:
    """Of the lives that led to the end: what the calm run read in a step and they did not, or the other way round."""
    found, expected = _trajectory(ours), _trajectory(calm)
    for step in sorted(found.keys() | expected.keys()):
        if found.get(step) != expected.get(step):
            lost = len(expected.get(step, {}).items() - found.get(step, {}).items())
            more = len(found.get(step, {}).items() - expected.get(step, {}).items())
            yield f"step {step}: {lost} samples lost, {more} that are not its own"
    places = [hashed for step in found.values() for hashed in step.values()]
    calm_places = [hashed for step in expected.values() for hashed in step.values()]
    if sorted(places) != sorted(calm_places):
        yield "a sample was seen more often than in the calm run"


def _trajectory(run: Path) -> Samples:
    """What was read for each step by the last life that took it: later lives take a step again from what was before."""
    led: Samples = {}
    for life in _lives_of(notes_of(run)):
        read = _samples(notes_of(run), life)
        if read:
            led = {step: samples for step, samples in led.items() if step < min(read)}
            gap = set(range(max(led, default=0) + 1, min(read)))
            led |= {step: {} for step in gap} | read
    return led


def _samples(notes: Path, life: int) -> Samples:
    """Of training: validation reads by another way. A rank that is killed may leave half a line."""
    found: Samples = {}
    for path in notes.glob(f"samples-{life}-*"):
        for line in path.read_text().splitlines():
            step, place, hashed = (line.split() + [""] * 3)[:3]
            if len(hashed) == 64:
                found.setdefault(int(step), {})[int(place)] = hashed
    return found


def _lives_of(notes: Path) -> list[int]:
    return sorted({int(path.name.split("-")[1]) for path in notes.glob("samples-*")})


def _moments(command: Command, life: int) -> list[list[Moment]]:
    notes = notes_of(command.out_dir)
    ranks = range(len(list(notes.glob(f"moments-{life}-*"))))
    return [[Moment(*each) for each in json.loads((notes / f"moments-{life}-{rank}").read_text())] for rank in ranks]


def _weights_off(ours: Path, calm: Path) -> Iterator[str]:
    """Weights, router bias, moments and the average, to the bit; of one that is not whole, that is told already."""
    if not is_whole(step_folder(ours, NUM_STEPS)):
        return
    a, b = (tensors_of(step_folder(run, NUM_STEPS)) for run in (ours, calm))
    if a.keys() != b.keys():
        yield f"the checkpoint holds {len(a)} tensors, not {len(b)}"
    elif wrong := [name for name in a if not torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))]:
        yield f"{len(wrong)} of {len(a)} tensors differ, {wrong[0]} among them"


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Everything that a checkpoint holds."""
    listed = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(each.size, dtype=each.properties.dtype)
        for name, each in listed.items()
        if isinstance(each, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP tells that it loads in one process
        dcp_load(state, checkpoint_id=checkpoint, no_dist=True)
    return {name: tensor.reshape(-1) for name, tensor in state.items()}


@contextmanager
def _disk(folder: Path, *, is_small: bool) -> Iterator[None]:
    """A small file system of its own where one is asked for."""
    folder.mkdir()
    if not is_small:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "chaos", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
