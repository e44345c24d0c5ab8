"""Times every Triton kernel on a CUDA device against its lower bound and torch: `python -m bench.gpu.bench`.

Exit code: 0: every target that was measured is met; 1: one is missed, or a kernel failed; 2: no CUDA device.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import triton

from bench.gpu.bench import report
from bench.gpu.bench.contenders import contenders, others_of
from bench.gpu.bench.measure import Roofs, Stopwatch, interleaved, measure_roofs
from kernels.operation import has_deep_gemm
from tests.kernels.catalogue import LAUNCHES
from tests.kernels.launches import Call, Launch

SECTIONS = tuple(dict.fromkeys(launch.module.split(".")[1] for launch in LAUNCHES))
MET, MISSED, NO_DEVICE = 0, 1, 2
DEVICE = torch.device("cuda")


@dataclass(frozen=True, slots=True)
class Findings:
    """Results of a benchmark run."""

    rows: list[report.Row] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the sections asked for, prints tables and targets, and gives the exit code."""
    arguments = _arguments(argv)
    if not torch.cuda.is_available():
        print("needs a CUDA device: torch.cuda.is_available() is false")
        return NO_DEVICE
    device = DEVICE
    machine = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    stopwatch = Stopwatch(device)
    roofs = measure_roofs(stopwatch, device, arguments.rounds)
    print(report.roofs_text(roofs), flush=True)
    timed = partial(interleaved, seconds_of=stopwatch.seconds, num_rounds=arguments.rounds)
    findings = Findings()
    for section in arguments.sections:
        chosen = [launch for launch in LAUNCHES if launch.module.split(".")[1] == section and launch.is_timed]
        num_rows = len(findings.rows)
        for launch in chosen:
            measure(launch, device, timed, roofs, findings)
        print(f"\n{report.table(findings.rows[num_rows:])}", flush=True)
    lines, is_met = report.target_lines(findings.rows)
    print("", *findings.refusals, *findings.failures, *lines, sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(report.data(machine, roofs, findings.rows, lines), indent=1) + "\n")
    return MET if is_met and not findings.failures else MISSED


def measure(
    launch: Launch,
    device: torch.device,
    seconds_of_all: Callable[[Mapping[str, Call]], Mapping[str, float]],
    roofs: Roofs,
    findings: Findings,
) -> None:
    """Adds what was found; a kernel of ours that fails must not keep the others from being measured."""
    try:
        calls, refusals = contenders(launch, device, others_of(launch, has_deep_gemm(device)))
        seconds = seconds_of_all(calls)
    except Exception as error:
        findings.failures.append(f"FAIL: {launch.name}, {launch.shape}: {type(error).__name__}: {error}")
    else:
        findings.rows.append(report.row_of(launch, seconds, roofs))
        findings.refusals.extend(refusals)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.bench", description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=21, help="of which the median is taken")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
