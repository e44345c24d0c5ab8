"""Finds and loads weights, and runs the ranks of commands that generate or evaluate.

Imports torch only to load weights, and on ranks, so that all checks run before.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from base.refusal import ConfigError, broken, nearest
from base.registry import loaded_plugins
from base.workers import end_with_parent
from comm.config import ClusterConfig, DispatchConfig, ParallelismConfig
from comm.exits import EXIT_LOST, STOPPED_LOOKS, is_stopped
from data.chat.encode import check_tokens
from data.chat.templates import CHAT_TEMPLATES, ChatTemplate, template_of
from data.corpus import DataError
from data.tokenizer import Tokenizer, find_tokenizer_file
from dualpipe.registry import FALLBACK, SCHEDULES, ScheduleConfig, check_size
from launch.config.compose import load_plugin_files, user_errors
from launch.config.rules import check_exchange, check_expert_ranks, check_experts
from launch.ranks.local import scratch_folder
from launch.ranks.machine import apply_rank_environment, check_world_size, is_torchrun, local_rank_environment
from model.config import CutError, InferencePrecision, ModelConfig, cut_at, cut_layers, products_of
from model.hf.config import CONFIG_NAME
from model.hf.files import read_json
from model.size import count_parameters
from train.checkpoint.index import WeightsKind
from train.checkpoint.manifest import read_precision
from train.checkpoint.sources import is_hf_folder, source_config, source_folder
from train.config import InferenceConfig
from train.errors import DeadRankError
from train.terminal import escape_terminals

if TYPE_CHECKING:
    from model.transformer import Transformer
    from train.post.pipeline import ReplicaPipeline

Device = Literal["cpu", "cuda"]
Dtype = Literal["auto", "float64", "float32", "bf16"]
_PRELOADED = ("train.post.pipeline", "launch.weights.job")  # modules that ranks import once, before they are forked
_TIMEOUT_SECONDS = 1800.0
_DEFAULT_DISPATCH = "all_to_all"  # of the commands that have the group, also if one rank has all experts


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsSource:
    """Weights that are not read yet.

    Attributes:
        ckpt: as the user named them.
        folder: the checkpoint, or the Hugging Face folder.
        end_ids: ids of the tokens that end a text.
        drop_mtp: whether the MTP modules of a Hugging Face folder are left out.
        precision: of the run that trained the weights; float32 for others.
    """

    ckpt: str
    folder: Path
    is_hf: bool
    model: ModelConfig
    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]
    weights: WeightsKind
    drop_mtp: bool
    precision: InferencePrecision

    def resolve(self, dtype: Dtype) -> InferencePrecision:
        """Returns what a command's `dtype` means: auto is the precision of the run."""
        return self.precision if dtype == "auto" else dtype

    def needed_tokenizer(self, users: str) -> Tokenizer:
        """Returns the tokenizer, or rejects weights without one, which `users` (in the plural) need."""
        if self.tokenizer is None:
            raise ConfigError(f"ckpt: {users} need a tokenizer, {self.folder} holds none")
        return self.tokenizer

    def without_mtp(self) -> "WeightsSource":
        """Returns the weights without MTP modules."""
        return replace(self, model=replace(self.model, mtp_depth=0))


def find_weights(ckpt: str, weights: WeightsKind, *, drop_mtp: bool, needs_tokenizer: bool) -> WeightsSource:
    """Locates weights without reading them.

    Dropped MTP modules are not checked. An unreadable tokenizer is an error only if it is needed.
    """
    folder = source_folder(ckpt, "ckpt")
    is_hf = is_hf_folder(ckpt)
    end_ids = list[int]()
    drop_mtp = drop_mtp and is_hf
    model = source_config(ckpt, "ckpt", drop_mtp=drop_mtp)
    if is_hf and weights == "ema":
        raise ConfigError(f"weights: must be trained, as ckpt={ckpt} is a Hugging Face folder, is ema")
    if is_hf:
        ends = read_json(folder / CONFIG_NAME).get("eos_token_id")
        end_ids = [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]
    try:
        path = find_tokenizer_file(folder)
        tokenizer = None if path is None else Tokenizer.load(path)
    except DataError:
        if needs_tokenizer:
            raise
        tokenizer = None
    if tokenizer is not None:
        end_ids.append(tokenizer.special.eos)
    return WeightsSource(
        ckpt=ckpt,
        folder=folder,
        is_hf=is_hf,
        model=model,
        tokenizer=tokenizer,
        end_ids=tuple(end_ids),
        weights=weights,
        drop_mtp=drop_mtp,
        precision="float32" if is_hf else read_precision(folder, "ckpt"),
    )


