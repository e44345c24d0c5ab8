"""Tests the sequences that a run reads for validation, and the lines of its steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.corpus import DataError
from tests.tiny import tiny_config, write_text
from train.corpus import prepare_corpus
from train.records.json_lines import JsonLines


def test_validation_part_too_small_for_a_pass_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path, 20)
    config = tiny_config(tmp_path)
    batch, validation = replace(config.batch, global_sequences=512), replace(config.validation, sequences=512)
    with pytest.raises(DataError, match=r"validation\.sequences.*512.*nearest valid"):
        prepare_corpus(replace(config, batch=batch, validation=validation))
    prepare_corpus(replace(config, batch=batch))


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
