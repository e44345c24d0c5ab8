"""`launch.generate` on several ranks, under a chat template, and with a run's averaged weights."""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from base.refusal import ConfigError
from comm.exits import EXIT_LOST
from data.arithmetic import ArithmeticSource, arithmetic_tokenizer
from data.chat.encode import encode_prompt
from data.chat.messages import user
from data.chat.sources import ChatSource
from data.chat.templates import CHAT_TEMPLATE_NAME, CHAT_TEMPLATES, template_jinja, template_of
from data.corpus import DataError
from data.tokenizer import Tokenizer
from dualpipe.ir import ScheduleError
from infer.config import GenerateError
from launch import convert, generate
from launch.cli.entry import command
from launch.convert import main as run_convert
from launch.generate import main
from launch.generate import main as run_generate
from launch.weights import job
from model.config import CutError
from model.pretrained import save_hf
from model.transformer import named_tensors
from tests import ROOT
from tests.commands import run_python
from tests.data.chat.conversations import chat_tokenizer
from tests.infer.continuing import generate as infer_generate
from tests.infer.models import make_foresighted
from tests.launch.checkpoints import write_checkpoint
from tests.refusals import assert_refused
from tests.tiny import tiny_config
from train.checkpoint.load import load_whole
from train.checkpoint.manifest import CheckpointError, read_model
from train.checkpoint.preserved import preserved_by_run
from train.errors import DeadRankError

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


@pytest.mark.exhaustive
def test_torchrun_ranks_write_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "launch.generate"]
    overrides = [f"ckpt={run}", "prompt=def", "max_new_tokens=8", "temperature=0"]
    many = run_python(*torchrun, *overrides, "parallelism=two_ranks", changes={"OMP_NUM_THREADS": "1"})
    assert many.returncode == 0, many.stderr
    assert many.stdout == written(capsys, *overrides)
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
    monkeypatch.setattr(generate, "run_on_ranks", lambda *job: pytest.fail("a rank started"))
    assert_refused(error, parts, lambda: main([f"ckpt={run}", "prompt=a", *overrides.split()]))


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
def test_rank_that_dies_ends_all_and_the_command_in_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"ckpt={run}", "prompt=a", "parallelism=two_ranks"]
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    monkeypatch.setattr(job, "_run_rank", _exit_as_rank_one)
    with pytest.raises(DeadRankError, match="rank 1 died before it returned"):
        main(arguments)
    capfd.readouterr()
    monkeypatch.setattr(job, "_run_rank", _killed_as_rank_one)
    assert command("generate", main, generate.preview) == EXIT_LOST == 78
    printed, lines = capfd.readouterr()
    assert printed == ""
    assert lines.splitlines()[1:] == ["error: rank 1 was ended by SIGKILL"]  # after the line about the start


@pytest.mark.slow
def test_command_that_is_killed_while_its_ranks_start_leaves_no_traceback() -> None:
    code = (
        "from functools import partial; from pathlib import Path; from tests.tiny import tiny_config\n"
        "from launch.weights.job import run_on_local_ranks\n"
        "print('begins', flush=True)\n"
        "cluster = tiny_config(Path('unused')).cluster\n"
        "run_on_local_ranks(partial(print, b'x' * 2**22), cluster, 2, [])\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)  # ranks begin once torch is imported, which takes longer
        process.kill()
        output, errors = process.communicate()  # until the ranks have ended, too
    assert (process.returncode, output, errors) == (-signal.SIGKILL, b"", b"")


def _exit_as_rank_one(place: tuple[int, int, str], *rest: object) -> None:
    if place[0] == 1:
        os._exit(7)
    threading.Event().wait(60)


def _killed_as_rank_one(place: tuple[int, int, str], end: Connection, *rest: object) -> None:
    if place[0] == 1:
        os.write(end.fileno(), struct.pack("!i", 2**14) + b"begin of a message")
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait(60)


def source_of(template: str) -> ArithmeticSource:
    return ArithmeticSource(
        kind="arithmetic",
        form="demonstrations",
        template=template,
        domains=("sort",),
        num_digits=8,
        num_samples=10,
        wrong_share=0.0,
        generator_seed=0,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the checkpoint of a run under the template of V3.1."""
    folder = write_checkpoint(tmp_path_factory.mktemp("run"), make_foresighted(dtype=torch.float32), tokenizer=False)
    tokenizer = chat_tokenizer()
    tokenizer.save(folder / "tokenizer.json")
    config = tiny_config(folder)
    config = replace(config, data=replace(config.data, source=source_of("v3_1")))
    for name, content in preserved_by_run(config, tokenizer).files.items():
        (folder / name).write_bytes(content)
    return folder


def answer(folder: Path, template: str, text: str, thinking: bool | None) -> str:
    """Returns what the model answers, computed without the command."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    prompt = encode_prompt([user(text)], CHAT_TEMPLATES.get(template), tokenizer, thinking=thinking)
    model = load_whole(read_model(folder), folder, torch.float32)
    made = infer_generate(model, [prompt], max_new_tokens=8, stop=[tokenizer.special.eos]).continuations
    return tokenizer.decode(list(made[0].tokens))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "template", "thinking"),
    [
        (["chat=auto"], "v3_1", None),
        (["chat=auto", "thinking=true"], "v3_1", True),
        (["chat=v3"], "v3", None),
        (["chat=r1", "thinking=false"], "r1", False),
    ],
)
def test_prompts_are_asked_by_the_template(
    arguments: list[str], template: str, thinking: bool | None, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "sort <｜Assistant｜> 31"
    main([f"ckpt={checkpoint}", f"prompt={text}", "temperature=0", "max_new_tokens=8", *arguments])
    assert capsys.readouterr().out == answer(checkpoint, template, text, thinking) + "\n"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["chat=v33"], "chat: must be one of v3, r1, r1_distill, v3_1, auto, is 'v33'; did you mean v3"),
        (["thinking=true"], "thinking: must be null without chat, is True; nearest valid: chat=auto"),
        (
            ["chat=v3", "thinking=true"],
            "thinking: must be false with chat=v3, is true; nearest valid: chat=r1 or r1_distill or v3_1",
        ),
    ],
)
def test_wrong_choices_of_templates_are_rejected(arguments: list[str], error: str, checkpoint: Path) -> None:
    assert_refused(ConfigError, [error], lambda: main([f"ckpt={checkpoint}", "prompt=a", *arguments]))


