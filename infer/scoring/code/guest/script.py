"""Runs a program in the sandbox as a script that reads standard input and prints."""

import json
import sys

from infer.scoring.code.guest.limits import apply_limits, read_source


def main(limits: str) -> None:
    """Runs `program.py` as `__main__`.

    Args:
        limits: JSON for `apply_limits`.
    """
    values = json.loads(limits)
    source = read_source(values, "program.py")
    apply_limits(values)
    sys.argv = ["program.py"]
    module = sys.modules["__main__"]
    module.__dict__.clear()
    module.__dict__.update({"__name__": "__main__", "__builtins__": __builtins__})
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
