"""The published DualPipe: micro-batches enter at both ends and meet (arXiv:2412.19437, section 3.2.1)."""

from dataclasses import replace

from dualpipe.generate.dualpipe_v import dualpipe_v, too_few_micro_batches
from dualpipe.generate.mirror import mirror
from dualpipe.ir import Schedule, mirrored_placement
from dualpipe.registry import SCHEDULES, IdleFormula, ScheduleSpec, SizeLimit
from dualpipe.simulate.costs import Costs, pair_time


def dualpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """The published schedule. Both numbers even, num_micro_batches >= 2 * num_ranks.

    Direction 0 enters at rank 0, direction 1 at the last rank; ranks r and P-1-r both hold stages r and P-1-r. Each
    half of the ranks runs DualPipeV, and hands over to its mirror image where the V turns back.
    """
    assert _limit(num_ranks, num_micro_batches) is None
    return replace(mirror(dualpipe_v(num_ranks // 2, num_micro_batches // 2)), kind="dualpipe")


def published_idle(num_ranks: int, costs: Costs) -> float:
    """Returns the idle time of every rank, (P/2 - 1)(F&B + B - 3W).

    F&B is the time of an overlapped pair. Source: arXiv:2412.19437, table 2.
    """
    backward = costs.backward_input + costs.backward_weight + costs.exchange
    return (num_ranks / 2 - 1) * (pair_time(costs) + backward - 3 * costs.backward_weight)


def _limit(num_ranks: int, num_micro_batches: int) -> SizeLimit | None:
    if num_ranks % 2:
        nearest = tuple(number for number in (num_ranks - 1, num_ranks + 1) if number > 0)
        return SizeLimit(about="num_ranks", rule="needs an even number of pipeline ranks", nearest=nearest)
    too_few = too_few_micro_batches(num_ranks, num_micro_batches)
    if too_few is None and num_micro_batches % 2:
        rule = "needs an even number of micro-batches, half for each direction"
        nearest = (num_micro_batches - 1, num_micro_batches + 1)
        return SizeLimit(about="num_micro_batches", rule=rule, nearest=nearest)
    return too_few


SCHEDULES.register(
    "dualpipe",
    ScheduleSpec(
        name="dualpipe",
        summary="the published DualPipe: micro-batches enter at both ends and meet",
        generate=dualpipe,
        placement=mirrored_placement,
        limit=_limit,
        idle=IdleFormula(text="(P/2-1)(F&B+B-3W)", assumes="F = I >= W and no latency", value=published_idle),
    ),
)
