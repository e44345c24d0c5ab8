"""Preparing the corpus may take longer than any collective may; a rank that is lost meanwhile is missed."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.corpus import DataError
from tests.commands import run_command
from tests.ports import reserved_port
from tests.tiny import tiny_config, write_text
from train.corpus import State, build_together


def ends(folder: Path, seconds: float, port: int) -> list[tuple[int, str]]:
    """Runs two ranks, each in a separate process, with a timeout of 5 seconds. Returns exit codes and outputs."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = ["-m", "tests.train.preparing_rank", str(seconds), str(folder)]

    def run(rank: int) -> tuple[int, str]:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
        ended = run_command(command, env={**os.environ, **common, **own}, timeout=200)
        return ended.returncode, ended.stdout + ended.stderr

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path)
    (tmp_path / "run").mkdir()
    return tmp_path


@pytest.fixture
def port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


def test_preparation_longer_than_the_timeout_is_no_hang(folder: Path, port: int) -> None:
    for rank, (code, text) in enumerate(ends(folder, 8.0, port)):
        assert code == 0, f"rank {rank}: {text[-3000:]}"


def test_rank_lost_while_another_prepares_is_detected(folder: Path, port: int) -> None:
    (folder / "victim").write_text("1")
    (code, _), (lost, _) = ends(folder, 60.0, port)
    assert lost == -9
    assert code == 78
    words = (folder / "run" / "log" / "rank_00000.error.log").read_text()
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
