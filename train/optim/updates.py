"""Keeps track of weight updates that run next to the following forward passes."""

from comm.protocol import Work


class WeightUpdates:
    """The updates of one replica's weights that may still be running, in the order of their lane.

    Only the main thread uses it. Whoever reads or changes weights waits first: passes for each stage before its first
    micro-batch, everything else for all stages.
    """

    def __init__(self) -> None:
        self._running: list[tuple[tuple[int, ...], Work[None]]] = []

    def add(self, stages: tuple[int, ...], work: Work[None]) -> None:
        """Adds an update that changes weights of some stages."""
        self._running.append((stages, work))

    def wait(self, stage: int) -> None:
        """Waits until no update changes weights of a stage, and raises the error of one that failed."""
        last = max((index for index, (stages, _) in enumerate(self._running) if stage in stages), default=-1)
        self._wait(last + 1)

    def wait_all(self) -> None:
        """Waits until all updates are complete, and raises the error of one that failed."""
        self._wait(len(self._running))

    def _wait(self, count: int) -> None:
        """Waits for the first `count` updates. They complete in order."""
        for _ in range(count):
            _, work = self._running.pop(0)
            work.wait()
