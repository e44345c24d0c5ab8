"""Tests of advice: a common mistake prints one line with the right advice, exits with 2, and starts no rank."""

import importlib
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import train
from launch.config.compose import compose, compose_defaults, dotted_keys, switches
from launch.config.groups import default_groups
from launch.help.advice import BARE_PATH, Advice, advice_table, find_advice
from launch.help.command import command
from launch.help.preview import split_switch

ROOT = Path(__file__).resolve().parents[2]
CPU_SECONDS = 3.0
COMMANDS = ("train", "submit", "generate", "sample", "convert", "schedule", "redraw")
HUB = "deepseek-ai/DeepSeek-V3"

# What is typed after `python -m launch.train`, and what the one line must say.
MISTAKES: list[tuple[list[str], str]] = [
    (["lr=1e-4"], "optim.learning_rate=1e-4"),
    (["--lr", "1e-4"], "optim.learning_rate=1e-4"),
    (["--lr=1e-4"], "optim.learning_rate=1e-4"),
    (["--learning-rate=1e-4"], "optim.learning_rate=1e-4"),
    (["optim.lr=1e-4"], "optim.learning_rate=1e-4"),
    (["+lr=1e-4"], "optim.learning_rate=1e-4"),
    (["lr", "1e-4"], "optim.learning_rate=1e-4"),
    (["bs=8"], "batch.global_sequences=8"),
    (["batch=8"], "batch.global_sequences=8"),
    (["batch_size=8"], "batch.global_sequences=8"),
    (["schedule=seq1f1b"], "schedule=sliced_1f1b"),
    (["target_kl=0.3"], "rollout.limits.kl=0.3"),
    (["micro_batch_size=1"], "batch.micro_sequences=1"),
    (["gradient_accumulation_steps=4"], "batch.global_sequences="),
    (["epochs=3"], "batch.global_sequences x batch.sequence_length_tokens tokens"),
    (["epochs=3"], "task.steps=1000"),
    (["seq_len=4096"], "batch.sequence_length_tokens=4096"),
    (["max_length=512"], "batch.sequence_length_tokens=512"),
    (["rope_scaling=yarn"], "task=long_context"),
    (["yarn_factor=8"], "task.rope.factor=8"),
    (["min_document_tokens=8192"], "data.long_documents={min_document_tokens: 8192, share: 0.5}"),
    (["max_steps=200"], "task.steps=200"),
    (["steps=200"], "task.steps=200"),
    (["--steps", "200"], "task.steps=200"),
    (["eval_steps=5"], "validation.every_steps=5"),
    (["save_steps=5"], "checkpointing.every_steps=5"),
    (["log_every=5"], "track.log_every_steps=5"),
    (["wandb=true"], "track=wandb_online"),
    (["wandb=false"], "track=none"),
    (["track=wandb"], "track=wandb_online"),
    (["project=mine"], "track.project=mine"),
    (["run_name=mine"], "name=mine"),
    (["tp=2"], "no tensor parallelism"),
    (["cp=2"], "parallelism.context=2"),
    (["ep=8"], "parallelism.data=8 parallelism.expert=8"),
    (["pp=4"], "parallelism.pipeline=4"),
    (["dp=2"], "parallelism.data=2"),
    (["num_gpus=8"], "parallelism=eight_ranks"),
    (["--nproc_per_node=4"], "parallelism=four_ranks"),
    (["gpus=2"], "parallelism=two_ranks"),
    (["world_size=6"], "parallelism.pipeline x parallelism.data"),
    (["nodes=2"], "experiment=two_nodes"),
    (["mfu=0.4"], "cluster.peak_flops=989e12"),
    (["check_memory=false"], "plan.check=false"),
    (["skip_memory_check=true"], "plan.check=false"),
    (["price=2"], "cluster.dollars_per_gpu_hour=2"),
    (["cost=2.5"], "cluster.dollars_per_gpu_hour=2.5"),
    (["power=700"], "cost.watts_per_gpu=700"),
    (["mtbf=24"], "cost.gpu_mtbf_hours=50000"),
    (["gpu_memory=80"], "cluster.memory_bytes=80000000000"),
    (["bandwidth=400"], "cluster.inter_node_bytes_per_second=50e9"),
    (["zero_stage=3"], "optim.sharding=zero1"),
    (["deepspeed=ds.json"], "optim.sharding=zero1"),
    (["fsdp=true"], "optim.sharding=zero1"),
    (["precision=float16"], "precision=bf16"),
    (["precision=fp16"], "precision=bf16"),
    (["precision=bfloat16"], "precision=bf16"),
    (["precision=mixed"], "precision=bf16"),
    (["precision=fp32"], "precision=float32"),
    (["bf16=true"], "precision=bf16"),
    (["fp8=true"], "precision=fp8"),
    (["dtype=bfloat16"], "precision=bf16"),
    (["compile=true"], "leave it out"),
    ([f"model={HUB}"], f"hf download {HUB} --local-dir DeepSeek-V3"),
    ([f"model={HUB}"], "model=of_checkpoint init_from=DeepSeek-V3"),
    ([f"init_from={HUB}"], f"hf download {HUB} --local-dir DeepSeek-V3"),
    ([f"ckpt={HUB}"], "model=of_checkpoint init_from=DeepSeek-V3"),
    ([f"model=of_checkpoint init_from={HUB}".split()[0], f"init_from={HUB}"], "hf download"),
    ([f"data.tokenizer={HUB}"], "--include 'tokenizer*'"),
    (["model=v3"], "model=v3_671b"),
    (["model=moonlight"], "moonlight_16b"),
    (["model=./weights"], "model=of_checkpoint init_from=./weights"),
    (["Model=Tiny"], "model=tiny"),
    (["SEED=3"], "seed=3"),
    (["num_layers=4"], "model.num_layers=4"),
    (["vocab_size=4096"], "model.vocab_size=4096"),
    (["top_k=2"], "model.num_experts_per_token=2"),
    (["dropout=0.1"], "leave it out"),
    (["optimizer=adam"], "optim=adamw"),
    (["optim=adam"], "optim=adamw"),
    (["lr_scheduler=cosine"], "optim/schedule=cosine"),
    (["warmup=10"], "'optim.schedule.warmup=10 steps'"),
    (["schedule=cosine"], "optim/schedule=cosine"),
    (["gradient_clipping=1.0"], "optim.clip_norm=1.0"),
    (["attention=flash"], "attention=auto"),
    (["flash_attn=true"], "attention=auto"),
    (["dispatch=deep_ep"], "dispatch=deepep"),
    (["data=./corpus.txt"], "data=files 'data.paths=[./corpus.txt]'"),
    (["data.paths=corpus.txt"], "data=files 'data.paths=[corpus.txt]'"),
    (["data=files", "data.paths=corpus.txt"], "data=files 'data.paths=[corpus.txt]'"),
    (["data=files", "data.paths=[texts/*.txt]"], "'data.paths=[texts]'"),
    (["data=files", r"data.paths=[C:\Users\me\a.txt]"], "/mnt/c"),
    (["data=files", "data.paths=[a,b.txt]"], "'a' does not exist"),
    (["data=files", "data.paths=[a,b.txt]"], "\"data.paths=['a,b.txt']\""),
    (["data=files", "data.paths=[a=b.txt]"], "\"data.paths=['a=b.txt']\""),
    (["data.paths=[corpus.txt]"], "data=files 'data.paths=[corpus.txt]'"),
    (["data.files=[a.txt]"], "'data.paths=[a.txt]'"),
    (["dataset=corpus.txt"], "data=files 'data.paths=[corpus.txt]'"),
    (["corpus.txt"], "data=files 'data.paths=[corpus.txt]'"),
    (["resume=latest"], "resume=auto out_dir=outputs/run"),
    (["resume=true"], "resume=auto out_dir=outputs/run"),
    (["resume=last"], "resume=auto out_dir=outputs/run"),
    (["resume_from_checkpoint=outputs/a"], "resume=outputs/a"),
    (["out=here"], "out_dir=here"),
    (["output_dir=here"], "out_dir=here"),
    (["out_dir=a,b"], "\"out_dir='a,b'\""),
    (["out_dir=a=b"], "\"out_dir='a=b'\""),
    (["out_dir=my", "run"], "'out_dir=my run'"),
    (["samples.prompt=def f(x"], "\"samples.prompt='def f(x'\""),
    (["name=my run"], "name=my-run"),
    (["device=cuda"], "cluster=one_gpu"),
    (["cluster=gpu"], "cluster=one_gpu"),
    (["model", "=", "tiny"], "model=tiny"),
    (["model=", "tiny"], "model=tiny"),
    (["model", "=tiny"], "model=tiny"),
    (["seed", "3"], "seed=3"),
    (["--seed", "3"], "seed=3"),
    (["seed"], "seed=0"),
    (["tiny"], "model=tiny"),
    (["--config", "run.yaml"], "experiment=quickstart"),
    (["--config-name=train"], "experiment=quickstart"),
    (["--multirun"], "one command starts one run"),
    (["-m"], "one command starts one run"),
    (["--dry-run"], "dry_run=true"),
    (["show_sample=true"], "dry_run=true"),
    (["+seed=3"], "seed=3"),
    (["model.new_key=3"], "model."),
    (["parallelism.cp=2"], "parallelism.context=2"),
    (["parallelism.tensor=2"], "there is no tensor parallelism"),
    (["model = tiny"], "model=tiny"),
    (["seed:3"], "seed=3"),
    (["parallelism=8"], "parallelism=eight_ranks"),
    (["gpu=0"], "cluster=one_gpu"),
    (["--resume"], "resume=null"),
    (["config_only"], "config_only=true"),
    (["seed=abc"], "seed=0"),
    (["seed="], "seed"),
    (["model="], "quickstart"),
    (["task.steps="], "a whole number"),
    (["recompute=full"], "'recompute=[layer]'"),
    (["recompute=true"], "'recompute=[norm,mla_up,swiglu]'"),
    (["gradient_checkpointing=true"], "'recompute=[norm,mla_up,swiglu]'"),
    (["config_olny=true"], "config_only"),
    (["loss_type=gspo"], "task/loss=gspo"),
    (["kl_coef=0.01"], "task.loss.kl_weight=0.01"),
    (["task=grpo", "rollout=default", "clip_ratio=0.3"], "task.loss.clip_high=0.3"),
]  # fmt: skip