def find_template(chat: str, folder: Path, tokenizer: Tokenizer, *, thinking: bool | None) -> ChatTemplate:
    """Returns the template that `chat` names, or that of the weights in a folder for `auto`."""
    names = CHAT_TEMPLATES.names()
    name = template_of(folder) if chat == "auto" else chat
    if name is None:
        raise ConfigError(
            f"chat: auto needs weights of a run on chats, {folder} has no template that is known; nearest valid: "
            f"one of {', '.join(names)}"
        )
    if name not in names:
        choices = [*names, "auto"]
        raise ConfigError(f"chat: must be one of {', '.join(choices)}, is {chat!r}; {nearest(chat, choices)}")
    template = CHAT_TEMPLATES.get(name)
    if thinking and template.thoughts is None:
        valid = " or ".join(name for name, spec in CHAT_TEMPLATES.items() if spec.thoughts is not None)
        raise ConfigError(f"thinking: must be false with chat={name}, is true; nearest valid: chat={valid}")
    check_tokens(template.required_tokens, name, tokenizer, "chat")
    return template


def load_model(source: WeightsSource, dtype: Dtype, device: Device) -> "Transformer":
    """Loads the whole model into this process, and reports it on standard error."""
    # Printed first: importing torch takes a second or more.
    print(f"reading the weights of {source.folder}", file=sys.stderr, flush=True)
    # OpenMP threads spin by default, which costs several times the work itself if other processes use the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda needs a GPU that torch can use, there is none; nearest valid: cpu")
    precision = source.resolve(dtype)
    if device == "cpu":
        _check_memory(source, {"float64": 8, "float32": 4}.get(precision, 2))
    torch_dtype = {"float64": torch.float64, "float32": torch.float32}.get(precision, torch.bfloat16)
    if source.is_hf:
        from model.pretrained import load_hf

        model = load_hf(source.folder, torch_dtype, drop_mtp=source.drop_mtp)
    else:
        from train.checkpoint.load import load_whole

        products = products_of(precision)
        model = load_whole(source.model, source.folder, torch_dtype, "ckpt", source.weights, products=products)
    return model.to(torch.device(device))


def _check_memory(source: WeightsSource, weight_bytes: int) -> None:
    account = count_parameters(source.model)
    needed = (account.total + account.mtp) * weight_bytes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(
            f"ckpt: weights must fit the {memory / 1e9:.0f} GB of this machine, {source.ckpt} has {needed / 1e9:.0f} GB"
            "; nearest valid: dtype=bf16, or ranks on several machines"
        )


def spread_over_ranks(
    source: WeightsSource,
    dtype: Dtype,
    device: Device,
    mesh: ParallelismConfig,
    schedule: ScheduleConfig,
    dispatch: DispatchConfig | None = None,
    *,
    places_experts: bool = False,
) -> InferenceConfig | None:
    """Returns how ranks hold the model together, checked, or None if one process holds the whole model.

    If experts are placed, ranks need not divide them, and the dispatcher is checked with the placement.
    """
    if mesh.expert == 1 and dispatch is not None and dispatch.kind not in (_DEFAULT_DISPATCH, "local"):
        raise broken("dispatch", "needs ranks that share the experts", dispatch.kind, f"dispatch={_DEFAULT_DISPATCH}")
    if mesh.expert == 1 and dispatch is not None and dispatch.payload != "full":
        raise broken("dispatch.payload", "needs ranks that share the experts", dispatch.payload, "full")
    if mesh.world_size == 1:
        return None
    if is_torchrun(os.environ):
        check_world_size(mesh, os.environ)
    kind, cut = _check_ranks(source.model, mesh, schedule, 1 if places_experts else mesh.expert)
    network = InferenceConfig(
        ckpt=source.ckpt,
        weights=source.weights,
        model=source.model,
        dtype=source.resolve(dtype),
        cluster=local_cluster(device, mesh.world_size),
        parallelism=mesh,
        kind=kind,
        cut=cut,
        dispatch=dispatch,
    )
    if dispatch is not None and mesh.expert > 1 and not places_experts:
        check_exchange(dispatch, network.dispatch_site)
    return network