def test_weights_without_a_template_or_its_tokens_are_rejected(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, make_foresighted(dtype=torch.float32))
    with pytest.raises(
        ConfigError, match=r"chat: auto needs weights of a run on chats, .* one of v3, r1, r1_distill, v3_1$"
    ):
        main([f"ckpt={folder}", "prompt=a", "chat=auto"])
    with pytest.raises(DataError, match="chat: r1 places the token '<think>', which must be a special token"):
        main([f"ckpt={folder}", "prompt=a", "chat=r1"])
    with pytest.raises(ConfigError, match="chat: must be null with prompt_ids, is 'v3'"):
        main([f"ckpt={folder}", "prompt_ids=[0]", "chat=v3"])


def test_exports_have_the_runs_template_for_transformers(checkpoint: Path, tmp_path: Path) -> None:
    assert template_of(checkpoint) == "v3_1"
    convert.main(["from=checkpoint", f"path={checkpoint}", f"to={tmp_path / 'hf'}"])
    assert template_of(tmp_path / "hf") == "v3_1"
    other: Any = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    messages = [{"role": "user", "content": "sort 31"}]
    for thinking in (False, True):
        read = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, thinking=thinking)
        template, tokenizer = CHAT_TEMPLATES.get("v3_1"), chat_tokenizer()
        assert list(read) == encode_prompt([user("sort 31")], template, tokenizer, thinking=thinking)


def test_a_run_on_chats_replaces_the_template_of_its_initial_weights(checkpoint: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    tokenizer = Tokenizer.load(checkpoint / "tokenizer.json")
    (checkpoint / "chat_template.json").write_text("{}")
    kept = replace(config, init_from=str(checkpoint))
    before = preserved_by_run(kept, tokenizer).files
    assert before[CHAT_TEMPLATE_NAME] == template_jinja(CHAT_TEMPLATES.get("v3_1")).encode()
    source = ChatSource(kind="chat", paths=("a",), template="r1", too_long="cut")
    changed = replace(kept, data=replace(kept.data, source=source))
    after = preserved_by_run(changed, tokenizer).files
    assert after[CHAT_TEMPLATE_NAME] == template_jinja(CHAT_TEMPLATES.get("r1")).encode()
    assert before.keys() - after.keys() == {"chat_template.json"}
    (checkpoint / "chat_template.json").unlink()
    fresh = replace(config, data=replace(config.data, source=source_of("v3")))
    assert set(preserved_by_run(fresh, arithmetic_tokenizer()).files) == {CHAT_TEMPLATE_NAME}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates `both`, a model with another one as its average, and `average`, the other one without an average."""
    folder = tmp_path_factory.mktemp("averages")
    trained, average = make_foresighted(dtype=torch.float32), make_foresighted(dtype=torch.float32)
    for place, weight in enumerate(named_tensors(average).values()):
        weight.mul_(1 + 0.05 * (place % 3))
    write_checkpoint(folder / "both", trained, average=average)
    write_checkpoint(folder / "average", average)
    return folder


def _made(capsys: pytest.CaptureFixture[str], *choices: str) -> str:
    assert run_generate(["prompt=def", "max_new_tokens=24", "seed=5", *choices]) == 0
    return capsys.readouterr().out


def test_generate_from_the_average_is_that_models_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    averaged = _made(capsys, f"ckpt={runs / 'both'}", "weights=ema")
    assert averaged == _made(capsys, f"ckpt={runs / 'average'}")
    assert averaged != _made(capsys, f"ckpt={runs / 'both'}")


def test_convert_writes_the_average(runs: Path, tmp_path: Path) -> None:
    for name, run, choices in (("one", "both", ["weights=ema"]), ("other", "average", []), ("third", "both", [])):
        assert run_convert(["from=checkpoint", f"path={runs / run}", f"to={tmp_path / name}", *choices]) == 0
    one, other, third = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other", "third"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], third[name]) for name in one)


def test_average_that_a_run_did_not_keep_is_rejected(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ckpt: .*: weights: must be trained, because the run kept no average"):
        run_generate(["prompt=def", f"ckpt={runs / 'average'}", "weights=ema"])
    with pytest.raises(CheckpointError, match=r"path: .*: weights: must be trained, because the run kept no average"):
        run_convert(["from=checkpoint", f"path={runs / 'average'}", f"to={tmp_path / 'none'}", "weights=ema"])
    assert not (tmp_path / "none").exists()
    assert run_convert(["from=checkpoint", f"path={runs / 'average'}", f"to={tmp_path / 'hf'}"]) == 0
    with pytest.raises(ConfigError, match=r"weights: must be trained, as ckpt=.* is a Hugging Face folder, is ema"):
        run_generate(["prompt_ids=[1]", f"ckpt={tmp_path / 'hf'}", "weights=ema"])
    with pytest.raises(ConfigError, match=r"weights: must be trained with from=hf, is ema; nearest valid: trained"):
        run_convert(["from=hf", f"path={tmp_path / 'hf'}", f"to={tmp_path / 'none'}", "weights=ema"])
