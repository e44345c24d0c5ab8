"""Calls a function before each collective, transfer, picture and file operation of a rank."""

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

OnOperation = Callable[[str, Hashable | None], None]
"""Receives the name of the operation that this thread is about to start, and its label."""

DRAWING = "drawing"
WRITING, SYNCING, MOVING = "writing of a part", "syncing", "the last move"


def watch_operations(on_operation: OnOperation) -> None:
    """Calls the function before every exchange, transfer, reduction and phase of this process."""
    from comm.watchdog.collective_log import Collective, CollectiveLog

    plain = CollectiveLog.start

    def start(
        log: CollectiveLog, group: str, ranks: Sequence[int], name: str, label: Hashable | None = None, **flags: bool
    ) -> Collective:
        on_operation(name, label)
        return plain(log, group, ranks, name, label, **flags)

    CollectiveLog.start = start  # type: ignore[assignment, method-assign]


def watch_drawing(on_operation: OnOperation) -> None:
    """Calls the function before every picture of a step."""
    from train.records.step_record import PipelineTimeline

    plain = PipelineTimeline.draw

    def draw(watch: PipelineTimeline, *arguments: Any) -> bool:
        on_operation(DRAWING, None)
        return plain(watch, *arguments)

    PipelineTimeline.draw = draw  # type: ignore[assignment, method-assign]


def watch_writing(on_operation: OnOperation) -> None:
    """Calls the function before each write, sync and the final rename of a checkpoint's thread."""
    from train.checkpoint import save as saver

    def before(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            on_operation(name, None)
            return plain(*arguments, **named)

        return watched

    saver.write_part = before(WRITING, saver.write_part)  # type: ignore[attr-defined]
    os.fsync = before(SYNCING, os.fsync)
    saver.replace_folder = before(MOVING, saver.replace_folder)
