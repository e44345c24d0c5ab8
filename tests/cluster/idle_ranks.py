"""Runs idle ranks until a test ends them, and prints the ranks' pids and the namespaces' inodes."""

import os
import tempfile
import time

from torch import distributed

from tests.cluster.namespaces import open_cluster
from tests.cluster.ranks_in_nodes import RanksInNodes


def sit(rank: int, world_size: int, path: str) -> None:
    """Reports on a pipe that all ranks have started, then waits to be ended."""
    distributed.barrier()
    if rank == 0:
        with open(path, "w") as pipe:
            pipe.write("there")
    time.sleep(600)


def main() -> None:
    """Starts the ranks and waits to be ended."""
    with tempfile.TemporaryDirectory() as folder, open_cluster(2) as cluster:
        path = f"{folder}/pipe"
        os.mkfifo(path)
        with RanksInNodes(cluster, 1, sit, path, preloaded=["torch.distributed"]) as ranks:
            with open(path) as pipe:
                pipe.read()
            print(*ranks.pids, ";", *(node.inode for node in cluster.nodes), flush=True)
            ranks.outcomes()


if __name__ == "__main__":
    main()
