"""Progress of a run for people: a bar on a terminal, whole plain lines elsewhere. No torch here.

Standard output and error may break without an end of the run.
"""

import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from base.figures import short
from train.terminal import escape_terminals, printable, seconds_text, unescaped

Clock = Callable[[], float]
_LEAST_SECONDS = 1.0
"""Shortest phase that gets a line, and shortest time between two updates of a terminal."""
_RECENT_STEPS = 20
LOG_COLUMNS = 99
"""Longest line of a run, except for a single word such as a path."""
_FIELD_ENDS = re.compile(r"(?<=\S)  (?=[A-Za-z(])")
"""A number in a column follows its name after any number of spaces, so a field begins with a letter."""
Report = Callable[[str], None]


def open_console(stream: TextIO) -> Console:
    """Returns a console that writes escape codes only if the stream is a terminal that understands them."""
    is_terminal = stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
    return Console(file=unescaped(stream), force_terminal=is_terminal, force_interactive=is_terminal)


class PhaseLines:
    """Prints one line for each phase of a run that takes at least a second."""

    def __init__(self, say: Callable[[str], object] | None, clock: Clock = time.monotonic) -> None:
        self._print = say or (lambda line: None)
        self._clock = clock

    def say(self, line: str) -> None:
        """Prints a line, and continues it on further lines if it is long."""
        for part in folded(line):
            self._print(part)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Prints the name of a phase and how long it took, if it ends without an error."""
        began = self._clock()
        yield
        seconds = self._clock() - began
        if seconds >= _LEAST_SECONDS:
            self.say(f"{name}: {seconds_text(seconds)}")


class Display:
    """Display of the steps: a progress bar and a line per second on a terminal, plain lines elsewhere."""

    def __init__(
        self, console: Console, num_steps: int, first_step: int, every: int, clock: Clock = time.monotonic
    ) -> None:
        """Starts the bar if the console is a terminal. `every` is the number of steps from line to line."""
        self._console = console
        self._num_steps = num_steps
        self._every = every
        self._clock = clock
        self._phases = PhaseLines(self.say, clock)
        self._times: deque[tuple[int, float]] = deque([(first_step, clock())], maxlen=_RECENT_STEPS + 1)
        self._shown_at = -_LEAST_SECONDS
        self._is_first = True
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._progress = Progress(*columns, console=console, refresh_per_second=1 / _LEAST_SECONDS)
            self._task = self._progress.add_task("training", total=num_steps, completed=first_step, rate="")
            self._progress.start()
            escape_terminals()  # the bar has replaced both streams

    def record(self, values: Mapping[str, Any]) -> None:
        """Shows a step if it is due. A terminal gets at most one line per second, and always the last step's."""
        step = values["step"]
        now = self._clock()
        self._times.append((step, now))
        if self._progress is not None:
            self._progress.update(self._task, completed=step, rate=self._rate(values["tokens_per_second"]))
            if self._is_first and values["step_seconds"] >= _LEAST_SECONDS:
                self.say(f"first step: {seconds_text(values['step_seconds'])}")
        self._is_first = False
        is_early = self._progress is not None and now - self._shown_at < _LEAST_SECONDS and step < self._num_steps
        if (step == 1 or step % self._every == 0) and not is_early:
            self._shown_at = now
            self.say(step_line(values))

    def roll_back(self, step: int) -> None:
        """Moves the bar back."""
        self._times.clear()
        self._times.append((step, self._clock()))
        if self._progress is not None:
            self._progress.update(self._task, completed=step, rate="")

    def amend(self, values: Mapping[str, Any]) -> None:
        """Shows nothing: what was added was printed when it was known."""

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one, and continues it on further lines if it is long."""
        self.show("\n".join(folded(line)))

    def show(self, text: str) -> None:
        """Prints a text as it is, with control characters as escapes on a terminal."""
        text_to_print = printable(text) if self._console.is_terminal else text
        self._console.print(text_to_print, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names a phase next to the bar, and prints a line with its duration if that is at least a second."""
        if self._progress is not None:
            self._progress.update(self._task, description=name)
        try:
            with self._phases.timed(name):
                yield
        finally:
            if self._progress is not None:
                self._progress.update(self._task, description="training")

    def close(self) -> None:
        """Removes the bar."""
        if self._progress is not None:
            self._progress.stop()

    def _rate(self, tokens_per_second: float) -> str:
        """Returns time per step, tokens per second and the remaining time, by the recent steps."""
        first, since = self._times[0]
        last, now = self._times[-1]
        seconds = (now - since) / max(last - first, 1)
        left = seconds_text(seconds * (self._num_steps - last))
        return f"{seconds:.3g} s/step  {float(f'{tokens_per_second:.3g}'):,.10g} tokens/s  {left} left"


