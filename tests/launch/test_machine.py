"""Machines and nodes that cannot run the ranks are detected before they start, and mistakes get advice."""

import ctypes
import importlib
import os
import resource
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from launch import train, verify
from launch.cli.entry import command
from launch.cli.help import alias_overrides, aliases, find_commands
from launch.config.compose import compose_defaults, default_groups, known_keys
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
from tests.commands import run_python
from tests.launch.test_config import build
from tests.ports import reserved_port
from tests.refusals import assert_refused
from train.errors import ConfigError


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


CPU_SECONDS = 3.0

HUB = "deepseek-ai/DeepSeek-V3"

# What is typed after `python -m launch.train`, and what the one line must say.
MISTAKES: list[tuple[list[str], str]] = [
    (["lr=1e-4"], "optim.learning_rate=1e-4"),
    (["--lr", "1e-4"], "optim.learning_rate=1e-4"),
    (["--lr=1e-4"], "optim.learning_rate=1e-4"),
    (["--learning-rate=1e-4"], "optim.learning_rate"),
    (["optim.lr=1e-4"], "optim.learning_rate=1e-4"),
    (["+lr=1e-4"], "optim.learning_rate=1e-4"),
    (["lr", "1e-4"], "optim.learning_rate=1e-4"),
    (["warmup_steps=10"], "'optim.schedule.warmup=10 steps'"),
    (["gradient_accumulation_steps=4"], "batch.global_sequences="),
    (["ep=8"], "parallelism.data=8 parallelism.expert=8"),
    (["tensor_model_parallel_size=2"], "no tensor parallelism"),
    (["dataset=[a.txt,b.txt]"], "data=files 'data.paths=[a.txt,b.txt]'"),
    (["dataset=a.txt"], "data=files 'data.paths=[a.txt]'"),
    (["--steps", "200"], "task.steps"),
    (["hidden_size=64"], "model.hidden_size"),
    (["out=here"], "out_dir"),
    ([f"model={HUB}"], f"hf download {HUB} --local-dir DeepSeek-V3"),
    ([f"model={HUB}"], "model=of_checkpoint init_from=DeepSeek-V3"),
    (["model=of_checkpoint", f"init_from={HUB}"], "hf download"),
    ([f"data.tokenizer={HUB}"], "hf download"),
    (["model=moonlight"], "moonlight_16b"),
    (["Model=Tiny"], "model=tiny"),
    (["SEED=3"], "seed=3"),
    (["data.paths=[corpus.txt]"], "data=files"),
    (["data=files", "data.paths=corpus.txt"], "data.paths=[corpus.txt]"),
    (["data=files", "data.paths=[a=b.txt]"], "\"data.paths=['a=b.txt']\""),
    (["corpus.txt"], "data=files 'data.paths=[corpus.txt]'"),
    (["out_dir=a,b"], "\"out_dir='a,b'\""),
    (["out_dir=a=b"], "\"out_dir='a=b'\""),
    (["out_dir=my", "run"], "'out_dir=my run'"),
    (["samples.prompt=def f(x"], "\"samples.prompt='def f(x'\""),
    (["name=my run"], "my-run"),
    (["model", "=", "tiny"], "model=tiny"),
    (["model=", "tiny"], "model=tiny"),
    (["model", "=tiny"], "model=tiny"),
    (["model = tiny"], "model=tiny"),
    (["seed:3"], "seed=3"),
    (["seed", "3"], "seed=3"),
    (["--seed", "3"], "seed=3"),
    (["seed"], "seed=0"),
    (["tiny"], "model=tiny"),
    (["--dry-run"], "dry_run=true"),
    (["+seed=3"], "seed=3"),
    (["model.new_key=3"], "model."),
    (["--resume"], "resume=null"),
    (["config_only"], "config_only=true"),
    (["config_olny=true"], "config_only"),
    (["seed=abc"], "a whole number"),
    (["seed="], "seed"),
    (["model="], "quickstart"),
    (["task.steps="], "a whole number"),
]  # fmt: skip

