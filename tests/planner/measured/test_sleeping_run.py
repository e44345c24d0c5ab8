"""A run whose computations sleep is not faster than its plan. docs/benchmarks.md has both sides."""

import json
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.tiny import write_text
from train.predict.measured import MEASURED_NAME, PROBE_NAME

PLUGIN = Path(__file__).parents[1] / "sleeping_plugin.py"
MOST_OFF = 0.05


@pytest.mark.long
def test_run_is_not_faster_than_its_plans_nor_its_last_steps_than_with_the_factor(tmp_path: Path) -> None:
    """Plans from the times of the probe, and from those of the last picture."""
    write_text(tmp_path)
    run = tmp_path / "run"
    overrides = [
        *(f"out_dir={run}", "cluster=laptop", "schedule=auto", f"plugins=[{PLUGIN}]", "parallelism=two_ranks"),
        *("model=tiny", "model.num_layers=3", "data=files", f"data.paths=[{tmp_path / 'text'}]"),
        *(f"data.cache_dir={tmp_path / 'cache'}", "data.tokenizer_vocab_size=320", "data.validation_fraction=0.2"),
        *("validation.sequences=0", "samples.prompt=", "batch.sequence_length_tokens=32", "batch.micro_sequences=1"),
        *("batch.global_sequences=4", "task.steps=31", "track.picture_every_steps=10"),
        "checkpointing.every_steps=1000",
    ]
    done = run_command(["-m", "launch.train", *overrides], timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / MEASURED_NAME).is_file()
    for is_probe in (True, False):
        assert (run / PROBE_NAME).is_file() == is_probe
        planned = run_command(["-m", "launch.plan", f"run={run}", "format=json"], timeout=100)
        assert planned.returncode == 0, planned.stderr
        compared = json.loads(planned.stdout)["compared"]
        assert compared["num_steps"] == 30
        assert compared["factor"] >= 1 - MOST_OFF, compared
        # The factor comes from the first steps, which other work may have slowed.
        assert compared["last_steps"]["difference"] >= 1 / compared["factor"] - 1 - MOST_OFF, compared
        (run / PROBE_NAME).unlink(missing_ok=True)
