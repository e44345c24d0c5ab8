"""Continues prompts with a trained model: `python -m launch.generate`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from io import StringIO
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

from base.decode import decode, encode
from base.ranges import PositiveInt
from base.refusal import ConfigError
from comm.config import DispatchConfig, ParallelismConfig
from comm.dispatch.registry import DISPATCHERS
from data.chat.encode import encode_prompt
from data.chat.messages import user
from data.progress import NO_PROGRESS, Progress
from data.tokenizer import Tokenizer
from dualpipe.registry import ScheduleConfig
from evaluation.protocol import checked_file, read_lines, read_text, text_field
from infer.config import Finish, Sampling, Speculative, Statistics, check
from infer.protocol import NumberedPrompt, Request, Rollouts, TextStream
from launch.cli.entry import command, open_output, preview_of
from launch.config.compose import compose, system_errors
from launch.ranks.machine import is_other_rank
from launch.weights.job import (
    Device,
    Send,
    WeightsSource,
    find_template,
    find_weights,
    load_model,
    open_ranks,
    run_on_ranks,
    spread_over_ranks,
)
from train.checkpoint.index import WeightsKind
from train.config import InferenceConfig
from train.terminal import progress_on

if TYPE_CHECKING:
    from model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Stop:
    """Token ids and strings that end a continuation."""

    ids: tuple[int, ...]
    strings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the user gave it (text or token ids), and as token ids for the model."""

    given: str | list[int]
    tokens: list[int]


def read_stop(value: object) -> Stop:
    """Reads the key `stop`, a list of token ids and strings."""
    if not isinstance(value, list):
        raise ConfigError(f"stop: must be a list of strings and token ids, is {value!r}; write stop=[{value}]")
    for index, item in enumerate(value):
        if not (type(item) is int or (isinstance(item, str) and item)):
            raise ConfigError(f"stop[{index}]: must be a token id or a non-empty string, is {item!r}")
    ids = tuple(item for item in value if isinstance(item, int))
    return Stop(ids, tuple(item for item in value if isinstance(item, str)))


def read_prompts(prompt: str | None, prompts: str | None) -> list[str]:
    """Reads prompts as text."""
    if prompts is None:
        try:
            return [_checked("prompt", sys.stdin.read() if prompt == "-" else prompt or "")]
        except UnicodeDecodeError as error:
            raise ConfigError(f"prompt: standard input must be UTF-8 text: {error}") from error
    suffix = Path(prompts).suffix
    if suffix == ".jsonl":
        return read_lines("prompts", prompts, lambda values, place: text_field(values, "prompt", place))
    if suffix != ".txt":
        raise ConfigError(f"prompts: must be a .txt or .jsonl file, is {prompts!r}")
    text = read_text("prompts", checked_file("prompts", prompts)).removeprefix("\ufeff")  # a byte order mark
    lines = [line for line in StringIO(text, newline=None).read().split("\n") if line.strip()]
    if not lines:
        raise ConfigError(f"prompts: {prompts!r} must hold at least one prompt, holds none")
    return lines


def text_encoder(
    chat: str | None, folder: Path, tokenizer: Tokenizer, *, thinking: bool | None
) -> Callable[[str], list[int]]:
    """Returns a function that encodes a prompt: as text to continue, or as a user's message to answer."""
    if chat is None and thinking is not None:
        raise ConfigError(f"thinking: must be null without chat, is {thinking}; nearest valid: chat=auto")
    if chat is None:
        return tokenizer.prompt
    template = find_template(chat, folder, tokenizer, thinking=thinking)
    return lambda text: encode_prompt([user(text)], template, tokenizer, thinking=thinking)


