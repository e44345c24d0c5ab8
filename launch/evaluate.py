"""Evaluates trained weights on tasks: `python -m launch.evaluate`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.decode import decode, encode
from base.ranges import NonNegativeInt, PositiveInt
from base.refusal import ConfigError
from comm.config import ParallelismConfig
from dualpipe.registry import ScheduleConfig
from evaluation.answers import Answerer, SharedAnswerer
from evaluation.benchmarks import (
    BenchmarkRun,
    open_manager,
    read_set,
    require_harness,
    run_lines,
    set_table,
    skipped_lines,
    table_text,
)
from evaluation.protocol import EVALUATION_TASKS, EvaluationError, Record, TaskContext
from evaluation.run import (
    IDENTITY_NAME,
    RESULTS_NAME,
    EvaluationFolder,
    OpenTask,
    TaskResult,
    Write,
    as_json,
    open_tasks,
    read_records,
    run_tasks,
    task_result,
)
from evaluation.statistics import PairedComparison, compare
from launch.cli.entry import command, preview_of
from launch.config.compose import compose, system_errors
from launch.ranks.machine import apply_rank_environment, is_other_rank, is_torchrun
from launch.weights.answerer import check_harness_weights, harness_model, open_answerer
from launch.weights.job import (
    Device,
    Dtype,
    WeightsSource,
    find_weights,
    load_model,
    local_cluster,
    open_ranks,
    run_on_ranks,
    spread_over_ranks,
)
from train.checkpoint.index import WeightsKind
from train.checkpoint.locate import listed_files
from train.checkpoint.manifest import digest, read_step
from train.config import EvaluationTasksConfig, InferenceConfig
from train.report.charts import EVALUATION_PAGE_NAME, evaluation_page

if TYPE_CHECKING:
    from model.transformer import Transformer

FORMAT = 1
_PRELOADED = ("train.listeners.evaluation",)
_HASHED_SUFFIXES = (".safetensors", ".json", ".model")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateCommandConfig:
    """Configuration of an evaluation. `conf/evaluate.yaml` explains the keys."""

    ckpt: str
    weights: WeightsKind
    out: str
    compare: str | None
    set: str | None
    set_limit: PositiveInt | None
    allow_unsafe_code: bool
    seed: NonNegativeInt
    batch_size: PositiveInt
    parallelism: ParallelismConfig
    schedule: ScheduleConfig
    dtype: Dtype
    device: Device
    plugins: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationJob:
    """What is evaluated: configuration, tasks' settings, and weights that are not read yet."""

    config: EvaluateCommandConfig
    tasks: EvaluationTasksConfig
    source: WeightsSource
    benchmarks: BenchmarkRun | None = None

    def open_tasks(self) -> list[OpenTask]:
        """Builds the tasks, which check all of their files."""
        source = self.source
        tokenizer = self.source.needed_tokenizer("tasks")
        for name in self.tasks.tasks:
            heads = EVALUATION_TASKS.get(name).heads
            if source.model.head not in heads:
                raise ConfigError(
                    f"tasks: {name} needs weights with model.head={' or '.join(heads)}, {source.folder} has "
                    f"{source.model.head}; nearest valid: other tasks or weights"
                )
        limit = source.model.max_position_tokens
        seed = self.config.seed
        context = TaskContext(tokenizer=tokenizer, max_tokens=limit, seed=seed, counts_loads=self.spread() is None)
        return open_tasks(self.tasks.tasks, self.tasks.settings, context)

    def spread(self) -> InferenceConfig | None:
        """Returns how ranks hold the model together, or None if one process holds the whole model."""
        config = self.config
        return spread_over_ranks(self.source, config.dtype, config.device, config.parallelism, config.schedule)


def read_job(overrides: Sequence[str]) -> EvaluationJob:
    """Composes and checks the configuration, and locates the weights without reading them."""
    return job_of(compose("evaluate", overrides))


def job_of(values: dict[str, Any], source: WeightsSource | None = None) -> EvaluationJob:
    """Checks composed values, and locates the weights unless they are known."""
    names = [name for name in ("tasks", *EVALUATION_TASKS.names()) if name in values]
    tasks = EvaluationTasksConfig.from_plain({name: values.pop(name) for name in names})
    config = decode(EvaluateCommandConfig, values)
    benchmarks = None
    if config.set is not None:
        if tasks.tasks or config.compare is not None:
            key = "tasks" if tasks.tasks else "compare"
            raise ConfigError(f"{key}: must be left out with set={config.set}; nearest valid: another command")
        require_harness()
        benchmarks = BenchmarkRun(
            benchmarks=read_set(config.set), limit=config.set_limit, allows_code=config.allow_unsafe_code
        )
    elif not tasks.tasks:
        raise ConfigError(f"tasks: must name at least one task, is []; valid: {', '.join(EVALUATION_TASKS.names())}")
    if not config.out:
        raise ConfigError("out: a value is needed, is empty; write out=FOLDER")
    if source is None:  # no task uses MTP modules
        source = find_weights(config.ckpt, config.weights, drop_mtp=True, needs_tokenizer=True).without_mtp()
    if benchmarks is not None:
        chat = benchmarks.benchmarks.chat_template
        if check_harness_weights(source, chat or "auto") is None and chat is not None:
            rule = f"must name a template, because {source.folder} has none that is known"
            raise ConfigError.broken("set.chat_template", rule, chat, "a copy of the set with a name")
    return EvaluationJob(config=config, tasks=tasks, source=source, benchmarks=benchmarks)


