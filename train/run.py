"""One rank of a training run, from an empty process to an exit code."""

import dataclasses
import logging
import os
import sys
from pathlib import Path

from rich.console import Console
from torch import distributed as dist

from comm.groups import Groups, start, stop
from comm.layout import Layout
from comm.operations import OperationLog, cuda_mark
from comm.watch_start import AbsentError, Job, Seat, join
from data.corpus import DataError
from data.prepare import Prepared
from train import checkpoint
from train.assemble import Assembly, assemble, is_mirrored
from train.balance import LoadLines
from train.config import TrainConfig
from train.corpus import prepare_corpus
from train.errors import NonFiniteError
from train.initial_weights import load_initial
from train.last_words import LastWords
from train.loop import Reporter, show_continuation, train
from train.manifest import check_fingerprint, check_manifest, find_checkpoint, read_step
from train.metrics import Display, JsonLines, Recorder, Wandb
from train.plan import Plan, plan
from train.profile import profile_notice
from train.ramp import SizedAssemblies
from train.report.write import Report

EXIT_NON_FINITE = 77
LOGGER = logging.getLogger("train")


def main(config: TrainConfig, is_aloud: bool = False) -> int:
    """Joins the job, trains, and leaves. Every rank calls it with the same configuration.

    The folder of the run is rank 0's `out_dir`: ranks on other machines may have been told none. Where a rank is lost
    or does not come in time, the process ends in here, with the exit codes 78 and 76, and with last words in the log.

    Args:
        config: of the run.
        is_aloud: last words also go to stderr.

    Returns:
        The exit code: 0 done, 77 non-finite loss or gradient norm.
    """
    seat = Seat.of_environment()
    log = OperationLog()
    words = LastWords(seat.rank, log, is_aloud)
    words.out_dir = Path(config.out_dir) if config.out_dir else None
    try:
        job = join(seat, log, config.cluster.timeout_seconds, words.write)
    except AbsentError as error:
        words.write(error.verdict)
        os._exit(error.verdict.code)
    try:
        code = _train(config, job, log, words)
    except Exception as error:
        job.watch.clear(error)
        raise
    job.close()
    stop()
    return code


def _train(config: TrainConfig, job: Job, log: OperationLog, words: LastWords) -> int:
    layout, world = Layout(config.parallelism, config.cluster.ranks_per_node), range(config.parallelism.world_size)
    with log.phase("world", world, "start of process groups"):
        device = start(config.cluster, job.store)
        config = _agree(config)
    words.out_dir = Path(config.out_dir)
    if device.type == "cuda":
        log.follow_streams(cuda_mark(device))
    with log.phase("world", world, "choice of the schedule"):
        planned = plan(config, layout, device)
    with log.phase("world", world, "making of groups"):
        groups = Groups(layout, is_mirrored(planned.schedule), config.cluster.timeout_seconds)
    prepared = _prepare(config, groups, log)
    with log.phase("world", world, "assembly of the model"):
        assembly = assemble(config, layout, groups, device, planned.schedule, log)
    first_step = _resume(assembly, prepared.fingerprint)
    started_from = _start(assembly, prepared)
    reporter = _reporter(config, first_step)
    try:
        _introduce(assembly, planned, prepared, reporter, first_step)
        if started_from:
            reporter.say(started_from)
        train(assembly, SizedAssemblies(assembly, planned.ramp), prepared, reporter, first_step)
        if dist.get_rank() == 0 and config.stage.sample_prompt and config.stage.sample_tokens:
            reporter.say(f"continuation of {config.stage.sample_prompt!r}:\n{show_continuation(assembly, prepared)}")
        code = 0
    except NonFiniteError as error:
        reporter.say(f"error: {error}; nothing was updated in this step")
        code = EXIT_NON_FINITE
    finally:
        reporter.close()
    with log.collective("world", groups.world, "end of training"):
        dist.barrier(group=groups.world)
    assembly.close()
    return code


def _resume(assembly: Assembly, data_fingerprint: str) -> int:
    """Fills everything from the checkpoint to resume from, if any; returns the number of steps already done."""
    config = assembly.config
    if config.resume is None:
        return 0
    folder = find_checkpoint(config.resume)
    check_manifest(folder, config)
    check_fingerprint(folder, data_fingerprint)
    with assembly.observers.log.phase("world", range(assembly.layout.world_size), "loading of the checkpoint"):
        checkpoint.load(assembly, folder)
    return read_step(folder)


