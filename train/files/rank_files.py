"""Computes where ranks' files are, in one folder or in one for each node, and replaces files whole."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from train.config import TrainConfig

MOST_FLAT_RANKS = 1024
"""Largest number of ranks whose files share a folder."""

_NODE_FOLDER = re.compile(r"node_[0-9]{6}")


@dataclass(frozen=True, slots=True)
class RankFiles:
    """Places and names of the files of one rank of a job; a node has `ranks_per_node` consecutive ranks."""

    rank: int
    num_ranks: int
    ranks_per_node: int

    @classmethod
    def of_run(cls, config: TrainConfig, rank: int) -> Self:
        """Returns the files of a rank of a run."""
        return cls(rank, config.parallelism.world_size, config.cluster.ranks_per_node)

    @property
    def subfolder(self) -> str:
        """Subfolder of the rank's files, such as `node_000012`; empty if the job has no subfolders."""
        return f"node_{self.rank // self.ranks_per_node:06d}" if self.num_ranks > MOST_FLAT_RANKS else ""

    @property
    def stem(self) -> str:
        """First part of a file's name, such as `rank_00003`. Names of all ranks of a job sort by rank."""
        return f"rank_{self.rank:06d}" if self.subfolder else f"rank_{self.rank:05d}"

    def folder(self, parent: Path) -> Path:
        """Returns the folder of the rank's files in a folder of the run."""
        return parent / self.subfolder

    def make_folder(self, parent: Path) -> Path:
        """Creates the folder of the rank's files, but not the run's folder, which contains `parent`."""
        parent.mkdir(exist_ok=True)
        self.folder(parent).mkdir(exist_ok=True)
        return self.folder(parent)


def find_rank_files(parent: Path, pattern: str) -> list[Path]:
    """Returns the files of all ranks in a folder of a run whose names match a pattern, in any order."""
    return [*parent.glob(pattern), *parent.glob(f"node_*/{pattern}")]


def replace_text(path: Path, text: str) -> None:
    """Writes a file in place of an earlier one, which stays until the new one is complete."""
    # Two processes may write the same file, such as `launch.redraw` and the run.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def is_node_folder(name: str) -> bool:
    """Returns whether a name is that of a subfolder for the ranks of a node."""
    return _NODE_FOLDER.fullmatch(name) is not None
