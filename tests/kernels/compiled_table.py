"""Compiles every Triton kernel for an H100 under the installed Triton: `python -m tests.kernels.compiled_table`.

Needs no GPU. `--write` records the table in `compiled/`, `--check` compares it with what is recorded there. All
supported versions: `make triton-table`, which is `tests.kernels.triton_versions`.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
import triton

from tests.kernels.aot import Compiled, Specialization, compile_launch, specialization_of
from tests.kernels.catalogue import LAUNCHES
from tests.kernels.launches import Launch, Product

FOLDER = Path(__file__).parent / "compiled"
MOST_SHARED_BYTES = 227 * 1024
HEADINGS = ("kernel", "launch", "registers", "spilled bytes", "shared bytes", "warps", "tensor cores", "TMA")
COMMAND = "make triton-table"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        failure: why it was not compiled; empty if it was.
        tensor_cores: the types that they multiply, as in `wgmma e4m3`; empty if they are not used.
    """

    name: str
    shape: str
    product: Product | None
    failure: str = ""
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    num_warps: int = 0
    tensor_cores: str = ""
    tma: str = ""

    def broken_rules(self) -> list[str]:
        broken: list[str] = []
        subject = f"{self.name}, {self.shape}"
        if self.failure:
            return [f"{subject}: must compile, got {self.failure}"]
        if self.spill_bytes:
            broken.append(f"{subject}: registers must not spill, got {self.spill_bytes} bytes")
        if self.shared_bytes > MOST_SHARED_BYTES:
            broken.append(f"{subject}: shared memory must be at most 227 KiB, got {self.shared_bytes} bytes")
        if self.product is not None:
            expected = "wgmma e4m3" if self.product.is_fp8 else "wgmma bf16"
            if self.tensor_cores != expected:
                broken.append(f"{subject}: must multiply by {expected}, got '{self.tensor_cores}'")
        return broken

    def cells(self) -> tuple[str, ...]:
        if self.failure:
            return (self.name, self.shape, f"failed: {self.failure}", *("",) * 5)
        numbers = (self.registers, self.spill_bytes, self.shared_bytes, self.num_warps)
        return (self.name, self.shape, *map(str, numbers), self.tensor_cores, self.tma)


def recorded_launches() -> list[Launch]:
    """Returns all launches, one for each different machine code: of equal ones the first."""
    seen: list[Specialization] = []
    chosen = []
    for launch in LAUNCHES:
        module = import_module(launch.module)
        specialization = specialization_of(module, launch.kernel, launch.call(torch.device("cpu")))
        if specialization not in seen:
            seen.append(specialization)
            chosen.append(launch)
    return chosen


def row_of(launch: Launch) -> Row:
    module = import_module(launch.module)
    row = Row(name=launch.name, shape=launch.shape, product=launch.product)
    try:
        compiled = compile_launch(module, launch.kernel, launch.call(torch.device("cpu")))
    except Exception as error:  # of many kinds: passes of the compiler, ptxas, the kernel's own source
        return replace(row, failure=f"{type(error).__name__}: {error}".splitlines()[0])
    return replace(
        row,
        registers=compiled.registers,
        spill_bytes=compiled.spill_bytes,
        shared_bytes=compiled.shared_bytes,
        num_warps=compiled.num_warps,
        tensor_cores=_tensor_cores(compiled),
        tma=" ".join(_tma(compiled)),
    )


def _tensor_cores(compiled: Compiled) -> str:
    """Names and operands' types of the instructions that multiply matrices."""
    found = compiled.instructions(r"(wgmma\.mma_async|mma\.sync)\.")
    # As in wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3
    return " ".join(sorted({f"{name.split('.')[0]} {name.split('.')[-1]}" for name in found}))


def _tma(compiled: Compiled) -> list[str]:
    directions = {"load": r"\.shared::(cta|cluster)\.global", "store": r"\.global\.shared::cta"}
    return [
        name for name, pattern in directions.items() if compiled.instructions(rf"cp\.async\.bulk\.tensor.*{pattern}")
    ]


def rows(num_processes: int = 1) -> list[Row]:
    """Compiles each different machine code; in several processes if asked for."""
    launches = recorded_launches()
    if num_processes == 1:
        return [row_of(launch) for launch in launches]
    indices = [LAUNCHES.index(launch) for launch in launches]
    with ProcessPoolExecutor(num_processes) as pool:
        return list(pool.map(_row_at, indices))


def _row_at(index: int) -> Row:
    """Compiles a launch by its place in the catalogue: functions do not travel between processes."""
    return row_of(LAUNCHES[index])


def file_of(version: str) -> Path:
    """Returns the path of the recorded table of a Triton version."""
    return FOLDER / f"triton-{version}.md"


def table(found: Sequence[Row]) -> str:
    """Returns the rows as Markdown, the compiler's version first."""
    lines = [" | ".join(cells) for cells in (HEADINGS, ("---",) * len(HEADINGS), *(row.cells() for row in found))]
    head = f"Kernels compiled for sm_90 by Triton {triton.__version__}; written by `{COMMAND} ARGS=--write`."
    return "\n".join([head, "", *(f"| {line} |" for line in lines), ""])


def problems(found: Sequence[Row]) -> list[str]:
    """Returns rules that rows break, and lines in which they differ from the recorded table."""
    broken = [rule for row in found for rule in row.broken_rules()]
    path = file_of(triton.__version__)
    if not path.exists():
        return [*broken, f"{path.name}: must be recorded; {COMMAND} ARGS=--write"]
    recorded = path.read_text().splitlines()
    return [*broken, *difflib.unified_diff(recorded, table(found).splitlines(), path.name, "compiled now", n=0)]


def main() -> int:
    """Compiles, and prints, writes or checks the table; the exit code is 1 if a check fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.compiled_table", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"record the table in {FOLDER.name}/")
    parser.add_argument("--check", action="store_true", help="compare with the recorded table")
    parser.add_argument("--processes", type=int, default=1, help="that compile at the same time")
    arguments = parser.parse_args()
    found = rows(arguments.processes)
    if arguments.write:
        file_of(triton.__version__).write_text(table(found))
    if not arguments.write and not arguments.check:
        print(table(found), end="")
    wrong = problems(found) if arguments.check else [rule for row in found for rule in row.broken_rules()]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"Triton {triton.__version__}: {len(found)} kernels compiled, {len(wrong)} problems", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
