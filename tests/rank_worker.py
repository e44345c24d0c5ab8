"""A rank of tests/ranks.py: runs calls until its parent closes the connection, and reports what each leaves behind."""

import faulthandler
import gc
import os
import pickle
import random
import resource
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import FunctionType
from typing import Any

from base.workers import end_with_parent

_COLLECTIVE_TIMEOUT = timedelta(seconds=60)
_OWN_PACKAGES = (
    "base",
    "bench",
    "comm",
    "data",
    "dualpipe",
    "evaluation",
    "infer",
    "kernels",
    "launch",
    "model",
    "planner",
    "score",
    "tests",
    "train",
    "verify",
)
_PATCHED_MODULES = ("torch.distributed", "torch.distributed.distributed_c10d")
_LIMITS = ("RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_STACK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of `run_ranks` as one rank receives it.

    job: the function and its arguments, pickled. folder: holds the rendezvous and the stacks of ranks that time out.
    """

    rank: int
    world_size: int
    job: bytes
    folder: str
    directory: str
    backend: str
    timeout_seconds: float


def serve(connection: Connection) -> None:
    """Runs every received call, and sends for each a report and then what the call left behind.

    A report is `(True, result)` or `(False, traceback)`, pickled. It is sent before the process group is destroyed, so
    that the first report of a failure is its cause. The parent answers once all ranks have succeeded, and the group is
    destroyed. What is left behind is a list of names, empty for a rank that may serve another call. A rank whose call
    failed exits.
    """
    import torch

    end_with_parent()
    torch.set_num_threads(1)
    generators = _generator_states()
    gc.freeze()  # Modules of the fork server: no collection needs to look at them again.
    before = _state()
    while True:
        try:
            call: Call = connection.recv()
        except EOFError:
            return
        os.chdir(call.directory)
        before["working directory"] = call.directory
        _set_generator_states(generators)
        if not _run(call, connection):
            return
        gc.collect()
        after = _state()
        connection.send(_differences(before, after))
        before = after


def _run(call: Call, connection: Connection) -> bool:
    """Runs a call inside its process group. Returns whether it succeeded."""
    from torch import distributed

    with open(Path(call.folder) / f"stack_{call.rank}", "w") as stack:
        faulthandler.dump_traceback_later(call.timeout_seconds, file=stack)
        succeeded = True
        try:
            distributed.init_process_group(
                call.backend,
                init_method=f"file://{call.folder}/rendezvous",
                rank=call.rank,
                world_size=call.world_size,
                timeout=_COLLECTIVE_TIMEOUT,
            )
            function, args = pickle.loads(call.job)
            report = pickle.dumps((True, function(call.rank, call.world_size, *args)))
        except BaseException:
            report = pickle.dumps((False, traceback.format_exc()))
            succeeded = False
        connection.send_bytes(report)
        if succeeded:
            # A rank that left at once could still be connecting to this one.
            connection.recv()
            distributed.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
    return succeeded


def _generator_states() -> tuple[Any, ...]:
    import numpy
    import torch

    return torch.get_rng_state(), numpy.random.get_state(), random.getstate()


def _set_generator_states(states: tuple[Any, ...]) -> None:
    """Resets the random generators to their state in a fresh rank."""
    import numpy
    import torch

    torch.set_rng_state(states[0])
    numpy.random.set_state(states[1])
    random.setstate(states[2])


def _state() -> dict[str, Any]:
    """Returns everything that a call could change for later calls, by name; `_differences` compares the values."""
    import torch
    from torch import distributed

    state: dict[str, Any] = {
        "working directory": os.getcwd(),
        "search path": list(sys.path),
        "threads": _threads(),
        "plugins": sorted(name for name in sys.modules if name.startswith("plugin_")),
        "process group": distributed.is_initialized(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads of torch": torch.get_num_threads(),
    }
    state |= {f"variable {name}": value for name, value in os.environ.items()}
    state |= {f"signal {number}": signal.getsignal(number) for number in range(1, signal.NSIG)}
    state |= {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS}
    for name, module in list(sys.modules.items()):
        package = name.partition(".")[0]
        if package in _OWN_PACKAGES or name in _PATCHED_MODULES:
            state |= _definitions(name, module)
    return state


def _threads() -> list[str]:
    """Returns the names of Python's threads, without C++ threads such as those of autograd."""
    return sorted(each.name for each in threading.enumerate() if not isinstance(each, threading._DummyThread))


def _definitions(name: str, module: Any) -> dict[str, Any]:
    """Returns a module's functions, classes and methods, which a test may patch."""
    found: dict[str, Any] = {}
    for attribute, value in list(vars(module).items()):
        # Compares exact types, because isinstance would trigger proxies of deprecated names.
        kind = type(value)
        if kind is FunctionType or issubclass(kind, type):
            found[f"{name}.{attribute}"] = value
        if issubclass(kind, type) and value.__module__ == name:
            methods = {key: _unhooked(method) for key, method in vars(value).items() if callable(method)}
            found |= {f"{name}.{attribute}.{key}": method for key, method in methods.items()}
    return found


def _unhooked(method: Any) -> Any:
    """Returns the method that torch replaces when an optimizer of a class is created for the first time."""
    return method.__wrapped__ if getattr(method, "hooked", False) else method


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns the names of changed, removed or added entries, except definitions of new modules."""
    missing = object()
    changed = []
    for name, value in before.items():
        found = after.get(name, missing)
        if found is not value and (callable(value) or found is missing or found != value):
            changed.append(name)
    added = after.keys() - before.keys()
    return changed + [name for name in added if name.startswith("variable ") or name.rpartition(".")[0] in before]
