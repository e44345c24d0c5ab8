"""Runs a program in the sandbox as a script that reads standard input and prints, or with its tests."""

import json
import os
import sys
from types import ModuleType

from score.guest.limits import Discarded, apply_limits, read_source


def main(limits: str, verdict_fd: str = "") -> None:
    """Runs `program.py` as `__main__`.

    With the number of a file descriptor, `tests.py` runs afterwards with the program's names, and if it passes, the
    first line of standard input is written there. The program can do so as well.
    """
    values = json.loads(limits)
    source = read_source(values, "program.py")
    if verdict_fd:
        tests = read_source(values, "tests.py")
        nonce = sys.stdin.readline().strip()
        write = os.write
        sys.stdout = Discarded()
        module = sys.modules["solution"] = ModuleType("solution")
    else:
        module = sys.modules["__main__"]
        module.__dict__.clear()
        module.__dict__.update({"__name__": "__main__", "__builtins__": __builtins__})
    apply_limits(values)
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    if verdict_fd:
        module.__dict__["__name__"] = "tests"
        exec(compile(tests, "tests.py", "exec", dont_inherit=True), module.__dict__)
        write(int(verdict_fd), nonce.encode())
