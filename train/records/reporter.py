"""Sends the summary, lines, records and reports of a run to the terminal, files and wandb."""

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import distributed as dist

from data.registry import DATA_SOURCES
from data.shards.encode import none_to_split
from data.shards.open import Prepared, unused_settings
from train.checkpoint.locate import other_layout
from train.config import TrainConfig
from train.core.replica import Replica
from train.core.step import Balance
from train.files.json_lines import LOADS_NAME, METRICS_NAME, JsonLines
from train.files.run_files import LOG_FOLDER, RankFiles, redact
from train.optim.learning_rate import learning_rate, schedule_warnings
from train.predict.cut import ramp_notices, with_cut
from train.predict.fit import summary_line
from train.predict.memory import predict_memory
from train.records.display import Display, open_console
from train.records.step_record import profile_notice
from train.records.trackers import Recorder, open_trackers
from train.report.page import REPORT_NAME, Report
from train.start.plan import Plan

LOGGER = logging.getLogger("train")


class LoadLines:
    """The file `loads.jsonl` of rank 0 with the tokens per expert of every `every_steps`-th step."""

    def __init__(self, folder: Path, every_steps: int, first_step: int) -> None:
        self._every = every_steps
        self._lines = JsonLines(folder / LOADS_NAME, first_step) if every_steps else None
        self._further: Mapping[str, Any] = {}

    def add(self, loads: Mapping[str, Any]) -> None:
        """Adds further loads to the line of the next step, which is then due."""
        self._further = loads

    def record(self, step: int, balance: Balance) -> None:
        """Writes the line of a step if it is due."""
        if self._lines is not None and (step % self._every == 0 or self._further):
            self._lines.record({"step": step, **balance.loads(), **self._further})
        self._further = {}

    def roll_back(self, step: int) -> None:
        """Removes the lines of later steps, which will be repeated."""
        if self._lines is not None:
            self._lines.roll_back(step)

    def close(self) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._lines.close()


class Reporter:
    """Prints and records on rank 0; does nothing on other ranks."""

    def __init__(
        self,
        display: Display | None,
        recorders: Sequence[Recorder],
        loads: LoadLines | None = None,
        report: Report | None = None,
        report_seconds: float = 0.0,
    ) -> None:
        self._display = display
        self._recorders = recorders
        self._loads = loads
        self._report = report
        self._report_seconds = report_seconds
        self._drawn_at = time.monotonic()

    def say(self, line: str) -> None:
        """Prints a line for people, in several lines if it is long."""
        if self._display is not None:
            self._display.say(redact(line))

    def show(self, text: str) -> None:
        """Prints a text for people as it is."""
        if self._display is not None:
            self._display.show(redact(text))

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Names a phase next to the bar on a terminal, and prints its duration if that is at least a second."""
        return nullcontext() if self._display is None else self._display.phase(name)

    def record(self, values: dict[str, Any], balance: Balance) -> None:
        """Records one step's numbers."""
        if self._loads is not None:
            self._loads.record(values["step"], balance)
        for recorder in self._recorders:
            recorder.record(values)
        if self._report_seconds and time.monotonic() - self._drawn_at >= self._report_seconds:
            self.draw()

    def add_loads(self, loads: Mapping[str, Any]) -> None:
        """Adds further loads of experts to the line of the step that is recorded next."""
        if self._loads is not None:
            self._loads.add(loads)

    def last(self) -> dict[str, Any] | None:
        """Returns the record of the last step, possibly of an earlier attempt; None on other ranks than 0."""
        return next((recorder.last() for recorder in self._recorders if isinstance(recorder, JsonLines)), None)

    def amend(self, values: dict[str, Any]) -> None:
        """Replaces the record of the last step by one with further values."""
        for recorder in self._recorders:
            recorder.amend(values)

    def draw(self) -> None:
        """Writes the report of the run up to now."""
        if self._report is not None:
            self._report.try_to_write()
        self._drawn_at = time.monotonic()

    def roll_back(self, step: int) -> None:
        """Removes the records of steps after this one, which will be repeated."""
        if self._loads is not None:
            self._loads.roll_back(step)
        for recorder in self._recorders:
            recorder.roll_back(step)

    def close(self) -> None:
        """Closes every recorder, and writes the last report."""
        if self._loads is not None:
            self._loads.close()
        for recorder in self._recorders:
            recorder.close()
        self.draw()


