"""Python interface: plans, training and weights, in a script, a notebook, or a rank of torchrun."""

import json
import logging
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.decode import flatten
from base.refusal import ConfigError, nearest
from comm.config import ClusterConfig
from comm.exits import SIGNALS
from comm.watchdog.membership import KEY_VARIABLE, STORE_FILE_VARIABLE
from dualpipe.api import Drawing
from evaluation.benchmarks import require_harness
from evaluation.run import RESULTS_NAME
from infer.config import check as check_generation
from launch.config.compose import compose, system_errors
from launch.config.folder import CONFIG_NAME, check_folder, locked_run_folder
from launch.config.run import check, compose_run
from launch.evaluate import evaluate, job_of
from launch.generate import Transcript, continue_prompts, encode_job, read_values
from launch.plan import PlanAnswer, answer_request
from launch.plan_request import read_request
from launch.ranks.machine import apply_rank_environment, check_driver, check_packages, is_other_rank, is_torchrun
from launch.weights.answerer import check_harness_weights, harness_model, open_answerer
from launch.weights.job import Device, Dtype, WeightsSource, find_weights, load_model
from model.size import count_parameters
from train.callbacks import Callbacks
from train.checkpoint.index import WeightsKind
from train.config import TrainConfig
from train.files.json_lines import METRICS_NAME, read_lines
from train.files.run_end import report_end
from train.report.charts import EVALUATION_PAGE_NAME

if TYPE_CHECKING:
    from evaluation.harness import HarnessModel
    from model.transformer import Transformer

Prompts = str | Sequence[int] | Sequence[str | Sequence[int]]
_OF_RANKS = ("parallelism", "schedule", "cohorts", "prompt_ids", "prompts", "plugins")
"""Keys of commands that have no meaning for weights in one process, or that arguments replace."""


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
    try:
        code = main(config, callbacks=callbacks)
    except Exception as error:
        if config.out_dir:
            report_end(config.track.on_end, Path(config.out_dir), error)
        raise
    if config.out_dir and not is_other_rank(os.environ):
        report_end(config.track.on_end, Path(config.out_dir))
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


def metrics(run: str | Path) -> Any:
    """Returns the records of a run's steps as columns: `metrics(run)["step_time.bubble_seconds"]`.

    Names are the dotted keys of `metrics.jsonl`. A value is None (NaN in pandas) where a step has no such number.

    Returns:
        A pandas DataFrame if pandas is installed, else a dict of lists.

    Raises:
        ConfigError: `run` is no run's folder.
    """
    folder = Path(run).expanduser()
    if not (folder / CONFIG_NAME).is_file():
        raise ConfigError(f"run: must be a run's folder, {str(run)!r} holds no {CONFIG_NAME}")
    records = [dict(flatten(record)) for record in read_lines(folder / METRICS_NAME)]
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    try:
        import pandas  # type: ignore[import-untyped]
    except ImportError:
        return columns
    return pandas.DataFrame(columns)


def plan(*overrides: str) -> PlanAnswer:
    """Returns what `python -m launch.plan OVERRIDES` prints: text, `values`, and a page in notebooks.

    Raises:
        ConfigError, CutError, ScheduleError: an invalid configuration of the run, or of the plan.
    """
    with system_errors():
        return answer_request(read_request(overrides))


def load(
    ckpt: str | Path, *, weights: WeightsKind = "trained", dtype: Dtype = "auto", device: Device = "cpu"
) -> "LoadedModel":
    """Reads weights into this process, to generate and evaluate with them.

    Args:
        ckpt: a run's folder, one of its checkpoints, converted weights, or a Hugging Face folder.
        weights: trained, or ema: the average of a run with `ema.decay`.
        dtype: auto is the precision of the run that trained the weights.

    Raises:
        ConfigError, CheckpointError: there are no such weights.
    """
    chosen = {"ckpt": str(ckpt), "weights": weights, "dtype": dtype, "device": device}
    with system_errors():
        source = find_weights(str(ckpt), weights, drop_mtp=False, needs_tokenizer=False)
        return LoadedModel(chosen, source, load_model(source, dtype, device))


