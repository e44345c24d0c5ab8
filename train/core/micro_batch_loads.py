"""Records, on request, the rows that each rank has for each expert in each micro-batch."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from comm.protocol import Label
from model.router import Router, Routes, Routing
from train.config import TrainConfig
from train.files.json_lines import MICRO_BATCH_LOADS, JsonLines
from train.files.run_files import RankFiles


@dataclass(frozen=True, slots=True)
class _CountingRoutes:
    """Counts what other routes, or without them the routers, choose."""

    inner: Routes | None
    counts: dict[Label, Tensor] = field(default_factory=dict)

    def route(self, label: Label, router: Router, logits_BTE: Tensor) -> Routing:
        """Implements `Routes.route`."""
        routing = router.route(logits_BTE) if self.inner is None else self.inner.route(label, router, logits_BTE)
        ids = routing.ids_TK.flatten()
        count_E = ids.new_zeros(logits_BTE.shape[-1]).scatter_add_(0, ids, torch.ones_like(ids))
        self.counts[label] = count_E
        return routing


class MicroBatchLoads:
    """The file of a rank with its rows for each expert, by layer and micro-batch, of every so many steps."""

    def __init__(self, config: TrainConfig, rank: int, first_step: int) -> None:
        self._every = config.track.micro_batch_loads_every_steps
        self._lines: JsonLines | None = None
        self._passes: list[_CountingRoutes] = []
        if self._every:
            files = RankFiles(rank, config.parallelism.world_size, config.cluster.ranks_per_node)
            folder = files.make_folder(Path(config.out_dir) / MICRO_BATCH_LOADS)
            self._lines = JsonLines(folder / f"{files.stem}.jsonl", first_step)

    def count(self, step: int, routes: tuple[Routes | None, ...]) -> tuple[Routes | None, ...]:
        """Returns the routes of a step's passes, which count from now on if the step, from 1, is due."""
        self._passes = [] if self._lines is None or step % self._every else [_CountingRoutes(each) for each in routes]
        return tuple(self._passes) or routes

    def record(self, step: int) -> None:
        """Writes the line of a step that updated the weights, if it was counted."""
        if self._lines is not None and self._passes:
            rows = [
                [number, label.layer, label.direction, label.micro_batch, *count_E.tolist()]  # host sync
                for number, one_pass in enumerate(self._passes)
                for label, count_E in one_pass.counts.items()
            ]
            self._lines.record({"step": step, "rows": sorted(rows)})

    def roll_back(self, step: int) -> None:
        """Removes the lines of later steps, which will be repeated."""
        if self._lines is not None:
            self._lines.roll_back(step)

    def close(self) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._lines.close()
