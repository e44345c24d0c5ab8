"""Tests that an error or failure of one rank ends all ranks within seconds."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.ports import reserved_port
from tests.tiny import write_text
from tests.train.failing_rank import CAUSE
from tests.train.faults import CASES, choices, read_reports, write_case

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "rank", "where"), [(4, 0, "backward"), (4, 1, "forward"), (8, 3, "backward"), (8, 7, "forward")]
)
def test_error_of_one_rank_in_a_step_ends_all_and_is_reported(
    tmp_path: Path, pipeline: int, rank: int, where: str
) -> None:
    write_text(tmp_path)
    choices = [
        *(f"out_dir={tmp_path / 'run'}", "model=tiny", f"parallelism.pipeline={pipeline}", "model.num_layers=8"),
        *("parallelism.data=1", "parallelism.expert=1", "validation.sequences=0", "samples.prompt="),
        *("data=files", f"data.paths=[{tmp_path / 'text'}]", f"data.cache_dir={tmp_path / 'cache'}"),
        *("data.tokenizer_vocab_size=320", "batch.sequence_length_tokens=32", "batch.global_sequences=16"),
        *("batch.micro_sequences=1", "data.validation_fraction=0.2"),
    ]
    ended = run_command(["-m", "tests.train.failing_rank", where, str(rank), *choices])
    seconds = time.time() - (tmp_path / "run" / "raised").stat().st_mtime
    assert seconds < 10
    assert ended.returncode == 1
    assert re.search(f"^error: rank {rank}: RuntimeError: {CAUSE}$", ended.stderr, re.MULTILINE), ended.stderr
    assert "raise RuntimeError(CAUSE)" in (tmp_path / "run" / "log" / f"rank_{rank:05d}.error.log").read_text()


@pytest.mark.slow
def test_lost_rank_under_torchrun_is_named_by_every_other_rank(tmp_path: Path) -> None:
    write_text(tmp_path)
    case = next(case for case in CASES if (case.how, case.phase) == ("killed", "combine"))
    write_case(case, tmp_path)
    job = [str(tmp_path), *choices(tmp_path), f"out_dir={tmp_path / 'run'}", "cluster.timeout_seconds=60"]
    with reserved_port() as port:
        rendezvous = ["--nnodes=1", "--nproc-per-node=4", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "-m", "tests.train.torchrun_rank", *job]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    words = read_reports(tmp_path / "run")
    assert set(words) == {0, 1, 2}
    text = words[0][0]
    assert set(words.values()) == {(text, 78)}
    assert text.startswith("rank 3 is lost: its process has ended; rank")
    for rank in words:
        assert f"error: rank {rank} ends: {text}\n" in ended.stderr
        operations = (tmp_path / "run" / "log" / f"rank_{rank:05d}.operations.jsonl").read_text().splitlines()
        assert {"time", "group", "number", "operation", "of", "state", "ranks"} == json.loads(operations[-1]).keys()
