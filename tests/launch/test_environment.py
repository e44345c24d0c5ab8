"""Tests of a rank's environment variables."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.ranks.environment import rank_environment
from tests.launch.test_config import build

ROOT = Path(__file__).resolve().parents[2]

# Starts threads that all hold memory at the same time, then prints glibc's information about its heaps.
_HEAPS = """
import ctypes, threading
from launch.ranks.environment import apply_rank_environment
from tests.launch.test_config import build

apply_rank_environment(build().cluster)
libc, barrier = ctypes.CDLL(None), threading.Barrier(8)

def hold():
    kept = [bytearray(10_000) for _ in range(100)]
    barrier.wait()
    del kept

threads = [threading.Thread(target=hold) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def test_environment_follows_threads_and_yields_to_the_user_in_the_rest() -> None:
    cluster = build().cluster
    set_by_user = {"OMP_NUM_THREADS": "64", "OMP_WAIT_POLICY": "ACTIVE", "HOME": "/"}
    chosen = rank_environment(cluster, set_by_user)
    assert chosen["OMP_NUM_THREADS"] == str(cluster.threads_per_rank)
    assert chosen["OMP_WAIT_POLICY"] == "ACTIVE"
    assert chosen["DS_ACCELERATOR"] == "cpu"
    assert "HOME" not in chosen


def test_environment_leaves_torchs_own_record_to_nccl() -> None:
    cluster = build().cluster
    assert rank_environment(cluster, {})["TORCH_FR_BUFFER_SIZE"] == "0"
    assert rank_environment(cluster, {"TORCH_FR_BUFFER_SIZE": "9"})["TORCH_FR_BUFFER_SIZE"] == "9"
    assert "TORCH_FR_BUFFER_SIZE" not in rank_environment(replace(cluster, device="cuda", backend="nccl"), {})


# Allocates and frees 24 MiB in parts twice; prints the page faults of the second time.
_FAULTS = """
import resource, sys
from launch.ranks.environment import apply_rank_environment
from tests.launch.test_config import build

if sys.argv[1] == "set":
    apply_rank_environment(build().cluster)

def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [bytearray(b"1") * 2**20 for _ in range(24)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fill(), fill()
print(fill())
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="pages are kept by glibc's allocator, which is Linux's"
)
def test_environment_keeps_the_pages_of_freed_tensors() -> None:
    def faults(mode: str) -> int:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        command = [sys.executable, "-c", _FAULTS, mode]
        return int(subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=True).stdout)

    assert faults("unset") > 1000
    assert faults("set") < 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="heaps of threads are glibc's, which is Linux's")
@pytest.mark.parametrize(("by_user", "most"), [(None, 1), ("3", 3)])
def test_environment_gives_a_ranks_threads_one_heap_unless_the_user_chose(by_user: str | None, most: int) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    environment = inherited if by_user is None else inherited | {"MALLOC_ARENA_MAX": by_user}
    done = subprocess.run(
        [sys.executable, "-c", _HEAPS], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert done.count("<heap nr=") == most
