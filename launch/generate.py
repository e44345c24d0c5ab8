"""Continues prompts with a trained model: `python -m launch.generate`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TextIO

from data.progress import NoProgress, progress_on
from infer.config import Statistics, check
from infer.engines.protocol import NumberedPrompt, Request, Rollouts
from launch.config.errors import system_errors
from launch.generation.continuations import new_file
from launch.generation.prompts import Prompt
from launch.generation.ranks import (
    RankJob,
    as_text_tokens,
    check_ranks,
    generate_as_rank,
    generate_on_local_ranks,
    local_cluster,
    with_drafts,
)
from launch.generation.request import (
    GenerateCommandConfig,
    find_source,
    open_writer,
    read_config,
    tokenize_prompts,
)
from launch.generation.source import GenerationSource, load_model
from launch.help.command import command
from launch.help.preview import plain_text
from launch.ranks.environment import apply_rank_environment, is_other_rank, is_torchrun
from train.config.decode import encode
from train.config.errors import ConfigError


def main(overrides: Sequence[str]) -> int:
    """Continues prompts. All user errors are reported before weights are read.

    The text of a single prompt streams to standard output. The continuations of a prompt file are printed one after
    the other, each after a line with its prompt, or written to `out`. Statistics go to standard error.
    """
    config = read_config(overrides)
    with system_errors():
        source = find_source(config)
        prompts = tokenize_prompts(config, source)
        check(
            source.model,
            [prompt.tokens for prompt in prompts],
            config.max_new_tokens,
            config.speculative,
            config.batch_size,
        )
        job = _job(config, source, prompts) if config.parallelism.world_size > 1 else None
        if job is not None and is_torchrun(os.environ):
            return _run_as_rank(config, source, prompts, job)
        with new_file("out", config.out) if config.out else nullcontext(sys.stdout) as file:
            statistics = (
                _run(config, source, prompts, file) if job is None else _run_ranks(config, source, prompts, job, file)
            )
    _print_statistics(statistics)
    return 0


def _print_statistics(statistics: Statistics) -> None:
    speed = statistics.tokens / max(statistics.seconds, 1e-9)
    line = f"{statistics.tokens} tokens in {statistics.seconds:.2f} s, {speed:,.1f} tokens/s; {statistics.summary()}"
    print(line, file=sys.stderr, flush=True)


def preview(overrides: Sequence[str]) -> str:
    """Returns the command's configuration, checked, as YAML."""
    config = read_config(overrides)
    with system_errors():
        tokenize_prompts(config, find_source(config))
    stop = [*config.stop.ids, *config.stop.strings]
    return plain_text("generate", {**encode(config), "stop": stop})


def _job(config: GenerateCommandConfig, source: GenerationSource, prompts: Sequence[Prompt]) -> RankJob:
    """Returns what every rank runs, after all checks."""
    world_size, started = config.parallelism.world_size, os.environ.get("WORLD_SIZE")
    if is_torchrun(os.environ) and started != str(world_size):
        raise ConfigError(
            f"parallelism: {config.parallelism.axes('=')} makes {world_size} ranks, but torchrun started "
            f"WORLD_SIZE={started}; start {world_size} ranks, or change parallelism"
        )
    model = with_drafts(source.model, config.speculative)
    kind, cut = check_ranks(model, config.parallelism, config.schedule)
    return RankJob(
        ckpt=config.ckpt,
        weights=config.weights,
        model=model,
        dtype=source.resolve(config.dtype),
        cluster=local_cluster(config.device, world_size),
        parallelism=config.parallelism,
        kind=kind,
        cut=cut,
        prompts=tuple(
            NumberedPrompt(number=number, tokens=tuple(prompt.tokens)) for number, prompt in enumerate(prompts)
        ),
        request=Request(
            samples=1,
            max_new_tokens=config.max_new_tokens,
            sampling=config.sampling,
            stop=config.stop_ids(source.end_ids),
        ),
        given=tuple(prompts),
        tokenizer=source.tokenizer,
        stop_strings=config.stop.strings,
        speculative=config.speculative,
        cohorts=config.cohorts,
        max_rows=config.batch_size,
    )


def _run_ranks(
    config: GenerateCommandConfig, source: GenerationSource, prompts: Sequence[Prompt], job: RankJob, file: TextIO
) -> Statistics:
    """Generates on local ranks, and writes the continuations."""
    print(f"{config.parallelism.world_size} ranks read the weights of {source.folder}", file=sys.stderr, flush=True)
    return _write_rollouts(config, source, prompts, generate_on_local_ranks(job), file)


def _run_as_rank(
    config: GenerateCommandConfig, source: GenerationSource, prompts: Sequence[Prompt], job: RankJob
) -> int:
    """Generates as a rank of torchrun. Rank 0 writes the continuations."""
    apply_rank_environment(job.cluster)
    rollouts = generate_as_rank(job)
    if not is_other_rank(os.environ):
        with new_file("out", config.out) if config.out else nullcontext(sys.stdout) as file:
            _print_statistics(_write_rollouts(config, source, prompts, rollouts, file))
    return 0


def _write_rollouts(
    config: GenerateCommandConfig, source: GenerationSource, prompts: Sequence[Prompt], rollouts: Rollouts, file: TextIO
) -> Statistics:
    transcripts, writer = open_writer(config, source, prompts, file)
    stop = config.stop_ids(source.end_ids)
    for transcript, rollout in zip(transcripts, rollouts.rollouts, strict=True):
        for token in as_text_tokens(rollout.tokens, stop):
            transcript.push(token)
        transcript.end(rollout.finish)
        writer.update()
    return rollouts.statistics


def _run(
    config: GenerateCommandConfig, source: GenerationSource, prompts: Sequence[Prompt], file: TextIO
) -> Statistics:
    # Values of sampling are checked before the weights are read.
    sampling, (transcripts, writer) = config.sampling, open_writer(config, source, prompts, file)
    model = load_model(source, source.resolve(config.dtype), config.device)
    from infer.generate import Stream

    stream = Stream(
        model,
        [prompt.tokens for prompt in prompts],
        max_new_tokens=config.max_new_tokens,
        sampling=sampling,
        stop=config.stop_ids(source.end_ids),
        speculative=config.speculative,
        batch_size=config.batch_size,
        stop_condition=lambda index, token: transcripts[index].push(token),
    )
    # Standard output shows text as it is made; a file shows nothing.
    progress, most = progress_on() if config.out else NoProgress(), len(prompts) * config.max_new_tokens
    for piece in progress.over("generating", stream, most, lambda piece: len(piece.tokens), "tokens"):
        if piece.finish is not None:
            transcripts[piece.index].end(piece.finish)
        writer.update()
    return stream.statistics


if __name__ == "__main__":
    sys.exit(command("generate", main, preview, quiet=is_other_rank(os.environ)))