def _checked(place: str, text: str) -> str:
    """Rejects lone surrogates, which Python puts in place of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: must be UTF-8 text, is not at character {error.start + 1}") from error
    return text


class Transcript:
    """A prompt and its continuation so far."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer | None, stop_strings: Sequence[str]) -> None:
        """Starts with an empty continuation. Without a tokenizer it has only token ids, no text."""
        self.prompt = prompt
        self.tokens: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self._stream: TextStream | None = None
        if tokenizer is not None:
            self._stream = TextStream(tokenizer.decode, stop_strings, tokenizer.text_context(prompt.tokens))

    def __str__(self) -> str:
        return self.in_form_of_prompt

    def __repr__(self) -> str:
        return f"Transcript({shorten(repr(self.prompt.given), 40)} -> {self.in_form_of_prompt!r}, {self.finish})"

    @property
    def in_form_of_prompt(self) -> str:
        """The continuation in the form of the prompt: text or token ids."""
        return self.text if isinstance(self.prompt.given, str) else " ".join(map(str, self.tokens))

    def push(self, token: int) -> bool:
        """Appends a token and returns whether a stop string has appeared."""
        self.tokens.append(token)
        if self._stream is None:
            return False
        self.text += self._stream.push(token)
        return self._stream.is_stopped

    def end(self, finish: Finish) -> None:
        """Ends the continuation; no token follows."""
        self.finish = finish
        if self._stream is not None:
            self.text += self._stream.close()

    def json_line(self) -> str:
        """Returns a JSON line with prompt, text (null without a tokenizer), tokens and finish reason."""
        text = self.text if self._stream is not None else None
        record = {"prompt": self.prompt.given, "text": text, "tokens": self.tokens, "finish": self.finish}
        return json.dumps(record, ensure_ascii=False)


Form = Literal["live", "blocks", "json"]


