"""Runs twelve attacks in the sandbox and prints what each of them achieved and cost, as JSON.

A separate command, so that `test_isolation` can start it as root and as an ordinary user.
Arguments: canary, port, and the user id for guests if root starts it.
"""

import json
import os
import resource
import sys
from unittest import mock

from score import programs
from score.programs import CodeConfig, CodeScorer
from score.score import Problem, TextAnswer
from tests.score.hostile_programs import ATTACKS, FORGERIES, TESTS

CPU_SECONDS = 0.4
SIGNAL = """
import ctypes, os
succeeded = False
for parent in (os.getppid(), {parent}):
    try: os.kill(parent, 9); succeeded = parent > 0
    except OSError: pass
    succeeded |= parent > 0 and ctypes.CDLL(None).ptrace(16, parent, 0, 0) == 0
    try: __import__('resource').prlimit(parent, 0, (1, 1)); succeeded |= parent > 0
    except OSError: pass
"""
# Each defines the right `f` only if it succeeded; the loops have none.
TWELVE = {
    "loop": FORGERIES["an endless loop"],
    "memory": ATTACKS["2 GiB of memory"],
    "files in": ATTACKS["reading a file outside"],
    "files out": ATTACKS["writing outside"],
    "symlinks": ATTACKS["a symbolic link"],
    "/proc": ATTACKS["reading the environments of others"],
    "network": ATTACKS["the loopback of the host"],
    "disk": ATTACKS["many files of 4 MiB"],
    "output flood": FORGERIES["endless output"],
    "environment": ATTACKS["reading the environment"],
    "fork bomb": FORGERIES["a fork bomb"],
    "signal and ptrace to the parent": SIGNAL,
}
HONEST = "succeeded = True"


def main(canary: str, port: str, uid: str = "") -> None:
    with mock.patch.object(programs, "_unused_uid", return_value=int(uid or -1)):
        scorer = CodeScorer(
            CodeConfig(
                kind="code", weight=1.0, cpu_seconds=CPU_SECONDS, wall_seconds=60.0, memory_mib=512, num_sandboxes=1
            )
        )
    found = {"level": scorer.isolation, "uid": os.getuid()}
    for name, attack in {"honest": HONEST, **TWELVE}.items():
        for key, value in {"canary!r": repr(canary), "port": port, "parent": str(os.getpid())}.items():
            attack = attack.replace(f"{{{key}}}", value)
        program = f"succeeded = False\n{attack}\nif succeeded:\n    def f(x): return x * x"
        before = used()
        score = scorer.score(
            TextAnswer(text=f"```python\n{program}\n```", num_tokens=1), Problem(prompt="", tests=TESTS)
        )
        found[name] = {"outcome": score.outcome, "detail": score.detail, "cpu": used() - before}  # type: ignore[assignment]
    print(json.dumps(found))


def used() -> float:
    """Returns the processor time of this process and of those that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


if __name__ == "__main__":
    main(*sys.argv[1:])
