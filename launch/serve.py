"""Serves trained weights over HTTP as OpenAI's API: `python -m launch.serve`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import errno
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

from base.decode import decode
from base.figures import bytes_text
from base.ranges import Between, NonNegativeInt, PositiveFloat, PositiveInt
from base.refusal import ConfigError, broken
from comm.config import CappedDispatchConfig, DispatchConfig, ParallelismConfig
from comm.dispatch.registry import DISPATCHERS
from comm.exits import EXIT_LOST
from data.chat.templates import template_of
from dualpipe.registry import FALLBACK, ScheduleConfig
from infer.config import Speculative, check
from infer.placement import Placement, PlacementError, PlacementShape
from launch.cli.entry import command, preview_of
from launch.config.compose import compose, system_errors
from launch.config.folder import read_folder
from launch.config.rules import check_exchange
from launch.ranks.machine import is_other_rank, is_torchrun
from launch.weights.job import (
    Device,
    Dtype,
    Send,
    WeightsSource,
    find_template,
    find_weights,
    load_model,
    open_ranks,
    run_on_ranks,
    spread_over_ranks,
)
from model.config import BLOCK_TOKENS
from model.hf.files import read_json
from train.checkpoint.index import WeightsKind
from train.checkpoint.locate import CHECKPOINTS_NAME
from train.config import InferenceConfig
from train.errors import DeadRankError

if TYPE_CHECKING:
    from infer.continuous import ContinuousEngine
    from infer.decoder import Decoder
    from infer.serve.calls import ServedModel
    from infer.serve.engine import ServingEngine
    from model.transformer import Transformer

API_KEY = "SERVE_API_KEY"
_GRACE_SECONDS = 10.0  # after a rank is lost, for the answers that say so

Overlap = Literal[True, False, "auto"]

Serve = Callable[["ServingEngine"], int]
"""Serves with an engine, and returns the exit code."""


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
    cors_origins: tuple[str, ...]
    drain_seconds: Annotated[float, Between(0, 29)]
    stall_seconds: PositiveFloat
    ranks: PositiveInt
    dispatch: Annotated[DispatchConfig, DISPATCHERS]
    prefill_ranks: NonNegativeInt
    overlap: Overlap
    placement: str | None
    rebalance_seconds: PositiveFloat | None
    dtype: Dtype
    device: Device
    plugins: tuple[str, ...]


def main(overrides: Sequence[str]) -> int:
    """Serves until a signal drains the server. User errors are reported before weights are read."""
    config = _decode(overrides)
    if os.environ.get(API_KEY) == "":
        raise ConfigError(f"{API_KEY}: must have at least one character, is empty; nearest valid: unset {API_KEY}")
    with system_errors():
        source, network, placement = _check(config)
        if network is not None and is_other_rank(os.environ):
            return _serve_on_ranks(config, network, placement, None)
        with _bind(config) as bound:
            serve = partial(_serve, config, source, bound)
            if network is not None:
                return _serve_on_ranks(config, network, placement, serve)
            return serve(build_engine(config, load_model(source, config.dtype, config.device)))


def _decode(overrides: Sequence[str]) -> ServeCommandConfig:
    return decode(ServeCommandConfig, compose("serve", overrides))


def _check(config: ServeCommandConfig) -> tuple[WeightsSource, InferenceConfig | None, Placement]:
    """Returns the weights, how ranks hold them together (None: one rank), and where their experts are."""
    source = find_weights(config.ckpt, config.weights, drop_mtp=config.speculative is False, needs_tokenizer=True)
    check(source.model, [], 0, config.speculative, config.max_sequences)
    describe_model(config, source)
    ranks = config.ranks
    if wrong := [origin for origin in config.cors_origins if not re.fullmatch(r"\*|https?://[^/\s]+", origin)]:
        raise broken("cors_origins", "must have origins such as http://localhost:3000, or *", wrong[0], "[]")
    if config.prefill_ranks >= ranks and config.prefill_ranks:
        raise broken("prefill_ranks", f"must be less than ranks={ranks}", config.prefill_ranks, ranks - 1)
    if ranks == 1 and (config.placement is not None or config.rebalance_seconds is not None):
        raise broken("ranks", "must be at least 2 if experts are placed", ranks, "the ranks of the placement")
    if ranks == 1 and config.overlap is True:
        raise broken("overlap", "needs ranks that share the experts", "true", "auto")
    mesh = ParallelismConfig(pipeline=1, data=ranks, expert=ranks)
    schedule = ScheduleConfig(kind=FALLBACK, chunks=None, pairing="sequential")
    shared = source.without_mtp() if config.speculative is False else source
    network = spread_over_ranks(
        shared, config.dtype, config.device, mesh, schedule, config.dispatch, places_experts=True
    )
    placement = _placement(config, source)
    if network is not None:
        check_nodes(config, network, placement.shape)
    return source, network, placement


def _placement(config: ServeCommandConfig, source: WeightsSource) -> Placement:
    """Returns where the experts are: as the file says, or in order."""
    ranks = config.ranks
    num_experts = source.model.num_routed_experts
    if config.placement is None:
        return Placement.in_order(num_experts, ranks)
    placement = Placement.read(read_json(Path(config.placement).expanduser()), "placement")
    sizes = (placement.shape.num_ranks, placement.shape.num_experts)
    with_shared = num_experts + source.model.num_shared_experts
    if sizes[0] != ranks or sizes[1] not in (num_experts, with_shared):
        rule = f"must be for ranks={ranks} and {num_experts} experts, or {with_shared} with the shared ones"
        near = f"python -m launch.place ranks={ranks} format=json"
        raise PlacementError.broken("placement", rule, f"for {sizes[0]} and {sizes[1]}", near)
    # MTP modules follow the layers. The size of those that are left out is not known.
    num_layers = sys.maxsize if source.drop_mtp else source.model.num_layers + source.model.mtp_depth
    layers = range(source.model.num_dense_layers, num_layers)
    if others := [layer for layer in placement.layers if layer not in layers]:
        rule = f"must place layers from {layers.start} to {layers.stop - 1}"
        raise PlacementError.broken("placement", rule, f"of layer {others[0]}", "a new placement")
    return placement


def check_nodes(config: ServeCommandConfig, network: InferenceConfig, shape: PlacementShape) -> None:
    """Rejects copies for a micro-batch, and a limit of nodes that a token may exceed with the placement."""
    dispatch = config.dispatch
    if dispatch != dispatch.without_copies():
        rule = "a server balances experts by their placement (rebalance_seconds), not for every micro-batch"
        raise broken("dispatch.balance", rule, getattr(dispatch, "balance", None), "none")
    site = network.dispatch_site
    nodes = -(-config.ranks // network.cluster.ranks_per_node)
    if config.placement is None and config.rebalance_seconds is None and not shape.num_redundant:
        check_exchange(dispatch, site)  # experts stay in order
        return
    if isinstance(dispatch, CappedDispatchConfig):
        # A token's groups are on as many nodes if each node has whole groups, else its experts are anywhere.
        sizes = (shape.num_nodes, shape.num_groups)
        has_groups = shape.policy == "hierarchical" and sizes == (nodes, site.num_groups)
        most = min(nodes, site.num_limited_groups) if has_groups else nodes
        if dispatch.node_cap == "verify" and most > dispatch.max_nodes:
            rule = f"a token may be sent to {most} nodes with this placement"
            near = f"{most}, dispatch.node_cap=clip, or a placement with policy=hierarchical for {nodes} nodes"
            raise broken("dispatch.max_nodes", rule, dispatch.max_nodes, near)
        dispatch = replace(dispatch, max_nodes=nodes)
    check_exchange(dispatch, replace(site, num_experts=shape.num_slots, num_groups=1, num_limited_groups=1))


def describe_model(config: ServeCommandConfig, source: WeightsSource) -> "ServedModel":
    """Returns what requests need to know of the model."""
    try:
        import prometheus_client  # noqa: F401
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
        name=config.name or _run_name(source.folder) or Path(config.ckpt).resolve().name,
        tokenizer=tokenizer,
        template=template,
        thinking=config.thinking,
        end_ids=end_ids,
        vocab_size=source.model.vocab_size,
        max_tokens=min(source.model.max_position_tokens, config.cached_tokens),
        most_choices=config.max_sequences + config.max_queue,
        grammars=Grammars(tokenizer, end_ids, source.model.vocab_size),
    )


def _run_name(checkpoint: Path) -> str | None:
    """Returns the name of the run that a checkpoint belongs to, or None if it is in no run's folder."""
    if checkpoint.parent.name != CHECKPOINTS_NAME:
        return None
    with suppress(ConfigError):  # weights are served without the plugins and files of their run
        return read_folder(checkpoint.resolve().parent.parent).name
    return None


