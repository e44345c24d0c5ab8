"""Runs ranks as threads over links that hold one message, the strictest transport.

A link's thread delivers its message when the receiver has posted its receive. Until then the sender blocks before its
next message on that link. Ranks and links pause at random, so that the order of events is random.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dualpipe.ir import Schedule
from dualpipe.transfers import Link, Message, transfers

LONGEST_PAUSE_SECONDS = 0.0002


class StuckError(Exception):
    """Raised if all remaining ranks wait and no message can be delivered."""


@dataclass
class _Request:
    due: Message
    came: Message | None = None

    def has_come(self) -> bool:
        return self.came is not None


@dataclass
class _LinkState:
    held: Message | None = None
    requests: deque[_Request] = field(default_factory=deque)

    def is_free(self) -> bool:
        return self.held is None

    @property
    def can_hand_over(self) -> bool:
        return self.held is not None and bool(self.requests)


def run_on_threads(schedule: Schedule, seed: int) -> None:
    """Runs a schedule to its end.

    Raises:
        StuckError: if ranks deadlock.
        AssertionError: if a rank received another message than expected.
    """
    _Job(schedule, seed).run()


class _Job:
    def __init__(self, schedule: Schedule, seed: int) -> None:
        self.messages = transfers(schedule)
        self.seed = seed
        self.changed = threading.Condition()
        self.links = {message.link: _LinkState() for rank in self.messages for message in rank.all_sends}
        self.blocked: dict[int, Callable[[], bool]] = {}
        self.running = set(range(len(schedule.ranks)))
        self.problem: Exception | None = None

    def run(self) -> None:
        threads = [threading.Thread(target=self.guard, args=(self.rank, rank)) for rank in sorted(self.running)]
        threads += [threading.Thread(target=self.guard, args=(self.link, link)) for link in self.links]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.problem is not None:
            raise self.problem

    def guard(self, target: Callable[[Any], None], subject: int | Link) -> None:
        try:
            target(subject)
        except Exception as error:
            with self.changed:
                self.problem = self.problem or error
                self.changed.notify_all()

    def rank(self, rank: int) -> None:
        pauses = random.Random(f"{self.seed} {rank}")
        for receives, sends in zip(self.messages[rank].receives, self.messages[rank].sends, strict=True):
            requests = [_Request(message) for message in receives]
            with self.changed:
                for request in requests:
                    self.links[request.due.link].requests.append(request)
                self.changed.notify_all()
            for request in requests:
                self.wait(rank, request.has_come)
                assert request.came == request.due
            pause(pauses)
            for message in sends:
                link = self.links[message.link]
                self.wait(rank, link.is_free)
                with self.changed:
                    link.held = message
                    self.changed.notify_all()
        with self.changed:
            self.running.discard(rank)
            self.check_stuck()
            self.changed.notify_all()

    def link(self, name: Link) -> None:
        pauses = random.Random(f"{self.seed} {name}")
        link = self.links[name]
        while True:
            with self.changed:
                self.changed.wait_for(lambda: link.can_hand_over or not self.running or self.problem)
                if not link.can_hand_over:
                    return
            pause(pauses)
            with self.changed:
                link.requests.popleft().came, link.held = link.held, None
                self.changed.notify_all()

    def wait(self, rank: int, is_over: Callable[[], bool]) -> None:
        with self.changed:
            self.blocked[rank] = is_over
            self.check_stuck()
            self.changed.wait_for(lambda: is_over() or self.problem)
            del self.blocked[rank]
            if not is_over():
                raise StuckError

    def check_stuck(self) -> None:
        """Checks for a deadlock. The caller holds the lock, so the state is consistent."""
        if not self.running or not self.running <= self.blocked.keys():
            return
        can_go_on = any(self.blocked[rank]() for rank in self.running)
        if not can_go_on and not any(link.can_hand_over for link in self.links.values()):
            raise StuckError(f"ranks {sorted(self.running)}")


def pause(draws: random.Random) -> None:
    if draws.random() < 0.3:
        time.sleep(draws.random() * LONGEST_PAUSE_SECONDS)
