"""Each value is sent once, from the rank that makes it to the rank that needs it."""

from dualpipe.build import build
from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.transfers import Message, message_of
from tests.dualpipe.messages import transfers


def test_transfers_send_and_receive_every_message_once() -> None:
    for schedule in (build("dualpipe", 4, 8), build("1f1b", 3, 4)):
        ranks = transfers(schedule)
        sends = [message for rank in ranks for message in rank.all_sends]
        receives = [message for rank in ranks for message in rank.all_receives]
        boundaries = schedule.num_stages - 1
        assert len(sends) == len(set(sends)) == 2 * boundaries * schedule.num_micro_batches
        assert set(sends) == set(receives)
        assert len(receives) == len(sends)
        for number, rank in enumerate(ranks):
            assert all(message.source == number for message in rank.all_sends)
            assert all(message.destination == number for message in rank.all_receives)


def test_transfers_follow_the_groups_of_an_overlapped_pair() -> None:
    schedule = build("dualpipe", 4, 8)
    rank = 1
    index = next(index for index, group in enumerate(schedule.ranks[rank]) if len(group) == 2)
    forward, backward = schedule.ranks[rank][index]
    messages = transfers(schedule)[rank]
    assert [(m.kind, m.direction, m.stage, m.micro_batch) for m in messages.receives[index]] == [
        ("activation", forward.direction, forward.stage - 1, forward.micro_batch),
        ("gradient", backward.direction, backward.stage + 1, backward.micro_batch),
    ]
    assert [(m.kind, m.stage) for m in messages.sends[index]] == [
        ("activation", forward.stage),
        ("gradient", backward.stage),
    ]


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
