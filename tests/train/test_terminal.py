"""Tests of terminals: progress as lines, and control characters that are escaped."""

import io
import itertools
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest

from base.refusal import ConfigError
from launch.cli.entry import command
from tests import ROOT
from train.records.display import Display, guard_terminal, open_console
from train.terminal import (
    EscapedStream,
    ProgressLines,
    escape_terminals,
    printable,
    progress_on,
    progress_text,
    seconds_text,
)


def shown(num_items: int, seconds_each: float) -> list[str]:
    """Returns the progress lines of work on items of a megabyte."""
    now = [0.0]
    lines: list[Any] = []

    def work() -> object:
        for _ in range(num_items):
            now[0] += seconds_each
            yield 10**6

    progress = ProgressLines(lines.append, lambda: now[0])
    assert list(progress.over("reading", work(), num_items * 10**6, int)) == [10**6] * num_items  # type: ignore[arg-type]
    return lines


def test_quick_work_is_not_mentioned() -> None:
    assert shown(100, 0.005) == []


def test_long_work_has_a_line_every_five_seconds_with_the_time_left() -> None:
    lines = shown(200, 0.1)
    assert re.fullmatch(r"reading: (9|10|11) MB of 200 MB, \d+ %, 10 MB/s, \d+ s left", lines[0])
    assert len(lines) == 5
    assert lines[-1] == "reading: done, 200 MB in 20 s"


def test_many_small_items_do_not_flood() -> None:
    assert len(shown(100_000, 0.0001)) <= 4


def test_lines_go_to_what_is_no_terminal() -> None:
    assert isinstance(progress_on(io.StringIO()), ProgressLines)


def test_texts_are_short() -> None:
    assert progress_text(0, 10**9, 1.0) == "0 B of 1 GB, 0 %"
    assert progress_text(5 * 10**8, 10**9, 100.0) == "500 MB of 1 GB, 50 %, 5 MB/s, 1 min left"
    assert seconds_text(7260) == "2 h 1 min"


def test_progress_counts_phases() -> None:
    said: list[str] = []
    clock = itertools.count().__next__
    assert list(ProgressLines(said.append, clock).over("first step", range(4), 4, lambda _: 1, "phases")) == [
        0,
        1,
        2,
        3,
    ]
    assert said[0] == "first step: 1 of 4 phases, 25 %, 3 s left"
    assert said[-1] == "first step: done, 4 phases in 5 s"


HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\r\u202eabc\u2066"
SHOWN = r"\x1b]0;title\x07\x1b[2J\x9b31m\x7f\r\u202eabc\u2066"
FORBIDDEN = ("\x1b]0;", "\x1b[2J", "\x9b", "\x07", "\x7f", "\u202e", "\u2066")


class Terminal:
    """A pseudo-terminal as standard output and error of this process; `text` is what it got."""

    def __enter__(self) -> "Terminal":
        self._before = (sys.stdout, sys.stderr)
        self._reader, writer = pty.openpty()
        sys.stdout = sys.stderr = self._stream = open(writer, "w", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        sys.stdout, sys.stderr = self._before
        self._stream.write("end\n")
        self._stream.flush()
        output = b""  # the kernel passes on what was written in parts, each when it gets to it
        while not output.endswith(b"end\r\n"):
            output += os.read(self._reader, 65536)
        self.text = output.decode()
        self._stream.close()
        os.close(self._reader)


def test_every_control_character_but_tab_and_line_break_is_escaped() -> None:
    controls = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    for number in controls:
        shown = printable(chr(number))
        assert shown == chr(number) if chr(number) in "\t\n" else shown.isascii(), hex(number)
        assert shown.isprintable() or shown in "\t\n"
    plain = "é中 🦊 a\tb\n\u200d{}\\x1b"
    assert printable(plain) == plain


def test_command_escapes_output_and_errors_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate"])

    def main(overrides: object) -> int:
        sys.stdout.write(HOSTILE)
        sys.stdout.writelines([HOSTILE])
        print("é", file=sys.stderr)
        raise ConfigError(f"ckpt: {HOSTILE.replace(chr(13), '')} must be a folder")

    with Terminal() as terminal:
        assert command("generate", main) == 2
    text = terminal.text
    assert text.count(SHOWN) == 2
    assert SHOWN.replace(r"\r", "") in text
    assert "é" in text
    assert not any(part in text for part in FORBIDDEN)


def test_rank_escapes_on_a_terminal_with_a_guard_and_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")
    with Terminal() as terminal:
        escape_terminals()
        guard_terminal()
        guard_terminal()
        print(HOSTILE)
        display = Display(open_console(sys.stdout), 2, 0, 1)
        display.show(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        display.close()
        list(progress_on(sys.stderr).over(HOSTILE, [1], 1, lambda item: item, "batches"))
    text = terminal.text
    # Bars are redrawn, so their description may appear more than once.
    assert text.count(SHOWN) >= 4
    assert not any(part in text for part in FORBIDDEN), repr(text)


def test_pipes_and_files_get_the_text_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys; from launch.cli.entry import command\n"
        f"sys.exit(command('generate', lambda overrides: print({HOSTILE!r}) or 0))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, timeout=60)
    assert done.stdout.decode() == HOSTILE + "\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    escape_terminals()
    assert not isinstance(sys.stdout, EscapedStream)