# Overrides, and a part of each line of the answer.
FIRST_MISTAKES = """
batch.sequence_length_tokens=4k => batch.sequence_length_tokens=4096
task.steps=10k => task.steps=10000
task.steps=1,000 => task.steps=1000
cluster.memory_bytes=80GB => cluster.memory_bytes=80000000000
cluster.memory_bytes=80GiB => cluster.memory_bytes=85899345920
cluster.host_memory_bytes=1TB => cluster.host_memory_bytes=1000000000000
cluster.timeout_seconds=30min => cluster.timeout_seconds=1800
cluster.timeout_seconds=1h => cluster.timeout_seconds=3600
cluster.memory_bytes=80 GB => 'cluster.memory_bytes=80 GB'
optim.weight_decay=0,1 => optim.weight_decay=0.1
seq_len=4k => batch.sequence_length_tokens=4096
tp=2 => no tensor parallelism
bs=8 => batch.global_sequences=8
max_seq_len=4096 => batch.sequence_length_tokens=4096
gpus=4 => parallelism=four_ranks
nproc=8 => parallelism=eight_ranks
world_size=8 => parallelism=eight_ranks
nodes=2 => cluster.ranks_per_node
fp16=true => precision=bf16
zero=1 => optim.sharding=zero1
fsdp=true => optim.sharding=zero1
deepspeed=ds.json => optim.sharding=zero1
save_every=100 => checkpointing.every_steps=100
checkpoint.interval=100 => checkpointing.every_steps=100
warmup_ratio=0.03 => 'optim.schedule.warmup=3 %'
training.steps=100 => task.steps=100
partition=gpu => python -m launch.submit slurm.partition=gpu
memory=40GB => cluster.memory_bytes=40000000000
ckpt=outputs/x => resume=outputs/x
steps=100 => task.steps=100
recompute=true => 'recompute=[norm,mla_up,swiglu]'
recompute=none => recompute=[]
resume=true => resume=auto
resume=last => resume=auto
--config train.yaml => experiment=quickstart
config.yaml => experiment=quickstart
--help-all => --help all
-m seed=1 => one command is one run
model=DeepSeek-V3 => model=v3_671b
model=671b => model=v3_671b
model.flavor=671B => model=v3_671b
schedule=zero_bubble => schedule=zb_v
schedule=1F1B => schedule=1f1b
precision=fp32 => precision=float32
precision=fp16 => precision=bf16
--precision fp32 => precision=float32
optim=muon => optim=adamw
track=tensorboard => track=wandb_offline
parallelism=8 => parallelism=eight_ranks
data_path=a.txt => data=files 'data.paths=[a.txt]'
out_dir=s3://bucket/run => out_dir: must be a path on this machine
data=files data.paths=[hf://a/b] => 'data.paths=[b]'
resume=gs://bucket/run => resume: must be a path on this machine
optim.schedule.warmup=2000 steps => 'optim.schedule.warmup=2000 steps'
warmup=2000 steps => 'optim.schedule.warmup=2000 steps'
--lr 1e-4 --batch_size 8 => optim.learning_rate=1e-4 => batch.global_sequences=8
precision=fp32 lr=1 task.steps=10k => precision=float32 => optim.learning_rate=1 => task.steps=10000
model=nonesuch model.num_layers=4 => model: no option nonesuch
num_attention_heads=8 => model.num_heads=8
save_strategy=steps => checkpointing.every_steps=50
offload=cpu => optim.offload=true
validation=none => validation.sequences=0
profile=true => profile=steps
lr=1 samples.prompt=http://a => optim.learning_rate=1
"""


def run_command(
    name: str,
    arguments: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_lines: int = 1,
) -> str:
    """Runs a command in this process until it is rejected. Returns its lines on stderr."""
    module = importlib.import_module(f"launch.{name}")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    code = command(name, module.main, module.preview)
    captured = capsys.readouterr()
    assert code == 2, f"{arguments}: exit code {code}, {captured}"
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert len(lines) == num_lines, (arguments, lines)
    return captured.err.strip()


