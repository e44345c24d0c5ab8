"""Tests of `launch.generate`: it writes what a `LocalEngine` produces, and rejects invalid requests with one line."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
import torch

from base.refusal import ConfigError
from data.corpus import DataError
from data.tokenizer import Tokenizer
from infer.config import GenerateError, Sampling
from kernels.quantize import quantize_128x128
from launch.generate import main
from launch.weights.job import find_weights, load_model
from model.config import InferencePrecision
from model.hf.files import HfError
from model.pretrained import save_hf
from tests import ROOT
from tests.commands import run_command, run_python
from tests.infer.continuing import generate
from tests.infer.models import SMALL, make_foresighted, make_model
from tests.launch.checkpoints import TEXTS, write_checkpoint, write_run
from tests.refusals import assert_refused
from train.checkpoint.load import load_whole
from train.checkpoint.locate import locate
from train.checkpoint.manifest import CheckpointError, read_model
from train.config import Fp8PrecisionConfig


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a run without a tokenizer and without an MTP module."""
    folder = tmp_path_factory.mktemp("bare")
    write_checkpoint(folder, make_model(replace(SMALL, mtp_depth=0), torch.float32), tokenizer=False)
    return folder


def expected(run: Path, texts: list[str], num_tokens: int, sampling: Sampling) -> tuple[list[list[int]], list[str]]:
    folder = locate(str(run)).folder
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    prompts = [[tokenizer.special.bos, *tokenizer.encode(text)] for text in texts]
    model = load_whole(read_model(folder), folder, torch.float32)
    stop = [tokenizer.special.eos]
    made = generate(model, prompts, max_new_tokens=num_tokens, sampling=sampling, stop=stop).continuations  # type: ignore[arg-type]
    tokens = [list(continuation.tokens) for continuation in made]
    return tokens, [tokenizer.decode(ids) for ids in tokens]