def _serve(config: ServeCommandConfig, source: WeightsSource, bound: socket.socket, engine: "ServingEngine") -> int:
    """Serves at a bound socket until a signal, and returns the exit code."""
    from infer.serve.app import Service
    from infer.serve.engine import EngineThread
    from infer.serve.http import run_server

    most_open = config.max_sequences + config.max_queue
    thread = EngineThread(engine, most_open=most_open, stall_seconds=config.stall_seconds)
    served = describe_model(config, source)
    for line in _start_lines(config, source, served, thread.counts, bound.getsockname()[0]):
        _write_line(line)
    if served.grammars.is_available:
        served.grammars.start()  # reads the tokenizer meanwhile
    key = os.environ.get(API_KEY)
    service = Service(served, thread, api_key=key, write_line=_write_line, cors_origins=config.cors_origins)
    return run_server(service, bound, config.drain_seconds)


def _start_lines(
    config: ServeCommandConfig, source: WeightsSource, served: "ServedModel", counts: Mapping[str, int], address: str
) -> Iterator[str]:
    """Yields what the server has, and a warning if other machines may use it without a key."""
    cache = f"{counts['total_blocks'] * BLOCK_TOKENS:,} tokens in {bytes_text(counts['cache_bytes'])}"
    yield f"weights in {source.resolve(config.dtype)}, cache of {cache}"
    if served.template is None:
        yield "no chat template: /v1/chat/completions is refused; chat=v3 gives it one"
    else:
        yield f"chat template {template_of(source.folder) if config.chat == 'auto' else config.chat}"
    if not served.grammars.is_available:
        yield "no structured output: it needs the extra structured: pip install '.[structured]'"
    if API_KEY not in os.environ and not ip_address(address).is_loopback:
        yield f"warning: other machines may use this server at {address} without a key; {API_KEY} sets one"


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