@dataclass(slots=True)
class ContinuationWriter:
    """Writes a single continuation as it grows, or complete ones in the order of their prompts."""

    transcripts: Sequence[Transcript]
    file: TextIO
    form: Form
    position: int = 0

    def update(self) -> None:
        """Writes what is new: text, or the complete continuations in order."""
        if self.form == "live":
            (transcript,) = self.transcripts
            text = transcript.in_form_of_prompt
            print(text[self.position :], end="\n" if transcript.finish else "", file=self.file, flush=True)
            self.position = len(text)
            return
        while self.position < len(self.transcripts) and self.transcripts[self.position].finish is not None:
            transcript = self.transcripts[self.position]
            self.position += 1
            heading = f"== {self.position} of {len(self.transcripts)}: {transcript.prompt.given!r}\n"
            block = f"{heading}{transcript.in_form_of_prompt}"
            print(transcript.json_line() if self.form == "json" else block, file=self.file, flush=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCommandConfig:
    """Configuration of text generation. `conf/generate.yaml` explains the keys."""

    ckpt: str
    weights: WeightsKind
    prompt: str | None
    prompt_ids: tuple[int, ...] | None
    prompts: str | None
    chat: str | None
    thinking: bool | None
    out: str
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: Stop
    seed: int
    speculative: Speculative
    batch_size: int
    parallelism: ParallelismConfig
    schedule: ScheduleConfig
    dispatch: Annotated[DispatchConfig, DISPATCHERS]
    cohorts: PositiveInt | None
    dtype: Literal["auto", "float32", "bf16"]
    device: Device
    plugins: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateJob:
    """What is generated: a checked configuration, weights that are not read yet, and prompts as token ids."""

    config: GenerateCommandConfig
    source: WeightsSource
    prompts: list[Prompt]
    request: Request

    @property
    def numbered(self) -> list[NumberedPrompt]:
        """The prompts as an engine reads them."""
        return [
            NumberedPrompt(number=number, tokens=tuple(prompt.tokens)) for number, prompt in enumerate(self.prompts)
        ]

    def transcripts(self) -> list[Transcript]:
        """Returns an empty transcript of each prompt."""
        return [Transcript(prompt, self.source.tokenizer, self.config.stop.strings) for prompt in self.prompts]


def main(overrides: Sequence[str]) -> int:
    """Continues prompts. All user errors are reported before weights are read.

    The text of a single prompt streams to standard output. The continuations of a prompt file are printed one after the
    other, each after a line with its prompt, or written to `out`. Statistics go to standard error.
    """
    config = _read_config(overrides)
    with system_errors():
        job = _read_job(config)
        tokens = [prompt.tokens for prompt in job.prompts]
        check(job.source.model, tokens, config.max_new_tokens, config.speculative, config.batch_size)
        # Without drafts, ranks do not read the MTP modules.
        source = job.source.without_mtp() if config.speculative is False else job.source
        network = spread_over_ranks(
            source, config.dtype, config.device, config.parallelism, config.schedule, config.dispatch
        )
        if network is not None and is_other_rank(os.environ):
            _generate_on_ranks(job, network)
            return 0
        with open_output(config.out) as file:
            if network is None:
                statistics = _stream(job, file)
            else:
                print(f"{network.parallelism.world_size} ranks read the weights of {source.folder}", file=sys.stderr)
                statistics = _write_rollouts(job, _generate_on_ranks(job, network), file)
    speed = statistics.tokens / max(statistics.seconds, 1e-9)
    line = f"{statistics.tokens} tokens in {statistics.seconds:.2f} s, {speed:,.1f} tokens/s; {statistics.summary()}"
    print(line, file=sys.stderr, flush=True)
    return 0


def _read_config(overrides: Sequence[str]) -> GenerateCommandConfig:
    """Composes and checks the configuration. Everything after `prompt=` is used verbatim."""
    # A prompt is text, not Hydra's grammar, in which brackets, colons and commas mean something.
    prompts = [text for text in overrides if text.startswith("prompt=")]
    values: dict[str, Any] = compose("generate", [text for text in overrides if text not in prompts])
    if prompts:
        values["prompt"] = prompts[-1].removeprefix("prompt=")
    return read_values(values)


def read_values(values: dict[str, Any]) -> GenerateCommandConfig:
    """Decodes and checks composed values."""
    config = decode(GenerateCommandConfig, {**values, "stop": read_stop(values["stop"])})
    chosen = [key for key in ("prompt", "prompt_ids", "prompts") if getattr(config, key) is not None]
    if not chosen:
        raise ConfigError("prompt: a value is needed; write prompt=TEXT, prompts=FILE or prompt_ids=[0,5,9]")
    if len(chosen) > 1:
        raise ConfigError(f"{chosen[1]}: must be left out if {chosen[0]} is set; choose one of them")
    if config.chat is not None and config.prompt_ids is not None:
        raise ConfigError(f"chat: must be null with prompt_ids, is {config.chat!r}; nearest valid: chat=null")
    if config.out and config.prompts and os.path.realpath(config.out) == os.path.realpath(config.prompts):
        raise ConfigError(f"out: must not be the file of prompts, which it would replace, is {config.out!r}")
    return config


def _read_job(config: GenerateCommandConfig) -> GenerateJob:
    """Locates the weights, and reads all prompts and converts them to token ids.

    An unreadable tokenizer does not matter if prompts and output are token ids.
    """
    needs_tokenizer = config.prompt_ids is None or bool(config.stop.strings)
    # Without drafts, the MTP modules of a Hugging Face folder are not checked.
    drop_mtp = config.speculative is False
    source = find_weights(config.ckpt, config.weights, drop_mtp=drop_mtp, needs_tokenizer=needs_tokenizer)
    tokenizer = source.tokenizer
    if tokenizer is None and config.stop.strings:
        raise ConfigError(f"stop: text needs a tokenizer, {source.folder} holds none; write token ids")
    if config.prompt_ids is not None:
        return encode_job(config, source, [list(config.prompt_ids)])
    if tokenizer is None:
        key = "prompt" if config.prompts is None else "prompts"
        raise ConfigError(f"{key}: text needs a tokenizer, {source.folder} holds none; write prompt_ids=[0,5,9]")
    return encode_job(config, source, read_prompts(config.prompt, config.prompts))


def encode_job(config: GenerateCommandConfig, source: WeightsSource, given: Sequence[str | list[int]]) -> GenerateJob:
    """Converts prompts, text or token ids, to token ids."""
    prompts = [Prompt(ids, list(ids)) for ids in given if not isinstance(ids, str)]
    if len(prompts) < len(given):
        tokenizer = source.needed_tokenizer("prompts of text")
        encode_text = text_encoder(config.chat, source.folder, tokenizer, thinking=config.thinking)
        prompts = [Prompt(text, encode_text(text) if isinstance(text, str) else list(text)) for text in given]
    request = Request(
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)}),
        stop=frozenset((*config.stop.ids, *source.end_ids)),
    )
    return GenerateJob(config=config, source=source, prompts=prompts, request=request)


