"""Sends the metrics of steps to wandb, TensorBoard and Prometheus, by name in groups."""

import logging
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from base.decode import flatten
from base.files import replace_text
from train.config import TrackConfig
from train.files.run_files import redact, redact_values

LOGGER = logging.getLogger("train")
Record = Mapping[str, Any]
TENSORBOARD_FOLDER = "tensorboard"
_ID_NAME = "wandb/id.txt"
_GROUPS = {
    **dict.fromkeys(("step_seconds", "tokens_per_second", "mfu", "pipeline_bubble"), "time"),
    **dict.fromkeys(("peak_memory_bytes", "mean_peak_memory_bytes"), "memory"),
    **dict.fromkeys(("grad_norm", "lr", "mtp_loss_weight", "bias_update_rate"), "optimizer"),
    **dict.fromkeys(("tokens", "global_batch_sequences", "long_document_share"), "data"),
    **dict.fromkeys(("nodes_per_token", "inter_node_bytes", "intra_node_bytes"), "exchange"),
    **dict.fromkeys(("lower_bound_share", "nic_imbalance", "clipped_tokens"), "exchange"),
    "step_time": "time",
    "max_violation": "router",
}
"""Groups of keys of a record. Others are in `loss`, `validation`, `evaluation`, their own name, or `metrics`."""
_OF_LAYERS = {"router": ("max_violation", "bias_std", "bias_most"), "exchange": ("nic_imbalance", "nodes_per_token")}
"""Numbers of each layer of which trackers get the mean and the maximum over layers."""


def series(record: Record, *, layers: bool) -> dict[str, float]:
    """Returns the numbers of a record as `group/name`: `loss/main_loss`, `time/bubble_seconds`.

    Args:
        layers: also every number of every layer, as in `layer_02/router_max_violation`.
    """
    numbers: dict[str, float] = {}
    for key, value in record.items():
        if key in _OF_LAYERS and isinstance(value, Mapping):
            numbers |= _layer_series(key, value, is_each=layers)
        elif isinstance(value, Mapping):
            numbers |= {f"{_GROUPS.get(key, key)}/{name}": number for name, number in _numbers(flatten(value))}
        elif key != "step" and not (key == "max_violation" and "router" in record):
            numbers |= dict(_numbers([(_grouped(key), value)]))
    return numbers


def _numbers(items: Any) -> Iterator[tuple[str, float]]:
    return ((name, float(value)) for name, value in items if type(value) in (int, float))


def _grouped(key: str) -> str:
    if key in _GROUPS:
        return f"{_GROUPS[key]}/{key}"
    for group in ("validation", "evaluation"):
        if key.startswith(f"{group}_"):
            return f"{group}/{key.removeprefix(f'{group}_')}"
    return f"loss/{key}" if key.endswith("loss") else f"metrics/{key}"


def _layer_series(part: str, by_layer: Record, *, is_each: bool) -> dict[str, float]:
    """Returns means and maxima over the layers of a part, and each layer's numbers if asked for."""
    layers = {int(name.rpartition("_")[2]): dict(_numbers(values.items())) for name, values in by_layer.items()}
    numbers: dict[str, float] = {}
    for key in _OF_LAYERS[part]:
        if values := [layer[key] for layer in layers.values() if key in layer]:
            numbers[f"{part}/{key}_mean"] = sum(values) / len(values)
            numbers[f"{part}/{key}_max"] = max(values)
    if is_each:
        for number, layer in layers.items():
            numbers |= {f"layer_{number:02d}/{part}_{key}": value for key, value in layer.items()}
    return numbers


class Recorder(Protocol):
    """The protocol of an output for the metrics of steps."""

    def record(self, values: Record) -> None:
        """Records the metrics of one step, including the key `step`."""
        ...

    def roll_back(self, step: int) -> None:
        """Removes the records of steps after this one, which will be repeated."""
        ...

    def amend(self, values: Record) -> None:
        """Replaces the record of the last step by one with further values."""
        ...

    def close(self) -> None:
        """Writes pending records and closes the output."""
        ...


