"""Continues prompts with a trained model: `python -m launch.generate`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from data.corpus import DataError
from data.tokenizer import Tokenizer
from infer.config import Sampling, Speculative, Statistics, check
from launch.command import command
from launch.config.compose import compose
from launch.config.errors import system_errors
from launch.generation.continuations import LiveWriter, OrderedWriter, Transcript, as_block, as_json_line, new_file
from launch.generation.prompts import Prompt, Stop, find_tokenizer, read_prompts, read_stop, text_encoder
from launch.help.preview import plain_text
from model.config import ModelConfig
from model.hf.config import CONFIG_NAME
from model.hf.json_file import read_json
from train.checkpoint.sources import is_hf_folder, source_config, source_folder
from train.config.decode import decode, encode
from train.config.errors import ConfigError

if TYPE_CHECKING:
    from model.transformer import Transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCommandConfig:
    """Configuration of text generation: weights, prompts, sampling and output; see `conf/generate.yaml`."""

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
    dtype: Literal["float32", "bf16"]
    device: Literal["cpu", "cuda"]
    plugins: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Weights that are not read yet: folder, architecture, tokenizer and end-of-text token ids."""

    folder: Path
    is_hf: bool
    model: ModelConfig
    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]


def main(overrides: Sequence[str]) -> int:
    """Continues prompts. All user errors are reported before weights are read.

    The text of a single prompt streams to standard output. The continuations of a prompt file are printed one after
    the other, each after a line with its prompt, or written to `out`. Statistics go to standard error.

    Args:
        overrides: overrides for `conf/generate.yaml`; everything after `prompt=` is used verbatim.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: an unknown or missing key, an invalid value, or a file that cannot be read or written.
        CheckpointError, HfError, DataError: the weights or the tokenizer cannot be read.
        GenerateError: a value is out of range, a prompt is too long, or drafts are requested without an MTP module.
    """
    config = _read(overrides)
    with system_errors():
        source = _find(config)
        prompts = _read_prompts(config, source)
        check(
            source.model,
            [prompt.tokens for prompt in prompts],
            config.max_new_tokens,
            config.speculative,
            config.batch_size,
        )
        with new_file("out", config.out) if config.out else nullcontext(_standard_output()) as file:
            statistics = _run(config, source, prompts, file)
    speed = statistics.tokens / max(statistics.seconds, 1e-9)
    line = f"{statistics.tokens} tokens in {statistics.seconds:.2f} s, {speed:,.1f} tokens/s; {statistics.summary()}"
    print(line, file=sys.stderr, flush=True)
    return 0


def preview(overrides: Sequence[str]) -> str:
    """Returns the command's configuration, checked, as YAML.

    Args:
        overrides: overrides for `conf/generate.yaml`.

    Raises:
        ConfigError, CheckpointError, HfError, DataError: as `main`.
    """
    config = _read(overrides)
    with system_errors():
        _read_prompts(config, _find(config))
    stop = [*config.stop.ids, *config.stop.strings]
    return plain_text("generate", {**encode(config), "stop": stop})


def _read(overrides: Sequence[str]) -> GenerateCommandConfig:
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


def _find(config: GenerateCommandConfig) -> Source:
    """Locates the weights without reading them."""
    ckpt = config.ckpt
    folder, model, is_hf, end_ids = source_folder(ckpt, "ckpt"), _model_of(config), is_hf_folder(ckpt), []
    if is_hf and config.weights == "ema":
        raise ConfigError(f"weights: must be trained, as ckpt={ckpt} is a Hugging Face folder, is ema")
    if is_hf:
        ends = read_json(folder / CONFIG_NAME).get("eos_token_id")
        end_ids = [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]
    try:
        tokenizer = find_tokenizer(folder)
    except DataError:
        # An unreadable tokenizer does not matter if prompts and output are token ids.
        if config.prompt_ids is None or config.stop.strings:
            raise
        tokenizer = None
    if tokenizer is not None:
        end_ids.append(tokenizer.end_of_sentence_id)
    return Source(folder, is_hf, model, tokenizer, tuple(end_ids))


def _model_of(config: GenerateCommandConfig) -> ModelConfig:
    """Returns the architecture. Without drafts, the MTP modules of a Hugging Face folder are not checked."""
    drop_mtp = config.speculative is False and is_hf_folder(config.ckpt)
    return source_config(config.ckpt, "ckpt", drop_mtp=drop_mtp)


def _read_prompts(config: GenerateCommandConfig, source: Source) -> list[Prompt]:
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


def _run(config: GenerateCommandConfig, source: Source, prompts: Sequence[Prompt], file: TextIO) -> Statistics:
    sampling = Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})
    transcripts = [Transcript(prompt, source.tokenizer, config.stop.strings) for prompt in prompts]
    if config.out:
        writer: LiveWriter | OrderedWriter = OrderedWriter(transcripts, file, as_json_line)
    elif config.prompts is None:
        writer = LiveWriter(transcripts[0], file)
    else:
        writer = OrderedWriter(transcripts, file, as_block)
    model = _load(config, source)
    from infer.generate import Stream

    stream = Stream(
        model,
        [prompt.tokens for prompt in prompts],
        max_new_tokens=config.max_new_tokens,
        sampling=sampling,
        stop=(*config.stop.ids, *source.end_ids),
        speculative=config.speculative,
        batch_size=config.batch_size,
        stop_condition=lambda index, token: transcripts[index].push(token),
    )
    for piece in stream:
        if piece.finish is not None:
            transcripts[piece.index].end(piece.finish)
        writer.update()
    return stream.statistics


def _load(config: GenerateCommandConfig, source: Source) -> "Transformer":
    # Printed first: importing torch takes a second or more.
    print(f"reading the weights of {source.folder}", file=sys.stderr, flush=True)
    # OpenMP threads spin by default, which costs several times the work itself if other processes use the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda needs a GPU that torch can use, there is none; nearest valid: cpu")
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
    if source.is_hf:
        from model.hf.convert import load_hf

        model = load_hf(source.folder, dtype, drop_mtp=config.speculative is False)
    else:
        from train.checkpoint.load import load_whole

        model = load_whole(source.model, source.folder, dtype, "ckpt", config.weights)
    return model.to(torch.device(config.device))


def _standard_output() -> TextIO:
    """Returns standard output, set to replace characters that the terminal cannot encode."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return sys.stdout


if __name__ == "__main__":
    sys.exit(command("generate", main, preview))
