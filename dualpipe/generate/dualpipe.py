"""The published DualPipe: micro-batches enter at both ends and meet (arXiv:2412.19437, section 3.2.1)."""

from dataclasses import replace

from dualpipe.generate.dualpipe_v import dualpipe_v
from dualpipe.generate.mirror import mirror
from dualpipe.ir import Schedule


def dualpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """The published schedule. Both numbers even, num_micro_batches >= 2 * num_ranks: see `select.check`.

    Direction 0 enters at rank 0, direction 1 at the last rank; ranks r and P-1-r both hold stages r and P-1-r. Each
    half of the ranks runs DualPipeV, and hands over to its mirror image where the V turns back.
    """
    assert num_ranks % 2 == num_micro_batches % 2 == 0
    return replace(mirror(dualpipe_v(num_ranks // 2, num_micro_batches // 2)), kind="dualpipe")