def _check_ranks(
    model: ModelConfig, mesh: ParallelismConfig, schedule: ScheduleConfig, expert_parts: int
) -> tuple[str, tuple[range, ...]]:
    """Returns the kind of schedule that places the stages, and the layers of each stage."""
    if mesh.context > 1:
        raise ConfigError(
            f"parallelism.context: must be 1, because ranks that generate hold whole sequences, is {mesh.context}; "
            f"nearest valid: parallelism.context=1 parallelism.data={mesh.stage_ranks}"
        )
    check_expert_ranks(mesh)
    check_experts(model, expert_parts)
    kind = FALLBACK if schedule.kind == "auto" else schedule.kind
    check_size(kind, mesh.pipeline, 2 * mesh.pipeline, ranks_key="parallelism.pipeline")
    chunks = SCHEDULES.get(kind).chunk_choices(schedule.chunks)[0]
    num_stages = mesh.pipeline * chunks
    if mesh.cut.kind != "listed":
        return kind, cut_layers(model.num_layers, num_stages, model.mtp_depth, stages_per_rank=chunks)
    sizes = mesh.cut.layers
    if len(sizes) != num_stages or sum(sizes) != model.num_layers or 0 in sizes[1:-1]:
        even = cut_layers(model.num_layers, num_stages, model.mtp_depth, stages_per_rank=chunks)
        raise CutError(
            f"parallelism.cut: must list the layers of {num_stages} stages that add up to {model.num_layers}, is "
            f"{list(sizes)}; nearest valid: {[len(layers) for layers in even]}, or auto"
        )
    return kind, cut_at(sizes)