def identity(job: EvaluationJob, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides the records, as plain values. Those of equal evaluations are equal."""
    settings = {name: encode(job.tasks.settings[name]) for name in job.tasks.tasks}
    return {
        "format": FORMAT,
        "ckpt": {key: value for key, value in checkpoint.items() if key != "folder"},
        "dtype": job.source.resolve(job.config.dtype),
        "seed": job.config.seed,
        "tasks": list(job.tasks.tasks),
        **settings,
        "versions": {name: EVALUATION_TASKS.get(name).version for name in job.tasks.tasks},
        "files": {
            path: digest(Path(path).expanduser()).sha256
            for name in job.tasks.tasks
            for path in EVALUATION_TASKS.get(name).files(job.tasks.settings[name])
        },
        **({} if job.benchmarks is None else _identity_of_set(job.benchmarks)),
    }


def _identity_of_set(run: BenchmarkRun) -> dict[str, Any]:
    return {"set": _sum(encode(run.benchmarks))["sha256"], "set_limit": run.limit, "lm_eval": _version("lm_eval")}


def describe_checkpoint(source: WeightsSource) -> dict[str, Any]:
    """Returns folder, kind, step and hash of weights; all files of a Hugging Face folder are read."""
    if source.is_hf:
        paths = sorted(path for path in source.folder.iterdir() if path.suffix in _HASHED_SUFFIXES)
        with ThreadPoolExecutor() as pool:
            digests = pool.map(digest, paths)
            hashes = {path.name: file.sha256 for path, file in zip(paths, digests, strict=True)}
        return {"folder": str(source.folder), "kind": "huggingface", "step": None, "weights": "trained", **_sum(hashes)}
    hashes = {name: file.sha256 for name, file in listed_files(source.folder).items()}
    folder = str(source.folder.resolve())
    step = read_step(source.folder)
    return {"folder": folder, "kind": "checkpoint", "step": step, "weights": source.weights, **_sum(hashes)}


def _sum(hashes: Mapping[str, Any]) -> dict[str, str]:
    return {"sha256": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()}


_PACKAGES = ("torch", "tokenizers", "numpy")
Comparisons = Mapping[str, Mapping[str, PairedComparison]]  # the comparison of each metric, by task and metric


def check_compared(folder: str, tasks: Sequence[OpenTask]) -> None:
    """Rejects a folder without a complete evaluation of the tasks."""
    path = Path(folder).expanduser()
    if not (path / RESULTS_NAME).is_file() or not (path / IDENTITY_NAME).is_file():
        raise ConfigError(
            f"compare: must be the folder of a complete evaluation, {folder!r} has no {RESULTS_NAME}; nearest valid: "
            "a folder that was out of launch.evaluate"
        )
    for task in tasks:
        record_ids = {str(record["id"]) for record in read_records(path, task.name)}
        missing = next((sample.key for sample in task.task.samples() if str(sample.key) not in record_ids), None)
        if missing is not None:
            raise ConfigError(
                f"compare: must have the same samples, {folder!r} has no record {missing!r} of {task.name}; nearest "
                "valid: an evaluation of the same file"
            )


def _compare_with(
    folder: str, tasks: Sequence[OpenTask], records: Mapping[str, Sequence[Record]], seed: int
) -> Comparisons:
    comparisons = dict[str, dict[str, PairedComparison]]()
    for opened in tasks:
        others = {str(record["id"]): record for record in read_records(Path(folder).expanduser(), opened.name)}
        measure = opened.task.measures
        pairs = [(measure(record), measure(others[str(record["id"])])) for record in records[opened.name]]
        comparisons[opened.name] = {}
        for name in (metric.name for metric in opened.task.metrics):
            both = [(ours[name], theirs[name]) for ours, theirs in pairs if name in ours and name in theirs]
            values = [pair[0] for pair in both]
            other_values = [pair[1] for pair in both]
            comparisons[opened.name][name] = compare(values, other_values, seed)
    return comparisons


def write_outcome(
    job: EvaluationJob,
    tasks: Sequence[OpenTask],
    records: Mapping[str, Sequence[Record]],
    checkpoint: Mapping[str, Any],
    folder: EvaluationFolder,
) -> str:
    """Computes results, writes the page and then `results.json`, and returns the summary."""
    results = {task.name: task_result(task, records[task.name]) for task in tasks}
    baseline = job.config.compare
    compared = None if baseline is None else _compare_with(baseline, tasks, records, job.config.seed)
    dtype = job.source.resolve(job.config.dtype)
    software = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    facts: dict[str, Any] = {
        "checkpoint": dict(checkpoint),
        "dtype": dtype,
        "seed": job.config.seed,
        "config": {"model": "dualpipe", "model_args": f"ckpt={job.config.ckpt}", **encode(job.config)},
        "software": software,
        "date": time.time(),
    }
    if baseline is not None and compared is not None:
        identity_of_other = json.loads((Path(baseline).expanduser() / IDENTITY_NAME).read_text(encoding="utf-8"))
        facts["comparison"] = {
            "folder": baseline,
            "checkpoint": identity_of_other.get("ckpt"),
            "tasks": {
                name: {metric: asdict(pair) for metric, pair in pairs.items()} for name, pairs in compared.items()
            },
        }
    settings = {task.name: encode(task.config) for task in tasks}
    provenance = {**checkpoint, "dtype": dtype, "seed": job.config.seed, "compared with": baseline}
    title = f"Evaluation of {job.source.folder.name}"
    folder.write(EVALUATION_PAGE_NAME, evaluation_page(title, provenance, results, compared))
    folder.write(RESULTS_NAME, json.dumps(as_json(tasks, results, settings, facts), indent=2) + "\n")
    return summary(results, compared)


def summary(results: Mapping[str, TaskResult], compared: Comparisons | None = None) -> str:
    """Returns a line for each metric, and for each note."""
    lines = []
    for name, result in results.items():
        for metric, estimate in result.estimates.items():
            error = "" if estimate.standard_error is None else f" +- {estimate.standard_error:.4f}"
            value = "none" if estimate.value is None else f"{estimate.value:.4f}"
            line = f"{name}  {metric} {value}{error}  ({estimate.num_samples:,} samples)"
            comparison = None if compared is None else compared[name][metric]
            if comparison is not None and comparison.difference is not None:
                chance = ""
                if comparison.p_value is not None:
                    chance = f", p {comparison.p_value:.3g} ({comparison.test.replace('_', ' ')})"
                line += f"  {comparison.difference:+.4f} to the other evaluation{chance}"
            lines.append(line)
        lines += [f"note: {name}: {note}" for note in result.details.notes]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


Done = Mapping[str, Collection[str | int]]
"""The ids of the samples of each task that have a record, and are not evaluated again."""


def main(overrides: Sequence[str]) -> int:
    """Evaluates, and writes records and results. User errors are reported before weights are read."""
    text = evaluate(read_job(overrides))
    if text:
        print(text, flush=True)
    return 0


def evaluate(job: EvaluationJob, model: "Transformer | None" = None) -> str:
    """Evaluates a model, or reads that of the job, into the job's folder, and returns the results as text.

    The text is empty on ranks of torchrun other than rank 0.
    """
    with system_errors():
        tasks = job.open_tasks()
        try:
            if job.config.compare is not None:
                check_compared(job.config.compare, tasks)
            return _evaluate(job, tasks, model)
        finally:
            _close(tasks)


def _close(tasks: Sequence[OpenTask]) -> None:
    for opened in tasks:
        opened.task.close()


def _evaluate(job: EvaluationJob, tasks: Sequence[OpenTask], model: "Transformer | None") -> str:
    """Evaluates in a folder, or reports that it is complete. Only rank 0 of torchrun writes there."""
    network = job.spread()
    if network is not None and is_other_rank(os.environ):
        run_on_ranks(partial(_evaluate_as_rank, job, network, None), network, _PRELOADED)
        return ""
    if job.benchmarks is not None:
        return _evaluate_set(job, job.benchmarks, network, model)
    checkpoint = describe_checkpoint(job.source)
    path = Path(job.config.out).expanduser()
    with EvaluationFolder(path, identity(job, checkpoint)) as folder:
        if folder.is_complete and not is_torchrun(os.environ):
            print(f"{path} is complete; nothing is evaluated", file=sys.stderr, flush=True)
            return summary({opened.name: task_result(opened, folder.read(opened.name)) for opened in tasks})
        records = {opened.name: folder.read(opened.name) for opened in tasks}
        done = {name: {record["id"] for record in task_records} for name, task_records in records.items()}

        def write(name: str, fresh: list[dict[str, Any]]) -> None:
            folder.append(name, fresh)
            records[name].extend(fresh)

        _run(job, network, tasks, done, write, model)
        return write_outcome(job, tasks, records, checkpoint, folder)


_SET = "set"  # the name under which the records of a set are kept


def _evaluate_set(
    job: EvaluationJob, run: BenchmarkRun, network: InferenceConfig | None, model: "Transformer | None"
) -> str:
    """Runs the lines of a set that have no record, and returns the table of all lines."""
    lines = run.benchmarks.lines
    reasons = skipped_lines(run, open_manager(run.benchmarks))
    if len(reasons) == len(lines):
        print(table_text(set_table(run, {}, reasons)), flush=True)
        raise ConfigError(f"set: must have a line that can run, {job.config.set} has none; the table has the reasons")
    checkpoint = describe_checkpoint(job.source)
    with EvaluationFolder(Path(job.config.out).expanduser(), identity(job, checkpoint)) as folder:
        records = {str(record["id"]): record for record in folder.read(_SET)}

        def write(name: str, fresh: list[Record]) -> None:
            for record in fresh:
                print(f"{record['id']}: {record.get('failed') or record['value']}", file=sys.stderr, flush=True)
                records[record["id"]] = record
            folder.append(name, [record for record in fresh if "failed" not in record])

        done = {_SET: {*records, *reasons}}
        if len(done[_SET]) < len(lines):
            _run(job, network, (), done, write, model)
        rows = set_table(run, records, reasons)
        facts = {"set": run.benchmarks.source, "limit": run.limit, "checkpoint": checkpoint, "seed": job.config.seed}
        software = {name: _version(name) for name in ("lm_eval", *_PACKAGES)}
        results = {**facts, "software": software, "date": time.time(), "lines": rows}
        folder.write(RESULTS_NAME, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    text = table_text(rows)
    if failed := [name for name, record in records.items() if "failed" in record]:
        print(text, flush=True)
        raise EvaluationError(f"set: all lines must run, failed: {', '.join(failed)}; the same command repeats them")
    return text


def _run(
    job: EvaluationJob,
    network: InferenceConfig | None,
    tasks: Sequence[OpenTask],
    done: Done,
    write: Write,
    model: "Transformer | None",
) -> None:
    if network is None:
        _evaluate_here(job, tasks, done, write, model)
    else:
        run_on_ranks(partial(_evaluate_as_rank, job, network, done), network, _PRELOADED, write)


def _run_set(
    job: EvaluationJob, run: BenchmarkRun, answerer: Answerer | SharedAnswerer, done: Done, write: Write
) -> None:
    template = check_harness_weights(job.source, run.benchmarks.chat_template or "auto")
    model = harness_model(job.source, answerer, template, seed=job.config.seed)
    run_lines(run, model, done[_SET], lambda record: write(_SET, [record]))


def _evaluate_here(
    job: EvaluationJob, tasks: Sequence[OpenTask], done: Done, write: Write, model: "Transformer | None"
) -> None:
    source = job.source
    if model is None:
        threads = os.environ.get("OMP_NUM_THREADS")
        apply_rank_environment(local_cluster(job.config.device, 1))
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
        model = load_model(source, job.config.dtype, job.config.device)
    from infer.engines.local import LocalModel

    answerer = open_answerer(source, LocalModel(model, job.config.batch_size))
    if job.benchmarks is None:
        run_tasks(tasks, answerer, done, write)
    else:
        _run_set(job, job.benchmarks, answerer, done, write)


def _evaluate_as_rank(job: EvaluationJob, network: InferenceConfig, done: Done | None, write: Write) -> None:
    """Evaluates as one rank of the job. `done` and `write` of rank 0 are used."""
    from train.listeners.evaluation import PipelinedModel, share

    tasks = job.open_tasks()
    try:
        with open_ranks(network) as pipeline:
            world = pipeline.replica.world
            model = PipelinedModel(pipeline.replica, job.config.batch_size, lambda: pipeline)
            answerer = open_answerer(job.source, model)
            done = share(world, done, "samples that have a record") or {}
            if job.benchmarks is None:
                run_tasks(tasks, answerer, done, write if world.rank == 0 else None)
                return
            shared = SharedAnswerer(answerer, lambda requests: share(world, requests, "requests"))
            if world.rank == 0:
                _run_set(job, job.benchmarks, shared, done, write)
                shared.end()
            else:
                shared.follow()
    finally:
        _close(tasks)


def _check(job: EvaluationJob) -> None:
    _close(job.open_tasks())
    if job.benchmarks is not None:
        open_manager(job.benchmarks.benchmarks)


preview = preview_of("evaluate", read_job, _check, lambda job: {**encode(job.config), **encode(job.tasks)})

if __name__ == "__main__":
    sys.exit(command("evaluate", main, preview, quiet=is_other_rank(os.environ)))
