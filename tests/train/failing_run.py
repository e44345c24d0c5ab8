"""Starts runs like a user's command does, in which one rank is killed or stopped.

`python -m tests.train.failing_run FOLDER CASE...` runs each case in a separate folder in FOLDER, which holds the text
to train on, and writes an `Outcome` for each to `FOLDER/CASE.json`.
"""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from datetime import datetime
from io import StringIO
from pathlib import Path

from launch.cli.entry import command
from launch.config.folder import write_run_folder
from launch.config.run import compose_run
from launch.ranks.local import preload_modules, run_ranks, start_fork_server
from tests.train.faults import CASES, Case, Outcome, arm, choices, failure_time, write_case
from train.config import TrainConfig


def run_rank(config: TrainConfig) -> int:
    """Runs one rank, which fails if it is the case's."""
    from train.run import main as run

    arm(Path(config.out_dir))
    return run(config)


def run_case(case: Case, folder: Path) -> Outcome:
    """Runs a case, and returns its outcome from the launcher's exit code and message."""
    # Ranks import this module by its full name, and here it runs as __main__.
    from tests.train import failing_run

    config = compose_run([*choices(folder), f"out_dir={folder / str(case)}", *case.overrides.split()])
    config = write_run_folder(config, datetime.now())
    out_dir = Path(config.out_dir)
    write_case(case, out_dir)
    with redirect_stderr(StringIO()) as said:
        code = run_ranks(out_dir, config.parallelism.world_size, failing_run.run_rank)
    text = said.getvalue().partition("error: ")[2].partition("\n")[0].partition(" (rank ")[0]
    return Outcome(case=case, exit_code=code, seconds=time.time() - failure_time(out_dir), text=text, ended=True)


def main(arguments: Sequence[str]) -> int:
    folder, *names = arguments
    config = compose_run(choices(Path(folder)))
    start_fork_server(config.cluster, preload_modules(config.cluster))
    for case in CASES:
        if str(case) in names:
            outcome = run_case(case, Path(folder))
            (Path(folder) / f"{case}.json").write_text(json.dumps(asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(command("train", main))
