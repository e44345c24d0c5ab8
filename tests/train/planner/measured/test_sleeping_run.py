"""A run whose computations sleep is not faster than its plan. docs/benchmarks.md has both sides."""

import json
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.tiny import write_text
from train.schedule.measured import MEASURED_NAME, PROBE_NAME

PLUGIN = Path(__file__).parents[1] / "sleeping_plugin.py"
MOST_OFF = 0.05


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["dualpipe_split", "auto"])
def test_run_is_not_faster_than_its_plan_nor_its_last_steps_than_with_the_factor(schedule: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    run = tmp_path / "run"
    overrides = [
        *(f"name={schedule}", f"out_dir={run}", "cluster=laptop", f"schedule={schedule}", f"plugins=[{PLUGIN}]"),
        *("model=tiny", "model.num_layers=7", "parallelism.pipeline=4", "parallelism.data=1", "parallelism.expert=1"),
        *("data=files", f"data.paths=[{tmp_path / 'text'}]", f"data.cache_dir={tmp_path / 'cache'}"),
        *("data.tokenizer_vocab_size=320", "data.validation_fraction=0.2", "validation.sequences=0", "samples.prompt="),
        *("batch.sequence_length_tokens=32", "batch.global_sequences=8", "batch.micro_sequences=1", "task.steps=45"),
        *("track.picture_every_steps=10", "checkpointing.every_steps=1000"),
    ]
    done = run_command(["-m", "launch.train", *overrides], timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / MEASURED_NAME).is_file()
    assert (run / PROBE_NAME).is_file() == (schedule == "auto")
    planned = run_command(["-m", "launch.plan", f"run={run}", "format=json"], timeout=100)
    assert planned.returncode == 0, planned.stderr
    compared = json.loads(planned.stdout)["compared"]
    assert compared["num_steps"] == 44
    assert compared["factor"] >= 1 - MOST_OFF, compared
    # The factor comes from the first steps, which other work may have slowed.
    assert compared["last_steps"]["difference"] >= 1 / compared["factor"] - 1 - MOST_OFF, compared
