"""Where a rank can be hit: everything that it does with others, draws, or writes, as it is about to begin."""

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

Come = Callable[[str, Hashable | None], None]
"""Is called with the name of what this thread is about to do, and with whose it is."""

DRAWING = "drawing"
WRITING, HASHING, SYNCING, MOVING = "writing of a part", "hashing", "syncing", "the last move"


def watch_operations(come: Come) -> None:
    """Exchanges, transfers, reductions and phases of this process."""
    from comm.watchdog.collective_log import Collective, CollectiveLog

    plain = CollectiveLog.start

    def start(
        log: CollectiveLog, group: str, ranks: Sequence[int], name: str, label: Hashable | None = None, *rest: bool
    ) -> Collective:
        come(name, label)
        return plain(log, group, ranks, name, label, *rest)

    CollectiveLog.start = start  # type: ignore[method-assign]


def watch_drawing(come: Come) -> None:
    """Pictures of a step."""
    from train.records.pictures import PipelineTimeline

    plain = PipelineTimeline.draw

    def draw(watch: PipelineTimeline, *arguments: Any) -> bool:
        come(DRAWING, None)
        return plain(watch, *arguments)

    PipelineTimeline.draw = draw  # type: ignore[method-assign]


def watch_writing(come: Come) -> None:
    """What a checkpoint's thread does with files: each part, hash, sync and the last move."""
    from train.checkpoint import save as saver

    def before(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            come(name, None)
            return plain(*arguments, **named)

        return watched

    saver.dcp_save = before(WRITING, saver.dcp_save)
    saver.digests = before(HASHING, saver.digests)
    os.fsync = before(SYNCING, os.fsync)
    saver.replace_folder = before(MOVING, saver.replace_folder)
