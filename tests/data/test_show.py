"""Tests that a training sample is rendered with its targets, and that text cannot imitate special tokens or escape."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from data.chat.sources import ChatSource, PreferencesSource
from data.prepare import prepare
from data.samples.pack import WEIGHTS
from data.samples.show import sample_lines
from launch import train
from launch.help.command import command
from tests.data.chat.conversations import SPELLED, chat_tokenizer, draw_text
from tests.data.chat.test_sources import L, config_of, write_lines


def test_every_target_is_marked_in_every_sequence(tmp_path: Path) -> None:
    rng = random.Random(1)
    lines = [{"prompt": f"{n} {draw_text(rng)}", "answer": draw_text(rng)} for n in range(30)]
    path = write_lines(tmp_path / "chats.jsonl", lines)
    source = ChatSource(kind="chat", paths=(str(path),), template="v3", too_long="cut")
    prepared = prepare(config_of(source, tmp_path, chat_tokenizer()), L)
    texts = {line["answer"] for line in lines}
    for row in range(len(prepared.train_tokens_NL)):
        shown = list(sample_lines(prepared, row, reads_weights=True))
        header = next(line for line in shown if line.startswith("piece: "))
        size = int(header.split()[1])
        assert f", {int(prepared.train_values[WEIGHTS][row, :size].sum())} targets" in header
        marked = [line.removeprefix("target | ") for line in shown if line.startswith("target | ")]
        answer = "\n".join(marked).removesuffix("<｜end▁of▁sentence｜>")
        for name in SPELLED:
            # Only special tokens that are placed appear without a backslash.
            assert answer.replace(f"\\{name}", "").count(name) == 0
            answer = answer.replace(f"\\{name}", name)
        assert answer in texts
        everything = list(sample_lines(prepared, row, reads_weights=False))
        assert next(line for line in everything if "|" in line) == "       | <｜begin▁of▁sentence｜>"


def test_pairs_show_both_answers_and_hostile_text_is_escaped(tmp_path: Path) -> None:
    line = {"prompt": "a\x1b[2Jb\u202e", "chosen": "right", "rejected": "wrong\r"}
    path = write_lines(tmp_path / "pairs.jsonl", [line, line])
    source = PreferencesSource(kind="preferences", paths=(str(path),), template="v3")
    config = dataclasses.replace(config_of(source, tmp_path, chat_tokenizer()), validation_fraction=0.001)
    shown = list(sample_lines(prepare(config, L), 0, reads_weights=True))
    prompt = "       | <｜begin▁of▁sentence｜><｜User｜>a\\x1b[2Jb\\u202e<｜Assistant｜>"
    assert [line for line in shown if "|" in line] == [
        prompt,
        "target | right<｜end▁of▁sentence｜>",
        prompt,
        "target | wrong\\r<｜end▁of▁sentence｜>",
    ]
    assert [line.partition(":")[0] for line in shown if line.startswith(("chosen", "rejected"))] == [
        "chosen",
        "rejected",
    ]


def test_dry_run_prints_a_sample_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "answer": "yes"}) + "\n" for n in range(40)))
    arguments = [
        "task=sft",
        "batch.document_mask=true",
        "data=chat",
        f"data.paths=[{path}]",
        "data.validation_fraction=0.01",
    ]
    arguments += [f"data.cache_dir={tmp_path / 'cache'}", f"out_dir={tmp_path / 'run'}", "validation.sequences=0"]
    monkeypatch.setattr("sys.argv", ["train", *arguments, "dry_run=true"])
    assert command("train", train.main, train.preview, dry_run=train.dry_run) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "target | yes<｜end▁of▁sentence｜>\n" in shown
    assert "train samples: 40 kept (0 cut at their end), 0 dropped, 80 targets\n" in shown
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("sys.argv", ["train", *arguments, "dry_run=maybe"])
    assert command("train", train.main, train.preview, dry_run=train.dry_run) == 2
    assert "dry_run: must be true or false, is 'maybe'; nearest valid: dry_run=true" in capsys.readouterr().err