def _start(assembly: Assembly, prepared: Prepared) -> str:
    """Fills the weights from `init_from`, if any; returns a line that says so."""
    if assembly.config.init_from is None:
        return ""
    with assembly.observers.log.phase("world", range(assembly.layout.world_size), "loading of initial weights"):
        told = load_initial(assembly, prepared.tokenizer)
    if assembly.ema is not None:
        assembly.ema.follow_weights()
    return told


def _agree(config: TrainConfig) -> TrainConfig:
    agreed = [config.out_dir]
    dist.broadcast_object_list(agreed, src=0)
    return dataclasses.replace(config, out_dir=agreed[0])


def _prepare(config: TrainConfig, groups: Groups, log: OperationLog) -> Prepared:
    """One rank of every machine builds the cache where it is missing; the others then find it.

    Raises:
        DataError: on every rank, where machines would read different samples.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        prepare_corpus(config)
    with log.collective("world", groups.world, "preparation of the corpus"):
        dist.barrier(group=groups.world)
    prepared = prepare_corpus(config)
    fingerprints = [""] * dist.get_world_size()
    with log.collective("world", groups.world, "comparison of the corpus"):
        dist.all_gather_object(fingerprints, prepared.fingerprint)
    if len(set(fingerprints)) > 1:
        other = next(rank for rank, seen in enumerate(fingerprints) if seen != fingerprints[0])
        raise DataError(
            f"data: every rank must read the same samples; rank {other}'s fingerprint is {fingerprints[other]}, "
            f"rank 0's {fingerprints[0]}. Machines with different Python versions embed different text"
        )
    return prepared


def _reporter(config: TrainConfig, first_step: int) -> Reporter:
    rank, out_dir = dist.get_rank(), Path(config.out_dir)
    (out_dir / "log").mkdir(parents=True, exist_ok=True)
    log = logging.FileHandler(out_dir / "log" / f"rank_{rank:05d}.log")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(log)
    LOGGER.setLevel(logging.INFO)
    if rank != 0:
        return Reporter(None, [])
    display = Display(Console(file=sys.stdout), config.stage.steps, first_step, config.track.log_every_steps)
    recorders: list[Recorder] = [JsonLines(out_dir / "metrics.jsonl", first_step), display]
    if config.track.wandb != "disabled":
        recorders.append(Wandb(config.track, config.name, out_dir, dataclasses.asdict(config)))
    loads = LoadLines(out_dir, config.track.loads_every_steps, first_step)
    return Reporter(display, recorders, loads, Report(config))


def _introduce(assembly: Assembly, planned: Plan, prepared: Prepared, reporter: Reporter, first_step: int) -> None:
    config, layout, rank = assembly.config, assembly.config.parallelism, assembly.groups.rank
    LOGGER.info(
        "rank %d, node %d: pipeline index %d with stages %s, data index %d, expert index %d, %d parameters, device %s",
        rank,
        assembly.layout.node_of(rank),
        assembly.layout.pipeline_index(rank),
        sorted(assembly.stages),
        assembly.layout.data_index(rank),
        assembly.layout.expert_index(rank),
        sum(parameter.numel() for parameter in assembly.model.parameters()),
        assembly.device,
    )
    reporter.say(
        f"{config.name}: {layout.world_size} ranks (pipeline {layout.pipeline} x data {layout.data}, "
        f"experts over {layout.expert}), {assembly.schedule.kind}, {config.num_micro_batches} micro-batches a step, "
        f"{config.precision.kind}; folder {config.out_dir}"
    )
    if config.schedule.kind == "auto":
        reporter.say(f"schedule: {planned.reason}")
    if notice := profile_notice(config):
        reporter.say(notice)
    reporter.say(
        f"corpus: {prepared.train_tokens:,} training and {prepared.validation_tokens:,} validation tokens, "
        f"{prepared.bytes_per_token:.2f} bytes per token, unigram entropy {prepared.unigram_entropy_nats:.4f} nats"
    )
    given, size = config.data.tokenizer, prepared.tokenizer.vocab_size
    origin = "trained on the corpus" if given is None else f"that of {given}, not one of data.tokenizer_vocab_size"
    reporter.say(f"tokenizer: {origin}; ids below {size:,}")
    if first_step:
        reporter.say(f"resumed after step {first_step} from {config.resume}")
