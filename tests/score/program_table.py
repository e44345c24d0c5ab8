"""Reads programs with their tests from text files next to this one.

`programs.txt`: of each kind a right program, a change that makes it wrong, and tests. `tricks.txt`: wrong programs that
make operators, or the harness, say that they are right. `own_process.txt`: right programs whose tests need the
program's own process; with 3 in place of the first 2 they are wrong.
"""

from pathlib import Path

TESTS = "--- tests\n"
WRONG = "--- wrong with: "


def read_programs(name: str, mark: str = TESTS) -> dict[str, tuple[str, str]]:
    """Returns the two parts of each section of a file."""
    sections = Path(__file__).with_name(name).read_text("utf-8").split("=== ")[1:]
    parts = (section.partition("\n") for section in sections)
    return {title: (rest.partition(mark)[0], rest.partition(mark)[2]) for title, _, rest in parts}


def read_table() -> dict[str, tuple[str, str, str]]:
    """Returns the right program, the wrong one and the tests of each kind."""
    table = {}
    for kind, (right, rest) in read_programs("programs.txt", WRONG).items():
        change, _, tests = rest.partition("\n")
        old, _, new = change.partition(" -> ")
        assert right.count(old) == 1, (kind, old)
        table[kind] = right, right.replace(old, new), tests
    return table


TABLE = read_table()
TRICKS = read_programs("tricks.txt")
OWN_PROCESS = read_programs("own_process.txt")
