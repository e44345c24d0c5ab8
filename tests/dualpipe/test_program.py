"""Compiled programs run every phase once, complete exchanges in time, and keep the order of links."""

from collections import Counter, defaultdict

import pytest

from dualpipe.ir import Message, Op, Schedule
from dualpipe.runtime.compile import Pairing
from dualpipe.runtime.program import Action, RunKey
from tests.dualpipe.adding import PAIRINGS, SCHEDULES, lanes_of, lower, name_of
from tests.dualpipe.messages import transfers

pytestmark = [pytest.mark.parametrize("pairing", PAIRINGS), pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)]


def test_program_runs_every_phase_of_every_operation_once(schedule: Schedule, pairing: Pairing) -> None:
    for rank, groups in enumerate(schedule.ranks):
        expected: Counter[tuple[Action, RunKey, int]] = Counter()
        for op in (op for group in groups for op in group):
            run = RunKey(op.direction, op.stage, op.micro_batch)
            for phase, lane in enumerate(lanes_of(op.stage, schedule.num_stages)):
                if op.kind is Op.FORWARD:
                    expected[Action.FORWARD, run, phase] += 1
                if op.kind in (Op.BACKWARD, Op.BACKWARD_INPUT):
                    expected[Action.BACKWARD, run, phase] += 1
                if op.kind in (Op.BACKWARD, Op.BACKWARD_WEIGHT) and lane == "compute":
                    expected[Action.WEIGHT, run, phase] += 1
        steps = lower(schedule, rank, pairing).steps
        phased = (Action.FORWARD, Action.BACKWARD, Action.WEIGHT)
        assert Counter((step.action, step.run, step.phase) for step in steps if step.action in phased) == expected


def test_every_exchange_is_completed_before_its_run_continues(schedule: Schedule, pairing: Pairing) -> None:
    for rank in range(schedule.num_ranks):
        under_way: set[RunKey] = set()
        done: dict[RunKey, list[int]] = defaultdict(list)
        for step in lower(schedule, rank, pairing).steps:
            if step.action is Action.WAIT:
                under_way.remove(step.run)
            elif step.action in (Action.FORWARD, Action.BACKWARD):
                assert step.run not in under_way
                if lanes_of(step.run.stage, schedule.num_stages)[step.phase] == "comm":
                    under_way.add(step.run)
                if step.action is Action.BACKWARD:
                    done[step.run].append(step.phase)
            elif step.action is Action.WEIGHT:
                assert step.phase in done[step.run]
            elif step.action in (Action.SEND, Action.FINISH):
                assert step.run not in under_way
        assert not under_way


def test_every_offload_is_copied_out_and_back_between_forward_and_backward(
    schedule: Schedule, pairing: Pairing
) -> None:
    for rank, groups in enumerate(schedule.ranks):
        copied = {RunKey(op.direction, op.stage, op.micro_batch) for (op, *_) in groups if op.kind is Op.OFFLOAD}
        seen: dict[RunKey, list[Action]] = defaultdict(list)
        for step in lower(schedule, rank, pairing).steps:
            is_own = step.action not in (Action.RECEIVE, Action.ACCEPT, Action.SEND, Action.WAIT)
            if is_own and seen[step.run][-1:] != [step.action]:
                seen[step.run].append(step.action)
        out_and_back = [Action.OFFLOAD, Action.RELEASE, Action.RELOAD, Action.RESTORE]
        for run, actions in seen.items():
            assert actions[: 1 + 4 * (run in copied)] == [Action.FORWARD, *(out_and_back if run in copied else [])]
            assert not set(out_and_back) & set(actions[5 if run in copied else 0 :])


def test_links_carry_messages_in_the_order_of_the_schedule(schedule: Schedule, pairing: Pairing) -> None:
    sent: dict[object, list[Message]] = defaultdict(list)
    received: dict[object, list[Message]] = defaultdict(list)
    for rank in range(schedule.num_ranks):
        at_hand: set[Message] = set()
        for step in lower(schedule, rank, pairing).steps:
            message = step.message
            if message is None:
                continue
            if step.action is Action.ACCEPT:
                at_hand.remove(message)
            elif step.action is Action.RECEIVE:
                assert message.source != message.destination == rank
                received[message.link].append(message)
                at_hand.add(message)
            elif message.source == message.destination:
                at_hand.add(message)
            else:
                sent[message.link].append(message)
        assert not at_hand
    assert sent == received
    planned = {message for rank in transfers(schedule) for message in rank.all_sends}
    assert planned == {message for messages in sent.values() for message in messages}


def test_receives_are_posted_one_group_before_they_are_needed(schedule: Schedule, pairing: Pairing) -> None:
    for rank, plan in enumerate(transfers(schedule)):
        posted: list[Message] = []
        # Copies to and from host memory need no message.
        groups = zip(schedule.ranks[rank], plan.receives, strict=True)
        receives = [messages for group, messages in groups if not group[0].kind.is_copy]
        needed = {message: group for group, messages in enumerate(receives) for message in messages}
        for step in lower(schedule, rank, pairing).steps:
            if step.action is Action.RECEIVE:
                assert step.message is not None
                posted.append(step.message)
            elif step.action is Action.ACCEPT and step.message in needed:
                ahead = {message for message in needed if needed[message] <= needed[step.message] + 1}
                assert set(posted) == ahead