class _RankLog(logging.FileHandler):
    """The log file of a rank. Lines that a full disk refuses are lost without a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignores the error."""


def open_reporter(config: TrainConfig, first_step: int) -> Reporter:
    """Opens this rank's log and, on rank 0, all outputs of the run."""
    rank = dist.get_rank()
    out_dir = Path(config.out_dir)
    files = RankFiles(rank, config.parallelism.world_size, config.cluster.ranks_per_node)
    log = _RankLog(files.make_folder(out_dir / LOG_FOLDER) / f"{files.stem}.log")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(log)
    for name in ("kernels", "train"):  # the log has the choice of attention's kernel and of tilings
        logging.getLogger(name).setLevel(logging.INFO)
    if rank != 0:
        return Reporter(None, [])
    display = Display(open_console(sys.stdout), config.task.steps, first_step, config.track.log_every_steps)
    recorders: list[Recorder] = [JsonLines(out_dir / METRICS_NAME, first_step), display]
    recorders += open_trackers(config.track, config.name, out_dir, first_step, dataclasses.asdict(config))
    loads = LoadLines(out_dir, config.track.loads_every_steps, first_step)
    return Reporter(display, recorders, loads, Report(config), 60 * config.track.report_minutes)


def print_run_summary(
    config: TrainConfig, replica: Replica, planned: Plan, prepared: Prepared, reporter: Reporter, first_step: int
) -> None:
    """Prints layout, schedule, memory, corpus and tokenizer, and logs this rank's coordinates."""
    _log_place(replica)
    layout = config.parallelism
    reporter.say(
        f"{config.name}: {layout.world_size} ranks ({layout.axes()}, experts over {layout.expert}), "
        f"{config.precision.kind}"
    )
    reason = f"; {planned.reason}" if config.schedule.kind == "auto" else ""
    reporter.say(f"schedule: {replica.schedule.kind}, {config.num_micro_batches} micro-batches per step{reason}")
    reporter.say(f"folder: {config.out_dir}")
    if minutes := config.track.report_minutes:
        now = f"python -m launch.redraw run={config.out_dir} draws it now"
        reporter.say(f"report: {REPORT_NAME} in it, drawn again every {minutes:g} min; {now}")
    if replica.schedule.num_stages > 1:
        reporter.say(f"cut: {','.join(str(len(layers)) for layers in replica.cut)} layers in the pipeline's stages")
    for notice in ramp_notices(config):
        reporter.say(notice)
    if config.cluster.memory_bytes is not None and replica.world.rank == 0:
        reporter.say(summary_line(config, predict_memory(with_cut(config, replica.cut))))
    if notice := profile_notice(config):
        reporter.say(notice)
    for line in corpus_lines(config, prepared):
        reporter.say(line)
    schedule = schedule_warnings(config.optim, config.batch_sizes, config.task.steps)
    for warning in schedule:
        reporter.say(f"warning: {warning}")
    if first_step and config.resume is not None:
        reporter.say(f"resumed after step {first_step} from {config.resume}{other_layout(Path(config.resume), config)}")
        rate = learning_rate(config.optim, config.batch_sizes, config.task.steps, first_step)
        reporter.say(
            f"learning rate: {rate:.3e} in step {first_step + 1}; its schedule spans {config.task.steps:,} steps"
        )


