"""Tests that a run that does not fit its devices is rejected with the nearest change that fits."""

import itertools
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.config.memory_rules import check_memory
from launch.config.rules import check_rules
from launch.config.run_config import compose_run
from train.config import TrainConfig, sized_config
from train.config.errors import ConfigError
from train.memory import memory_lines, predict_memory
from train.memory.predict import ramp_memory_cap

ROOT = Path(__file__).resolve().parents[2]
V3 = (
    "model=v3_671b",
    "cluster=h800",
    "parallelism=v3_2048_ranks",
    "precision=fp8",
    "optim=adamw_v3",
    "dispatch=two_hop",
    "batch.sequence_length_tokens=4096",
    "batch.global_sequences=15360",
    "validation.sequences=0",
    "batch.micro_sequences=1",
)
RAMP = "batch.ramp={start_sequences:3072,end_tokens:469000000000,num_sizes:5}"


def make_config(*overrides: str) -> TrainConfig:
    return compose_run(overrides)


def refusal(config: TrainConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_memory(config, check_rules)
    return str(caught.value)


def test_deepseek_v3_fits_80_gb_with_one_sequence_and_not_with_two() -> None:
    check_memory(make_config(*V3), check_rules)
    message = refusal(make_config(*V3, "batch.micro_sequences=2"))
    assert message.startswith("memory: rank 1 needs 126.5 GB of 84.9 (activations 86.5, ")
    assert message.endswith("; nearest: batch.micro_sequences=1")


@pytest.mark.long
def test_deepseek_v3_at_128k_names_the_ranks_that_must_share_a_sequence() -> None:
    message = refusal(make_config(*V3, "batch.sequence_length_tokens=131072"))
    assert re.match(r"memory: rank \d+ needs 16\d\d\.\d GB of 84\.9 \(activations 1456\.3, ", message), message
    nearest = message.rpartition("; nearest: ")[2].split()
    assert any(text.startswith("parallelism.context=") for text in nearest), message
    check_memory(make_config(*V3, "batch.sequence_length_tokens=131072", *nearest), check_rules)


def test_deepseek_v3_is_measured_once_and_takes_less_than_two_seconds_and_no_torch_then(tmp_path: Path) -> None:
    code = (
        "import sys, time; "
        "from launch.config.run_config import compose_run; "
        "from train.memory import memory_lines; config = compose_run(sys.argv[1:]); "
        "start = time.process_time(); lines = memory_lines(config); "
        "print(time.process_time() - start, 'torch' in sys.modules, lines)"
    )
    cache = f"data.cache_dir={tmp_path}"

    def predict() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *V3, cache], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout.split(maxsplit=2)

    _, has_torch, measured = predict()
    assert has_torch == "True"
    seconds, has_torch, read = predict()
    assert float(seconds) < 2
    assert has_torch == "False"
    assert read == measured
    # Files that were cut or changed are measured again.
    files = sorted((tmp_path / "sizes").iterdir())
    whole = [file.read_text() for file in files]
    for file, change in zip(
        files, itertools.cycle(('{"a": 1}', "[[{}]]", "[[", '[[{"kept": 1e300}]]', "null", "[[5]]"))
    ):
        file.write_text(change)
    assert predict()[1:] == ["True", measured]
    assert [file.read_text() for file in files] == whole


def test_a_machine_without_triton_measures_the_same(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules |= {'triton': None} if sys.argv[1] == 'absent' else {}; "
        "from launch.config.run_config import compose_run; from train.memory import memory_lines; "
        "print(memory_lines(compose_run(sys.argv[2:])))"
    )
    lines = []
    for triton in ("present", "absent"):
        command = [sys.executable, "-c", code, triton, *V3, f"data.cache_dir={tmp_path / triton}"]
        lines.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_the_start_of_a_ramp_is_scheduled_so_that_it_fits() -> None:
    """With fewer than two micro-batches per rank, more W operations are deferred, which needs 81 GB on rank 0."""
    config = make_config(*V3, RAMP)
    first = sized_config(config, 3072)
    assert 80e9 < predict_memory(first).worst.total < 84e9
    larger = replace(first, cluster=replace(first.cluster, memory_bytes=90_000_000_000))
    assert ramp_memory_cap(larger) is None
    # A cap costs little, so a size takes at most 95 % of the memory if one allows that.
    assert predict_memory(replace(first, memory_cap=ramp_memory_cap(first))).worst.total <= 0.95 * 84.9e9
    smaller = replace(first, cluster=replace(first.cluster, memory_bytes=75_000_000_000))
    cap = ramp_memory_cap(smaller)
    assert cap is not None
    assert predict_memory(replace(smaller, memory_cap=cap)).worst.total <= 75e9
    check_memory(config, check_rules)


def test_without_memory_bytes_nothing_is_checked() -> None:
    config = make_config(*V3, "batch.micro_sequences=2", "cluster.memory_bytes=null")
    started = time.process_time()
    check_memory(config, check_rules)
    assert time.process_time() - started < 0.05


@pytest.mark.parametrize(
    ("share", "overrides", "nearest"),
    [
        (
            0.99,
            ("recompute=[norm]", "batch.micro_sequences=1", "batch.sequence_length_tokens=1024"),
            "recompute=[norm,mla_up,swiglu]",
        ),
        (0.95, ("precision=bf16", "batch.micro_sequences=1"), "optim.moments=bf16"),
        (0.5, ("batch.micro_sequences=1",), "none; closest "),
    ],
)
def test_nearest_changes_are_computed(share: float, overrides: tuple[str, ...], nearest: str) -> None:
    """Each suggested change is predicted again and fits."""
    config = make_config("model=quickstart", "parallelism.cut=even", *overrides)
    needed = predict_memory(config).worst.total
    tight = replace(config, cluster=replace(config.cluster, memory_bytes=round(needed * share)))
    assert f"nearest: {nearest}" in refusal(tight)


def test_a_nearest_change_passes_when_it_is_made() -> None:
    config = make_config("model=quickstart", "batch.micro_sequences=4", "cluster.memory_bytes=200000000")
    text = refusal(config).partition("nearest: ")[2]
    again = make_config("model=quickstart", "batch.micro_sequences=4", "cluster.memory_bytes=200000000", text)
    check_memory(again, check_rules)


def test_the_command_rejects_with_one_line_and_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.train", "experiment=quickstart", "cluster.memory_bytes=1000000"]
    done = subprocess.run(
        [*command, f"out_dir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: memory: rank ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_reserve_as_large_as_the_memory_is_rejected() -> None:
    message = refusal(make_config("cluster.memory_bytes=1000", "cluster.memory_reserve_bytes=1000"))
    assert message.startswith("cluster.memory_reserve_bytes: must be below cluster.memory_bytes=1000, is 1000; nearest")


def test_the_table_has_a_row_for_each_rank() -> None:
    lines = memory_lines(make_config("experiment=two_nodes"))
    assert lines[0].startswith("memory: rank ")
    assert [line.split()[0] for line in lines[2:6]] == ["0", "1", "2", "3"]
    assert lines[-1].startswith("experts are taken to receive equally many rows; 10 % more")
