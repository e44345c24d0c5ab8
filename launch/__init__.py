"""Commands: `python -m launch.NAME`."""

import sys

from kernels import share_comm

# `python -m launch.NAME` imports this package before the command's module and before any slow import.
if sys.argv[:1] == ["-m"]:
    from launch.ranks.interrupt import exit_on_interrupt

    exit_on_interrupt()

share_comm()
