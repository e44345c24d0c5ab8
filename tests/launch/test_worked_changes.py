"""Seven changes of a researcher's first day are short files outside the checkout, and each has its effect."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dualpipe.ir import from_json
from tests import ROOT
from tests.commands import run_command

NAMES = ("extend.md", "model.md", "optimizers.md", "rewards.md", "routers.md")
PAGES = [(ROOT / "docs" / name).read_text("utf-8") for name in NAMES]
FILES = dict(re.findall(r"`([\w/]+\.\w+)`[^`]*\n\n```\w+\n(.*?)^```$", "\n".join(PAGES), re.MULTILINE | re.DOTALL))
MOST_LINES = 60

TINY = ("model=tiny", "data.tokenizer_vocab_size=320")
EXACT = (
    "precision=float64",
    "optim.sharding=replicated",
    "task.steps=3",
    "samples.tokens=0",
    "batch.micro_sequences=1",
)
SHORT = ("validation.sequences=0", "batch.sequence_length_tokens=32", "batch.global_sequences=16")
ONE_RANK = ("parallelism=one_rank", "schedule=1f1b")
ROLLOUTS = (
    *("experiment=arithmetic_grpo", "init_from=random", "model.num_layers=2", "model.hidden_size=32"),
    *("rollout.prompts=4", "rollout.samples=4", "rollout.max_new_tokens=5", "rollout.held_out=0"),
    *("batch.sequence_length_tokens=48", "batch.global_sequences=8", "validation.every_steps=0"),
)
EXACT_VALUES = ("loss", "main_loss", "mtp_loss", "balance_loss", "kl", "entropy", "grad_norm", "max_violation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Files of a page, and the overrides that choose what they register.

    `alone`: overrides of the run on one rank that replace the change; None: that run has it too.
    """

    files: tuple[str, ...]
    chosen: tuple[str, ...] = ()
    base: tuple[str, ...] = (*TINY, *SHORT)
    alone: tuple[str, ...] | None = None
    changes_losses: bool = False

    @property
    def plugin(self) -> str:
        return f"plugins=[{self.files[0]}]"


CHANGES = {
    "metric": Change(files=("bits.py",)),
    "schedule": Change(files=("gpipe.py", "conf/schedule/gpipe.yaml"), chosen=("schedule=gpipe",), alone=()),
    "dispatcher": Change(
        files=("counting.py", "conf/dispatch/counting.yaml"),
        chosen=("dispatch=counting", "dispatch.print_every=5"),
        alone=("dispatch=local",),
    ),
    "router": Change(files=("rooted.py",), chosen=("model.router=rooted",), changes_losses=True),
    "optimizer": Change(files=("signs.py",), chosen=("optim=muon", "optim.kind=signs"), changes_losses=True),
    "attention": Change(
        files=("gated.py", "conf/model/gated.yaml"), base=("model=gated", "data.tokenizer_vocab_size=320", *SHORT)
    ),
    "reward": Change(files=("evens.py", "conf/reward/evens.yaml"), chosen=("reward=evens",), base=ROLLOUTS),
}


def run(folder: Path, command: str, *overrides: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = run_command(["-m", f"launch.{command}", *overrides], cwd=folder, env=environment, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def train(folder: Path, name: str, *overrides: str) -> tuple[list[dict[str, Any]], str]:
    """Returns the records of a short run, and what it printed."""
    printed = run(folder, "train", *overrides, *EXACT, f"out_dir={name}")
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text("utf-8").splitlines())
    records = [line for line in lines if "loss" in line]
    assert len(records) == 3
    return records, printed


def exact_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the values of a step that no layout changes."""
    rewards = {"reward": record["rollouts"]["reward"]} if "rollouts" in record else {}
    return {name: record[name] for name in (*EXACT_VALUES, "bits_per_token") if name in record} | rewards


def write_files(change: Change, folder: Path) -> None:
    for name in change.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(FILES[name], "utf-8")


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_short(name: str) -> None:
    python, *others = CHANGES[name].files
    assert python.endswith(".py")
    assert all(other.startswith("conf/") for other in others)
    assert sum(len(FILES[file].splitlines()) for file in (python, *others)) <= MOST_LINES


@pytest.mark.long
@pytest.mark.parametrize("name", CHANGES)
def test_four_ranks_equal_one_with_a_change(name: str, tmp_path: Path) -> None:
    change = CHANGES[name]
    write_files(change, tmp_path)
    four = ("schedule=1f1b", "parallelism=four_ranks", change.plugin, *change.base, *change.chosen)
    plain = (*change.base, *ONE_RANK)
    many, printed = train(tmp_path, "many", *four)
    one = (*plain, *change.alone) if change.alone is not None else (*plain, change.plugin, *change.chosen)
    expected, _ = train(tmp_path, "one", *one)
    for record, other in zip(many, expected, strict=True):
        values = exact_values(record)
        assert len(values) > 4
        assert values == pytest.approx(exact_values(other), rel=1e-12, abs=1e-14)
    match name:
        case "metric":
            bits = [record["main_loss"] / math.log(2) for record in many]
            assert [record["bits_per_token"] for record in many] == pytest.approx(bits)
        case "schedule":
            drawn = run(tmp_path, "schedule", change.plugin, *change.chosen, "num_ranks=2", "format=json")
            kinds = [operation.kind.value for (operation,) in from_json(drawn).ranks[0]]
            assert kinds == sorted(kinds, reverse=True), "all forwards come before all backwards"
        case "dispatcher":
            assert "5 dispatches" in printed
        case "reward":
            assert many[0]["rollouts"]["parts"] == {"evens": many[0]["rollouts"]["reward"]}
    if change.changes_losses:
        base, _ = train(tmp_path, "base", *plain)
        assert many[-1]["loss"] != pytest.approx(base[-1]["loss"], rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", CHANGES)
def test_verification_passes_with_a_change(name: str, tmp_path: Path) -> None:
    change = CHANGES[name]
    write_files(change, tmp_path)
    chosen = (change.plugin, *change.base, *change.chosen)
    printed = run(tmp_path, "verify", "parallelism=four_ranks", *chosen, "layouts=0")
    assert "9 checks passed" in printed


@pytest.mark.long
def test_two_other_files_change_what_the_page_says(tmp_path: Path) -> None:
    """A task and an attention kernel."""
    base, _ = train(tmp_path, "base", *TINY, *SHORT, *ONE_RANK)
    for name in ("weighted.py", "plain.py"):
        (tmp_path / name).write_text(FILES[name], "utf-8")
    weighting = ("plugins=[weighted.py]", "task.kind=weighted", "+task.even_token_weight=3.0")
    weighted, _ = train(tmp_path, "task", *TINY, *SHORT, *ONE_RANK, *weighting)
    assert weighted[0]["loss"] != pytest.approx(base[0]["loss"], rel=1e-6)
    attended, _ = train(tmp_path, "kernel", *TINY, *SHORT, *ONE_RANK, "plugins=[plain.py]", "attention=plain")
    assert [record["loss"] for record in attended] == pytest.approx([record["loss"] for record in base])
    assert "attention: plain" in (tmp_path / "kernel" / "config.yaml").read_text("utf-8")


def test_the_page_of_extensions_is_short_enough_to_read() -> None:
    assert len(PAGES[0].splitlines()) <= 400
