"""Logs what each method of a dispatcher does on its lane, on the ranks of an expert group."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from comm.dispatch.registry import TokenSizes
from comm.lane import Lane
from comm.protocol import Dispatcher
from comm.watchdog.collective_log import Collective, CollectiveLog
from train.config import TrainConfig
from train.core.world import World

_ON_LANE = "deepep"
"""Kind of the group whose kernels run on the lane's stream instead of the communicator's."""


@dataclass(frozen=True, slots=True)
class Call:
    """Action of a dispatcher's method on the thread of its lane.

    `start` starts a collective, `wait` makes the lane's stream wait for it, `read` blocks the thread until the stream
    has run, and `hold` does so while it holds the interpreter's lock.
    """

    action: Literal["start", "wait", "read", "hold"]
    group: str = ""  # kind of the collective's group, as in the log: expert, rail, node, ...
    name: str = ""  # the collective's name in the log

    @property
    def on_lane(self) -> bool:
        """Whether it runs on the lane's stream instead of the communicator's."""
        return self.group == _ON_LANE


Calls = Mapping[str, tuple[Call, ...]]
"""The calls of each method of a dispatcher, by its name."""


class CallLog(CollectiveLog):
    """A log that lists the starts of collectives and the waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def start(self, group: str, ranks: Iterable[int], name: str, *args: Any, **options: Any) -> Collective:
        """Logs and lists a start."""
        self.calls.append(Call("start", group.split()[0], name))
        return super().start(group, ranks, name, *args, **options)

    @contextmanager
    def awaiting(self, collective: Collective) -> Iterator[None]:
        """Logs and lists a wait."""
        with super().awaiting(collective):
            yield
        self.calls.append(Call("wait", collective.group.split()[0], collective.name))


def log_calls(dispatcher: Dispatcher, log: CallLog, lane: Lane, ids_TK: Tensor, rows_TD: Tensor) -> Calls:
    """Runs each method of a dispatcher that writes to `log` and uses `lane`. All its ranks call it."""
    calls: dict[str, tuple[Call, ...]] = {}

    def end(method: str) -> None:
        lane.submit(lambda: None).wait()
        calls[method] = tuple(log.calls)
        log.calls.clear()

    log.calls.clear()
    weights_TK = torch.ones(ids_TK.shape, device=ids_TK.device)
    handle = dispatcher.plan(ids_TK, weights_TK)
    end("plan")
    arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
    end("dispatch")
    dispatcher.dispatch_again(rows_TD, handle).wait()
    end("dispatch_again")
    dispatcher.combine(arrived.rows_AD, handle).wait()
    end("combine")
    dispatcher.dispatch_backward(arrived.rows_AD, arrived.weights_A, handle).wait()
    end("dispatch_backward")
    dispatcher.combine_backward(rows_TD, handle).wait()
    end("combine_backward")
    return calls


def with_host_reads(calls: Calls) -> Calls:
    """Adds what no log has: a dispatch reads its plan's counts, and DeepEP's its own with Python's lock."""
    dispatch = [Call("read")]
    for call in calls["dispatch"]:
        dispatch += [Call("hold")] * (call.on_lane and call.action == "wait")
        dispatch.append(call)
    return {**calls, "dispatch": tuple(dispatch)}


def run_calls(config: TrainConfig, world: World) -> Calls:
    """Returns the calls of a run's dispatcher for one token of each rank. All ranks call it."""
    hidden_size = config.model.hidden_size
    log = CallLog()
    observers = replace(world, log=log).observers()
    tokens = TokenSizes(max_tokens=1, hidden_size=hidden_size, num_choices=2)
    dispatcher = world.open_dispatcher(config.dispatch, config.model.num_routed_experts, observers, tokens)
    ids_TK = torch.tensor([[0, -1]], device=world.device)
    rows_TD = torch.ones(1, hidden_size, dtype=torch.bfloat16, device=world.device)
    calls = log_calls(dispatcher, log, world.lane, ids_TK, rows_TD)
    dispatcher.close()
    return with_host_reads(calls)