def _log_place(replica: Replica) -> None:
    world = replica.world
    LOGGER.info(
        "rank %d, node %d: pipeline index %d with stages %s, data index %d, context index %d, expert index %d, "
        "%d parameters, device %s",
        world.rank,
        world.layout.node_of(world.rank),
        world.pipeline_index,
        sorted(replica.stages),
        world.data_index,
        world.context_index,
        world.layout.expert_index(world.rank),
        sum(parameter.numel() for parameter in replica.model.parameters()),
        world.device,
    )


def corpus_lines(config: TrainConfig, prepared: Prepared) -> Iterator[str]:
    """Yields lines about corpus and tokenizer."""
    yield (
        f"corpus: {prepared.train.num_tokens:,} training and {prepared.validation.num_tokens:,} validation tokens "
        f"of {prepared.bytes_per_token:.2f} bytes, unigram entropy {prepared.unigram_entropy_nats:.4f} nats"
        f"{_long_documents(prepared)}"
    )
    if counts := prepared.counts.get("train"):
        steps = config.task.steps
        sizes = config.batch_sizes
        rollout = config.rollout
        if rollout is None:
            size = len(prepared.train.tokens_NL)
            step_size = float(sizes.sequences(steps - 1))
            read = float(sizes.sequences_before(steps))
            line = (
                f"samples: {counts.kept:,} for training ({counts.cut:,} cut at their end, {counts.dropped:,} dropped) "
            )
            line += f"in {size:,} sequences"
        else:
            # Such a run reads problems, and its batches are made of sampled answers, not of the data's samples.
            size = counts.kept + counts.dropped
            step_size = rollout.prompts / rollout.updates
            read = steps * step_size
            line = f"problems: {size:,} for training"
        yield f"{line}; an epoch is {size / step_size:.1f} steps, {steps:,} steps are {read / size:.2f} epochs"
    tokenizer_name = config.data.tokenizer
    size = prepared.tokenizer.vocab_size
    trained = "trained on the corpus" if DATA_SOURCES.get(config.data.source.kind).tokenizer is None else "of data.kind"
    origin = trained if tokenizer_name is None else f"from {tokenizer_name}; data.tokenizer_vocab_size is not used"
    yield f"tokenizer: {origin}; ids below {size:,}{_special_notes(config, prepared)}"
    if unused := unused_settings(config.data):
        yield f"data: {unused}"
    num_held_out = len(prepared.validation.tokens_NL)
    wanted = config.validation.sequences
    if wanted and not num_held_out:
        yield "validation: off, because data.validation_fraction is too small to hold out a document of this corpus"
    elif num_held_out < wanted and config.rollout is None:
        # Whole global batches are read, or all of less than one.
        num_read = num_held_out // config.batch.global_sequences * config.batch.global_sequences or num_held_out
        reason = f"because the held-out part has only {num_held_out}"
        yield f"validation: reads {num_read} of validation.sequences={wanted}, {reason}"


def _special_notes(config: TrainConfig, prepared: Prepared) -> str:
    """Returns how documents begin and end, and which settings have no effect, as the end of a line."""
    split = none_to_split(prepared.tokenizer, config.data.punctuation_newline_split)
    split = split and f"; {split}"
    if config.data.tokenizer is None:
        return split
    names = prepared.tokenizer.token_names
    special = prepared.tokenizer.special
    begin = "nothing" if special.bos is None else repr(names["bos_token"])
    notes = f"; a document begins with {begin} and ends with {names['eos_token']!r}"
    if special.fim is None and config.data.fim_rate > 0:
        notes += f"; it has no fill-in-the-middle tokens, so data.fim_rate={config.data.fim_rate} has no effect"
    return notes + split


def _long_documents(prepared: Prepared) -> str:
    long = prepared.long_documents
    if long is None:
        return ""
    return (
        f", {long.own_share:.1%} of training tokens and {long.read_share:.1%} of those read in documents of at least "
        f"{long.min_document_tokens:,} tokens"
    )