class LoadedModel:
    """Weights in this process. Options are the keys of the command, with its defaults."""

    def __init__(self, chosen: dict[str, Any], source: WeightsSource, model: "Transformer") -> None:
        """Stores what `load` has read; `chosen` are the keys that it decides."""
        self.source = source
        self.model = model
        self._chosen = chosen

    def __repr__(self) -> str:
        return f"LoadedModel({self.source.folder}, {count_parameters(self.source.model).total:,} weights)"

    def generate(self, prompts: Prompts, **options: Any) -> Transcript | list[Transcript]:
        """Continues a prompt, or several together, as text or token ids: `generate("import os", top_p=0.9)`.

        Returns:
            The transcript of the prompt, with the continuation as its `str`; a list for a list of prompts.

        Raises:
            ConfigError, GenerateError: an unknown option, or a prompt or value that is not valid.
        """
        is_one = isinstance(prompts, str) or all(isinstance(each, int) for each in prompts)
        given: list[Any] = [prompts] if is_one else [*prompts]
        with system_errors():
            config = read_values(self._values("generate", options, prompt="", out=""))
            job = encode_job(config, self.source, [each if isinstance(each, str) else [*each] for each in given])
            tokens = [prompt.tokens for prompt in job.prompts]
            check_generation(self.source.model, tokens, config.max_new_tokens, config.speculative, config.batch_size)
            transcripts = job.transcripts()
            continue_prompts(job, self.model, transcripts)
        return transcripts[0] if is_one else transcripts

    def evaluate(self, *tasks: str, out: str | Path | None = None, **options: Any) -> "EvaluationReport":
        """Evaluates on tasks: `evaluate("bits_per_byte", bits_per_byte={"path": "notes.txt"})`.

        Args:
            out: folder of records and results, which the same call continues; None to keep only the report.

        Raises:
            ConfigError, EvaluationError: an unknown option, an invalid file, or a folder of another evaluation.
        """
        with tempfile.TemporaryDirectory(prefix="evaluation-") as scratch:
            folder = Path(out or scratch).expanduser()
            values = self._values("evaluate", options, tasks=list(tasks), out=str(folder), set=None)
            text = evaluate(job_of(values, self.source.without_mtp()), self.model)
            results = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))
            return EvaluationReport(results, text, (folder / EVALUATION_PAGE_NAME).read_text(encoding="utf-8"))

    def _values(self, command: str, options: Mapping[str, Any], **chosen: Any) -> dict[str, Any]:
        """Returns a command's values with options; what this class decides is no option."""
        decided = {**self._chosen, **chosen}
        values = compose(command, [f"{key}=_" for key in ("ckpt", "tasks", "out") if key in decided])
        free = [key for key in values if key not in decided and key not in _OF_RANKS]
        for key, value in options.items():
            if key not in free:
                raise ConfigError(f"{key}: no option of {command}; {nearest(key, free)}")
            is_group = isinstance(values[key], dict) and isinstance(value, Mapping)
            values[key] = {**values[key], **value} if is_group else value
        return values | decided


class EvaluationReport(Drawing):
    """Results of an evaluation: `tasks` has the metrics of each task by name. Notebooks show the page."""

    def __init__(self, results: dict[str, Any], text: str, page: str) -> None:
        """Stores the content of `results.json`, the summary and the page."""
        super().__init__({"text": lambda: text, "html": lambda: page, "json": lambda: json.dumps(results, indent=2)})
        self.tasks: dict[str, dict[str, Any]] = results["tasks"]


def open_harness_model(
    ckpt: str,
    *,
    weights: WeightsKind = "trained",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    batch_size: int = 32,
    seed: int = 0,
    chat: str = "auto",
) -> "HarnessModel":
    """Returns a model for `lm_eval.simple_evaluate(model=...)`.

    Args:
        ckpt: a run's folder, one of its checkpoints, converted weights, or a Hugging Face folder.
        weights: trained, or ema: the average of a run with `ema.decay`.
        batch_size: maximum number of sequences that are computed together. It changes no result.
        chat: name of the chat template for `apply_chat_template=True`; auto: that of the weights.
    """
    require_harness()
    with system_errors():
        source = find_weights(ckpt, weights, drop_mtp=True, needs_tokenizer=True)
    template = check_harness_weights(source, chat)
    from infer.engines.local import LocalModel

    model = LocalModel(load_model(source, dtype, device), batch_size)
    return harness_model(source, open_answerer(source, model), template, seed=seed)