def test_advice_of_a_first_mistake_is_one_line_and_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_run_local", lambda config: pytest.fail("ranks start"))
    for arguments, advice in MISTAKES:
        line = run_command("train", arguments, monkeypatch, capsys)
        assert advice in line, arguments
    for case in FIRST_MISTAKES.strip().splitlines():
        overrides, *parts = case.split(" => ")
        lines = run_command("train", overrides.split(), monkeypatch, capsys, len(parts)).splitlines()
        assert [part for part, line in zip(parts, lines, strict=True) if part not in line] == [], (case, lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "advice"),
    [
        ("generate", [f"ckpt={HUB}", "prompt=a"], "hf download"),
        ("generate", ["outputs/run"], "ckpt=outputs/run"),
        ("generate", ["ckpt=run", "prompt=hello", "world"], "'prompt=hello world'"),
        ("generate", ["ckpt=run", "prompt=a", "max_tokens=5"], "max_new_tokens"),
        ("generate", ["--prompt", "hello"], "prompt=hello"),
        ("convert", [f"path={HUB}", "from=hf", "to=x"], "hf download"),
        ("redraw", ["outputs/run"], "run=outputs/run"),
        ("redraw", ["my_run"], "run=my_run"),
        ("convert", ["my_weights"], "path=my_weights"),
        ("submit", ["lr=1e-4"], "optim.learning_rate=1e-4"),
        ("submit", ["--partition=gpu"], "slurm.partition"),
        ("plan", ["batch_size=8"], "batch.global_sequences=8"),
        ("plan", ["cluster.memory_bytes=80GB"], "cluster.memory_bytes=80000000000"),
        ("verify", ["tp=2"], "no tensor parallelism"),
        ("generate", ["ckpt=s3://bucket/run", "prompt=a"], "ckpt: must be a path on this machine"),
        ("generate", ["ckpt=a", "prompt=a", "fp16=true"], "dtype=bf16"),
        ("serve", ["ckpt=a", "tp=2"], "ranks=2"),
        ("serve", ["model=a"], "ckpt=a"),
        ("serve", ["ckpt=a", "drain_seconds=1min"], "drain_seconds=60"),
        ("sample", ["n=4"], "num_samples=4"),
        ("sample", ["temperature=0,7"], "temperature=0.7"),
        ("evaluate", ["model=a"], "ckpt=a"),
        ("prepare", ["data.manifest=a.yaml", "out=b", "unit_bytes=64MB"], "unit_bytes=64000000"),
        ("prepare", ["num_proc=4"], "workers=4"),
        ("schedule", ["schedule=zero_bubble"], "schedule=zb_v"),
        ("schedule", ["pp=8"], "num_ranks=8"),
        ("submit", ["--partition", "gpu"], "slurm.partition=gpu"),
    ],
)
def test_advice_of_every_other_command(
    name: str, arguments: list[str], advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert advice in run_command(name, arguments, monkeypatch, capsys)


def test_no_key_has_the_name_of_an_alias_and_what_they_recommend_composes() -> None:
    names = [command.name for command in find_commands()]
    known = {name: {*known_keys(name), *default_groups(name)} for name in names}
    batches: dict[str, list[dict[str, str]]] = {name: [] for name in names}  # one command line has many keys
    for alias in aliases():
        key, _, value = alias.partition("=")
        prefix, _, rest = key.partition(".")
        chosen = [prefix] if prefix in names and rest else ["train", *names]
        key = rest if chosen == [prefix] else key
        advice = {name: alias_overrides(name, key, value or "5") for name in chosen}
        name = next((name for name in advice if advice[name] is not None), None)
        assert name is not None, alias
        if not value:
            assert key not in known[name], alias
        why, overrides = advice[name] or ("", [])
        assert why
        if overrides[0] in ("--help", "python"):
            continue
        keys = {text.partition("=")[0]: text for text in overrides}
        if not keys.keys().isdisjoint(default_groups(name)):  # an option changes which keys there are
            batches[name] += [keys] if keys not in batches[name] else []
            continue
        values = [line for line in batches[name] if line.keys().isdisjoint(default_groups(name))]
        batch = next((line for line in values if all(line.get(key, keys[key]) == keys[key] for key in keys)), None)
        if batch is None:
            batches[name].append(batch := {})
        batch |= keys
    for name, lines in batches.items():
        for line in lines:
            compose_defaults(name, list(line.values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["launch", "train", "--lr", "1"], "optim.learning_rate=1"),
        (["launch.train", "cluster=h100"], "cluster.device: cuda needs a"),
    ],
)
def test_advice_takes_less_than_3_seconds_of_cpu_time(arguments: list[str], advice: str, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_python("-m", *arguments, cwd=tmp_path, changes={"CUDA_VISIBLE_DEVICES": ""})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert advice in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
    assert list(tmp_path.iterdir()) == []


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