def _open_writer(job: GenerateJob, transcripts: Sequence[Transcript], file: TextIO) -> ContinuationWriter:
    form: Form = "live" if job.config.prompts is None else "blocks"
    return ContinuationWriter(transcripts, file, "json" if job.config.out else form)


def _stream(job: GenerateJob, file: TextIO) -> Statistics:
    transcripts = job.transcripts()
    writer = _open_writer(job, transcripts, file)
    model = load_model(job.source, job.config.dtype, job.config.device)
    # Standard output shows text as it is generated; a file shows nothing.
    progress = progress_on() if job.config.out else NO_PROGRESS
    return continue_prompts(job, model, transcripts, writer.update, progress)


def continue_prompts(
    job: GenerateJob,
    model: "Transformer",
    transcripts: Sequence[Transcript],
    update: Callable[[], None] = lambda: None,
    progress: Progress = NO_PROGRESS,
) -> Statistics:
    """Continues all prompts in this process, and calls `update` after each change of the transcripts."""
    from infer.engines.local import LocalEngine

    config = job.config
    engine = LocalEngine(
        model,
        speculative=config.speculative,
        batch_size=config.batch_size,
        stop_condition=lambda index, token: transcripts[index].push(token),
    )
    most = len(job.prompts) * config.max_new_tokens
    steps = engine.run(engine.start(job.numbered, job.request))
    for sequence, _ in progress.over("generating", steps, most, lambda step: len(step[1]), "tokens"):
        if sequence.finish is not None:
            transcripts[sequence.index].end(sequence.finish)
        update()
    return engine.statistics


def _write_rollouts(job: GenerateJob, rollouts: Rollouts, file: TextIO) -> Statistics:
    transcripts = job.transcripts()
    writer = _open_writer(job, transcripts, file)
    for transcript, rollout in zip(transcripts, rollouts.rollouts, strict=True):
        for token in rollout.without_end(job.request.stop):
            transcript.push(token)
        transcript.end(rollout.finish)
        writer.update()
    return rollouts.statistics


def _generate_on_ranks(job: GenerateJob, network: InferenceConfig) -> Rollouts:
    rollouts = run_on_ranks(partial(_generate_as_rank, job, network), network, ["infer.engines.pipelined"])
    assert isinstance(rollouts, Rollouts)
    return rollouts


def _generate_as_rank(job: GenerateJob, network: InferenceConfig, send: Send) -> Rollouts:
    """Generates as one rank, which sends nothing, and returns all rollouts on every rank."""
    from infer.cohorts import CohortSizes
    from infer.engines.pipelined import PipelinedEngine

    config = job.config
    transcripts = job.transcripts() if config.stop.strings else []
    with open_ranks(network) as pipeline:
        engine = PipelinedEngine(
            pipeline,
            speculative=config.speculative,
            sizes=CohortSizes(cohorts=config.cohorts, max_rows=config.batch_size),
            stop_condition=lambda index, token: bool(transcripts) and transcripts[index].push(token),
        )
        return engine.generate(job.numbered, job.request)


def _to_plain(config: GenerateCommandConfig) -> dict[str, Any]:
    return {**encode(config), "stop": [*config.stop.ids, *config.stop.strings]}


preview = preview_of("generate", _read_config, _read_job, _to_plain)

if __name__ == "__main__":
    sys.exit(command("generate", main, preview, quiet=is_other_rank(os.environ)))
