"""Compiled programs copy offloaded activations out and back, and post receives as early as the proof assumes."""

from collections import defaultdict
from dataclasses import replace

import pytest

from dualpipe.ir import MOST_LINK_DEPTH, Link, Message, Op, Schedule
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


@pytest.mark.parametrize("link_depth", range(1, MOST_LINK_DEPTH + 1))
def test_receives_are_posted_one_group_ahead_and_as_many_of_a_link_as_it_holds(
    schedule: Schedule, pairing: Pairing, link_depth: int
) -> None:
    schedule = replace(schedule, link_depth=link_depth)
    for rank, plan in enumerate(transfers(schedule)):
        posted: list[Message] = []
        # Copies to and from host memory need no message.
        groups = zip(schedule.ranks[rank], plan.receives, strict=True)
        receives = [messages for group, messages in groups if not group[0].kind.is_copy]
        needed = {message: group for group, messages in enumerate(receives) for message in messages}
        of_link: dict[Link, list[Message]] = {}
        for message in needed:
            of_link.setdefault(message.link, []).append(message)
        for step in lower(schedule, rank, pairing).steps:
            if step.action is Action.RECEIVE:
                assert step.message is not None
                posted.append(step.message)
            elif step.action is Action.ACCEPT and step.message in needed:
                group = needed[step.message]
                ahead = {message for message in needed if needed[message] <= group + 1}
                for messages in of_link.values():
                    later = [message for message in messages if needed[message] > group]
                    ahead.update(later[: link_depth - 1])
                assert set(posted) == ahead
                assert [message for message in posted if message.link == step.message.link] == (
                    of_link[step.message.link][: sum(message.link == step.message.link for message in posted)]
                )
