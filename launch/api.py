"""Python interface: training and weights, from a script, a notebook, or a rank that torchrun started."""

import importlib.util
import logging
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from comm.config import ClusterConfig
from comm.exits import SIGNALS
from comm.watchdog.membership import KEY_VARIABLE, STORE_FILE_VARIABLE
from infer.evaluate.answers import Answerer
from launch.config.compose import system_errors
from launch.config.run_config import check, compose_run
from launch.job import Device, Dtype, find_weights, load_model
from launch.machine import apply_rank_environment, check_driver, check_packages, is_other_rank, is_torchrun
from launch.run_folder import check_folder, locked_run_folder
from train.callbacks import Callbacks
from train.checkpoint.index import WeightsKind
from train.config import TrainConfig
from train.errors import ConfigError

if TYPE_CHECKING:
    from infer.evaluate.harness import HarnessModel


def configure(*overrides: str) -> TrainConfig:
    """Returns the checked configuration that `python -m launch.train OVERRIDES` trains with.

    Raises:
        ConfigError, DataError, ScheduleError, CutError, CheckpointError: an invalid configuration.
    """
    with system_errors():
        config = compose_run(overrides)
        check(config)
    return config


def train(config: TrainConfig, callbacks: Callbacks | None = None) -> Path:
    """Trains in this process, as the only rank or as one of the ranks that torchrun started.

    Call it from the main thread, because it installs signal handlers. Configuration and callbacks are the same on all
    ranks; callbacks run on rank 0.

    Returns:
        The run's folder. Its `status.json` says how the run ended.

    Raises:
        ConfigError: as in `configure`, or the number of ranks differs from `parallelism`.
        CallbackError: a callback failed; raised on every rank.
        RunEndedError: the run was preempted or stopped before its last step; `exit_code` says which.
    """
    with system_errors():
        check(config)
    _check_ranks(config)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        check_driver(config.cluster.device, "cluster.device")
        check_packages(config)
    if is_other_rank(os.environ):
        return _run(config, callbacks)
    check_folder(config)
    with locked_run_folder(config, datetime.now()) as (config, _):
        if is_torchrun(os.environ):
            return _run(config, callbacks)
        with _only_rank(config.cluster):
            return _run(config, callbacks)


class RunEndedError(RuntimeError):
    """A run that ended before its last step.

    `exit_code` is that of the equivalent command: 75 preempted, 77 stopped by the guard, 1 run folder lost.
    """

    def __init__(self, out_dir: str, exit_code: int) -> None:
        super().__init__(f"{out_dir}: the run ended with exit code {exit_code}; its status.json says why")
        self.exit_code = exit_code


def _run(config: TrainConfig, callbacks: Callbacks | None) -> Path:
    from train.run import main

    apply_rank_environment(config.cluster)
    code = main(config, callbacks=callbacks)
    if code:
        raise RunEndedError(config.out_dir, code)
    return Path(config.out_dir)


def _check_ranks(config: TrainConfig) -> None:
    world = config.parallelism.world_size
    if not is_torchrun(os.environ):
        if world != 1:
            raise ConfigError(
                f"parallelism: must be 1 rank in a process that torchrun did not start, is {world}; nearest valid: "
                f"parallelism=one_rank, or start the script with torchrun --nproc-per-node={world}"
            )
        return
    if world != int(os.environ["WORLD_SIZE"]):
        raise ConfigError(
            f"parallelism: must have the {os.environ['WORLD_SIZE']} ranks that torchrun started, is {world}"
        )
    if not config.out_dir:
        raise ConfigError(
            "out_dir: must be set under torchrun, so that all ranks return it; nearest valid: out_dir=PATH"
        )


@contextmanager
def _only_rank(cluster: ClusterConfig) -> Iterator[None]:
    """Makes this process the only rank of a job. Restores environment, signal and log handlers on exit."""
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    log_handlers = list(logging.getLogger().handlers)
    with tempfile.TemporaryDirectory(prefix="dualpipe-") as folder:
        rank_variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        store = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", STORE_FILE_VARIABLE: str(Path(folder) / "store")}
        os.environ.update(rank_variables | store | {KEY_VARIABLE: secrets.token_hex(32)})
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for added in [active for active in logging.getLogger().handlers if active not in log_handlers]:
                logging.getLogger().removeHandler(added)
                added.close()


def open_harness_model(
    ckpt: str,
    *,
    weights: WeightsKind = "trained",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    batch_size: int = 32,
    seed: int = 0,
) -> "HarnessModel":
    """Returns a model for `lm_eval.simple_evaluate(model=...)`.

    Args:
        ckpt: a run's folder, one of its checkpoints, converted weights, or a Hugging Face folder.
        weights: trained, or ema: the average of a run with `ema.decay`.
        batch_size: maximum number of sequences that are computed together. It changes no result.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm_eval: must be installed, is not; run pip install '.[lm-eval]'")
    with system_errors():
        source = find_weights(ckpt, weights, drop_mtp=True, needs_tokenizer=True)
    tokenizer = source.needed_tokenizer("tasks")
    if source.model.head != "tokens":
        raise ConfigError(f"ckpt: model.head must be tokens, {source.folder} has {source.model.head}")
    model = load_model(source, dtype, device)
    from infer.engines.local import LocalModel
    from infer.evaluate.harness import HarnessModel

    local = LocalModel(model, batch_size)
    answerer = Answerer(local, tokenizer, source.end_ids, source.model.max_position_tokens)
    return HarnessModel(answerer, tokenizer, seed=seed, name=str(source.folder))
