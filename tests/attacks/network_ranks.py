"""Two training runs of two ranks each, of which tests attack the second: `python -m tests.attacks.network_ranks DIR`.

The runs `uninterrupted` and `attacked` are equal and started by the built-in launcher. Every rank records the datagrams
that it sends and counts the polls of its watchdog's thread. The second run waits in the middle of training, before an
update of the weights, until the file `over` appears in DIR.
"""

import json
import os
import sys
import time
from collections.abc import Hashable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from comm.watchdog.membership import KEY_VARIABLE, STORE_FILE_VARIABLE
from launch.cli.entry import command
from launch.config.folder import write_run_folder
from launch.config.run import compose_run
from launch.ranks.local import preload_modules, run_ranks, start_fork_server
from train.config import TrainConfig

NUM_STEPS = 6
_WAIT_SECONDS = 90.0


def uninterrupted(config: TrainConfig) -> int:
    """Runs a rank of the first run."""
    return _train(config)


def attacked(config: TrainConfig) -> int:
    """Runs a rank of the second run."""
    from tests.train.operation_hooks import watch_operations

    num_updates = 0

    def come(name: str, label: Hashable | None) -> None:
        nonlocal num_updates
        num_updates += name == "update of the weights"
        if name == "update of the weights" and num_updates == 3:
            state = {
                "pid": os.getpid(),
                "store": os.environ[STORE_FILE_VARIABLE],
                "has_key": KEY_VARIABLE in os.environ,
            }
            (Path(config.out_dir) / f"waiting_{os.environ['RANK']}").write_text(json.dumps(state))
            until = time.monotonic() + _WAIT_SECONDS
            while not (Path(config.out_dir).parent / "over").exists() and time.monotonic() < until:
                time.sleep(0.02)

    watch_operations(come)
    return _train(config)


def _train(config: TrainConfig) -> int:
    from train.run import main as run

    _record(Path(config.out_dir), os.environ["RANK"])
    return run(config)


def _record(folder: Path, rank: str) -> None:
    from comm.watchdog.messages import WatchdogSocket
    from comm.watchdog.wire import DatagramCodec

    encode, receive = DatagramCodec.encode, WatchdogSocket.receive
    # Each look appends a byte, so that a reader never finds less than before.
    ticks = (folder / f"ticks_{rank}").open("ab", buffering=0)

    def recorded(codec: DatagramCodec, recipient: int, kind: Any, values: Mapping[str, Any]) -> bytes:
        data = encode(codec, recipient, kind, values)
        with (folder / f"sent_{rank}").open("a") as file:
            file.write(json.dumps([recipient, data.hex()]) + "\n")
        return data

    def counted(watchdog_socket: WatchdogSocket, seconds: float) -> Any:
        ticks.write(b".")
        return receive(watchdog_socket, seconds)

    DatagramCodec.encode = recorded  # type: ignore[assignment, method-assign]
    WatchdogSocket.receive = counted  # type: ignore[assignment, method-assign]


def main(arguments: Sequence[str]) -> int:
    """Runs both, and returns the first exit code that is not 0."""
    # Found by its full name, as ranks must find it: this module runs as __main__ here.
    from tests.attacks import network_ranks

    folder = Path(arguments[0])
    choices = [
        *("model=tiny", "parallelism=two_ranks", "data=files", f"data.paths=[{folder / 'text'}]"),
        *(f"data.cache_dir={folder / 'cache'}", "data.tokenizer_vocab_size=320", "data.validation_fraction=0.2"),
        *("batch.sequence_length_tokens=32", "batch.global_sequences=8", "batch.micro_sequences=1"),
        *("validation.sequences=0", "samples.prompt=", f"task.steps={NUM_STEPS}"),
    ]
    config = compose_run(choices)
    start_fork_server(config.cluster, preload_modules(config.cluster))
    for entry in (network_ranks.uninterrupted, network_ranks.attacked):
        out_dir = folder / entry.__name__
        write_run_folder(compose_run([*choices, f"out_dir={out_dir}"]), datetime(2024, 1, 2))
        if code := run_ranks(out_dir, config.parallelism.world_size, entry):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(command("train", main))
