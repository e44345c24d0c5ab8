"""Commands: `python -m launch.NAME`."""

import sys

from kernels.checkout import share_comm

# `python -m launch.NAME` imports this package first, before the command's module and all heavy ones.
if sys.argv[:1] == ["-m"]:
    from launch.ranks.interrupt import end_at_once_from_here

    end_at_once_from_here()

share_comm()
