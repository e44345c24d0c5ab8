"""Memory that nothing uses goes back to the system, at its time."""

import subprocess
import sys
from pathlib import Path

import pytest

from train.heap import Trimmer

ROOT = Path(__file__).resolve().parents[2]

# 200 MB of freed blocks, each held in its place by a small one that lives on; then the memory before and after.
_HOLES = """
import ctypes
from pathlib import Path
from train.heap import Trimmer

def resident_kib():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
before, blocks = resident_kib(), []
for _ in range(2000):
    blocks.append(libc.malloc(ctypes.c_size_t(100_000)))
    ctypes.memset(blocks[-1], 1, 100_000)
    libc.malloc(ctypes.c_size_t(1000))
for block in blocks:
    libc.free(ctypes.c_void_p(block))
with_holes = resident_kib()
assert Trimmer(every_seconds=0.0).trim_when_due()
print(with_holes - before, resident_kib() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and the heap is glibc's")
def test_trimmer_gives_back_what_lies_between_blocks_that_live() -> None:
    told = subprocess.run(
        [sys.executable, "-c", _HOLES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    with_holes, trimmed = map(int, told)
    assert with_holes > 150_000
    assert trimmed < 0.2 * with_holes


def test_trimmer_trims_no_more_often_than_it_is_to() -> None:
    now = [100.0]
    trimmer = Trimmer(every_seconds=30.0, clock=lambda: now[0])
    seen = []
    for now[0] in (100.0, 129.9, 130.0, 131.0, 159.9, 160.5):
        seen.append(trimmer.trim_when_due())
    assert seen == [False, False, True, False, False, True]
