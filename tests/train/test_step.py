"""Tests the sequences that a run reads for validation, and the lines of its steps."""

import json
from dataclasses import replace
from pathlib import Path

from tests.tiny import tiny_config, write_text
from train.corpus import prepare_corpus
from train.files.json_lines import JsonLines
from train.records.run_summary import corpus_lines


def test_validation_part_below_a_batch_is_read_whole_and_said(tmp_path: Path) -> None:
    write_text(tmp_path, 20)
    config = tiny_config(tmp_path)
    batch, validation = replace(config.batch, global_sequences=512), replace(config.validation, sequences=512)
    prepared = prepare_corpus(replace(config, batch=batch, validation=validation))
    found = len(prepared.validation_tokens_NL)
    assert 0 < found < 512
    lines = list(corpus_lines(replace(config, batch=batch, validation=validation), prepared))
    assert f"validation: reads {found} of validation.sequences=512, because the held-out part has only {found}" in lines
    whole = replace(config.validation, sequences=found)
    assert not any("validation: " in line for line in corpus_lines(replace(config, validation=whole), prepared))


def test_resumed_run_removes_later_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first_step, steps in ((0, range(1, 7)), (4, range(5, 9))):
        lines = JsonLines(path, first_step)
        for step in steps:
            lines.record({"step": step, "after": first_step})
        lines.close()
        if first_step == 0:
            with path.open("a") as file:
                file.write('{"step": 7, "cut of')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["after"] for record in records] == [0] * 4 + [4] * 4
