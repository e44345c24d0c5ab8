"""Lists the commands or starts one: `python -m launch [NAME]`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import os
import sys
from collections.abc import Sequence

from comm.exits import EXIT_CONFIGURATION
from launch.cli.entry import EXIT_BROKEN_PIPE, discard_output
from launch.cli.help import listing, split_command, unknown_command
from train.terminal import escape_terminals


def main(arguments: Sequence[str]) -> int:
    """Lists the commands, or starts the command that the first argument names."""
    name, others = split_command(arguments)
    if name is not None:
        os.execv(sys.executable, [sys.executable, "-m", f"launch.{name}", *others])
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _print(listing())
    print(f"error: {unknown_command(arguments[0])}", file=sys.stderr)
    return EXIT_CONFIGURATION


def _print(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()
        return EXIT_BROKEN_PIPE
    return 0


if __name__ == "__main__":
    escape_terminals()
    sys.exit(main(sys.argv[1:]))
