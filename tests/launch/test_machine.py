"""Tests that a machine that cannot run the ranks is detected before they start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch import train
from launch.ranks import machine
from launch.ranks.machine import MachineError, check_driver, check_gpus, check_packages, has_driver, torch_has_cuda
from tests.launch.test_config import build

ROOT = Path(__file__).resolve().parents[2]


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
    with pytest.raises(MachineError, match=r"^cluster\.device: cuda needs") as refused:
        check_driver("cuda", "cluster.device")
    assert rule in str(refused.value)
    assert "nearest valid: cluster=laptop" in str(refused.value)


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
    with pytest.raises(MachineError) as refused:
        check_gpus(build("parallelism=four_ranks", f"cluster={cluster}"), local)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(("cluster", "found"), [("h100", 4), ("one_gpu", 1)])
def test_machine_with_enough_is_taken(cluster: str, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    check_gpus(build("parallelism=four_ranks", f"cluster={cluster}"), 4)


def test_package_of_an_attention_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.attention.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"^attention: flash_attention needs the package flash_attn"):
        check_packages(build("cluster=one_gpu", "precision=bf16", "attention=flash_attention"))


@pytest.mark.skipif(has_driver(), reason="this machine has NVIDIA's driver")
@pytest.mark.parametrize("rank", ["0", "8", "9"])
def test_rank_of_torchrun_says_it_once_on_each_node(rank: str, tmp_path: Path) -> None:
    """Ranks 0 and 8 are the first of their nodes; the others wait for the end that these bring."""
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "3", "RANK": rank, "LOCAL_RANK": str(int(rank) % 8)}
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", "cluster=h100"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **torchrun},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    # Rank 9 is refused for the wrong WORLD_SIZE, which rank 0 reports for all.
    assert done.stderr.count("cuda needs a GPU") == (rank != "9")
    assert list(tmp_path.iterdir()) == []


def test_submit_and_config_only_do_not_look_at_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_driver", lambda: pytest.fail("looks for a driver"))
    assert "override /cluster: h100" in train.preview(["cluster=h100"])
