"""Tests of `launch.prepare`: it writes the public files without torch, and refuses what it cannot do in one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from base.refusal import ConfigError
from data.corpus import DataError
from data.prepare import check_config, prepare
from data.readers.sources import FilesSource
from data.shards.format import PARTS, open_shards
from data.tokenizer import Tokenizer
from launch.prepare import main
from tests import ROOT
from tests.refusals import assert_refused
from tests.tiny import data_config


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    rows = [json.dumps({"text": f"row {number} of a text"}) for number in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, *rows[:50], "no row"]))
    (tmp_path / "notes.rst").write_text("a file of another kind")
    (tmp_path / "mix.yaml").write_text(
        "sources:\n- {name: rows, paths: [.], weight: 1}\ndedup: {kind: exact}\n"
        "on_broken: skip\nmax_broken_share: 0.01\n"
    )
    return [
        f"data.manifest={tmp_path / 'mix.yaml'}",
        f"out={tmp_path / 'out'}",
        "data.tokenizer_vocab_size=300",
        "order_steps=2",
        "global_sequences=3",
        "sequence_length_tokens=64",
    ]


@pytest.mark.slow
def test_command_writes_the_public_files_and_a_second_start_does_nothing(arguments: list[str], tmp_path: Path) -> None:
    program = f"import sys, launch.prepare; launch.prepare.main({arguments}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "rows.paths: 2 files are ignored (1 .rst, 1 .yaml)" in done.stderr
    assert "1 of 251 rows are broken and were skipped" in done.stderr
    assert "200 documents" in done.stdout
    assert "dropped: 50 exact duplicate, 1 broken" in done.stdout
    report = json.loads((tmp_path / "out" / "prepare.json").read_text())
    counts = report["sources"]["rows"]
    assert counts["documents_read"] == 251 == counts["documents_kept"] + sum(counts["dropped"].values())
    assert counts["tokens"] > counts["documents_kept"]
    assert (report["cached"], report["peak_rss_bytes"] < 2**29, report["seconds"] > 0) == (False, True, True)
    assert "50" in (tmp_path / "out" / "report.html").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    assert lines[0] == {"dropped": "rows/rows.jsonl:201", "kind": "exact", "kept": "rows/rows.jsonl:1"}
    order = [json.loads(line) for line in (tmp_path / "out" / "order.jsonl").read_text().splitlines()]
    assert [step["step"] for step in order] == [1, 2]
    assert all(len(step["sequences"]) == 3 and step["sequences"][0][0] == "rows" for step in order)
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out" / "prepare.json").read_text()) == {
        **report,
        "cached": True,
        "seconds": json.loads((tmp_path / "out" / "prepare.json").read_text())["seconds"],
    }
    mix = tmp_path / "mix.yaml"
    mix.write_text(mix.read_text().replace("weight: 1", "weight: 1, max_epochs: 0.01"))
    with pytest.raises(DataError, match=r"rows\.max_epochs: a run of 384 tokens must read"):
        main(arguments)


def test_command_says_that_no_token_is_split(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Rows without line breaks train no token that joins one.
    assert main([*arguments, "data.punctuation_newline_split=0.5", f"out={tmp_path / 'split'}"]) == 0
    line = "tokenizer: it has no tokens of punctuation and line breaks, so data.punctuation_newline_split=0.5"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("out=", ["out", "must be"]),
        ("workers=0", ["workers", "above 0", "0"]),
        ("sequence_length_tokens=1", ["sequence_length_tokens", "2"]),
        ("data.tokenizer_vocab_size=100", ["data.tokenizer_vocab_size", "100", "nearest"]),
        ("data.punctuation_newline_split=1.5", ["data.punctuation_newline_split", "1.5"]),
        ("data.tokenizer=train_256k", ["data.tokenizer", "train_256k"]),
        ("data.manifest=mixx.yaml", ["data.manifest", "mixx.yaml"]),
    ],
)
def test_impossible_settings_are_refused_before_text_is_read(
    arguments: list[str], override: str, parts: list[str]
) -> None:
    assert_refused((ConfigError, DataError), parts, lambda: main([*arguments, override]))


def tokens_of(folder: Path, source: str) -> list[list[int]]:
    """Returns the documents of both parts as token ids, sorted, because parts are drawn by the names of files."""
    return sorted(
        shard.tokens[start : start + length].tolist()
        for part in PARTS
        for shard in open_shards(folder, source, part)
        for start, length in zip(shard.starts, shard.lengths, strict=True)
    )


@pytest.mark.slow
def test_tokens_survive_the_way_to_megatron_and_back(arguments: list[str], tmp_path: Path) -> None:
    ours = tmp_path / "theirs"
    assert main([*arguments, f"megatron={ours}", "data.fim_rate=0.3"]) == 0
    (ours / "mix.yaml").write_text("sources:\n- {name: theirs, paths: ['*.bin'], weight: 1}\ndecontaminate: []\n")
    again = [f"data.manifest={ours / 'mix.yaml'}", f"out={ours / 'out'}", f"data.tokenizer={tmp_path / 'out'}"]
    assert main(again) == 0
    assert tokens_of(ours / "out", "theirs") == tokens_of(tmp_path / "out", "rows")
    source = FilesSource(kind="files", paths=(str(ours),), text_field="text")
    tokenizer = str(tmp_path / "out" / "tokenizer.json")
    check_config(config := data_config(tmp_path, source=source, tokenizer=tokenizer))
    prepared = prepare(config, 64)
    num_tokens = sum(map(len, tokens_of(ours / "out", "theirs")))
    assert prepared.train.num_tokens + prepared.validation.num_tokens == num_tokens
    assert prepared.bytes_per_token > 1
    with pytest.raises(DataError, match=r"^data\.tokenizer: must be given for files of token ids such as .*\.bin; "):
        check_config(replace(config, tokenizer=None))
    other = Tokenizer.train(["a few words"], 290)
    other.save(tmp_path / "other.json")
    with pytest.raises(DataError, match=r"\.bin:\d+: token ids must be 0 to \d+, are \d+ to \d+; nearest: data\.tok"):
        prepare(replace(config, tokenizer=str(tmp_path / "other.json")), 64)
