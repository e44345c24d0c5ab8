"""What watchdogs send each other, as types, and its decoding from unchecked JSON."""

from dataclasses import asdict, dataclass
from typing import Literal, Self, get_args

from comm.exit_codes import EXIT_OTHER
from comm.watchdog.decode import MessageError, text_of
from comm.watchdog.mailbox import Message
from comm.watchdog.verdict import Standing, Verdict

End = Literal["done", "error", "signal"]


@dataclass(frozen=True, slots=True)
class Question:
    """Asks a rank what it does."""


@dataclass(frozen=True, slots=True)
class Farewell:
    """Announces that the sender leaves the job by itself: how, and in one line why."""

    end: End
    text: str

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """Decodes the JSON of `as_json`.

        Raises:
            MessageError: a field is missing or of another form.
        """
        end = text_of(message.values, "end")
        for known in get_args(End):
            if end == known:
                return cls(known, text_of(message.values, "text"))
        raise MessageError(f"end: {end} is none of {get_args(End)}")

    def as_json(self) -> dict[str, str]:
        """Returns the fields by name."""
        return asdict(self)

    def verdict_on(self, rank: int) -> Verdict:
        """Returns the verdict by which all other ranks end if `rank` ended by its own error."""
        return Verdict(code=EXIT_OTHER, text=f"rank {rank}: {self.text}", judge=rank, culprits=(rank,))


def decode_message(message: Message, world_size: int) -> Question | Standing | Verdict | Farewell:
    """Decodes the fields of an authentic message.

    Raises:
        MessageError: a field is missing or of another form, or a verdict is not the sender's own.
    """
    match message.kind:
        case "question":
            return Question()
        case "answer":
            return Standing.from_json(message.values, world_size)
        case "farewell":
            return Farewell.from_message(message)
        case "verdict":
            verdict = Verdict.from_json(message.values, world_size)
            if verdict.judge != message.rank:
                raise MessageError(f"judge: {verdict.judge} is not the sender, rank {message.rank}")
            return verdict
