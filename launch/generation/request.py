"""Reads the request of `launch.generate`: configuration, weights and prompts. Imports no torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TextIO

from comm.config import ParallelismConfig
from dualpipe.config import ScheduleConfig
from infer.config import Sampling, Speculative
from kernels.ranges import PositiveInt
from launch.config.compose import compose
from launch.generation.continuations import LiveWriter, OrderedWriter, Transcript, as_block, as_json_line
from launch.generation.prompts import Prompt, Stop, read_prompts, read_stop, text_encoder
from launch.generation.source import GenerationSource, find_weights
from train.config.decode import decode
from train.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCommandConfig:
    """Configuration of text generation: weights, prompts, sampling and ranks (`conf/generate.yaml`)."""

    ckpt: str
    weights: Literal["trained", "ema"]
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
    cohorts: PositiveInt | None
    dtype: Literal["auto", "float32", "bf16"]
    device: Literal["cpu", "cuda"]
    plugins: tuple[str, ...]

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})

    def stop_ids(self, end_ids: Sequence[int]) -> frozenset[int]:
        """Returns the token ids that end a continuation, given those of the tokenizer and the weights."""
        return frozenset((*self.stop.ids, *end_ids))


def read_config(overrides: Sequence[str]) -> GenerateCommandConfig:
    """Composes and checks the configuration."""
    # A prompt is text, not Hydra's grammar, in which brackets, colons and commas mean something.
    prompts = [text for text in overrides if text.startswith("prompt=")]
    values: dict[str, Any] = compose("generate", [text for text in overrides if text not in prompts])
    if prompts:
        values["prompt"] = prompts[-1].removeprefix("prompt=")
    config = decode(GenerateCommandConfig, {**values, "stop": read_stop(values["stop"])})
    given = [key for key in ("prompt", "prompt_ids", "prompts") if getattr(config, key) is not None]
    if not given:
        raise ConfigError("prompt: a value is needed; write prompt=TEXT, prompts=FILE or prompt_ids=[0,5,9]")
    if len(given) > 1:
        raise ConfigError(f"{given[1]}: must be left out if {given[0]} is set; choose one of them")
    if config.chat is not None and config.prompt_ids is not None:
        raise ConfigError(f"chat: must be null with prompt_ids, is {config.chat!r}; nearest valid: chat=null")
    if config.out and config.prompts and os.path.realpath(config.out) == os.path.realpath(config.prompts):
        raise ConfigError(f"out: must not be the file of prompts, which it would replace, is {config.out!r}")
    return config


def find_source(config: GenerateCommandConfig) -> GenerationSource:
    """Locates the weights. An unreadable tokenizer does not matter if prompts and output are token ids."""
    needs_tokenizer = config.prompt_ids is None or bool(config.stop.strings)
    # Without drafts, the MTP modules of a Hugging Face folder are not checked.
    drop_mtp = config.speculative is False
    return find_weights(config.ckpt, config.weights, drop_mtp=drop_mtp, needs_tokenizer=needs_tokenizer)


def tokenize_prompts(config: GenerateCommandConfig, source: GenerationSource) -> list[Prompt]:
    """Reads all prompts and converts them to token ids."""
    tokenizer = source.tokenizer
    if tokenizer is None and config.stop.strings:
        raise ConfigError(f"stop: text needs a tokenizer, {source.folder} holds none; write token ids")
    if config.prompt_ids is not None:
        return [Prompt(list(config.prompt_ids), list(config.prompt_ids))]
    if tokenizer is None:
        key = "prompt" if config.prompts is None else "prompts"
        raise ConfigError(f"{key}: text needs a tokenizer, {source.folder} holds none; write prompt_ids=[0,5,9]")
    prompts = read_prompts(config.prompt, config.prompts)
    encode_text = text_encoder(config.chat, source.folder, tokenizer, thinking=config.thinking)
    return [Prompt(text, encode_text(text)) for text in prompts]


def open_writer(
    config: GenerateCommandConfig, source: GenerationSource, prompts: Sequence[Prompt], file: TextIO
) -> tuple[list[Transcript], LiveWriter | OrderedWriter]:
    """Returns an empty transcript of each prompt, and what writes them to a file."""
    transcripts = [Transcript(prompt, source.tokenizer, config.stop.strings) for prompt in prompts]
    if config.out:
        return transcripts, OrderedWriter(transcripts, file, as_json_line)
    if config.prompts is None:
        return transcripts, LiveWriter(transcripts[0], file)
    return transcripts, OrderedWriter(transcripts, file, as_block)
