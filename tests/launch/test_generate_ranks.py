"""Tests of `launch.generate` on several ranks: it writes what one rank writes, and rejects invalid requests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dualpipe.ir import ScheduleError
from infer.config import GenerateError
from launch import generate
from launch.generate import main
from launch.ranks import workers
from launch.ranks.workers import RankError
from model.config import CutError
from model.hf.convert import save_hf
from tests.infer.models import make_foresighted
from tests.launch.checkpoints import write_checkpoint
from train.config.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["def f(x):", "a", "naïve café", "return x + 1\n", "日本", "x"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS), encoding="utf-8")
    return path


def written(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert main(overrides) == 0
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "parallelism=two_ranks",
        "parallelism=two_ranks schedule=dualpipe cohorts=1 batch_size=2 speculative=false",
        "parallelism.data=2 parallelism.expert=2",
    ],
)
def test_ranks_write_what_one_rank_writes(
    layout: str, run: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"ckpt={run}", f"prompts={prompts}", "max_new_tokens=16", "seed=3", 'stop=["é",7]']
    if "speculative" in layout:
        common.append("speculative=false")
    assert written(capsys, *common, *layout.split()) == written(capsys, *common)


@pytest.mark.slow
def test_ranks_read_slices_of_a_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hf"
    save_hf(make_foresighted(dtype=torch.float32), folder)
    common = [f"ckpt={folder}", "prompt_ids=[5,9,2]", "max_new_tokens=9", "temperature=0"]
    assert written(capsys, *common, "parallelism=two_ranks", f"out={tmp_path}/made.jsonl") == ""
    (line,) = (tmp_path / "made.jsonl").read_text(encoding="utf-8").splitlines()
    assert " ".join(map(str, json.loads(line)["tokens"])) == written(capsys, *common).strip()


@pytest.mark.slow
def test_torchrun_ranks_write_once(run: Path) -> None:
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "launch.generate"]
    overrides = [f"ckpt={run}", "prompt=def", "max_new_tokens=8", "temperature=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    many = subprocess.run(
        [sys.executable, *arguments, *overrides, "parallelism=two_ranks"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert many.returncode == 0, many.stderr
    one = subprocess.run(
        [sys.executable, "-m", "launch.generate", *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert many.stdout == one.stdout
    assert many.stderr.count("passes instead of") == 1


@pytest.mark.parametrize(
    ("overrides", "error", "parts"),
    [
        ("parallelism.data=3 parallelism.expert=2", ConfigError, ["parallelism.expert", "data=3", "is 2", "valid: 1"]),
        ("parallelism.data=3 parallelism.expert=3", ConfigError, ["num_routed_experts", "expert=3", "is 8"]),
        ("parallelism.pipeline=3 schedule=dualpipe", ScheduleError, ["parallelism.pipeline", "even", "has 3"]),
        ("parallelism.pipeline=9", CutError, ["model.num_layers", "9 pipeline stages"]),
        (
            "parallelism.pipeline=2 parallelism.cut=[3,1]",
            CutError,
            ["parallelism.cut", "2 stages", "is [3, 1]", "[1, 1]"],
        ),
        ("parallelism.pipeline=0", ConfigError, ["parallelism.pipeline", "is 0"]),
        ("parallelism.pipeline=2 cohorts=0", ConfigError, ["cohorts", "is 0"]),
    ],
)
def test_layout_that_does_not_fit_is_refused_before_ranks_start(
    overrides: str, error: type[ValueError], parts: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "run_on_local_ranks", lambda *job: pytest.fail("a rank started"))
    with pytest.raises(error) as caught:
        main([f"ckpt={run}", "prompt=a", *overrides.split()])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.slow
def test_error_of_the_ranks_is_the_users(tmp_path: Path) -> None:
    model = make_foresighted(dtype=torch.float32)
    model.head_weight.data.fill_(torch.inf)
    write_checkpoint(tmp_path, model, tokenizer=False)
    with pytest.raises(ValueError, match="must hold finite numbers"):
        main([f"ckpt={tmp_path}", "prompt_ids=[1,2]", "parallelism=two_ranks"])
    model.head_weight.data.fill_(3e38)
    run = tmp_path / "large"
    write_checkpoint(run, model, tokenizer=False)
    with pytest.raises(GenerateError, match="prompt 1: the model's logits must be finite"):
        main([f"ckpt={run}", "prompt_ids=[1,2]", "parallelism=two_ranks"])


@pytest.mark.slow
def test_rank_that_dies_ends_all(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_run_rank", _die_as_rank_one)
    with pytest.raises(RankError, match="rank 1 died before it returned"):
        main([f"ckpt={run}", "prompt=a", "parallelism=two_ranks"])


def _die_as_rank_one(function: object, place: tuple[int, int, str], *rest: object) -> None:
    if place[0] == 1:
        os._exit(7)
    workers.threading.Event().wait(60)