class _Tracker:
    """A tracker that is another program's. Its first error is logged, and never ends the run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_failed = False

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            if not self._has_failed:
                LOGGER.warning("%s: %s: %s", self._name, type(error).__name__, error)
            self._has_failed = True


class Wandb(_Tracker):
    """A wandb run with its files in the run's folder, which has one id over all attempts."""

    def __init__(self, config: TrackConfig, name: str, out_dir: Path, resolved: Record) -> None:
        import wandb

        super().__init__("wandb")
        self._layers = config.layers
        # wandb records the command line from sys.argv, so secrets are hidden there.
        sys.argv[1:] = [redact(argument) for argument in sys.argv[1:]]
        is_online = config.wandb == "online"
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            tags=list(config.tags),
            name=redact(name),
            id=_stored_id(out_dir / _ID_NAME),
            resume="allow" if is_online else None,
            dir=out_dir,
            mode="online" if is_online else "offline",
            settings=wandb.Settings(silent=True, disable_git=True),
        )
        self._run.config.update(redact_values(resolved), allow_val_change=True)
        self._last_step = 0

    def record(self, values: Record) -> None:
        """Logs a step, unless wandb already has it, because wandb cannot replace it."""
        if values["step"] > self._last_step:
            self.amend(values)

    def roll_back(self, step: int) -> None:
        """Does nothing, because a wandb run cannot remove steps."""

    def amend(self, values: Record) -> None:
        """Logs the record again with further values, also in a wandb run that was started after the step."""
        self._last_step = max(self._last_step, values["step"])
        self._try(lambda: self._run.log(series(values, layers=self._layers), step=values["step"]))

    def close(self) -> None:
        """Ends the run."""
        self._try(self._run.finish)


def _stored_id(path: Path) -> str:
    """Returns the id in a file, or writes a new one, so that a requeued run continues its wandb run."""
    with suppress(OSError):
        if re.fullmatch(r"[0-9a-f]{16}", text := path.read_text(encoding="utf-8").strip()):
            return text
    text = secrets.token_hex(8)
    with suppress(OSError):  # a full disk: the next attempt has another id
        path.parent.mkdir(exist_ok=True)
        replace_text(path, f"{text}\n")
    return text


class TensorBoard(_Tracker):
    """Event files of TensorBoard in the run's folder, which purge the steps that a run repeats."""

    def __init__(self, config: TrackConfig, out_dir: Path, first_step: int) -> None:
        super().__init__("tensorboard")
        self._layers = config.layers
        self._folder = out_dir / TENSORBOARD_FOLDER
        self._open(first_step)

    def record(self, values: Record) -> None:
        """Writes the numbers of a step."""

        def add() -> None:
            for name, number in series(values, layers=self._layers).items():
                self._writer.add_scalar(name, number, values["step"])

        self._try(add)

    amend = record

    def roll_back(self, step: int) -> None:
        """Continues in a further file, which purges later steps."""
        self.close()
        self._open(step)

    def close(self) -> None:
        """Writes pending numbers and closes the file."""
        self._try(self._writer.close)

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = first_step + 1 if self._folder.is_dir() else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)


class Prometheus(_Tracker):
    """The numbers of the last step as gauges `train_*`, in a text file or at a port."""

    def __init__(self, place: str, name: str) -> None:
        from prometheus_client import CollectorRegistry

        from base.prometheus import Gauges

        super().__init__("track.prometheus")
        self._registry = CollectorRegistry()
        self._gauges = Gauges("train", "Of the last step", {}, {"run": redact(name)})
        self._registry.register(self._gauges)
        self._server: Any = None
        self._place = place
        if (address := split_address(place)) is not None:
            self._try(lambda: self._listen(*address))

    def record(self, values: Record) -> None:
        """Replaces the numbers."""
        self._gauges.values = {"step": float(values["step"]), **series(values, layers=False)}
        if split_address(self._place) is None:
            from prometheus_client import write_to_textfile

            path = str(Path(self._place).expanduser())
            self._try(lambda: write_to_textfile(path, self._registry))

    amend = record

    def roll_back(self, step: int) -> None:
        """Does nothing: the next step replaces all numbers."""

    def close(self) -> None:
        """Closes the port. A file stays with the numbers of the last step."""
        if self._server is not None:
            self._try(self._server.shutdown)
            self._try(self._server.server_close)

    def _listen(self, host: str, port: int) -> None:
        from prometheus_client import start_http_server

        self._server, _ = start_http_server(port, host, self._registry)


def split_address(place: str) -> tuple[str, int] | None:
    """Returns host and port of `HOST:PORT`; None for the path of a file."""
    host, _, port = place.rpartition(":")
    return (host, int(port)) if host and "/" not in place and port.isdecimal() and int(port) < 2**16 else None


def open_trackers(config: TrackConfig, name: str, out_dir: Path, first_step: int, resolved: Record) -> list[Recorder]:
    """Opens the configured trackers of a run; rank 0 calls it."""
    trackers: list[Recorder] = []
    if config.wandb != "disabled":
        trackers.append(Wandb(config, name, out_dir, resolved))
    if config.tensorboard:
        trackers.append(TensorBoard(config, out_dir, first_step))
    if config.prometheus is not None:
        trackers.append(Prometheus(config.prometheus, name))
    return trackers