def local_cluster(device: Device, num_ranks: int) -> ClusterConfig:
    """Returns the configuration of ranks that share this machine, or of those of torchrun."""
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    return ClusterConfig(
        device=device,
        backend="nccl" if device == "cuda" else "gloo",
        ranks_per_node=ranks_per_node,
        threads_per_rank=max(1, (os.cpu_count() or 1) // ranks_per_node),
        timeout_seconds=_TIMEOUT_SECONDS,
        peak_flops=None,
        memory_bytes=None,
        memory_reserve_bytes=0,
        grace_seconds=10.0,
        max_restarts=0,
    )


@contextmanager
def open_ranks(network: InferenceConfig) -> "Iterator[ReplicaPipeline]":
    """Loads this rank's part of a model. All ranks call it."""
    from comm.groups import ClusterError
    from train.post.pipeline import open_pipeline

    try:
        with open_pipeline(network) as pipeline:
            yield pipeline
    except ClusterError as error:
        raise ConfigError(f"device: {error}") from error


Send = Callable[..., None]  # sends a message to the parent; on all ranks except rank 0 it does nothing
RankFunction = Callable[[Send], Any]  # what every rank runs. Its module is imported on the ranks; pickle sends it.


class RankError(RuntimeError):
    """Raised if a rank failed with an error that is not the user's, or died."""


def run_on_ranks(
    function: RankFunction,
    network: InferenceConfig,
    preloaded: Sequence[str],
    receive: Callable[..., None] = lambda *message: None,
    *,
    grace_seconds: float = 0.0,
) -> Any:
    """Runs a function as this rank of torchrun, or else on local ranks, and returns its result.

    A rank of torchrun returns its own result. `preloaded` are the modules that the function imports besides those of
    every command on weights.
    """
    if is_torchrun(os.environ):
        apply_rank_environment(network.cluster)
        return function(receive)
    modules = (*_PRELOADED, *preloaded)
    num_ranks = network.parallelism.world_size
    return run_on_local_ranks(function, network.cluster, num_ranks, modules, receive, grace_seconds=grace_seconds)


def run_on_local_ranks(
    function: RankFunction,
    cluster: ClusterConfig,
    num_ranks: int,
    preloaded: Sequence[str],
    receive: Callable[..., None] = lambda *message: None,
    *,
    grace_seconds: float = 0.0,
) -> Any:
    """Starts ranks on this machine and returns the result of rank 0. No rank outlives the call.

    After another rank has failed or died, rank 0 may continue for `grace_seconds`.
    """
    apply_rank_environment(cluster)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", *preloaded])
    processes = []
    ends = dict[connection.Connection, int]()
    with scratch_folder() as scratch:
        try:
            for rank in range(num_ranks):
                ours, theirs = context.Pipe()
                rank_place = (rank, num_ranks, str(scratch / "store"))
                process = context.Process(target=_run_rank, args=(rank_place, theirs, loaded_plugins()), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                ends[ours] = rank
                # Not an argument: multiprocessing prints a traceback if this process is killed while a rank reads one.
                with suppress(BrokenPipeError, ConnectionResetError):  # the rank is lost, which is found below
                    ours.send(function)
            return _await_results(ends, processes, receive)
        except (RankError, DeadRankError):
            _await_end(next(end for end, rank in ends.items() if rank == 0), grace_seconds)
            raise
        finally:
            for process in processes:
                process.kill()
                process.join()


def _await_results(
    ends: "dict[connection.Connection, int]", processes: Sequence[BaseProcess], receive: Callable[..., None]
) -> Any:
    """Waits for the results of all ranks and returns that of rank 0. Raises the first error."""
    result: Any = None
    waiting = set(ends)
    looks = [0] * len(processes)  # at each rank since it is stopped
    while waiting:
        messages = connection.wait(waiting, 1.0)
        for rank, process in enumerate(processes) if not messages else ():
            looks[rank] = looks[rank] + 1 if is_stopped(process.pid) else 0
            if looks[rank] == STOPPED_LOOKS:
                process.kill()  # the others see that it has ended
        for end in messages:
            assert isinstance(end, connection.Connection)
            rank = ends[end]
            try:
                kind, content = end.recv()
            except (EOFError, OSError) as error:  # OSError: within a message
                raise DeadRankError(_describe_loss(processes, looks, rank)) from error
            if kind == "message":
                receive(*content)
                continue
            waiting.remove(end)
            if isinstance(content, ValueError) and kind == "user error":
                raise content
            if kind == "error":
                raise RankError(f"rank {rank} failed\n{content}")
            result = content if rank == 0 else result
    return result


def _describe_loss(processes: Sequence[BaseProcess], looks: Sequence[int], first: int) -> str:
    """Returns which ranks a signal ended or stopped, or else how the first missing rank ended."""
    processes[first].join(1.0)
    lost = []
    for rank, process in enumerate(processes):
        if is_stopped(process.pid) or looks[rank] >= STOPPED_LOOKS:
            lost.append(f"rank {rank} is stopped and does not continue")
        elif process.exitcode is not None and process.exitcode < 0:
            lost.append(f"rank {rank} was ended by {signal.Signals(-process.exitcode).name}")
    if not lost and processes[first].exitcode == EXIT_LOST:
        lost.append("one does not respond")
    return "; ".join(lost) or f"rank {first} died before it returned"


def _await_end(end: "connection.Connection", seconds: float) -> None:
    """Waits until the rank at the other end has ended."""
    until = time.monotonic() + seconds
    with suppress(EOFError, OSError):
        while end.poll(max(0.0, until - time.monotonic())):
            end.recv()


def _run_rank(place: tuple[int, int, str], end: "connection.Connection", plugins: Sequence[Path]) -> None:
    rank, num_ranks, store_file = place
    escape_terminals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the ranks
    end_with_parent()
    try:
        function: RankFunction = end.recv()
    except (EOFError, OSError):  # the parent was killed
        return
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= local_rank_environment(Path(store_file))

    def send(*message: Any) -> None:
        if rank == 0:
            end.send(("message", message))

    try:
        load_plugin_files([str(path) for path in plugins])
        result = function(send)
        end.send(("result", result if rank == 0 else None))
    except Exception as error:
        is_users = isinstance(error, user_errors())
        outcome = ("user error", type(error)(str(error))) if is_users else ("error", traceback.format_exc())
        with suppress(OSError):
            end.send(outcome)
