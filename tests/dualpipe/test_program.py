"""Compiled programs copy offloaded activations out and back, and post receives in time."""

from collections import defaultdict

import pytest

from dualpipe.ir import Message, Op, Schedule
from dualpipe.runtime.compile import Pairing
from dualpipe.runtime.program import Action, RunKey
from tests.dualpipe.adding import PAIRINGS, SCHEDULES, lower, name_of
from tests.dualpipe.messages import transfers

pytestmark = [pytest.mark.parametrize("pairing", PAIRINGS), pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)]


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
