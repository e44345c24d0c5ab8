"""Serves trained weights over HTTP as OpenAI's API: `python -m launch.serve`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from data.chat.templates import template_of
from infer.config import Speculative, check
from kernels.ranges import Between, NonNegativeInt, PositiveFloat, PositiveInt
from launch.command import command, plain_text
from launch.config.compose import compose, system_errors
from launch.job import Device, Dtype, WeightsSource, find_template, find_weights, load_model
from launch.machine import is_other_rank
from launch.serve_ranks import RanksConfig, check_ranks, serve_on_ranks
from train.checkpoint.index import WeightsKind
from train.config.decode import decode, encode
from train.errors import ConfigError

if TYPE_CHECKING:
    from infer.continuous import ContinuousEngine
    from infer.decoder import Decoder
    from infer.serve.calls import ServedModel
    from infer.serve.engine import ServingEngine
    from model.transformer import Transformer

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
    ranks: PositiveInt
    prefill_ranks: NonNegativeInt
    placement: str | None
    place_again_seconds: PositiveFloat | None
    dtype: Dtype
    device: Device
    plugins: tuple[str, ...]


def main(overrides: Sequence[str]) -> int:
    """Serves until a signal drains the server. User errors are reported before weights are read."""
    config = _decode(overrides)
    with system_errors():
        source = _find_source(config)
        describe_model(config, source)
        ranks = _check_ranks(config, source)
        if ranks is not None and is_other_rank(os.environ):
            return serve_on_ranks(ranks, partial(build_engine, config), None)
        with _bind(config) as bound:
            serve = partial(_serve, config, source, bound)
            if ranks is not None:
                return serve_on_ranks(ranks, partial(build_engine, config), serve)
            return serve(build_engine(config, load_model(source, config.dtype, config.device)))


def preview(overrides: Sequence[str]) -> str:
    """Returns the command's configuration, checked, as YAML."""
    config = _decode(overrides)
    with system_errors():
        source = _find_source(config)
        describe_model(config, source)
        _check_ranks(config, source)
    return plain_text("serve", encode(config))


def _decode(overrides: Sequence[str]) -> ServeCommandConfig:
    return decode(ServeCommandConfig, compose("serve", overrides))


def _find_source(config: ServeCommandConfig) -> WeightsSource:
    source = find_weights(config.ckpt, config.weights, drop_mtp=config.speculative is False, needs_tokenizer=True)
    check(source.model, [], 0, config.speculative, config.max_sequences)
    return source


def _check_ranks(config: ServeCommandConfig, source: WeightsSource) -> RanksConfig | None:
    return check_ranks(
        source.without_mtp() if config.speculative is False else source,
        (config.dtype, config.device),
        config.ranks,
        placement=config.placement,
        prefill_ranks=config.prefill_ranks,
        place_again_seconds=config.place_again_seconds,
    )


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


def _serve(config: ServeCommandConfig, source: WeightsSource, bound: socket.socket, engine: "ServingEngine") -> int:
    """Serves at a bound socket until a signal, and returns the exit code."""
    from infer.serve.app import Service
    from infer.serve.engine import EngineThread
    from infer.serve.http import run_server

    thread = EngineThread(engine, most_open=config.max_sequences + config.max_queue)
    served = describe_model(config, source)
    service = Service(served, thread, api_key=os.environ.get(API_KEY), write_line=_write_line)
    return run_server(service, bound, config.drain_seconds)


def build_engine(
    config: ServeCommandConfig, model: "Transformer", build_decoder: "Callable[..., Decoder] | None" = None
) -> "ContinuousEngine":
    """Returns an engine that continues requests with a model."""
    from infer.continuous import ContinuousEngine
    from infer.decoder import Decoder

    return ContinuousEngine(
        model,
        max_sequences=config.max_sequences,
        cached_tokens=config.cached_tokens,
        chunk_tokens=config.chunk_tokens,
        speculative=config.speculative,
        prefix_cache=config.prefix_cache,
        build_decoder=build_decoder or Decoder,
    )


def _bind(config: ServeCommandConfig) -> socket.socket:
    """Returns a socket at the address, which accepts connections once the weights are read."""
    from infer.serve.http import open_socket

    try:
        return open_socket(config.host, config.port)
    except OSError as error:
        raise ConfigError(
            f"port: {config.host}:{config.port} must be a free address, cannot be used: {error.strerror or error}; "
            f"nearest valid: port=0, which chooses a free one"
        ) from error


def _write_line(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(command("serve", main, preview))
