"""The five worked changes of docs/extend.md, each one file in a folder outside the checkout, have their effect."""

import json
import math
import os
import re
from pathlib import Path

import pytest

from dualpipe.ir import from_json
from tests import ROOT
from tests.commands import run_command

PAGE = (ROOT / "docs" / "extend.md").read_text("utf-8")
SMALL = ("model=tiny", "data.tokenizer_vocab_size=320", "precision=float64", "optim.sharding=replicated")
SHORT = ("task.steps=2", "validation.sequences=0", "samples.tokens=0", "batch.sequence_length_tokens=32")
PLAIN = ("parallelism=one_rank", "schedule=1f1b")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Writes the python file of each worked change, and nothing else."""
    files = dict(re.findall(r"`(\w+\.py)`[^`]*\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    for name in ("gpipe.py", "counting.py", "weighted.py", "plain.py", "bits.py"):
        (tmp_path / name).write_text(files[name], "utf-8")
    return tmp_path


def run(folder: Path, command: str, *overrides: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = run_command(["-m", f"launch.{command}", *overrides], cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def train(folder: Path, name: str, *overrides: str) -> tuple[list[dict[str, float]], str]:
    """Returns the records of a short run, and what it printed."""
    printed = run(folder, "train", *SMALL, *SHORT, *PLAIN, *overrides, f"out_dir={name}")
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line for line in lines if "loss" in line], printed


@pytest.mark.long
def test_five_files_outside_the_checkout_change_what_the_page_says(folder: Path) -> None:
    base, _ = train(folder, "base")

    drawn = run(folder, "schedule", "plugins=[gpipe.py]", "schedule.kind=gpipe", "num_ranks=2", "format=json")
    kinds = [operation.kind.value for (operation,) in from_json(drawn).ranks[0]]
    assert kinds == sorted(kinds, reverse=True), "all forwards come before all backwards"
    scheduled, _ = train(folder, "schedule", "plugins=[gpipe.py]", "schedule.kind=gpipe", "schedule.pairing=sequential")
    assert [record["loss"] for record in scheduled] == pytest.approx([record["loss"] for record in base])

    counting = ("dispatch=all_to_all", "dispatch.kind=counting", "+dispatch.print_every=1")
    dispatched, printed = train(folder, "dispatch", "plugins=[counting.py]", *counting)
    assert "1 dispatches" in printed
    assert [record["loss"] for record in dispatched] == pytest.approx([record["loss"] for record in base])

    weighting = ("task.kind=weighted", "+task.even_token_weight=3.0")
    weighted, _ = train(folder, "task", "plugins=[weighted.py]", *weighting)
    assert weighted[0]["loss"] != pytest.approx(base[0]["loss"], rel=1e-6)

    attended, _ = train(folder, "kernel", "plugins=[plain.py]", "attention=plain")
    assert [record["loss"] for record in attended] == pytest.approx([record["loss"] for record in base])
    assert "attention: plain" in (folder / "kernel" / "config.yaml").read_text("utf-8")

    measured, _ = train(folder, "metric", "plugins=[bits.py]")
    bits = [record["main_loss"] / math.log(2) for record in measured]
    assert [record["bits_per_token"] for record in measured] == pytest.approx(bits)
    assert "bits_per_token" not in base[0]


def test_worked_changes_are_one_python_file_each() -> None:
    assert len(PAGE.splitlines()) <= 400
    titles = ("A pipeline schedule", "A dispatcher", "A task", "An attention kernel", "A metric")
    sections = [PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0] for title in titles]
    assert [section.count("```python") for section in sections] == [1] * 5