def run_command(
    name: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Runs a command in this process until it is rejected. Returns its line on stderr."""
    module = importlib.import_module(f"launch.{name}")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    code = command(name, module.main, module.preview)
    captured = capsys.readouterr()
    assert code == 2, f"{arguments}: exit code {code}, {captured}"
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.strip()


@pytest.mark.parametrize(
    ("arguments", "advice"), MISTAKES, ids=lambda part: part[:40] if isinstance(part, str) else " ".join(part)[:40]
)
def test_advice_of_a_first_mistake_is_one_line_and_nothing_starts(
    arguments: list[str],
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_run_local", lambda config: pytest.fail("ranks start"))
    line = run_command("train", arguments, monkeypatch, capsys)
    assert advice in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "advice"),
    [
        ("generate", [f"ckpt={HUB}", "prompt=a"], "hf download"),
        ("generate", ["model=outputs/run", "prompt=a"], "ckpt=outputs/run"),
        ("generate", ["ckpt=run", "prompt=hello", "world"], "'prompt=hello world'"),
        ("generate", ["ckpt=run", "prompt=a", "max_tokens=5"], "max_new_tokens=5"),
        ("generate", ["--prompt", "hello"], "prompt=hello"),
        ("convert", [f"path={HUB}", "from=hf", "to=x"], "hf download"),
        ("convert", ["path=run", "from=hf", "output=x"], "to=x"),
        ("schedule", ["kind=dualpipe"], "schedule=dualpipe"),
        ("schedule", ["format=png"], "format=svg"),
        ("plan", ["gpus=2048"], "search=true ranks=2048"),
        ("plan", ["--html"], "format=html out=plan.html"),
        ("plan", ["mfu=0.4"], "cluster.peak_flops=989e12"),
        ("plan", ["compare=outputs/run"], "run=outputs/run"),
        ("submit", ["memory_check=false"], "plan.check=false"),
        ("redraw", ["outputs/run"], "run=outputs/run"),
        ("redraw", ["my_run"], "run=my_run"),
        ("convert", ["my_weights"], "path=my_weights"),
        ("submit", ["lr=1e-4"], "optim.learning_rate=1e-4"),
        ("submit", ["--partition=gpu"], "slurm.partition"),
    ],
)
def test_advice_of_every_other_command(
    name: str, arguments: list[str], advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert advice in run_command(name, arguments, monkeypatch, capsys)


def cases() -> list[tuple[str, Advice]]:
    return [(name, line) for line in advice_table() for name in line.commands]


def test_advice_table_has_no_line_that_another_hides() -> None:
    for name in COMMANDS:
        known = {*dict(dotted_keys(compose_defaults(name))), *default_groups(name)}
        for line in (line for other, line in cases() if other == name):
            for key in line.keys:
                is_unknown = key not in known and key != BARE_PATH
                assert is_unknown or line.values is not None, f"{name}: {key} exists, and {line.why!r} has no values"
                found = find_advice(name, key, line.example, is_unknown=is_unknown)
                assert found == line, f"{name}: {key}={line.example} leads to {found}"


def batches(name: str) -> list[list[str]]:
    """Returns a command's recommendations in few command lines without repeated keys, as composing is slow."""
    filled: list[dict[str, str]] = []
    for line in (line for other, line in cases() if other == name):
        if name == "submit" and "train" in line.commands:
            continue
        overrides = line.overrides(line.example)
        for switch in switches(name):
            overrides, _ = split_switch(overrides, switch)
        keys = {text.partition("=")[0]: text for text in overrides}
        batch = next((batch for batch in filled if all(batch.get(key, keys[key]) == keys[key] for key in keys)), None)
        if batch is None:
            filled.append(batch := {})
        batch |= keys
    return [list(batch.values()) for batch in filled]


@pytest.mark.parametrize("name", COMMANDS)
def test_advice_that_is_recommended_composes(name: str) -> None:
    for overrides in batches(name):
        compose(name, overrides)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["launch.train", "lr=1e-4"], "optim.learning_rate=1e-4"),
        (["launch.train", f"init_from={HUB}"], "hf download"),
        (["launch.train", "cluster=h100"], "cluster.device: cuda needs a"),
        (["launch.submit", "precision=float16"], "precision=bf16"),
        (["launch", "tarin"], "python -m launch.train"),
        (["launch", "train", "--lr", "1"], "optim.learning_rate=1"),
    ],
)
def test_advice_takes_less_than_3_seconds_of_cpu_time(arguments: list[str], advice: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert advice in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
    assert list(tmp_path.iterdir()) == []