def _serve_on_ranks(
    config: ServeCommandConfig, network: InferenceConfig, placement: Placement, serve: Serve | None
) -> int:
    """Serves on rank 0 with an engine over all ranks, and returns the exit code. Other ranks pass None."""
    function = partial(_serve_as_rank, config, network, placement, serve)
    preloaded = ("infer.engines.expert_ranks", "infer.serve.http")
    try:
        code: int = run_on_ranks(function, network, preloaded, _pass_signals_to, grace_seconds=_GRACE_SECONDS)
    except DeadRankError as error:
        print(f"ranks: {error}", file=sys.stderr, flush=True)
        return EXIT_LOST
    return code


def _pass_signals_to(process: int) -> None:
    """Lets a process handle the signals that end a server."""

    def handle(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(process, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _serve_as_rank(
    config: ServeCommandConfig, network: InferenceConfig, placement: Placement, serve: Serve | None, send: Send
) -> int:
    """Serves as one rank until rank 0 ends; returns the exit code."""
    from infer.engines.expert_ranks import (
        LEAST_OVERLAPPED,
        LostRankError,
        RankDecoder,
        RanksEngine,
        SequenceTransfers,
        ServingRank,
    )

    rank = int(os.environ["RANK"])
    if rank:
        # Rank 0 decides when the others end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    seconds = network.cluster.timeout_seconds
    with open_ranks(network) as pipeline:
        pipeline.place_experts(placement)
        least_overlapped = {"auto": LEAST_OVERLAPPED, True: 2, False: None}[config.overlap]
        engine = build_engine(config, pipeline.model, partial(RankDecoder, seconds, least_overlapped))
        transfers = SequenceTransfers(engine, rank, config.ranks, config.prefill_ranks, seconds)
        serving = ServingRank(engine, placement, pipeline.place_experts, transfers)
        if rank == 0:
            assert serve is not None
            # Ctrl-C in a terminal goes to the whole group; only the parent passes it on. Ranks of torchrun lead one.
            if not is_torchrun(os.environ):
                os.setpgid(0, 0)
                send(os.getpid())
            code = serve(RanksEngine(serving, config.prefill_ranks, config.rebalance_seconds))
        else:
            try:
                serving.follow()
                code = 0
            except LostRankError as error:
                code = error.exit_code
        if code:
            sys.exit(code)  # without the end of the job, in which all ranks take part
    return code


def _bind(config: ServeCommandConfig) -> socket.socket:
    """Returns a socket at the address, which accepts connections once the weights are read."""
    from infer.serve.http import open_socket

    try:
        return open_socket(config.host, config.port)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            value = f"{config.host!r} ({error.strerror})"
            raise broken("host", "must be an address of this machine", value, "127.0.0.1") from error
        raise ConfigError(
            f"port: {config.host}:{config.port} must be a free address, cannot be used: {error.strerror or error}; "
            f"nearest valid: port=0, which chooses a free one"
        ) from error


def _write_line(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


preview = preview_of("serve", _decode, _check)

if __name__ == "__main__":
    sys.exit(command("serve", main, preview))
