"""Where the words, records and pictures of a run go."""

from collections.abc import Sequence
from typing import Any

from train.balance import Balance, LoadLines
from train.metrics import Display, JsonLines, Recorder
from train.report.write import Report


class Reporter:
    """Where the first rank's words and records go; on other ranks nowhere."""

    def __init__(
        self,
        display: Display | None,
        recorders: Sequence[Recorder],
        loads: LoadLines | None = None,
        report: Report | None = None,
    ) -> None:
        self._display = display
        self._recorders = recorders
        self._loads = loads
        self._report = report

    def say(self, line: str) -> None:
        """One line for people."""
        if self._display is not None:
            self._display.say(line)

    def record(self, values: dict[str, Any], balance: Balance) -> None:
        """One step's numbers."""
        if self._loads is not None:
            self._loads.record(values["step"], balance)
        for recorder in self._recorders:
            recorder.record(values)

    def last(self) -> dict[str, Any] | None:
        """The record of the last step, as an earlier life of the run may have left it; None on other ranks."""
        return next((each.last() for each in self._recorders if isinstance(each, JsonLines)), None)

    def amend(self, values: dict[str, Any]) -> None:
        """The record of the last step again, with more in it."""
        for recorder in self._recorders:
            recorder.amend(values)

    def draw(self) -> None:
        """The report of the run so far."""
        if self._report is not None:
            self._report.try_to_write()

    def go_back(self, step: int) -> None:
        """The steps after this one come again."""
        if self._loads is not None:
            self._loads.go_back(step)
        for recorder in self._recorders:
            recorder.go_back(step)

    def close(self) -> None:
        """Closes every recorder and draws the last report, however the run ends."""
        if self._loads is not None:
            self._loads.close()
        for recorder in self._recorders:
            recorder.close()
        self.draw()
