"""Machines and nodes that cannot run the ranks are detected before they start, and mistakes get advice."""

import ctypes
import os
import socket
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from base.refusal import ConfigError
from launch import train, verify
from launch.config.rules import check_attention
from launch.ranks import machine
from launch.ranks.machine import (
    MachineError,
    check_driver,
    check_environment,
    check_gpus,
    check_node,
    check_packages,
    gpu_problems,
    has_driver,
    host_problems,
    rank_environment,
    reach_problems,
    torch_has_cuda,
)
from tests import ROOT
from tests.commands import run_command as run_command_in_fork
from tests.launch.test_config import build
from tests.ports import reserved_port
from tests.refusals import assert_refused


def test_driver_is_found_by_its_library() -> None:
    assert has_driver(["libc.so.6"])
    assert not has_driver(["lib-unknown.so.1"])


def test_torch_build_is_that_of_torch_itself() -> None:
    assert torch_has_cuda() == (torch.version.cuda is not None)


def test_cpu_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_driver", lambda: pytest.fail("looks for a driver"))
    check_driver("cpu", "cluster.device")
    check_gpus(build(), 8)
    check_packages(build())


@pytest.mark.parametrize(
    ("driver", "build_has_cuda", "rule"),
    [(False, True, "this machine has none"), (True, False, f"torch {torch.__version__} was not")],
)
def test_machine_without_driver_or_cuda_build_is_rejected(
    driver: bool, build_has_cuda: bool, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_driver", lambda: driver)
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: build_has_cuda)
    parts = ["cluster.device: cuda needs", rule, "nearest valid: cluster=laptop"]
    assert_refused(MachineError, parts, lambda: check_driver("cuda", "cluster.device"))


