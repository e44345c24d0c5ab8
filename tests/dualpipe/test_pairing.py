"""Interleaving hides exchanges and keeps the order of messages, for every kind of group."""

from collections.abc import Sequence

import pytest

from dualpipe.ir import Group, Message, Op, Operation, Schedule, message_of
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.pairing import overlapped, sequential
from dualpipe.runtime.program import Action, RunKey, Step
from tests.dualpipe.adding import BLOCK
from tests.dualpipe.messages import transfers

DENSE = ("compute", "compute")


def group_steps(
    kinds: str, lanes: Sequence[str] = BLOCK * 2, same_stage: bool = False, order: object = overlapped
) -> list[Step]:
    """Compiles one group of independent operations on a middle rank.

    Directions alternate, or are all 0. Each operation belongs to a different micro-batch.
    """
    group = tuple(
        Operation(Op(kind), direction, 1, micro_batch)
        for micro_batch, kind in enumerate(kinds)
        for direction in (0 if same_stage else micro_batch % 2,)
    )
    schedule = Schedule(
        kind="one group",
        num_ranks=3,
        num_micro_batches=2 * len(kinds),
        placement=((0, 1, 2), (2, 1, 0)),
        ranks=((), (group, (Operation(Op.BACKWARD, 0, 1, 99),)), ()),
    )
    steps = compile_rank(schedule, 1, {1: lanes}, order).steps  # type: ignore[arg-type, dict-item]
    return [step for step in steps if step.run.micro_batch != 99]


def exchanges(steps: Sequence[Step], lanes: Sequence[str] = BLOCK * 2) -> tuple[int, int]:
    """Returns the number of exchanges, and the number of those that hide computation."""
    hidden: list[bool] = []
    for index, step in enumerate(steps):
        if step.action in (Action.FORWARD, Action.BACKWARD) and lanes[step.phase] == "comm":
            wait = next(at for at in range(index, len(steps)) if steps[at] == Step(Action.WAIT, step.run))
            hidden.append(any(is_compute(under, lanes) for under in steps[index + 1 : wait]))
    return len(hidden), sum(hidden)


def is_compute(step: Step, lanes: Sequence[str]) -> bool:
    return step.action in (Action.FORWARD, Action.BACKWARD, Action.WEIGHT) and lanes[step.phase] == "compute"


@pytest.mark.parametrize("same_stage", [False, True])
@pytest.mark.parametrize(
    ("kinds", "exposed"),
    [
        # No computation can hide a group's last exchange, except weight gradients that follow it.
        ("FF", 1),
        ("II", 1),
        ("FB", 0),
        ("BF", 0),
        ("FI", 0),
        ("IF", 0),
        ("FW", 0),
        ("IW", 0),
        ("WI", 0),
        ("FIW", 0),
        ("FFW", 0),
        ("IIW", 0),
        ("FBIW", 0),
    ],
)
def test_overlapped_hides_exchanges_under_the_other_members(kinds: str, exposed: int, same_stage: bool) -> None:
    for num_blocks in (1, 2, 3):
        lanes = BLOCK * num_blocks
        total, hidden = exchanges(group_steps(kinds, lanes, same_stage), lanes)
        assert total == 2 * num_blocks * sum(kind != "W" for kind in kinds)
        assert total - hidden <= exposed, num_blocks
        assert exchanges(group_steps(kinds, lanes, same_stage, sequential), lanes)[1] <= total // 2


@pytest.mark.parametrize("lanes", [BLOCK * 2, DENSE])
@pytest.mark.parametrize("kinds", ["IW", "WI", "FW", "FIW", "WWI", "IWF"])
def test_weight_gradients_delay_a_message_at_most_by_hidden_exchanges(kinds: str, lanes: Sequence[str]) -> None:
    for order in (overlapped, sequential):
        steps = group_steps(kinds, lanes, order=order)
        last_send = max(index for index, step in enumerate(steps) if step.action is Action.SEND)
        before = sum(step.action is Action.WEIGHT for step in steps[:last_send])
        alone = sum(kind != "W" for kind in kinds) == 1
        assert before <= (lanes.count("comm") if alone and order is overlapped else 0)


