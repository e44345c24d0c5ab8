"""Runs an engine on a thread, and delivers its tokens to the coroutines of an event loop."""

import asyncio
import itertools
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from comm.exits import EXIT_LOST
from infer.config import ConstraintError, GenerateError
from infer.continuous import ContinuousEngine, SequenceUpdate
from infer.protocol import NumberedPrompt, Request
from infer.serve.fields import ApiError, internal_error

if TYPE_CHECKING:
    from infer.engines.expert_ranks import RanksEngine

_IDLE_SECONDS = 20.0
_STOP_SECONDS = 2.0  # for the current step; with the other limits below the 30 s that supervisors wait


ServingEngine: TypeAlias = "ContinuousEngine | RanksEngine"
"""An engine that a server drives. One thread makes all calls."""


class StalledEngineError(RuntimeError):
    """A step of an engine does not end: a rank or a device does not respond."""

    exit_code = EXIT_LOST


@dataclass(eq=False)
class Subscription:
    """The sequences of one call, and the news that were not read yet."""

    engine: "EngineThread"
    numbers: dict[int, int]  # index of each sequence in its call, by number; without those that ended
    news: asyncio.Queue[tuple[int, SequenceUpdate] | ApiError] = field(default_factory=asyncio.Queue)

    async def read(self) -> AsyncIterator[tuple[int, SequenceUpdate]]:
        """Yields the index of a sequence and its news until all have ended, or raises ApiError."""
        while self.numbers or not self.news.empty():
            item = await self.news.get()
            if isinstance(item, ApiError):
                raise item
            yield item

    def cancel(self, index: int | None = None) -> None:
        """Cancels the sequence with an index, or all."""
        numbers = [number for number, at in self.numbers.items() if index in (None, at)]
        self.engine.cancel(self, numbers)

    def fail(self, error: ApiError) -> None:
        """Ends the call with an error."""
        self.news.put_nowait(error)
        self.cancel()


class EngineThread:
    """An engine with its thread. All methods are called on the event loop's thread."""

    def __init__(self, engine: ServingEngine, *, most_open: int, stall_seconds: float) -> None:
        """Takes over an engine that no other thread uses.

        Args:
            most_open: maximum number of sequences that wait or are active.
            stall_seconds: maximum time of a step, after which `fail_if_stalled` fails.
        """
        self._stall_seconds = stall_seconds
        self.step_began = math.inf  # infinite between steps
        self._engine = engine
        self._most_open = most_open
        self._commands = queue.SimpleQueue[Callable[[], None] | None]()
        self._numbers = itertools.count()
        self._open: dict[int, Subscription] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.counts = engine.counts()
        self.failure: BaseException | None = None
        self.error: ApiError | None = None  # that clients receive after a failure

    @property
    def num_open(self) -> int:
        """Number of sequences that have not ended."""
        return len(self._open)

    def start(self) -> None:
        """Starts the thread. Call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step, which fails if it does not end."""
        self._commands.put(None)
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive() and self.failure is None:
            self._fail(StalledEngineError(f"a step has not ended {_STOP_SECONDS:g} s after the server"))

    def submit(self, sequences: Iterable[tuple[tuple[int, ...], Request]]) -> Subscription:
        """Queues the sequences of a call; raises ApiError if too many wait."""
        if self.error is not None:
            raise self.error
        numbered = [
            (NumberedPrompt(number=next(self._numbers), tokens=tokens), request) for tokens, request in sequences
        ]
        if self.num_open + len(numbered) > self._most_open:
            raise ApiError(429, f"{self.num_open} answers are in progress; try again later", code="queue_full")
        numbers = {prompt.number: index for index, (prompt, _) in enumerate(numbered)}
        subscription = Subscription(self, numbers)
        self._open |= dict.fromkeys(numbers, subscription)
        self._commands.put(partial(self._begin, numbered))
        return subscription

    def cancel(self, subscription: Subscription, numbers: Iterable[int]) -> None:
        """Cancels sequences before the next step. No news of them follow."""
        for number in numbers:
            subscription.numbers.pop(number)
            if self._open.pop(number, None) is not None:
                self._commands.put(partial(self._engine.cancel, number))

    def fail_all(self, error: ApiError) -> None:
        """Ends all calls with an error."""
        for subscription in set(self._open.values()):
            subscription.fail(error)

    def fail_if_stalled(self) -> None:
        """Ends all calls with an error if the current step takes too long."""
        if self.failure is None and time.monotonic() > self.step_began + self._stall_seconds:
            limit = f"stall_seconds={self._stall_seconds:g}"
            self._fail(StalledEngineError(f"a step takes more than {limit}: a rank or device does not respond"))

    def _run(self) -> None:
        try:
            while self._run_commands():
                self.step_began = time.monotonic()
                news = self._engine.step()
                self.step_began = math.inf
                self._call(self._deliver, news, self._engine.counts())
            self._engine.close()
        except BaseException as error:  # the thread ends, and the server reports why
            self._call(self._fail, error)

    def _run_commands(self) -> bool:
        """Runs all commands that wait, and waits for one if the engine is idle. Returns whether to continue."""
        waits = self._engine.is_idle
        while True:
            try:
                # An idle engine steps, too: its other ranks wait for a sign of it.
                command = self._commands.get(waits, _IDLE_SECONDS)
            except queue.Empty:
                return True
            waits = False  # a step follows even if all was cancelled: it delivers the counts
            if command is None:
                return False
            command()

    def _begin(self, sequences: Iterable[tuple[NumberedPrompt, Request]]) -> None:
        for prompt, request in sequences:
            try:
                self._engine.submit(prompt, request)
            except GenerateError as error:
                self._call(self._refuse, prompt.number, ApiError.of_field(error))

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, news: list[SequenceUpdate], counts: Mapping[str, int]) -> None:
        self.counts = counts
        for item in news:
            subscription = self._open.get(item.number)
            if subscription is None:
                continue
            if isinstance(item.error, ConstraintError):
                message = "no token can follow in the demanded structure: its grammar is too complex, or contradictory"
                subscription.fail(ApiError(400, message, code="structure_failed"))
                continue
            if item.error is not None:
                subscription.fail(internal_error(500, "the answer failed", "generation_failed", item.error))
                continue
            subscription.news.put_nowait((subscription.numbers[item.number], item))
            if item.finish is not None:
                del self._open[item.number]
                del subscription.numbers[item.number]

    def _refuse(self, number: int, error: ApiError) -> None:
        if number in self._open:
            self._open[number].fail(error)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.error = internal_error(503, "the engine has ended", "engine_died", f"{type(error).__name__}: {error}")
        self.step_began = math.inf
        self.fail_all(self.error)
