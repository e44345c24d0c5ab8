"""Tests of the comparison at the start: ranks that differ in configuration, sources or packages do not train."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ports import reserved_port
from tests.ranks import run_ranks
from tests.tiny import tiny_config, write_text
from train import startup
from train.config import TrainConfig
from train.startup import compare_ranks

ROOT = Path(__file__).parents[2]


def compared(rank: int, world_size: int, configs: list[TrainConfig], versions: list[str]) -> str:
    """Compares the configurations of ranks, each a node, which claim to have these versions of torch."""
    kept, version = dict(os.environ), startup.version
    os.environ |= {"GROUP_RANK": str(rank), "LOCAL_RANK": "0", "MY_API_KEY": "abc0123456789"}
    startup.version = lambda name: versions[rank] if name == "torch" else version(name)  # type: ignore[assignment]
    try:
        return compare_ranks(configs[rank])
    finally:
        os.environ.clear()
        os.environ.update(kept)
        startup.version = version  # type: ignore[assignment]


def test_ranks_that_differ_name_nodes_keys_and_values(tmp_path: Path) -> None:
    first = tiny_config(tmp_path)
    optim = replace(first.optim, learning_rate=0.5)
    # A name that holds a secret of the environment is hidden.
    second = replace(first, optim=optim, seed=8, name="abc0123456789", out_dir="")
    texts = run_ranks(3, compared, [first, second, first], ["1", "1", "2"])
    assert len(set(texts)) == 1
    assert "rank 0 on node 0 (" in texts[0]
    assert "on node 1 (" in texts[0]
    for part in ("seed is 8 instead of 7", "optim.learning_rate is 0.5 instead of 0.01", 'name is "***"'):
        assert part in texts[0]
    assert "version of torch is 2 instead of 1" in texts[0]
    assert "2 of 3 ranks differ" in texts[0]
    assert "abc0123456789" not in texts[0]
    assert "out_dir" not in texts[0]


def test_ranks_that_are_equal_may_leave_out_dir_to_rank_0(tmp_path: Path) -> None:
    first = tiny_config(tmp_path)
    assert run_ranks(2, compared, [first, replace(first, out_dir="")], ["1", "1"]) == ["", ""]
    (text, _) = run_ranks(2, compared, [first, replace(first, out_dir="/elsewhere")], ["1", "1"])
    assert f"out_dir is /elsewhere instead of {first.out_dir}" in text


def test_identity_holds_every_key_as_on_the_command_line_and_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    identity = startup._identity(config)
    assert identity["data.paths"] == f'["{tmp_path / "text"}"]'
    assert {"data.kind", "task.steps", "model.vocab_size", "cluster.timeout_seconds"} <= identity.keys()
    for name in startup._SOURCES:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(startup, "_ROOT", tmp_path)
    digests = [startup._identity(config)["sources"]]
    (tmp_path / "model" / "head.py").write_text("a = 1\n")
    digests.append(startup._identity(config)["sources"])
    assert len({identity["sources"], *digests}) == 3


@pytest.mark.slow
def test_two_nodes_with_different_overrides_end_with_code_2_before_a_step(tmp_path: Path) -> None:
    write_text(tmp_path)
    job = [
        *("cluster=laptop", "model=tiny", "data=files", f"data.paths=[{tmp_path / 'text'}]", "samples.prompt="),
        *(f"data.cache_dir={tmp_path / 'cache'}", "data.tokenizer_vocab_size=320", "data.validation_fraction=0.2"),
        *("validation.sequences=0", "batch.sequence_length_tokens=32", f"out_dir={tmp_path / 'run'}", "task.steps=2"),
    ]
    with reserved_port() as port:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}"]
        nodes = [
            subprocess.Popen(
                [*torchrun, f"--node-rank={node}", "-m", "launch.train", *job, f"optim.learning_rate={rate}"],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for node, rate in enumerate((0.001, 0.002))
        ]  # fmt: skip
        try:
            outputs = [node.communicate(timeout=200)[0].decode() for node in nodes]
        finally:
            for node in nodes:
                node.kill()
    for output in outputs:
        assert "optim.learning_rate is 0.002 instead of 0.001" in output
        assert "on node 1 (" in output
        assert "exitcode  : 2" in output, output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert '"exit_code": 2' in (tmp_path / "run" / "status.json").read_text()