@pytest.mark.parametrize("order", [overlapped, sequential])
@pytest.mark.parametrize("lanes", [BLOCK * 2, DENSE])
@pytest.mark.parametrize("kinds", ["FF", "BF", "WF", "WFIF", "BWF", "FFFB"])
def test_forwards_begin_before_a_member_is_over(kinds: str, lanes: Sequence[str], order: object) -> None:
    steps = group_steps(kinds, lanes, order=order)
    begun = {step.run for step in steps if step.action is Action.FORWARD}
    first_end = next((index for index, step in enumerate(steps) if step.action is Action.FINISH), len(steps))
    assert begun == {step.run for step in steps[:first_end] if step.action is Action.FORWARD}


@pytest.mark.parametrize("order", [overlapped, sequential])
@pytest.mark.parametrize("kinds", ["FFF", "IFIF", "BIF", "IBF", "WIIF"])
def test_messages_of_one_link_are_sent_in_the_order_of_the_members(kinds: str, order: object) -> None:
    for same_stage in (False, True):
        steps = group_steps(kinds, same_stage=same_stage, order=order)
        links: dict[object, list[int]] = {}
        for step in steps:
            if step.action is Action.SEND:
                assert step.message is not None
                links.setdefault(step.message.link, []).append(step.run.micro_batch)
        assert sum(map(len, links.values())) == sum(kind != "W" for kind in kinds)
        assert all(sent == sorted(sent) for sent in links.values())


def test_a_shorter_member_does_not_overtake_on_a_link() -> None:
    """Stages 0 and 2 of rank 0 both send to rank 1, and stage 2 has fewer phases."""
    group = (Operation(Op.FORWARD, 0, 0, 1), Operation(Op.FORWARD, 0, 2, 0))
    schedule = Schedule(
        kind="looped", num_ranks=2, num_micro_batches=2, placement=((0, 1, 0, 1),), ranks=((group,), ())
    )
    steps = compile_rank(schedule, 0, {0: BLOCK * 3, 2: ("compute",)}, overlapped).steps
    assert [step.run for step in steps if step.action is Action.SEND] == [RunKey(0, 0, 1), RunKey(0, 2, 0)]


def test_transfers_of_a_split_backward_are_sent_after_its_input_half() -> None:
    groups: tuple[tuple[Group, ...], ...] = (
        (),
        ((Operation(Op.BACKWARD_INPUT, 0, 1, 0),), (Operation(Op.BACKWARD_WEIGHT, 0, 1, 0),)),
    )
    schedule = Schedule(kind="any", num_ranks=2, num_micro_batches=1, placement=((0, 1),), ranks=groups)
    expected = Message(kind="gradient", direction=0, stage=1, micro_batch=0, source=1, destination=0)
    assert transfers(schedule)[1].sends == ((expected,), ())


def test_transfers_exclude_edges_within_a_rank() -> None:
    chain = tuple((Operation(Op.FORWARD, 0, stage, 0),) for stage in range(4))
    schedule = Schedule(
        kind="v",
        num_ranks=2,
        num_micro_batches=1,
        placement=((0, 1, 1, 0),),
        ranks=((chain[0], chain[3]), (chain[1], chain[2])),
    )
    ranks = transfers(schedule)
    assert [(m.stage, m.destination) for m in ranks[0].all_sends] == [(0, 1)]
    assert [(m.stage, m.destination) for m in ranks[1].all_sends] == [(2, 0)]
    sent = ranks[0].all_sends[0]
    assert message_of(schedule, sent.value) == sent
    assert str(sent) == "activation 0.0 from rank 0 to rank 1"
