"""Tests of the check of a node before ranks start: every problem is one line that names the node."""

import ctypes
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from launch.ranks import machine
from launch.slurm import health
from launch.slurm.health import gpu_problems, host_problems, main, reach_problems
from tests.ports import reserved_port

GB = 10**9


def test_gpus_must_be_visible_and_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "device_memory_bytes", lambda kind: (80 * GB, 80 * GB, 3 * GB))
    assert list(gpu_problems(3, 2 * GB, {})) == []
    assert list(gpu_problems(0, 2 * GB, {})) == []
    assert list(gpu_problems(4, 2 * GB, {})) == ["GPUs: 4 must be visible, 3 are"]
    assert list(gpu_problems(3, 2 * GB, {"CUDA_VISIBLE_DEVICES": "0,1"})) == ["GPUs: 3 must be visible, 2 are"]
    assert list(gpu_problems(3, 70 * GB, {})) == ["GPU 2: must have 70.0 GB free as predicted, has 3.0"]


def test_free_memory_is_that_of_the_driver() -> None:
    class Driver:
        """The part of NVIDIA's management library that is used, with two GPUs."""

        nvmlInit_v2 = nvmlShutdown = staticmethod(lambda: 0)
        nvmlDeviceGetHandleByIndex_v2 = staticmethod(lambda index, device: 0)

        def nvmlDeviceGetCount_v2(self, count: Any) -> int:
            count._obj.value = 2
            return 0

        def nvmlDeviceGetMemoryInfo(self, device: ctypes.c_void_p, memory: Any) -> int:
            memory._obj.total, memory._obj.free = 80 * GB, 0
            return 0

    memories = machine._device_memories(Driver())  # type: ignore[arg-type]
    assert [(memory.total, memory.free) for memory in memories] == [(80 * GB, 0)] * 2


def test_host_memory_must_be_free() -> None:
    assert list(host_problems(1)) == []
    (problem,) = host_problems(10**18)
    assert problem.startswith("memory: 1000000000.0 GB must be free, ")


def test_nodes_must_reach_the_first_one() -> None:
    found: dict[int, list[str]] = {}

    def check(index: int, master: str, num_nodes: int) -> None:
        seconds = 5.0 if num_nodes == 3 else 0.5
        found[index] = list(reach_problems(master, f"n{index}", index, num_nodes, seconds))

    with reserved_port() as port:
        for num_nodes in (3, 4):  # the fourth is absent
            threads = [threading.Thread(target=check, args=(i, f"127.0.0.1:{port}", num_nodes)) for i in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            absent = [f"127.0.0.1:{port}: 3 nodes must reach this port, 2 did: timed out"]
            assert found == {0: [] if num_nodes == 3 else absent, 1: [], 2: []}
        # The port is free for the ranks at once.
        socket.create_server(("127.0.0.1", port)).close()
        (problem,) = reach_problems(f"127.0.0.1:{port}", "n1", 1, 2, seconds=0.1)
        assert problem.startswith(f"127.0.0.1:{port}: must be reachable, is not: ")


def test_node_that_fails_prints_one_line_for_each_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health, "device_memory_bytes", lambda kind: (80 * GB,))
    environment = {"SLURMD_NODENAME": "n7", "SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "1"}
    with reserved_port() as port:
        given = ["ranks=2", "rank_bytes=1000", f"master=127.0.0.1:{port}"]
        assert main([*given, "gpus=1", f"folder={tmp_path}"], environment) == 0
        assert list(tmp_path.iterdir()) == []
        assert main([*given, "gpus=2", f"folder={tmp_path / 'absent'}"], environment) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: node n7: GPUs: 2 must be visible, 1 are"
    assert second.startswith(f"error: node n7: out_dir: '{tmp_path / 'absent'}' must be writable, is not: ")
