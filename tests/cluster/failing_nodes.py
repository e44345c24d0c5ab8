"""Runs training in a cluster with one rank per node, and disconnects one node.

`python -m tests.cluster.failing_nodes FOLDER CASE...` has the same arguments as `tests.train.failing_run`.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from base.workers import end_with_parent
from launch.cli.entry import command
from launch.config.folder import read_folder, write_run_folder
from launch.config.run import compose_run
from launch.ranks.local import preload_modules, start_fork_server
from tests.cluster.namespaces import Cluster, enter, open_cluster
from tests.train.faults import CASES, WORLD_SIZE, Case, Outcome, arm, choices, failure_time, read_reports, write_case

_PORT = 29556
_TIMEOUT_SECONDS = 60.0


def run_rank(rank: int, namespace: str, master: str, out_dir: str) -> None:
    enter(namespace)
    end_with_parent()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": master, "MASTER_PORT": str(_PORT), "GLOO_SOCKET_IFNAME": "eth0"}
    from train.run import main as run

    arm(Path(out_dir))
    sys.exit(run(read_folder(Path(out_dir))))


def run_case(case: Case, folder: Path, cluster: Cluster) -> Outcome:
    """Runs one case and returns the exit code and message of the ranks that are still connected."""
    from tests.cluster import failing_nodes

    overrides = [*choices(folder), "cluster.ranks_per_node=1", f"out_dir={folder / str(case)}", *case.overrides.split()]
    config = compose_run(overrides)
    out_dir = Path(write_run_folder(config, datetime.now()).out_dir)
    write_case(case, out_dir)
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(
            target=failing_nodes.run_rank, args=(rank, node.path, cluster.address(0), str(out_dir)), daemon=True
        )
        for rank, node in enumerate(cluster.nodes)
    ]
    for each in ranks:
        each.start()
    until = time.monotonic() + _TIMEOUT_SECONDS
    while not (out_dir / "failed").exists() and time.monotonic() < until:
        time.sleep(0.01)
    cluster.cut(case.rank)
    (out_dir / "cut").touch()
    while any(each.is_alive() for each in ranks) and time.monotonic() < until:
        time.sleep(0.02)
    seconds, ended = time.time() - failure_time(out_dir), not any(each.is_alive() for each in ranks)
    for each in ranks:
        each.kill()
        each.join()
    cluster.restore(case.rank)
    words = {text for rank, (text, _) in read_reports(out_dir).items() if rank != case.rank}
    codes = {each.exitcode or 0 for each in ranks}
    return Outcome(
        case=case,
        exit_code=codes.pop() if len(codes) == 1 else -1,
        seconds=seconds,
        text=words.pop() if len(words) == 1 else f"several messages: {sorted(words)}",
        ended=ended,
    )


def main(arguments: Sequence[str]) -> int:
    folder, *names = arguments
    config = compose_run(choices(Path(folder)))
    start_fork_server(config.cluster, preload_modules(config.cluster))
    with open_cluster(WORLD_SIZE) as cluster:
        for case in CASES:
            if str(case) in names:
                outcome = run_case(case, Path(folder), cluster)
                (Path(folder) / f"{case}.json").write_text(json.dumps(asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(command("train", main))
