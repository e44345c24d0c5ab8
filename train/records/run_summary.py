"""Prints a summary of a run before its first step."""

import logging
from collections.abc import Iterator
from pathlib import Path

from data.prepare import Prepared
from data.registry import DATA_SOURCES
from train.checkpoint.verify import other_layout
from train.config import TrainConfig
from train.memory import predict_memory, summary_line
from train.optim.learning_rate import learning_rate, schedule_warnings
from train.plan import Plan
from train.records.reporter import Reporter
from train.records.step_record import profile_notice
from train.replica import Replica
from train.schedule.cut import ramp_notices, with_cut

LOGGER = logging.getLogger("train")


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
        f"corpus: {prepared.train_tokens:,} training and {prepared.validation_tokens:,} validation tokens "
        f"of {prepared.bytes_per_token:.2f} bytes, unigram entropy {prepared.unigram_entropy_nats:.4f} nats"
        f"{_long_documents(prepared)}"
    )
    if counts := prepared.counts.get("train"):
        steps = config.task.steps
        sizes = config.batch_sizes
        rollout = config.rollout
        if rollout is None:
            size = len(prepared.train_tokens_NL)
            step_size = float(sizes.sequences(steps - 1))
            read = float(sizes.sequences_before(steps))
            found = (
                f"samples: {counts.kept:,} for training ({counts.cut:,} cut at their end, {counts.dropped:,} dropped) "
            )
            found += f"in {size:,} sequences"
        else:
            # Such a run reads problems, and its batches are made of sampled answers, not of the data's samples.
            size = counts.kept + counts.dropped
            step_size = rollout.prompts / rollout.updates
            read = steps * step_size
            found = f"problems: {size:,} for training"
        yield f"{found}; an epoch is {size / step_size:.1f} steps, {steps:,} steps are {read / size:.2f} epochs"
    given = config.data.tokenizer
    size = prepared.tokenizer.vocab_size
    made = "trained on the corpus" if DATA_SOURCES.get(config.data.source.kind).tokenizer is None else "of data.kind"
    origin = made if given is None else f"from {given}; data.tokenizer_vocab_size is not used"
    yield f"tokenizer: {origin}; ids below {size:,}{_special_notes(config, prepared)}"
    num_held_out = len(prepared.validation_tokens_NL)
    wanted = config.validation.sequences
    if wanted and not num_held_out:
        yield "validation: off, because data.validation_fraction is too small to hold out a document of this corpus"
    elif num_held_out < wanted and config.rollout is None:
        # Whole global batches are read, or all of less than one.
        num_read = num_held_out // config.batch.global_sequences * config.batch.global_sequences or num_held_out
        reason = f"because the held-out part has only {num_held_out}"
        yield f"validation: reads {num_read} of validation.sequences={wanted}, {reason}"


def _special_notes(config: TrainConfig, prepared: Prepared) -> str:
    """Returns how documents begin and end under a given tokenizer, as the end of a line."""
    if config.data.tokenizer is None:
        return ""
    names = prepared.tokenizer.token_names
    special = prepared.tokenizer.special
    begin = "nothing" if special.bos is None else repr(names["bos_token"])
    notes = f"; a document begins with {begin} and ends with {names['eos_token']!r}"
    if special.fim is None and config.data.fim_rate > 0:
        notes += f"; it has no fill-in-the-middle tokens, so data.fim_rate={config.data.fim_rate} has no effect"
    return notes


def _long_documents(prepared: Prepared) -> str:
    long = prepared.long_documents
    if long is None:
        return ""
    return (
        f", {long.own_share:.1%} of training tokens and {long.read_share:.1%} of those read in documents of at least "
        f"{long.min_document_tokens:,} tokens"
    )
