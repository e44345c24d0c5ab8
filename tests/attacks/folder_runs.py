"""Runs training whose folder is damaged: deleted, on a full disk, on a read-only disk, or taken over.

`python -m tests.attacks.folder_runs FOLDER CASE...` trains each case in `FOLDER/CASE` on real ranks and writes its exit
code into `FOLDER/CASE.code`. The cases with disks need root and a private mount namespace.
"""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from launch.cli.entry import command
from launch.config.folder import check_folder, locked_run_folder
from launch.config.run import check, compose_run
from launch.ranks.local import preload_modules, run_ranks, start_fork_server
from launch.train import train_rank
from train.files.run_lock import LOCK_NAME, Owner

NUM_STEPS = 300
OTHER_HOST = "node9"


def choices(folder: Path) -> list[str]:
    """Returns the overrides of each run, without its folder and steps."""
    return [
        *("model=tiny", "parallelism=two_ranks", "data=files", f"data.paths=[{folder / 'text'}]"),
        *(f"data.cache_dir={folder / 'cache'}", "data.tokenizer_vocab_size=320", "data.validation_fraction=0.2"),
        *("batch.sequence_length_tokens=32", "batch.global_sequences=8", "batch.micro_sequences=1"),
        *("validation.sequences=0", "samples.prompt=", "checkpointing.every_steps=3", "accept=[repeated_corpus]"),
    ]


def delete(run: Path) -> None:
    """Deletes a folder, as `rm -r` does."""
    gone = run.with_name(f"{run.name}.gone")
    run.rename(gone)
    shutil.rmtree(gone)


def fill(run: Path) -> None:
    with (run / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


def make_read_only(run: Path) -> None:
    """Makes the checkpoints' disk read-only, as after an error. Fails while a file is being written."""
    folder = str(run / "checkpoints")
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    while subprocess.run(["mount", "-o", "remount,bind,ro", folder], capture_output=True, check=False).returncode:
        time.sleep(0.01)


def take_over(run: Path) -> None:
    """Takes over the lock, as a command on another machine does after the lease."""
    (run / "other").write_text(replace(Owner.of_this_process(), host=OTHER_HOST, machine="another").to_text())
    (run / "other").rename(run / LOCK_NAME)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": delete,
    "taken_over": take_over,
    "full": fill,
    "read_only": make_read_only,
}


def _damage_later(case: str, run: Path) -> None:
    """Waits until the run has done some steps and has a checkpoint, then damages its folder."""
    while not list(run.glob("checkpoints/step-*/manifest.json")):
        time.sleep(0.05)
    DAMAGES[case](run)


def run_case(folder: Path, case: str) -> int:
    run = folder / case
    if case == "full":
        run.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(run)], check=True)
    config = compose_run([*choices(folder), f"task.steps={NUM_STEPS}", f"out_dir={run}"])
    check(config)
    check_folder(config)
    damage = threading.Thread(target=_damage_later, args=(case, run), daemon=True)
    damage.start()
    with locked_run_folder(config, datetime.now()) as (config, _):
        return run_ranks(run, config.parallelism.world_size, train_rank)


def main(arguments: Sequence[str]) -> int:
    folder, *cases = Path(arguments[0]), *arguments[1:]
    config = compose_run([*choices(folder), f"out_dir={folder}/any"])
    start_fork_server(config.cluster, preload_modules(config.cluster))
    for case in cases:
        (folder / f"{case}.code").write_text(str(run_case(folder, case)))
    return 0


if __name__ == "__main__":
    sys.exit(command("train", main))
