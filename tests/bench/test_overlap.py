"""The steps of a pair are found in a rank's program, in any order."""

import pytest

from dualpipe.build import build
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import Pairing, compile_rank
from dualpipe.runtime.program import Action
from dualpipe.runtime.protocols import Lane
from tests.bench.overlap import is_pair, steps_of

_LANES: tuple[Lane, ...] = ("compute", "comm", "compute", "comm")


@pytest.mark.parametrize("order", [pairing.sequential, pairing.overlapped])
def test_steps_of_a_pair_are_its_forward_and_its_backward(order: Pairing) -> None:
    schedule = build("dualpipe", 2, 8)
    program = compile_rank(schedule, 0, dict.fromkeys(range(2), _LANES), order)
    pairs = [group for group in schedule.ranks[0] if is_pair(group)]
    assert len(pairs) == 5
    ends = 0
    for group in pairs:
        found = steps_of(program, group)
        assert found.start >= ends
        ends = found.stop
        actions = [program.steps[index].action for index in found]
        counts = [actions.count(action) for action in (Action.FORWARD, Action.BACKWARD, Action.WEIGHT, Action.WAIT)]
        assert counts == [4, 4, 2, 4]
        assert actions.count(Action.FINISH) == 1