def test_prompt_is_continued_with_statistics_on_stderr(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "def f(x): [1, {2}] = '${y}'"
    assert main([f"ckpt={run}", f"prompt={prompt}", "max_new_tokens=20", "seed=3", "top_k=40"]) == 0
    printed = capsys.readouterr()
    _, (text,) = expected(run, [prompt], 20, Sampling(temperature=0.7, top_k=40, seed=3))
    assert printed.out == text + "\n"
    assert "20 tokens in " in printed.err
    assert "tokens/s; drafts accepted" in printed.err
    assert "passes instead of 20" in printed.err
    assert printed.err.startswith("reading the weights of ")
    assert printed.err.count("\n") == 2


def test_prompt_is_written_as_it_is_made(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys.stdout, "write", lambda text: written.append(text) or len(text))
    main([f"ckpt={run}", "prompt=def", "max_new_tokens=20", "temperature=0", "speculative=false"])
    assert len([piece for piece in written if piece]) > 5


def test_prompt_from_standard_input(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb"))
    main([f"ckpt={run}", "prompt=-", "max_new_tokens=8", "temperature=0"])
    assert capsys.readouterr().out == expected(run, ["a\nb"], 8, Sampling())[1][0] + "\n"


def test_prompt_ids_need_no_tokenizer(bare: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, model in (
        (bare, make_model(replace(SMALL, mtp_depth=0), torch.float32)),
        (run, make_foresighted(dtype=torch.float32)),
    ):
        main([f"ckpt={folder}", "prompt_ids=[0,5,9]", "max_new_tokens=6", "temperature=0"])
        (made,) = generate(model, [[0, 5, 9]], max_new_tokens=6, stop=[1]).continuations
        assert capsys.readouterr().out == " ".join(map(str, made.tokens)) + "\n"


@pytest.mark.parametrize("speculative", ["auto", "true", "false"])
def test_speculative_changes_passes_alone(speculative: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([f"ckpt={run}", "prompt=def f", "max_new_tokens=12", "temperature=0", f"speculative={speculative}"])
    printed = capsys.readouterr()
    assert printed.out == expected(run, ["def f"], 12, Sampling())[1][0] + "\n"
    assert ("no drafts, 12 passes" in printed.err) == (speculative == "false")


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_prompts_of_a_file_in_order(
    batch_size: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["def f(x)", "café 🙂", "a", "x + 1\n  y", "日本"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text, "id": 1}) + "\n\n" for text in texts))
    (tmp_path / "p.txt").write_text("def f(x)\n\ncafé 🙂\na")
    choices = [f"ckpt={run}", "max_new_tokens=10", "seed=2", f"batch_size={batch_size}"]
    tokens, made = expected(run, texts, 10, Sampling(temperature=0.7, seed=2))
    main([*choices, f"prompts={tmp_path / 'p.txt'}"])
    blocks = [f"== {n} of 3: {text!r}\n{after}\n" for n, text, after in zip((1, 2, 3), texts, made, strict=False)]
    assert capsys.readouterr().out == "".join(blocks)
    out = tmp_path / "new" / "out.jsonl"
    main([*choices, f"prompts={tmp_path / 'p.jsonl'}", f"out={out}"])
    assert capsys.readouterr().out == ""
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in records] == texts
    assert [record["text"] for record in records] == made
    assert [record["tokens"] for record in records] == tokens
    assert {record["finish"] for record in records} <= {"length", "stop"}
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_stop_strings_and_ids_end_the_text(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (ids,), (text,) = expected(run, ["def"], 20, Sampling())
    stop = text[7:9]
    main([f"ckpt={run}", "prompt=def", "max_new_tokens=20", "temperature=0", f"stop=['{stop}']"])
    assert capsys.readouterr().out == text[: text.find(stop)] + "\n"
    choices = [f"ckpt={run}", "prompt=def", "max_new_tokens=20", "temperature=0", f"out={tmp_path / 'o'}"]
    main([*choices, f"stop=['never there',{ids[6]}]"])
    record = json.loads((tmp_path / "o").read_text())
    assert record["tokens"] == ids[: ids.index(ids[6])]
    assert record["finish"] == "stop"


def test_file_shows_progress_on_standard_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.terminal._FIRST_SECONDS", 0.0)
    main([f"ckpt={run}", "prompt=def", "max_new_tokens=5", "temperature=0", f"out={tmp_path / 'made.jsonl'}"])
    assert re.search(r"^generating: \d of 5 tokens, \d+ %", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize(("scales", "precision"), [("float32", "fp8"), ("power_of_two", "fp8_power_of_two")], ids=str)
def test_weights_of_a_run_in_fp8_have_its_products(
    scales: Literal["float32", "power_of_two"], precision: InferencePrecision, tmp_path: Path
) -> None:
    trained = Fp8PrecisionConfig(kind="fp8", scales=scales)
    write_checkpoint(tmp_path, make_model(dtype=torch.bfloat16), tokenizer=False, precision=trained)
    source = find_weights(str(tmp_path), "trained", drop_mtp=False, needs_tokenizer=False)
    assert (source.resolve("auto"), source.resolve("bf16")) == (precision, "bf16")
    for dtype in ("auto", "bf16"):
        model = load_model(source, dtype, "cpu")
        assert next(model.parameters()).dtype is torch.bfloat16
        with mock.patch("model.precision.fp8_rows.quantize_128x128", wraps=quantize_128x128) as quantize:
            generate(model, [[0, 5, 9]], max_new_tokens=2)
        rounded = {call.kwargs["power_of_two"] for call in quantize.call_args_list}
        assert rounded == (set() if dtype == "bf16" else {scales == "power_of_two"})


def test_hugging_face_folder_is_read_with_its_tokenizer_and_its_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_foresighted(dtype=torch.float32)
    (free,) = generate(model, [[0, 5, 9]], max_new_tokens=12).continuations
    save_hf(model, tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**values, "eos_token_id": [free.tokens[5], 1]}))
    choices = [f"ckpt={tmp_path / 'hf'}", "max_new_tokens=12", "temperature=0", "speculative=true"]
    main([*choices, "prompt_ids=[0,5,9]"])
    printed = capsys.readouterr()
    assert printed.out.split() == [str(token) for token in free.tokens[: free.tokens.index(free.tokens[5])]]
    assert "drafts accepted" in printed.err
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        main([*choices, "prompt=a"])
    Tokenizer.train(TEXTS, 300).save(tmp_path / "hf" / "tokenizer.json")
    assert main([*choices, "prompt=a"]) == 0
    assert capsys.readouterr().out.endswith("\n")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(HfError, match=r"model\.safetensors"):
        main([*choices, "prompt=a"])


def test_hugging_face_folder_without_mtp_weights_makes_no_drafts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers keeps the key of `config.json` and drops the module."""
    save_hf(make_model(replace(SMALL, mtp_depth=0), torch.float32), tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": 1}))
    choices = [f"ckpt={tmp_path / 'hf'}", "prompt_ids=[0,5]", "max_new_tokens=3"]
    assert main(choices) == 0
    assert "no drafts, 3 passes" in capsys.readouterr().err
    with pytest.raises(GenerateError, match=r"^speculative: .*MTP"):
        main([*choices, "speculative=true"])


def test_generate_rejects_before_torch_is_imported(run: Path) -> None:
    code = f"""
import sys
from launch.generate import main
for choice in ("top_p=0", "prompt_ids=[99999]", "max_new_tokens=-1"):
    try:
        main(["ckpt={run}", *(["prompt=a"] if "ids" not in choice else []), choice])
    except ValueError as error:
        print(str(error).partition(":")[0])
print([name for name in ("torch", "deepspeed") if name in sys.modules])
"""
    done = run_python("-c", code)
    assert done.stdout.splitlines() == ["top_p", "prompt 1", "max_new_tokens", "[]"], done.stderr


@pytest.mark.parametrize(
    ("choices", "error", "parts"),
    [
        ([], ConfigError, ["prompt: a value is needed", "prompts=FILE"]),
        (["prompt=a", "prompt_ids=[1]"], ConfigError, ["prompt_ids", "left out if prompt is set"]),
        (["prompt=a", "max_new_token=3"], ConfigError, ["max_new_token", "did you mean max_new_tokens"]),
        (["prompt=a", "temperature=-1"], GenerateError, ["temperature", "at least 0", "-1"]),
        (["prompt=a", "top_k=0"], GenerateError, ["top_k", "at least 1"]),
        (["prompt=a", "top_p=1.5"], GenerateError, ["top_p", "1.5"]),
        (["prompt=a", "speculative=maybe"], ConfigError, ["speculative", "auto", "maybe"]),
        (["prompt=a", "dtype=int8"], ConfigError, ["dtype", "float32, bf16", "int8"]),
        (["prompt=a", "stop=x"], ConfigError, ["stop: must be a list", "stop=[x]"]),
        (["prompt=a", "stop=[1.5]"], ConfigError, ["stop[0]", "1.5"]),
        (["prompt=a", "out=/proc/none/a"], ConfigError, ["out", "/proc/none/a"]),
        (["prompts=absent.txt"], DataError, ["prompts", "absent.txt"]),
        ([f"prompts={'a' * 300}.txt"], DataError, ["prompts: must be a file", "name too long"]),
        (["prompts=absent.csv"], ConfigError, ["prompts", ".txt or .jsonl", "absent.csv"]),
        (["prompt_ids=[1,99999]"], GenerateError, ["prompt 1", "99999", "319"]),
        (["prompt_ids=[]"], GenerateError, ["prompt 1", "at least one token"]),
        ([f"prompt={'a b ' * 50}"], GenerateError, ["prompt 1", "max_position_tokens=64"]),
        (["prompt=a", "batch_size=0"], GenerateError, ["batch_size", "0"]),
        (["prompt=a", "ckpt=outputs/absent"], CheckpointError, ["ckpt", "outputs/absent"]),
    ],
)
def test_generate_rejects(choices: list[str], error: type[ValueError], parts: list[str], run: Path) -> None:
    assert_refused(error, parts, lambda: main([f"ckpt={run}", *choices]))


def test_generate_rejects_text_without_a_tokenizer_and_drafts_without_mtp(bare: Path) -> None:
    with pytest.raises(ConfigError, match=r"^prompt: text needs a tokenizer.*prompt_ids"):
        main([f"ckpt={bare}", "prompt=a"])
    with pytest.raises(ConfigError, match=r"^stop: text needs a tokenizer"):
        main([f"ckpt={bare}", "prompt_ids=[1]", "stop=[a]"])
    with pytest.raises(GenerateError, match=r"^speculative: .*MTP"):
        main([f"ckpt={bare}", "prompt_ids=[1]", "speculative=true"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["at least one line"]),
        ('{"prompt": "a"}\n{"text": "b"}\n', ["line 2", "prompt: must be given"]),
        ('{"prompt": 3}\n', ["line 1"]),
        ("\n{\n", ["line 2", "JSON"]),
        ("[]\n", ["line 1"]),
        ('{"prompt": "a"}\n{"prompt": "\\ud800"}\n', ["line 2", "lone surrogate"]),
        ('{"prompt":' * 100_000, ["line 1", "must be a JSON object"]),
    ],
    ids=range(7),
)
def test_generate_rejects_a_broken_file(text: str, parts: list[str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    assert_refused(DataError, ["prompts: ", *parts], lambda: main([f"ckpt={run}", f"prompts={tmp_path / 'p.jsonl'}"]))


def test_generate_rejects_broken_weights(tmp_path: Path) -> None:
    folder = locate(str(write_run(tmp_path / "run"))).folder
    (weights,) = folder.glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    given = [f"ckpt={folder}", "prompt=a", f"out={tmp_path / 'o.jsonl'}"]
    assert_refused(CheckpointError, ["ckpt: ", weights.name], lambda: main(given))
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "something was left behind"


def test_generate_command_ends_with_2_in_one_line(run: Path) -> None:
    done = run_command(["-m", "launch.generate", f"ckpt={run}", "prompt=a", "top_p=0"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: top_p: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_generate_reader_that_leaves_early_ends_it_quietly(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("def f\n" * 400)
    choices = f"ckpt={run} prompts={tmp_path / 'p.txt'} max_new_tokens=40"
    command = f"{sys.executable} -m launch.generate {choices} | head -c 10"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "== 1 of 40"
    assert done.stderr.startswith("reading the weights of ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_generate_interrupted_ends_with_130_and_keeps_what_is_complete(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("def f\n" * 4000)
    out = tmp_path / "new" / "out.jsonl"
    choices = [f"ckpt={run}", f"prompts={tmp_path / 'p.txt'}", "max_new_tokens=40", f"out={out}", "batch_size=2"]
    command = [sys.executable, "-m", "launch.generate", *choices]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        partial, deadline = out.with_name("out.jsonl.partial"), time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        written, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begin < 20
    first, *progress, path_line, last = errors.decode().splitlines()
    assert (written, first.startswith("reading the weights of ")) == (b"", True)
    assert all(line.startswith("generating: ") for line in progress)  # from the first second on
    assert (path_line, last) == (f"out: not complete; the output so far is in {partial}", "interrupted")
    assert [path.name for path in out.parent.iterdir()] == [partial.name]
    lines = partial.read_text(encoding="utf-8").splitlines()
    assert 1 <= len(lines) < 4000
    assert {json.loads(line)["prompt"] for line in lines} == {"def f"}


def test_generate_rejects_bytes_that_are_no_text(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^prompt: must be UTF-8 text, is not at character 2"):
        main([f"ckpt={run}", os.fsdecode(b"prompt=a\xff")])
    for errors in ("surrogateescape", "strict"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), "utf-8", errors))
        with pytest.raises(ConfigError, match=r"^prompt: .*must be UTF-8 text"):
            main([f"ckpt={run}", "prompt=-"])


def test_generate_leaves_out_the_mark_at_a_files_begin(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfabc\r\n")
    assert main([f"ckpt={run}", f"prompts={tmp_path / 'p.txt'}", "max_new_tokens=1"]) == 0
    assert capsys.readouterr().out.startswith("== 1 of 1: 'abc'\n")


def test_generate_never_replaces_its_prompts(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "o.jsonl").symlink_to("p.jsonl")
    for out in ("p.jsonl", "o.jsonl"):
        with pytest.raises(ConfigError, match=r"^out: must not be the file of prompts"):
            main([f"ckpt={run}", f"prompts={tmp_path / 'p.jsonl'}", f"out={tmp_path / out}"])


def test_generate_reads_ids_next_to_an_unsupported_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = locate(str(write_run(tmp_path))).folder
    (folder / "tokenizer.json").write_text("{}")
    assert main([f"ckpt={folder}", "prompt_ids=[5,9]", "max_new_tokens=3"]) == 0
    assert len(capsys.readouterr().out.split()) == 3
    for choices in (["prompt=a"], ["prompt_ids=[5]", "stop=[a]"]):
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            main([f"ckpt={folder}", *choices])


@pytest.mark.slow
def test_generate_on_a_full_disk_says_so_in_one_line(run: Path) -> None:
    command = [sys.executable, "-m", "launch.generate", f"ckpt={run}", "prompt=a"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.endswith("\nerror: output: must be readable or writable, is not (No space left on device)\n")
