"""Messages of every rank, as the groups of a schedule need and make them."""

from collections.abc import Callable
from dataclasses import dataclass

from dualpipe.ir import Group, Message, Operation, Schedule, Value, message_of, value_made, value_needed

Messages = tuple[tuple[Message, ...], ...]


@dataclass(frozen=True)
class RankTransfers:
    """Messages of a rank by group: group g needs `receives[g]` to run, and then sends `sends[g]`."""

    receives: Messages
    sends: Messages

    @property
    def all_receives(self) -> list[Message]:
        return [message for messages in self.receives for message in messages]

    @property
    def all_sends(self) -> list[Message]:
        return [message for messages in self.sends for message in messages]


def transfers(schedule: Schedule) -> list[RankTransfers]:
    def messages(groups: tuple[Group, ...], value_of: Callable[[Schedule, Operation], Value | None]) -> Messages:
        values = ([value for op in group if (value := value_of(schedule, op)) is not None] for group in groups)
        carried = ([message_of(schedule, value) for value in of_group] for of_group in values)
        return tuple(tuple(message for message in of_group if message is not None) for of_group in carried)

    return [RankTransfers(messages(groups, value_needed), messages(groups, value_made)) for groups in schedule.ranks]
