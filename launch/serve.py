"""Serves trained weights over HTTP as OpenAI's API: `python -m launch.serve`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from data.chat.templates import template_of
from infer.config import Speculative, check
from kernels.ranges import Between, NonNegativeInt, PositiveInt
from launch.command import command, plain_text
from launch.config.compose import compose, system_errors
from launch.job import Device, Dtype, WeightsSource, find_template, find_weights, load_model
from train.checkpoint.index import WeightsKind
from train.config.decode import decode, encode
from train.errors import ConfigError

if TYPE_CHECKING:
    from infer.serve.calls import ServedModel
    from infer.serve.engine import ServingEngine

API_KEY = "SERVE_API_KEY"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeCommandConfig:
    """Configuration of the command. `conf/serve.yaml` explains the keys."""

    ckpt: str
    weights: WeightsKind
    name: str | None
    host: str
    port: Annotated[int, Between(0, 65535)]
    chat: str
    thinking: bool | None
    max_sequences: PositiveInt
    max_queue: NonNegativeInt
    cached_tokens: PositiveInt
    chunk_tokens: PositiveInt
    prefix_cache: bool
    speculative: Speculative
    drain_seconds: Annotated[float, Between(0, 29)]
    dtype: Dtype
    device: Device
    plugins: tuple[str, ...]


def main(overrides: Sequence[str]) -> int:
    """Serves until SIGTERM or SIGINT, which drain the server. All user errors are reported before weights are read."""
    config = _decode(overrides)
    with system_errors():
        source = _find_source(config)
        served = describe_model(config, source)
        with _bind(config) as bound:
            from infer.serve.app import Service
            from infer.serve.engine import EngineThread
            from infer.serve.http import run_server

            engine = EngineThread(open_engine(config, source), most_open=config.max_sequences + config.max_queue)
            service = Service(served, engine, api_key=os.environ.get(API_KEY), write_line=_write_line)
            return run_server(service, bound, config.drain_seconds)


def preview(overrides: Sequence[str]) -> str:
    """Returns the command's configuration, checked, as YAML."""
    config = _decode(overrides)
    with system_errors():
        describe_model(config, _find_source(config))
    return plain_text("serve", encode(config))


def _decode(overrides: Sequence[str]) -> ServeCommandConfig:
    return decode(ServeCommandConfig, compose("serve", overrides))


def _find_source(config: ServeCommandConfig) -> WeightsSource:
    source = find_weights(config.ckpt, config.weights, drop_mtp=config.speculative is False, needs_tokenizer=True)
    check(source.model, [], 0, config.speculative, config.max_sequences)
    return source


def describe_model(config: ServeCommandConfig, source: WeightsSource) -> "ServedModel":
    """Returns what requests need to know of the model."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"serve: needs the extra serve ({error}); install it: pip install '.[serve]'") from error
    from infer.serve.calls import ServedModel
    from infer.serve.constraint import Grammars

    tokenizer = source.needed_tokenizer("requests of text")
    template = None
    if config.chat != "auto" or template_of(source.folder) is not None:
        template = find_template(config.chat, source.folder, tokenizer, thinking=config.thinking)
    elif config.thinking is not None:
        raise ConfigError(
            f"thinking: must be null without a chat template, is {config.thinking}; nearest valid: chat=v3"
        )
    end_ids = tuple(dict.fromkeys(source.end_ids))
    return ServedModel(
        name=config.name or Path(config.ckpt).resolve().name,
        tokenizer=tokenizer,
        template=template,
        thinking=config.thinking,
        end_ids=end_ids,
        vocab_size=source.model.vocab_size,
        max_tokens=min(source.model.max_position_tokens, config.cached_tokens),
        most_choices=config.max_sequences + config.max_queue,
        grammars=Grammars(tokenizer, end_ids, source.model.vocab_size),
    )


def open_engine(config: ServeCommandConfig, source: WeightsSource) -> "ServingEngine":
    """Loads the weights, and returns the engine that the server drives."""
    model = load_model(source, config.dtype, config.device)
    from infer.continuous import ContinuousEngine

    return ContinuousEngine(
        model,
        max_sequences=config.max_sequences,
        cached_tokens=config.cached_tokens,
        chunk_tokens=config.chunk_tokens,
        speculative=config.speculative,
        prefix_cache=config.prefix_cache,
    )


def _bind(config: ServeCommandConfig) -> socket.socket:
    """Returns a socket at the address, which accepts connections once the weights are read."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host, config.port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"port: {config.host}:{config.port} must be a free address, cannot be used: {error.strerror or error}; "
            f"nearest valid: port=0, which chooses a free one"
        ) from error
    return bound


def _write_line(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(command("serve", main, preview))
