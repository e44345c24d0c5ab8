"""Whether the memory of any rank grows over a long run.

`python -m tests.bench.growth [MINUTES] [OVERRIDE...]`, 30 by default, trains `experiment=two_nodes` for so long, reads
every rank's resident memory every five seconds, and compares its mean over the fifth minute with that over the last
one; for a run of under ten minutes, over the tenths of it that begin at a sixth and at nine tenths. Then the run is
asked to make room, and must end with 75. Needs Linux.
"""

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from comm.exit_codes import EXIT_PREEMPTED
from train.records.status import read_status

LIMIT = 0.02
_EVERY_SECONDS = 5.0
_NUM_RANKS = 8

Samples = dict[int, list[tuple[float, int]]]
"""By process, seconds since the beginning and bytes."""


def ranks_of(launcher: int) -> list[int]:
    """The processes that a command's fork server has started, the oldest first."""
    servers = [child for child in _children(launcher) if _children(child)]
    return sorted(rank for server in servers for rank in _children(server))


def resident_bytes(pid: int) -> int | None:
    """What a process has in memory; None where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:")), None)


def growth_of(samples: Sequence[tuple[float, int]], seconds: float) -> tuple[float, float]:
    """Mean bytes early, and at the end."""
    early, length = (300.0, 60.0) if seconds >= 600.0 else (seconds / 6, seconds / 10)
    first = [size for at, size in samples if early <= at < early + length]
    last = [size for at, size in samples if at >= seconds - length]
    return statistics.mean(first), statistics.mean(last)


def by_minute(samples: Sequence[tuple[float, int]]) -> list[float]:
    """Mean bytes of each minute."""
    minutes = sorted({int(at // 60) for at, _ in samples})
    return [statistics.mean(size for at, size in samples if int(at // 60) == minute) for minute in minutes]


def follow(process: subprocess.Popen[bytes], seconds: float) -> Samples:
    """Reads the ranks' memory for so long."""
    samples: Samples = {}
    started = time.monotonic()
    while (now := time.monotonic() - started) < seconds:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended after {now:.0f} s with exit code {process.returncode}")
        for pid in ranks_of(process.pid):
            if (size := resident_bytes(pid)) is not None:
                samples.setdefault(pid, []).append((now, size))
        time.sleep(_EVERY_SECONDS)
    return {pid: seen for pid, seen in samples.items() if seen[-1][0] > seconds - 2 * _EVERY_SECONDS}


def main(minutes: str = "30", *overrides: str) -> int:
    """Runs, measures, prints; the exit code is 1 where a rank grew by more than the limit."""
    seconds = 60.0 * float(minutes)
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        out_dir = Path(name) / "run"
        command = [sys.executable, "-m", "launch.train", "experiment=two_nodes", "task.steps=1000000"]
        command += [f"out_dir={out_dir}", "checkpointing.keep=2", "cluster.grace_seconds=300", *overrides]
        with (Path(name) / "said").open("wb") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
            try:
                samples = follow(process, seconds)
                process.send_signal(signal.SIGTERM)
                code = process.wait(600)
            finally:
                process.kill()
        status = read_status(out_dir)
    assert status is not None
    grown = []
    for rank, seen in enumerate(samples[pid] for pid in sorted(samples)):
        first, last = growth_of(seen, seconds)
        grown.append(last / first - 1)
        print(
            f"rank's process {rank}: " + ", ".join(f"{size / 2**20:.0f}" for size in by_minute(seen)) + " MiB by minute"
        )
        print(f"rank's process {rank}: {first / 2**20:.1f} MiB, then {last / 2**20:.1f} MiB: {100 * grown[-1]:+.2f} %")
    print(
        f"{status.step} steps in {float(minutes):g} minutes, exit code {code}; "
        f"of {len(grown)} ranks the most grown by {100 * max(grown):.2f} %"
    )
    return 0 if code == EXIT_PREEMPTED and len(grown) == _NUM_RANKS and max(grown) <= LIMIT else 1


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
