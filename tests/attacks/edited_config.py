"""Runs training whose first attempt edits `config.yaml`: `python -m tests.attacks.edited_config FOLDER`."""

import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from comm.exits import EXIT_LOST
from launch.config.folder import write_run_folder
from launch.ranks.local import run_ranks, start_fork_server
from tests.tiny import tiny_config
from train.config import TrainConfig
from train.files.run_files import ExitReason, RankFiles, write_error


def edit_then_read(config: TrainConfig) -> int:
    """Edits the file and exits in the first attempt; prints what it read in the second."""
    folder = Path(config.out_dir)
    if not (folder / "first").exists():
        (folder / "first").touch()
        with (folder / "config.yaml").open("a") as file:
            file.write(f"out_dir: elsewhere\nx: !!python/object/apply:os.system ['touch {folder / 'proof'}']\n")
        write_error(
            folder,
            RankFiles(0, config.parallelism.world_size, config.cluster.ranks_per_node),
            ExitReason("rank 0 is lost", EXIT_LOST),
            "",
        )
        return sys.exit(EXIT_LOST)
    (folder / "second").write_text(config.out_dir)
    return 0


if __name__ == "__main__":
    config = tiny_config(Path(sys.argv[1]))
    config = write_run_folder(replace(config, cluster=replace(config.cluster, max_restarts=1)), datetime.now())
    start_fork_server(config.cluster, [])
    from tests.attacks.edited_config import edit_then_read as entry

    sys.exit(run_ranks(Path(config.out_dir), 1, entry))
