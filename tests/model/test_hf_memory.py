"""Converting, loading and saving never hold more than two shards in addition to the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.hf_memory import SHARD_BYTES
from tests.test_floors import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_at_most_two_shards_above_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.model.hf_memory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    assert peak["num_files"] >= 8
    assert peak["size"] > 7 * SHARD_BYTES
    assert peak["streamed"] <= 2 * SHARD_BYTES
    assert peak["loaded"] <= peak["size"] + 2 * SHARD_BYTES
    assert peak["saved"] <= peak["size"] + 2 * SHARD_BYTES
    # The measure itself: a second copy of all weights shows in full.
    assert peak["held"] >= 1.9 * peak["size"]
