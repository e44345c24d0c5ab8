"""Runs the checks of a verification in order on all ranks, and collects what they find."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import distributed as dist

from comm.agreement import gather_present
from comm.exits import Preemption
from comm.watchdog.collective_log import CollectiveLog
from train.config import TrainConfig
from verify.layouts import Trial

Verdict = Literal["passed", "failed", "not run"]
MOST_FAILURES = 64  # of one check that are reported


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What is wrong: the rank (None: all), the tensor, key, link or file, by how much, and why."""

    rank: int | None
    subject: str
    difference: str
    cause: str

    def __str__(self) -> str:
        place = "all ranks" if self.rank is None else f"rank {self.rank}"
        return f"{place}: {self.subject}: {self.difference}; likely cause: {self.cause}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What a check found on this rank.

    `summary` is that of rank 0, which also reports failures of all ranks.
    """

    summary: str
    failures: Sequence[Failure] = ()
    measured: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of one check on all ranks."""

    check: str
    verdict: Verdict
    summary: str
    measured: float | None = None
    tolerance: float | None = None
    seconds: float = 0.0
    failures: tuple[Failure, ...] = ()

    def __str__(self) -> str:
        return f"{self.verdict:7} {self.check:12} {self.seconds:6.1f} s  {self.summary}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The host and device of a rank. `device` is equal on two ranks of a host if they share it."""

    rank: int
    local_rank: int
    host: str
    device_type: str
    device_index: int
    device: str


@dataclass(kw_only=True, slots=True)
class Verification:
    """What the checks share; the last three are results for later checks and the certificate."""

    config: TrainConfig
    device: torch.device
    log: CollectiveLog
    trials: Sequence[Trial]
    folder: Path
    preemption: Preemption = field(default_factory=Preemption)
    places: Sequence[Place] = ()
    copies: Sequence[Failure] = ()
    rates: dict[str, object] = field(default_factory=dict)


class CheckFailedError(Exception):
    """Raised on all ranks if a check cannot continue, with its failures."""

    def __init__(self, failures: Iterable[Failure]) -> None:
        self.failures = list(failures)
        super().__init__(str(self.failures))


class Check(Protocol):
    """Finds what is wrong. All ranks call it at the same point."""

    def __call__(self, verification: Verification, /) -> Findings:
        """Returns the findings of this rank. Another error than `CheckFailedError` ends the verification."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckEntry:
    """A check, which does not run if one that it `needs` failed: ranks might wait for each other."""

    name: str
    about: str
    run: Check
    needs: tuple[str, ...] = ()


def run_checks(entries: Sequence[CheckEntry], verification: Verification) -> Iterator[Outcome]:
    """Runs checks and yields the outcome of each, equal on all ranks, which iterate to the end."""
    ranks = range(dist.get_world_size())
    passed: dict[str, bool] = {}
    for entry in entries:
        broken = [name for name in entry.needs if not passed.get(name, True)]
        if broken:
            outcome = Outcome(check=entry.name, verdict="not run", summary=f"needs the check {broken[0]} to pass")
        else:
            with verification.log.phase("world", ranks, f"check of {entry.name}"):
                outcome = _run(entry, verification)
        passed[entry.name] = outcome.verdict == "passed"
        yield outcome


def _run(entry: CheckEntry, verification: Verification) -> Outcome:
    started = time.perf_counter()
    try:
        findings = entry.run(verification)
    except CheckFailedError as error:
        findings = Findings(summary="", failures=error.failures)
    # Each rank sends its own failures, so most send nothing.
    own = [failure for failure in findings.failures if (failure.rank or 0) == dist.get_rank()]
    parts = gather_present(own[:MOST_FAILURES] or None)
    failures = [failure for part in parts for failure in part]
    return Outcome(
        check=entry.name,
        verdict="failed" if failures else "passed",
        summary=str(failures[0]) if failures else findings.summary,
        measured=findings.measured,
        tolerance=findings.tolerance,
        seconds=time.perf_counter() - started,
        failures=tuple(failures[:MOST_FAILURES]),
    )