def step_line(values: Mapping[str, Any]) -> str:
    """Returns the line of a step."""
    rollouts = values.get("rollouts", {})
    if "equal_share" in rollouts:
        return _reward_line(values, rollouts)
    main = values["main_loss"]
    mtp = values["mtp_loss"]
    violation = values["max_violation"]
    parts = f"{main:#.4g}/{mtp:#.4g}" if mtp else f"{main:#.4g}"
    return (
        f"step {values['step']:>5}  loss {values['loss']:#.4g} ({parts})  {_update(values)}  "
        f"{short(values['tokens_per_second'])} tok/s  MaxVio {violation:.{2 if violation < 10 else 1}f}  "
        f"bubble {100 * values['pipeline_bubble']:.0f} %"
    )


def folded(line: str) -> Iterator[str]:
    """Yields a line in parts of at most 99 characters, cut between fields or words; an error stays whole."""
    label = re.match(r"step +\d+  ", line)
    indent = " " * (label.end() if label else 4)
    while len(line) > LOG_COLUMNS and not line.startswith("error: "):
        ends = [match.start() for match in _FIELD_ENDS.finditer(line[: LOG_COLUMNS + 2])]
        cut = ends[-1] if ends and ends[-1] > LOG_COLUMNS // 2 else line.rfind(" ", len(indent), LOG_COLUMNS + 1)
        if cut < 0 and (cut := line.find(" ", LOG_COLUMNS)) < 0:
            break
        yield line[:cut].rstrip()
        line = indent + line[cut:].lstrip()
    yield line


def _update(values: Mapping[str, Any]) -> str:
    return f"grad {values['grad_norm']:.3g}  lr {values['lr']:.1e}".replace("e-0", "e-")


def _reward_line(values: Mapping[str, Any], rollouts: Mapping[str, Any]) -> str:
    """Returns the line of a step that learns from rewards. Its columns keep their widths."""
    reward = f"{rollouts['reward']:7.4f}" if "reward" in rollouts else "   none"
    correct = f"correct {100 * rollouts['correct_share']:3.0f} %  " if "correct_share" in rollouts else ""
    without = ""
    if share := rollouts.get("no_verdict_share"):  # one below 1 % does not look like none
        groups = rollouts["no_verdict_groups"]
        without += f"no verdict {max(100 * share, 1):.0f} % in {max(100 * groups, 1):.0f} % of groups  "
    if share := rollouts.get("skipped_share"):
        without += f"skipped {max(100 * share, 1):.0f} %  "
    policy = f"KL {values['kl']:.4f}  " if "kl" in values else ""
    if "entropy" in values:
        policy += f"entropy {values['entropy']:.3f}  clipped {100 * values['clip_fraction']:4.1f} %  "
        policy += f"sampler off {values['sampler_difference']:.4f}  "
    else:
        policy = "nothing is trained  "
    return (
        f"step {values['step']:>5}  reward {reward}  {correct}"
        f"equal groups {100 * rollouts['equal_share']:3.0f} %  {without}tokens {rollouts['mean_tokens']:7.1f}  "
        f"cut {100 * rollouts['cut_share']:3.0f} %  {policy}{_update(values)}  {values['step_seconds']:.3g} s"
    )


class GuardedStream:
    """Text stream that drops what it cannot write.

    At the first failure, its descriptor is redirected to the null device, so that libraries, child processes and the
    interpreter's exit can still write to it.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        """Wraps a stream with or without a descriptor, named stdout or stderr."""
        self._stream = stream
        self._name = name
        self._problem = ""
        self._report: Report | None = None

    def write(self, text: str) -> int:
        """Writes, or loses the text."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._break(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each of them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes, or loses what was not written."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._break(error)

    def report_to(self, report: Report) -> None:
        """Has a failure reported once: the one that there was, or the one that comes."""
        self._report = report
        if self._problem:
            report(self._problem)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _break(self, error: Exception) -> None:
        if self._problem or isinstance(error, BlockingIOError):  # a pipe that is full may have room again
            return
        reason = getattr(error, "strerror", None) or str(error)
        self._problem = f"{self._name} cannot be written ({reason}); the run continues without it"
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if self._report is not None:
            self._report(self._problem)


def guard_terminal() -> None:
    """Guards standard output and error, opens closed ones, and escapes control characters."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # the next file that is opened would get the number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = unescaped(getattr(sys, name) or open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        setattr(sys, name, stream if isinstance(stream, GuardedStream) else GuardedStream(stream, name))
    escape_terminals()


def report_breaks(report: Report) -> None:
    """Has failures of guarded streams reported, each once, on the thread that writes."""
    for stream in (unescaped(sys.stdout), unescaped(sys.stderr)):
        if isinstance(stream, GuardedStream):
            stream.report_to(report)
