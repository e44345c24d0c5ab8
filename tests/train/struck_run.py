"""Runs of which one rank is killed or stopped, started as a user's command starts them.

`python -m tests.train.struck_run FOLDER CASE...` runs each in a folder of its own under FOLDER, which holds the text
to train on, and writes an `Outcome` for each into `FOLDER/CASE.json`.
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

from launch.command import command
from launch.config.run_config import compose_run
from launch.ranks.local import preload_modules, run_ranks, start_fork_server
from launch.ranks.run_folder import write_run_folder
from tests.train.faults import CASES, Case, Outcome, arm, choices, place, struck_at
from train.config import TrainConfig


def struck(config: TrainConfig) -> int:
    """What each rank does."""
    from train.run import main as run

    arm(Path(config.out_dir))
    return run(config)


def run_case(case: Case, folder: Path) -> Outcome:
    """One run, by the launcher's exit code and words."""
    # Found by its full name, as ranks must find it: this module runs as __main__ here.
    from tests.train import struck_run

    config = compose_run([*choices(folder), f"out_dir={folder / str(case)}"])
    config = write_run_folder(config, datetime.now())
    out_dir = Path(config.out_dir)
    place(case, out_dir)
    with redirect_stderr(StringIO()) as said:
        code = run_ranks(out_dir, config.parallelism.world_size, struck_run.struck)
    text = said.getvalue().partition("error: ")[2].partition("\n")[0].partition(" (rank ")[0]
    return Outcome(case=case, exit_code=code, seconds=time.time() - struck_at(out_dir), text=text, ended=True)


def main(arguments: Sequence[str]) -> int:
    """Runs the cases."""
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
