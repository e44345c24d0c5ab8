"""What becomes of every Triton kernel on an H100, as a table: `python -m tests.kernels.compiled_table [--write]`.

Needs no GPU: each launch of `tests.kernels.catalogue` whose machine code differs from the others' is compiled for
sm_90 through its own launcher.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import triton

from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.catalogue import LAUNCHES
from tests.kernels.launches import Launch

FILE = Path(__file__).parent / "compiled.md"
MOST_SHARED_BYTES = 227 * 1024
HEADINGS = ("kernel", "launch", "registers", "spilled bytes", "shared bytes", "warps", "tensor cores", "TMA")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        launch: that was compiled.
        registers: per thread.
        spill_bytes: per thread.
        shared_bytes: of a program.
        num_warps: of a program.
        tensor_cores: the types that they multiply, as in `wgmma e4m3`; empty where they are not used.
        tma: what is moved by descriptor: `load`, `store` or both.
    """

    launch: Launch
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    tensor_cores: str
    tma: str

    def broken_rules(self) -> list[str]:
        """Rules that no kernel may break; empty where all is well."""
        broken = []
        if self.spill_bytes:
            broken.append(f"{self.launch.name}: registers must not spill, got {self.spill_bytes} bytes")
        if self.shared_bytes > MOST_SHARED_BYTES:
            broken.append(f"{self.launch.name}: shared memory must be at most 227 KiB, got {self.shared_bytes} bytes")
        if self.launch.product is not None:
            expected = "wgmma e4m3" if self.launch.product.is_fp8 else "wgmma bf16"
            if self.tensor_cores != expected:
                broken.append(f"{self.launch.name}: must multiply by {expected}, got '{self.tensor_cores}'")
        return broken

    def cells(self) -> tuple[str, ...]:
        """The row's text."""
        numbers = (self.registers, self.spill_bytes, self.shared_bytes, self.num_warps)
        return (self.launch.name, self.launch.shape, *map(str, numbers), self.tensor_cores, self.tma)


def row_of(launch: Launch) -> Row:
    """Compiles one launch."""
    module = import_module(launch.module)
    compiled = compile_launch(module, launch.kernel, launch.call(torch.device("cpu")))
    return Row(
        launch=launch,
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


def rows() -> list[Row]:
    """Of all launches that are recorded."""
    return [row_of(launch) for launch in LAUNCHES if launch.is_recorded]


def table(found: Sequence[Row]) -> str:
    """Markdown, with the compiler's version first."""
    lines = [" | ".join(cells) for cells in (HEADINGS, ("---",) * len(HEADINGS), *(row.cells() for row in found))]
    command = "python -m tests.kernels.compiled_table --write"
    head = f"Kernels compiled for sm_90 by Triton {triton.__version__}; written by `{command}`."
    return "\n".join([head, "", *(f"| {line} |" for line in lines), ""])


def main() -> None:
    """Compiles, and prints or writes the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.compiled_table", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"to {FILE.name}, beside this module")
    arguments = parser.parse_args()
    found = rows()
    if arguments.write:
        FILE.write_text(table(found))
    else:
        print(table(found), end="")
    for row in found:
        print(*row.broken_rules(), sep="\n", end="\n" if row.broken_rules() else "")


if __name__ == "__main__":
    main()
