"""Tests of `launch.generate` that is rejected, interrupted, or whose output is not read to the end."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.corpus import DataError
from launch.generate import main
from tests.launch.checkpoints import write_run
from train.checkpoint.locate import locate
from train.config.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def test_generate_command_ends_with_2_in_one_line(run: Path) -> None:
    command = [sys.executable, "-m", "launch.generate", f"ckpt={run}", "prompt=a", "top_p=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
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
    first, *last = errors.decode().splitlines()
    assert (written, first.startswith("reading the weights of ")) == (b"", True)
    assert last == [f"out: not complete; the output so far is in {partial}", "interrupted"]
    assert [path.name for path in out.parent.iterdir()] == [partial.name]
    lines = partial.read_text(encoding="utf-8").splitlines()
    assert 1 <= len(lines) < 4000
    assert {json.loads(line)["prompt"] for line in lines} == {"def f"}


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("half.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud800"}\n', ["line 2", "lone surrogate"]),
        ("deep.jsonl", b'{"prompt":' * 100_000, ["line 1", "must be a JSON object"]),
        ("a" * 300 + ".txt", None, ["must be readable or writable", "name too long"]),
    ],
)
def test_generate_rejects_prompts_that_are_no_text(
    name: str, content: bytes | None, parts: list[str], run: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        main([f"ckpt={run}", f"prompts={tmp_path / name}"])
    for part in parts:
        assert part in str(refused.value)


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
    assert (
        done.stderr.splitlines(keepends=True)[-1]
        == "error: output: must be readable or writable, is not (No space left on device)\n"
    )
