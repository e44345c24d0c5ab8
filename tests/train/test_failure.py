"""A failure of one rank ends all ranks within seconds, in an agreed order, also while a corpus is prepared."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from comm.config import DispatchConfig, ParallelismConfig, TwoHopDispatchConfig
from data.corpus import DataError
from dualpipe.registry import ScheduleConfig
from tests import ROOT
from tests.commands import run_command
from tests.covering import exhaustive
from tests.ports import reserved_port
from tests.ranks import run_ranks
from tests.stopping import descendants
from tests.tiny import VALIDATION, tiny_config, write_text
from tests.train.failing_rank import CAUSE
from tests.train.faults import Case, choices, read_reports, write_case
from tests.train.job import close_job, open_job, open_loader
from train.config import TrainConfig
from train.core.step import train_step
from train.files.run_files import read_status
from train.listeners.validation import validate
from train.start.corpus import State, build_together


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "rank", "where"),
    [
        (4, 1, "forward"),
        *exhaustive((4, 0, "backward"), (8, 3, "backward"), (8, 7, "forward")),
    ],
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


@pytest.mark.long
def test_lost_rank_under_torchrun_is_named_by_every_other_rank(tmp_path: Path) -> None:
    write_text(tmp_path)
    write_case(Case("killed", 1, "optimizer step", "update of the weights", 2), tmp_path)
    job = [str(tmp_path), *choices(tmp_path), f"out_dir={tmp_path / 'run'}", "cluster.timeout_seconds=60"]
    job += ["parallelism=two_ranks"]
    with reserved_port() as port:
        rendezvous = ["--nnodes=1", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "-m", "tests.train.torchrun_rank", *job]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    words = read_reports(tmp_path / "run")
    assert set(words) == {0}
    text = words[0][0]
    assert set(words.values()) == {(text, 78)}
    assert text.startswith("rank 1 is lost: its process has ended; rank")
    for rank in words:
        assert f"error: rank {rank} ends: {text}\n" in ended.stderr
        operations = (tmp_path / "run" / "log" / f"rank_{rank:05d}.operations.jsonl").read_text().splitlines()
        assert {"time", "group", "number", "operation", "of", "state", "ranks"} == json.loads(operations[-1]).keys()


@pytest.mark.long
@pytest.mark.parametrize("moment", [0, 1, 2, *exhaustive(*range(3, 20))])
def test_rank_killed_at_any_moment_under_torchrun_leaves_a_lost_run(moment: int, tmp_path: Path) -> None:
    """Rank 0 draws and saves after every step, so many of the moments are within a drawing or a checkpoint."""
    chance = random.Random(moment)
    write_text(tmp_path)
    run = tmp_path / "run"
    job = [
        *choices(tmp_path),
        f"out_dir={run}",
        "task.steps=100000",
        "parallelism=two_ranks",
        "accept=[repeated_corpus]",
    ]
    job += ["track.picture_every_steps=1", "validation.sequences=0", "cluster.timeout_seconds=60"]
    with reserved_port() as port, (tmp_path / "output").open("w") as output:
        rendezvous = ["--nnodes=1", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "-m", "launch.train", *job]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while (status := read_status(run)) is None or status.state != "running":
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(chance.uniform(0.0, 4.0))
            rank = chance.choice((1, 1, 1, 0))
            os.kill(_pid_of_rank(process.pid, rank), signal.SIGKILL)
            process.wait(timeout=60)
        finally:
            process.terminate()
            process.wait(timeout=60)
    status = read_status(run)
    assert status is not None
    assert (status.state, status.exit_code) == ("lost", 78), (rank, status, (tmp_path / "output").read_text()[-2000:])
    assert status.reason.startswith(f"rank {rank} is lost")


def _pid_of_rank(agent: int, rank: int) -> int:
    marks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in descendants(agent)}
    return min(pid for pid, variables in marks.items() if f"RANK={rank}".encode() in variables)


TWO_HOP = TwoHopDispatchConfig(
    kind="two_hop", payload="full", max_nodes=4, node_cap="verify", chunks=2, partial_sums="rows"
)

Seen = tuple[dict[str, str], dict[str, tuple[int, ...]], set[str]]


def _steps(rank: int, world_size: int, config: TrainConfig) -> Seen:
    """Hashes and members of every group after two steps and a validation, and the names of what was done."""
    learner, loader = open_job(config), open_loader(config)
    for step in range(2):
        train_step(learner, config.task, loader, step)
    validate(learner.replica, config.task, loader, config.validation.sequences)
    close_job(learner)
    log = learner.world.log
    recent = [operation for _, operation in log.recent()]
    return log.order_hashes(), {each.group: each.ranks for each in recent}, {each.name for each in recent}  # type: ignore[misc]


def _check_order(seen: list[Seen]) -> set[str]:
    """The groups, each with one hash on all its ranks."""
    members = {group: ranks for _, groups, _ in seen for group, ranks in groups.items()}
    for group, ranks in members.items():
        held = {rank for rank, (hashes, _, _) in enumerate(seen) if group in hashes}
        assert held == set(ranks), group
        assert len({seen[rank][0][group] for rank in ranks}) == 1, group
    return set(members)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "dispatch"), [(2, None), *exhaustive((4, TWO_HOP))])
def test_operations_of_every_group_have_one_order_on_all_its_ranks(
    tmp_path: Path, data: int, dispatch: DispatchConfig | None
) -> None:
    write_text(tmp_path)
    config = tiny_config(
        tmp_path,
        parallelism=ParallelismConfig(pipeline=2, data=data, expert=data),
        schedule=ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped"),
        validation=replace(VALIDATION, sequences=16),
    )
    config = replace(config, data=replace(config.data, validation_fraction=0.5))  # enough for a validation pass
    seen = run_ranks(2 * data, _steps, config if dispatch is None else replace(config, dispatch=dispatch))
    groups, names = _check_order(seen), set().union(*(names for _, _, names in seen))
    world = list(range(2 * data))
    links = {(0, data), (data - 1, 2 * data - 1), (data, 0), (2 * data - 1, data - 1)}
    assert {f"{kind} {source}->{end}" for kind in ("activation", "gradient") for source, end in links} <= groups
    assert {f"world {world}", f"stage {world}"} <= groups
    assert {"transfer", "sum of targets", "sum of losses", "update of the weights", "sum of router loads"} <= names
    assert len([group for group in groups if "->" not in group]) > 2  # those of the experts' exchange


def ends(folder: Path, seconds: float, port: int) -> list[tuple[int, str]]:
    """Runs two ranks, each in a separate process, with a timeout of 4 seconds. Returns exit codes and outputs."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = ["-m", "tests.train.preparing_rank", str(seconds), str(folder)]

    def run(rank: int) -> tuple[int, str]:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
        ended = run_command(command, env={**os.environ, **common, **own}, timeout=200)
        return ended.returncode, ended.stdout + ended.stderr

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def test_preparation_longer_than_the_timeout_is_no_hang_and_a_rank_lost_meanwhile_is_detected(tmp_path: Path) -> None:
    """Two jobs wait at the same time."""
    jobs = {"long": 5.5, "lost": 60.0}
    for name in jobs:
        write_text(tmp_path / name)
        (tmp_path / name / "run").mkdir()
    (tmp_path / "lost" / "victim").touch()
    with ThreadPoolExecutor(2) as pool, reserved_port() as first, reserved_port() as second:
        ran = pool.map(ends, [tmp_path / name for name in jobs], jobs.values(), (first, second))
        long, ((code, _), (lost, _)) = ran
    for rank, (ended, text) in enumerate(long):
        assert ended == 0, f"rank {rank}: {text[-3000:]}"
    assert (code, lost) == (78, -9)
    words = (tmp_path / "lost" / "run" / "log" / "rank_00000.error.log").read_text()
    assert words.startswith("rank 1 is lost")


def test_every_rank_raises_the_error_of_one_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks exchange states; here the other one's are played."""
    config = tiny_config(tmp_path)  # without text

    def exchange(state: State) -> State:
        return state

    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(DataError, match=r"data\.paths: .* does not exist"):
        build_together(config, exchange)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(DataError, match="no text there"):
        build_together(config, lambda state: (True, "no text there"))