@pytest.mark.parametrize(
    ("cluster", "found", "has_nccl", "local", "parts"),
    [
        ("h100", 0, True, 4, ["cluster.device: ", "CUDA_VISIBLE_DEVICES=0,9 shows none"]),
        ("one_gpu", 0, True, 4, ["cluster.device: ", "cluster=laptop"]),
        ("h100", 2, True, 4, ["cluster.backend: ", "each of the 4 ranks", "shows 2", "cluster=one_gpu"]),
        ("h100", 4, False, 4, ["cluster.backend: nccl must be part of torch", "cluster.backend=gloo"]),
    ],
)
def test_machine_with_too_little_is_rejected(
    cluster: str, found: int, has_nccl: bool, local: int, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,9")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    config = build("parallelism=four_ranks", f"cluster={cluster}")
    assert_refused(MachineError, parts, lambda: check_gpus(config, local))


@pytest.mark.parametrize(("cluster", "found"), [("h100", 4), ("one_gpu", 1)])
def test_machine_with_enough_is_taken(cluster: str, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    check_gpus(build("parallelism=four_ranks", f"cluster={cluster}"), 4)


UNSAFE = [
    ("CUDA_DEVICE_MAX_CONNECTIONS=1", "above 1 with schedule.pairing=overlapped"),
    ("CUDA_DEVICE_MAX_CONNECTIONS=x", "above 1 with schedule.pairing=overlapped"),
    ("CUDA_MODULE_LOADING=LAZY", "EAGER"),
    ("CUDA_MODULE_LOADING=DEFAULT", "EAGER"),
    ("CUDA_LAUNCH_BLOCKING=1", "0, because a receive"),
    ("NCCL_LAUNCH_ORDER_IMPLICIT=1", "0, because three threads"),
    ("NCCL_MIN_CTAS=16", "at most 2"),
    ("NCCL_MAX_CTAS=3", "at most 2"),
    ("NCCL_MAX_CTAS=-1", "at most 2"),
    ("NCCL_MIN_NCHANNELS=32", "at most 2"),
    ("NCCL_MIN_P2P_NCHANNELS=8", "at most 2"),
]
SAFE = "CUDA_MODULE_LOADING=EAGER CUDA_LAUNCH_BLOCKING=0 NCCL_LAUNCH_ORDER_IMPLICIT=0 NCCL_MIN_CTAS=1 NCCL_MAX_CTAS=2"


@pytest.mark.parametrize(("variable", "rule"), UNSAFE, ids=[case[0] for case in UNSAFE])
def test_unsafe_variable_is_rejected_for_ranks_on_nccl(variable: str, rule: str) -> None:
    name, value = variable.split("=")
    config = build("parallelism=four_ranks", "cluster=h100")
    parts = [f"{name}: must be {rule}", f", is {value}; nearest valid: "]
    assert_refused(MachineError, parts, lambda: check_environment(config, {name: value}))
    check_environment(config, {name: ""})
    check_environment(build("parallelism=four_ranks"), {name: value})
    check_environment(build("parallelism=one_rank", "cluster=h100"), {name: value})


def test_safe_variables_are_taken_for_ranks_on_nccl() -> None:
    config = build("parallelism=four_ranks", "cluster=h100")
    safe = dict(variable.split("=") for variable in SAFE.split())
    check_environment(config, safe | rank_environment(config.cluster, {}))
    sequential = build("parallelism=four_ranks", "cluster=h100", "schedule.pairing=sequential")
    check_environment(sequential, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})


@pytest.mark.parametrize("program", [train, verify])
@pytest.mark.parametrize("rank", [None, "0", "8", "1"])
def test_commands_check_variables_on_the_first_rank_of_each_node(
    program: ModuleType, rank: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do so before they look for a GPU; a rank that is not the first of its node leaves it to that one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_MAX_CTAS", "32")
    monkeypatch.setattr(program, "check_driver", lambda *args: pytest.fail("looks for a driver"))
    monkeypatch.setattr(program, "_run_as_rank", lambda *args: 0)
    if rank is not None:
        torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": rank, "LOCAL_RANK": str(int(rank) % 8)}
        for name, value in torchrun.items():
            monkeypatch.setenv(name, value)
    overrides = ["parallelism=four_ranks", "cluster=h100"]
    if rank == "1":
        assert program.main(overrides) == 0
    else:
        assert_refused(MachineError, ["NCCL_MAX_CTAS: must be at most 2"], lambda: program.main(overrides))
    assert list(tmp_path.iterdir()) == []


def test_package_of_an_attention_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.attention.has_module", lambda name: False)
    with pytest.raises(MachineError, match=r"^attention: flash_attention needs the package flash_attn"):
        check_packages(build("cluster=one_gpu", "precision=bf16", "attention=flash_attention"))
    check_packages(build("attention=deterministic"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"^dispatch: deepep needs the package deep_ep .* dispatch=two_hop$"):
        check_packages(build("cluster=h800", "dispatch=deepep", "precision=bf16", "model.hidden_size=256"))
    on_gpu = ("cluster=one_gpu", "attention=deterministic")
    with pytest.raises(MachineError, match=r"^attention: deterministic needs a package of .*attention=auto$"):
        check_packages(build(*on_gpu, "precision=bf16"))
    with pytest.raises(ConfigError, match=r"^attention: deterministic needs precision=bf16 .*valid: auto$"):
        check_attention(build(*on_gpu, "precision=float32"))


def test_online_wandb_needs_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = build("track=wandb_online")
    with pytest.raises(MachineError, match=r"^track.wandb: online needs a login, there is none; nearest valid: wandb"):
        check_packages(config)
    monkeypatch.setenv("RANK", "1")  # another node may have none
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    check_packages(config)


@pytest.mark.slow
@pytest.mark.skipif(has_driver(), reason="this machine has NVIDIA's driver")
@pytest.mark.parametrize("rank", ["0", "8", "9"])
def test_rank_of_torchrun_says_it_once_on_each_node(rank: str, tmp_path: Path) -> None:
    """Ranks 0 and 8 are the first of their nodes; the others wait for the end that these bring."""
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "3", "RANK": rank, "LOCAL_RANK": str(int(rank) % 8)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **torchrun}
    done = run_command_in_fork(["-m", "launch.train", "cluster=h100"], cwd=tmp_path, env=environment)
    assert done.returncode == 2
    # Rank 9 is refused for the wrong WORLD_SIZE, which rank 0 reports for all.
    assert done.stderr.count("cuda needs a GPU") == (rank != "9")
    assert list(tmp_path.iterdir()) == []


def test_submit_and_config_only_do_not_look_at_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_driver", lambda: pytest.fail("looks for a driver"))
    assert "override /cluster: h100" in train.preview(["cluster=h100"])


GB = 10**9


def test_gpus_must_be_visible_and_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_memory_bytes", lambda kind: (80 * GB, 80 * GB, 3 * GB))
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


@pytest.mark.slow
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
    monkeypatch.setattr(machine, "device_memory_bytes", lambda kind: (80 * GB,))
    environment = {"SLURMD_NODENAME": "n7", "SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "1"}
    with reserved_port() as port:
        given = ["ranks=2", "rank_bytes=1000", f"master=127.0.0.1:{port}"]
        assert check_node([*given, "gpus=1", f"folder={tmp_path}"], environment) == 0
        assert list(tmp_path.iterdir()) == []
        assert check_node([*given, "gpus=2", f"folder={tmp_path / 'absent'}"], environment) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: node n7: GPUs: 2 must be visible, 1 are"
    assert second.startswith(f"error: node n7: out_dir: '{tmp_path / 'absent'}' must be writable, is not: ")


def test_rank_of_torchrun_whose_device_has_too_little_memory_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object, *, reports_on_stderr: bool) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "train_rank", fail)
    monkeypatch.setattr(train, "out_of_memory_line", lambda config, rules, rank, error: f"memory: rank {rank}: {error}")
    monkeypatch.setenv("RANK", "3")
    assert train._train_as_rank(build()) == 79
    assert capsys.readouterr().err == "error: memory: rank 3: CUDA out of memory. Tried to allocate 2.00 GiB\n"


def test_trackers_are_checked_before_ranks_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages(build(f"track.prometheus={tmp_path}/train.prom", "track.on_end='echo done'"))
    for place in ("9400x", "nohost:99999", f"{tmp_path}/none/train.prom"):
        with pytest.raises(MachineError, match=r"^track\.prometheus: must be HOST:PORT, or .*127\.0\.0\.1:9400$"):
            check_packages(build(f"track.prometheus='{place}'"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(MachineError, match="a free port of this mach"):
        check_packages(build(f"track.prometheus='127.0.0.1:{taken.getsockname()[1]}'"))
    with pytest.raises(ConfigError, match=r"^track\.on_end: must be a command on PATH"):
        check_packages(build("track.on_end=no-such-command-47"))
    monkeypatch.setattr("launch.ranks.machine.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"^track\.tensorboard: needs the package tensorboard, .*track=none$"):
        check_packages(build("track=tensorboard"))
