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
from launch.config.compose import compose, compose_defaults, dotted_keys
from launch.config.groups import default_groups
from launch.help.advice import alias_overrides, aliases
from launch.help.command import command

ROOT = Path(__file__).resolve().parents[2]
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


def test_advice_of_a_first_mistake_is_one_line_and_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_run_local", lambda config: pytest.fail("ranks start"))
    for arguments, advice in MISTAKES:
        line = run_command("train", arguments, monkeypatch, capsys)
        assert advice in line, arguments
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
    ],
)
def test_advice_of_every_other_command(
    name: str, arguments: list[str], advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert advice in run_command(name, arguments, monkeypatch, capsys)


def test_aliases_are_few_no_key_has_their_name_and_what_they_recommend_composes() -> None:
    assert len(aliases()) <= 40
    known = {*dict(dotted_keys(compose_defaults("train"))), *default_groups("train")}
    batches: list[dict[str, str]] = []  # composing is slow, so one command line has many keys
    for name in aliases():
        assert name not in known
        advice = alias_overrides("train", name, "5")
        assert advice is not None, name
        keys = {text.partition("=")[0]: text for text in advice[1]}
        batch = next((batch for batch in batches if all(batch.get(key, keys[key]) == keys[key] for key in keys)), None)
        if batch is None:
            batches.append(batch := {})
        batch |= keys
    for batch in batches:
        compose("train", list(batch.values()))


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["launch.train", "lr=1e-4"], "optim.learning_rate=1e-4"),
        (["launch.train", "cluster=h100"], "cluster.device: cuda needs a"),
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
