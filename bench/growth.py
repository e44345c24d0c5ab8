"""Measures whether the memory of any rank grows over a long run.

`python -m bench.growth [MINUTES] [OVERRIDE...]`, 30 by default, trains `experiment=two_nodes` for that
time. It samples every rank's resident memory every five seconds, and compares the means of the fifth and of the last
minute. If the run takes less than ten minutes, it compares tenths of the run that start at 1/6 and at 9/10. At the
end the run is preempted and must exit with 75. Needs Linux.
"""

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from comm.exits import EXIT_PREEMPTED
from train.files.run_files import read_status

LIMIT = 0.02
_EVERY_SECONDS = 5.0
_NUM_RANKS = 8

Samples = dict[int, list[tuple[float, int]]]
"""Samples of each process: seconds since the start, and bytes."""


def ranks_of(launcher: int) -> list[int]:
    """Returns the processes that a command's fork server has started, the oldest first."""
    servers = [child for child in _children(launcher) if _children(child)]
    return sorted(rank for server in servers for rank in _children(server))


def resident_bytes(pid: int) -> int | None:
    """Returns the resident memory of a process, or None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:")), None)


def growth_of(samples: Sequence[tuple[float, int]], seconds: float) -> tuple[float, float]:
    """Returns the mean bytes early in the run and at its end."""
    early, length = (300.0, 60.0) if seconds >= 600.0 else (seconds / 6, seconds / 10)
    first = [size for at, size in samples if early <= at < early + length]
    last = [size for at, size in samples if at >= seconds - length]
    return statistics.mean(first), statistics.mean(last)


def by_minute(samples: Sequence[tuple[float, int]]) -> list[float]:
    minutes = sorted({int(at // 60) for at, _ in samples})
    return [statistics.mean(size for at, size in samples if int(at // 60) == minute) for minute in minutes]


def follow(process: subprocess.Popen[bytes], seconds: float) -> Samples:
    """Samples the ranks' memory for a time."""
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
    """Runs, measures and prints. The exit code is 1 if a rank grew by more than the limit."""
    seconds = 60.0 * float(minutes)
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        out_dir = Path(name) / "run"
        command = [
            sys.executable,
            "-m",
            "launch.train",
            "experiment=two_nodes",
            "task.steps=1000000",
            "accept=[repeated_corpus]",
        ]
        command += [f"out_dir={out_dir}", "checkpointing.keep=2", "cluster.grace_seconds=300", *overrides]
        with (Path(name) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
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
