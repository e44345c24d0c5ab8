"""Measures the cost of the watchdog on four ranks: `python -m bench.watch [OVERRIDE...]`.

Overrides are those of `conf/train.yaml`. Without failures, a rank's watchdog only listens on its thread, and the rank
logs each exchange, transfer and reduction. Both are measured in CPU time relative to the rank's step. Needs Linux for
the times of threads.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.config.folder import write_run_folder
from launch.config.run import check, compose_run
from launch.ranks.local import preload_modules, run_ranks, start_fork_server
from train.config import TrainConfig

LIMIT = 0.02
_NUM_STEPS, _NUM_SKIPPED = 12, 2
_NUM_NOTES = 20_000


def watched_rank(config: TrainConfig) -> int:
    """Runs one rank, and writes the cost of its steps to a file at the end."""
    from comm.watchdog.collective_log import CollectiveLog
    from tests.train.operation_hooks import watch_operations
    from train import loop
    from train.run import main as run

    num_operations, steps, plain = [0], [], loop.train_step  # type: ignore[attr-defined]

    def count(*_: object) -> None:
        num_operations[0] += 1

    def step(*arguments: Any) -> Any:
        watch = next(thread for thread in threading.enumerate() if thread.name == "watchdog")
        before = time.process_time(), _thread_seconds(watch), num_operations[0]
        result = plain(*arguments)
        after = time.process_time(), _thread_seconds(watch), num_operations[0]
        steps.append([late - early for early, late in zip(before, after, strict=True)])
        return result

    watch_operations(count)
    loop.train_step = step  # type: ignore[assignment, attr-defined]
    code = run(config)
    begun, log = time.process_time(), CollectiveLog()
    for _ in range(_NUM_NOTES):
        with log.awaiting(log.start("expert [0, 1]", (0, 1), "dispatch", "layer 4")):
            pass
    note = (time.process_time() - begun) / _NUM_NOTES
    cpu, watch, operations = (sum(column) / len(column) for column in zip(*steps[_NUM_SKIPPED:], strict=True))
    costs = {"step": cpu, "watch": watch, "operations": operations, "note": note}
    (Path(config.out_dir) / f"cost-{os.environ['RANK']}.json").write_text(json.dumps(costs))
    return code


def _thread_seconds(thread: threading.Thread) -> float:
    return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9


def main(overrides: Sequence[str]) -> int:
    """Prints the cost of the most expensive rank. The exit code is 1 if it is above the limit."""
    # Imported by its full name, because ranks must find it: this module runs as __main__ here.
    from bench import watch

    with tempfile.TemporaryDirectory(prefix="watch-") as name:
        choices = [
            "experiment=quickstart",
            "parallelism=four_ranks",
            "cluster.ranks_per_node=2",
            f"task.steps={_NUM_STEPS}",
            "validation.sequences=0",
        ]
        choices += ["samples.prompt=", f"out_dir={name}/run", *overrides]
        config = compose_run(choices)
        check(config)
        start_fork_server(config.cluster, preload_modules(config.cluster))
        config = write_run_folder(config, datetime.now())
        code = run_ranks(Path(config.out_dir), config.parallelism.world_size, watch.watched_rank)
        costs = [json.loads(path.read_text()) for path in sorted(Path(config.out_dir).glob("cost-*.json"))]
    shares = [(each["watch"] + each["operations"] * each["note"]) / each["step"] for each in costs]
    share, most = max(zip(shares, costs, strict=True), key=lambda pair: pair[0])
    print(
        f"watch {1e3 * most['watch']:.2f} ms, and {most['operations']:.0f} operations noted at "
        f"{1e6 * most['note']:.1f} us, of {1e3 * most['step']:.0f} ms CPU time a step: {100 * share:.2f} % of the rank "
        f"of {len(costs)} with the highest cost"
    )
    return 0 if code == 0 and len(costs) == config.parallelism.world_size and share <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
