"""Main functions of ranks for the launcher's tests (ranks find them by name), and a command to run them.

`python -m tests.launch.rank_entries ENTRY,ENTRY FOLDER` runs four ranks for each, without the heavy modules.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from base.refusal import ConfigError
from comm.exits import EXIT_HANG, EXIT_LOST, EXIT_PREEMPTED, SIGNALS, Preemption
from comm.watchdog.membership import STORE_FILE_VARIABLE
from launch.cli.entry import command
from launch.config.folder import write_run_folder
from launch.config.run import compose_run
from launch.ranks.local import run_ranks, start_fork_server
from train.config import TrainConfig
from train.files.run_files import ExitReason, RankFiles, write_error

WORLD_SIZE = 4
GRACE_SECONDS = 3


def rank() -> int:
    return int(os.environ["RANK"])


def is_running(pid: str) -> bool:
    """Returns whether a process runs; one that has ended and waits for its parent does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def sleep_on() -> None:
    """Waits until a signal ends it, with nothing to save."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(600)


def sleep_on_visibly(config: TrainConfig) -> None:
    """Waits like `sleep_on`, and reports before that SIGTERM ends it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    (Path(config.out_dir) / f"asleep_{rank()}").touch()
    sleep_on()


def wait_until_others_sleep(config: TrainConfig) -> None:
    """Waits until all other ranks are in `sleep_on_visibly`.

    A rank that the launcher ends earlier takes SIGTERM for a preemption request, and the launcher kills it after 30 s.
    """
    while len(list(Path(config.out_dir).glob("asleep_*"))) < WORLD_SIZE - 1:
        time.sleep(0.02)


def done(config: TrainConfig) -> int:
    assert int(os.environ["WORLD_SIZE"]) == WORLD_SIZE
    (Path(config.out_dir) / f"ran_{rank()}").touch()
    # In one write, because ranks share this pipe, and print may write the line and its end separately.
    os.write(1, f"threads {os.environ['OMP_NUM_THREADS']}\n".encode())
    return 0


def one_needs_memory(config: TrainConfig) -> int:
    import torch

    if rank() == 3:
        text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
        raise torch.OutOfMemoryError(f"{text}\nmore lines")
    sleep_on_visibly(config)
    return 0


def all_reduced(config: TrainConfig) -> int:
    import torch
    from torch import distributed as dist

    # Ranks are given no address of a store, but a file.
    store = f"file://{os.environ[STORE_FILE_VARIABLE]}"
    dist.init_process_group("gloo", init_method=store, rank=rank(), world_size=WORLD_SIZE)
    total = torch.tensor([rank()])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total)


def all_say_non_finite(config: TrainConfig) -> int:
    return 77


def one_raises(config: TrainConfig) -> int:
    if rank() == 2:
        raise RuntimeError("the first line\nand the second")
    sleep_on()
    return 0


def one_refuses(config: TrainConfig) -> int:
    if rank() == 1:
        raise ConfigError("task.steps: must be luckier")
    sleep_on()
    return 0


def one_exits(config: TrainConfig) -> int:
    if rank() == 1:
        wait_until_others_sleep(config)
        sys.exit(75)
    sleep_on_visibly(config)
    return 0


def one_is_killed(config: TrainConfig) -> int:
    if rank() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank() == 0:
        raise ConnectionError("connection closed by peer")
    sleep_on()
    return 0


def one_is_killed_at_first(config: TrainConfig) -> int:
    """Fails in the first two attempts, in the second by its watchdog, and succeeds in the third."""
    attempts = Path(config.out_dir) / f"attempts_{rank()}"
    number = len(attempts.read_text()) if attempts.exists() else 0
    attempts.write_text("x" * (number + 1))
    if rank() == 3 and number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank() == 3 and number == 1:
        reason = ExitReason("rank 1 is lost: gone", EXIT_LOST)
        files = RankFiles(3, config.parallelism.world_size, config.cluster.ranks_per_node)
        write_error(Path(config.out_dir), files, reason, "details")
        os._exit(EXIT_LOST)
    if number < 2:
        sleep_on()
    return 0 if config.resume == "auto" else 1


def fork_server_is_killed_at_first(config: TrainConfig) -> int:
    """Loses the fork server in the first attempt; in the second, the first attempt's ranks must have ended."""
    pids = Path(config.out_dir) / f"attempts_{rank()}"
    if not pids.exists():
        pids.write_text(str(os.getpid()))
        if rank() == 1:
            while len(list(Path(config.out_dir).glob("attempts_*"))) < WORLD_SIZE:
                time.sleep(0.02)
            os.kill(os.getppid(), signal.SIGKILL)
        sleep_on()
    is_alone = not any(is_running(path.read_text()) for path in Path(config.out_dir).glob("attempts_*"))
    return 0 if is_alone and config.resume == "auto" else 1


def one_vanishes(config: TrainConfig) -> int:
    """Exits with code 0 while the other ranks wait for its result."""
    if rank() == 1:
        os._exit(0)
    return 0


def all_vanish(config: TrainConfig) -> int:
    """Exits with code 0 before the run is done."""
    os._exit(0)


def one_is_terminated(config: TrainConfig) -> int:
    """Is ended by its watchdog, because it would not end by itself."""
    if rank() == 1:
        wait_until_others_sleep(config)
        os._exit(128 + signal.SIGTERM)
    sleep_on_visibly(config)
    return 0


def one_is_stopped(config: TrainConfig) -> int:
    """Is stopped, so that the other ranks do not get its response."""
    if rank() == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    word = ExitReason("rank 2 did not reach a collective within 4 s", EXIT_HANG)
    files = RankFiles(rank(), config.parallelism.world_size, config.cluster.ranks_per_node)
    write_error(Path(config.out_dir), files, word, "details")
    os._exit(EXIT_HANG)


def tell_pid(config: TrainConfig) -> None:
    partial = Path(config.out_dir) / f"partial_{rank()}"
    partial.write_text(str(os.getpid()))
    partial.rename(Path(config.out_dir) / f"pid_{rank()}")


def sleep(config: TrainConfig) -> int:
    tell_pid(config)
    sleep_on()
    return 0


def saves(config: TrainConfig) -> int:
    """Ends after a preemption request; only then are all ranks done."""
    tell_pid(config)
    while not Preemption.of_process().is_requested:
        time.sleep(0.05)
    time.sleep(1.0)
    (Path(config.out_dir) / f"saved_{rank()}").touch()
    return EXIT_PREEMPTED


def deaf(config: TrainConfig) -> int:
    """Ignores all preemption requests."""
    tell_pid(config)
    while True:
        time.sleep(1.0)


def main(arguments: Sequence[str]) -> int:
    """Runs each of the entries in its own folder and prints their exit codes. Returns the last one."""
    # Found by its full name, as ranks must find it: this module runs as __main__ here.
    from tests.launch import rank_entries

    names, place = arguments[0].split(","), Path(arguments[1])
    config = compose_run(["parallelism=four_ranks", f"cluster.grace_seconds={GRACE_SECONDS}"])
    start_fork_server(config.cluster, ["torch.distributed", "launch.config.compose", "launch.ranks.local"])
    code = 0
    for name in names:
        cluster = replace(config.cluster, max_restarts=2 if name.endswith("_at_first") else 0)
        write_run_folder(replace(config, out_dir=str(place / name), cluster=cluster), datetime(2024, 1, 2))
        code = run_ranks(place / name, WORLD_SIZE, getattr(rank_entries, name))
        print(f"{name}: {code}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(command("train", main))
