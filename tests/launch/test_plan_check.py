"""`launch.train` and `launch.submit` refuse what the plan says cannot fit on CUDA; `plan.check=false` overrides."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.config.run_config import check, compose_run
from launch.plan import main
from launch.ranks import machine
from launch.ranks.machine import check_device_memory, device_memory_bytes, has_driver
from train.config import TrainConfig
from train.config.errors import ConfigError
from train.memory import fitted_config, predict_memory

ROOT = Path(__file__).resolve().parents[2]
LARGE = ("cluster=h100", "cluster.memory_bytes=200000000", "cluster.memory_reserve_bytes=0", "model=quickstart")
LARGE += ("batch.micro_sequences=4",)
MESSAGE = "error: memory: rank "


def command(name: str, *overrides: str) -> "subprocess.CompletedProcess[str]":
    arguments = [sys.executable, "-m", f"launch.{name}", *overrides]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "more"), [("train", ()), ("submit", ("dry_run=true",)), ("train", ("config_only=true",))]
)
def test_command_refuses_with_the_plans_message(name: str, more: tuple[str, ...], tmp_path: Path) -> None:
    done = command(name, *LARGE, *more, f"out_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(MESSAGE)
    assert "; nearest: batch.micro_sequences=" in done.stderr
    assert not (tmp_path / "run").exists()


def test_plan_gives_the_reason_of_the_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        check(compose_run(LARGE))
    assert main([*LARGE, "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["reasons"] == [str(refused.value)]


@pytest.mark.skipif(has_driver(), reason="this machine has NVIDIA's driver")
def test_train_without_the_check_goes_on_to_the_machine(tmp_path: Path) -> None:
    done = command("train", *LARGE, "plan.check=false", f"out_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cluster.device: cuda needs a GPU")


def test_submit_without_the_check_prints_a_job_that_skips_it_too(tmp_path: Path) -> None:
    done = command("submit", *LARGE, "plan.check=false", "dry_run=true", f"out_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "plan.check=false" in done.stdout


def one_gpu(*overrides: str) -> TrainConfig:
    return compose_run(["cluster=one_gpu", "model=quickstart", "parallelism=four_ranks", *overrides])


def with_devices(monkeypatch: pytest.MonkeyPatch, *sizes: int) -> None:
    monkeypatch.setattr(machine, "device_memory_bytes", lambda: sizes)


def test_memory_of_the_gpus_is_asked_if_the_cluster_does_not_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_gpu()
    needed = predict_memory(fitted_config(config)).worst.total
    with_devices(monkeypatch, 4 * needed)
    check_device_memory(config, 4)
    with_devices(monkeypatch, needed, needed, needed, needed)
    check_device_memory(config, 4)
    with_devices(monkeypatch, 2 * needed)
    check_device_memory(config, 2)
    with pytest.raises(ConfigError, match=r"^memory: rank \d needs .* GB of .*; nearest: "):
        check_device_memory(config, 4)
    check_device_memory(replace(config, plan=replace(config.plan, check=False)), 4)


@pytest.mark.parametrize("override", ["cluster=laptop", "cluster.memory_bytes=1000", "plan.check=false"])
def test_gpus_are_not_asked_without_need(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_memory_bytes", lambda: pytest.fail("asks the driver"))
    check_device_memory(one_gpu(override), 4)


def test_machine_without_the_library_or_with_another_one_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_memory_bytes(["lib-unknown.so.1"]) == ()
    assert device_memory_bytes(["libc.so.6"]) == ()
    with_devices(monkeypatch)
    check_device_memory(one_gpu(), 4)


@pytest.mark.skipif(not has_driver(), reason="this machine has no driver of NVIDIA")
def test_driver_knows_the_memory_of_its_gpus() -> None:
    assert all(total > 2**30 for total in device_memory_bytes())
    assert device_memory_bytes()
