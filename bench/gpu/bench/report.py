"""Tables of what was measured, with the targets, and the same as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.gpu.bench.contenders import BF16, NAMES, OURS
from bench.gpu.bench.measure import Roofs
from tests.kernels.launches import Launch


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One launch as measured.

    Attributes:
        operations: of a product, else 0.
    """

    kernel: str
    shape: str
    seconds: Mapping[str, float]
    floor_seconds: float
    bytes_moved: int
    operations: int

    @property
    def rate(self) -> str:
        """Operations per second of a product, bytes per second of any other kernel."""
        if self.operations:
            return f"{self.operations / self.seconds[OURS] / 1e12:.0f} TFLOP/s"
        return f"{self.bytes_moved / self.seconds[OURS] / 1e9:.0f} GB/s"

    @property
    def share_of_floor(self) -> float:
        """Least time divided by ours; 1 if nothing is left to gain."""
        return self.floor_seconds / self.seconds[OURS]

    def times_quicker(self, than: str) -> float | None:
        """Returns another's time divided by ours; None if it was not measured."""
        return self.seconds[than] / self.seconds[OURS] if than in self.seconds else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Speed that a kernel must reach.

    Attributes:
        than: the contender that it must be quicker than; None: its floor.
        least: times as quick, or share of the floor.
    """

    subject: str
    kernel: str
    shape: str
    than: str | None
    least: float

    def reached(self, rows: Sequence[Row]) -> float | None:
        """Returns the smallest value of the target's launches; None if none was measured."""
        chosen = [row for row in rows if row.kernel == self.kernel and row.shape.startswith(self.shape)]
        found = [row.share_of_floor if self.than is None else row.times_quicker(self.than) for row in chosen]
        values = [value for value in found if value is not None]
        return min(values) if values and len(values) == len(chosen) else None


TARGETS = (
    Target(
        subject="product in FP8, 4096 x 7168 x 2048, against torch's in bf16",
        kernel="gemm.gemm",
        shape="4096 x 7168 x 2048",
        than=BF16,
        least=1.4,
    ),
    Target(
        subject="grouped products in FP8 against torch's in bf16",
        kernel="gemm.grouped_rows_fp8",
        shape="",
        than=BF16,
        least=1.3,
    ),
    Target(
        subject="quantizing against a copy's bandwidth",
        kernel="quantize.quantize",
        shape="4096 x 7168",
        than=None,
        least=0.8,
    ),
)


def row_of(launch: Launch, seconds: Mapping[str, float], roofs: Roofs) -> Row:
    """Returns a launch with its times."""
    return Row(
        kernel=launch.name,
        shape=launch.shape,
        seconds=dict(seconds),
        floor_seconds=roofs.floor_seconds(launch),
        bytes_moved=launch.bytes_moved,
        operations=0 if launch.product is None else launch.product.operations,
    )


def roofs_text(roofs: Roofs) -> str:
    """Formats the roofs on one line."""
    return (
        f"copy {roofs.copy_bytes_per_second / 1e9:.0f} GB/s, bf16 {roofs.bf16_per_second / 1e12:.0f} TFLOP/s, "
        f"FP8 {roofs.fp8_per_second / 1e12:.0f} TFLOP/s"
    )


def table(rows: Sequence[Row]) -> str:
    """Formats a Markdown table; each contender's column says how many times as long it takes."""
    names = [name for name in NAMES if any(name in row.seconds for row in rows)]
    headings = ["kernel", "shape", "microseconds", "rate", "of floor", *(f"x {name}" for name in names)]
    lines = [headings, ["---"] * len(headings)]
    for row in rows:
        ratios = [row.times_quicker(name) for name in names]
        lines.append(
            [
                row.kernel,
                row.shape,
                f"{row.seconds[OURS] * 1e6:.1f}",
                row.rate,
                f"{row.share_of_floor:.0%}",
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def target_lines(rows: Sequence[Row]) -> tuple[list[str], bool]:
    """Returns a line for each target, and whether all measured targets are met."""
    lines, is_met = list[str](), True
    for target in TARGETS:
        reached = target.reached(rows)
        if reached is None:
            lines.append(f"not measured: {target.subject}: at least {target.least}")
            continue
        is_met &= reached >= target.least
        verdict = "pass" if reached >= target.least else "FAIL"
        lines.append(f"{verdict}: {target.subject}: at least {target.least}, got {reached:.2f}")
    return lines, is_met


def data(machine: Mapping[str, str], roofs: Roofs, rows: Sequence[Row], lines: Sequence[str]) -> dict[str, Any]:
    """Returns all figures, and the lines about targets, for a file."""
    return {
        "machine": dict(machine),
        "roofs": asdict(roofs),
        "rows": [{**asdict(row), "share_of_floor": row.share_of_floor} for row in rows],
        "targets": list(lines),
    }
