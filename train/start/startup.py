"""Prepares a run on all ranks together before the first step: configuration, corpus, weights."""

import dataclasses
import hashlib
import json
import os
import platform
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from base.decode import encode, flatten
from comm.agreement import compare_with_first_rank, exchange_reports, gather_present, sum_over_ranks
from data.corpus import DataError
from data.progress import NO_PROGRESS
from data.shards.open import Prepared
from train.checkpoint import load as checkpoint
from train.checkpoint.locate import AUTO, check_compatible, newest_whole, verify_sizes
from train.checkpoint.manifest import read_step
from train.checkpoint.sources import load_initial
from train.config import TrainConfig
from train.core.learner import Learner
from train.core.world import World
from train.errors import PreemptedError
from train.files.run_files import HIDDEN, is_secret_name, read_status, redact
from train.start.corpus import State as CorpusState
from train.start.corpus import build_together, prepare_corpus
from train.terminal import progress_on

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = (
    "base",
    "comm",
    "data",
    "dualpipe",
    "evaluation",
    "infer",
    "kernels",
    "launch",
    "model",
    "planner",
    "score",
    "train",
    "verify",
)
_PACKAGES = ("torch", "triton", "deepspeed", "numpy", "tokenizers")
_VERSION = "version of "
_SOURCES_KEY = "sources"
_MOST_KEYS = 8


def compare_ranks(config: TrainConfig) -> str:
    """Compares every rank's configuration, sources and packages with those of rank 0. All ranks call it.

    The result names ranks, nodes, keys and values that differ. Other ranks than rank 0 may leave `out_dir` empty.
    """
    identity = identity_of(config)
    node = f"node {os.environ.get('GROUP_RANK', '0')} ({socket.gethostname()})"
    first = [hash_text(json.dumps(identity)), str(Path(config.out_dir).expanduser())]
    digest = first[0]
    dist.broadcast_object_list(first, src=0)
    identity["out_dir"] = str(Path(config.out_dir).expanduser()) if config.out_dir else first[1]
    is_same = [digest, identity["out_dir"]] == first
    (num_others,) = sum_over_ranks([not is_same])
    if not num_others:
        return ""
    expected: list[Any] = [node, identity]
    dist.broadcast_object_list(expected, src=0)
    # The ranks of a node usually run the same command, so the lowest of the ranks that differ in the same way reports.
    text = f"on {node} {_differences(identity, expected[1])}"
    others = dict(reversed(gather_present(None if is_same else (hash_text(text), dist.get_rank()))))
    reports = exchange_reports(text if others.get(hash_text(text)) == dist.get_rank() else None)
    nodes = "; ".join(f"rank {report.rank} {report.text}" for report in reports.first)
    return redact(
        f"ranks: must all have the configuration, sources and packages of rank 0 on {expected[0]}, {nodes}; "
        f"{num_others} of {dist.get_world_size()} ranks differ; nearest valid: the same overrides, sources and "
        f"packages on every node"
    )


def hash_text(text: str) -> str:
    """Returns the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def identity_of(config: TrainConfig) -> dict[str, str]:
    """Returns what must be equal on all ranks: every key but `out_dir`, the sources, and the packages."""
    sources = hashlib.sha256()
    for path in sorted(path for package in _SOURCES for path in (_ROOT / package).rglob("*.py")):
        sources.update(str(path.relative_to(_ROOT)).encode() + path.read_bytes())
    versions = {"python": ".".join(platform.python_version_tuple()[:2]), "NCCL": _nccl_version()}
    versions |= {name: version_of(name) for name in _PACKAGES}
    values = encode(dataclasses.replace(config, out_dir=""))
    # On the command line, the keys of a source of data are those of `data`.
    keys = {key.replace("data.source.", "data.", 1): json.dumps(value) for key, value in flatten(values)}
    named = {f"{_VERSION}{name}": text for name, text in versions.items()}
    return {**keys, **named, _SOURCES_KEY: sources.hexdigest()}


def is_version(key: str) -> bool:
    """Returns whether a key of `identity_of` is a version or the sources, not a key of the configuration."""
    return key.startswith(_VERSION) or key == _SOURCES_KEY


def version_of(package: str) -> str:
    """Returns the installed version of a package; `absent` if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _nccl_version() -> str:
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    return ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "absent"


def _differences(own: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """Returns the keys that differ with both values, without secrets; at most eight keys."""
    keys = [key for key in {**expected, **own} if own.get(key) != expected.get(key)]
    parts = []
    for key in keys[:_MOST_KEYS]:
        both = [HIDDEN if is_secret_name(key) else values.get(key, "absent")[:80] for values in (own, expected)]
        parts.append(f"{key} is {both[0]} instead of {both[1]}")
    return ", ".join(parts) + (f" and {len(keys) - _MOST_KEYS} more keys differ" if len(keys) > _MOST_KEYS else "")


def broadcast_config(config: TrainConfig) -> tuple[TrainConfig, int | None]:
    """Broadcasts what rank 0 knows about the run: its folder, and the checkpoint that it resumes from.

    Returns the exit code of a run that has already ended, too: torchrun restarts all ranks after any exit code.
    """
    is_first = dist.get_rank() == 0
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    sent = [_resolve_auto_resume(config) if is_first else None]
    dist.broadcast_object_list(sent, src=0)
    assert sent[0] is not None
    config = sent[0]
    ended: list[int | None] = [None]
    # A machine may not have seen the restart yet, so its count may still be 0.
    (total_restarts,) = sum_over_ranks([restarts])
    if total_restarts:
        if is_first:
            before = read_status(Path(config.out_dir))
            ended = [before.exit_code if before is not None and before.state in ("preempted", "stopped") else None]
        dist.broadcast_object_list(ended, src=0)
    return config, ended[0]


def _resolve_auto_resume(config: TrainConfig) -> TrainConfig:
    """Replaces `resume=auto` by a path or None. A run that resumes ignores `init_from`."""
    if config.resume != AUTO:
        return config
    if newest_whole(Path(config.out_dir), check=verify_sizes) is None:
        return dataclasses.replace(config, resume=None)
    return dataclasses.replace(config, resume=config.out_dir, init_from=None)


def raise_if_preempted(world: World) -> None:
    """Raises PreemptedError on all ranks if one of them was preempted. All ranks call it."""
    group = world.groups.world
    with world.log.collective("world", group, "check for preemption"):
        (num_requests,) = sum_over_ranks([world.preemption.is_requested], group)
    if num_requests:
        num_ranks = len(world.ranks)
        raise PreemptedError(f"{num_requests} of {num_ranks} ranks received a preemption request before the first step")


def prepare_corpus_together(config: TrainConfig, world: World) -> Prepared:
    """Prepares the corpus on all ranks.

    One rank per machine builds what the cache lacks. If machines would read different samples, it raises DataError.
    """
    group = world.groups.world

    def exchange(state: CorpusState) -> CorpusState:
        raise_if_preempted(world)
        is_over, problem = state
        with world.log.collective("world", group, "preparation of the corpus"):
            (num_busy,) = sum_over_ranks([not is_over], group)
            problems = exchange_reports(problem or None, group)
        return num_busy == 0, problems.first_text

    build_together(config, exchange, progress_on() if world.rank == 0 else NO_PROGRESS)
    prepared = prepare_corpus(config)
    with world.log.collective("world", group, "comparison of the corpus"):
        expected, others = compare_with_first_rank(prepared.fingerprint, group)
    if others.total:
        odd = others.first[0]
        raise DataError(
            f"data: every rank must read the same samples; rank {odd.rank}'s fingerprint is {odd.text}, "
            f"rank 0's {expected} ({others.name_ranks()} of {len(world.ranks)} differ). "
            f"Machines with different Python versions embed different text"
        )
    return prepared


def load_resumed(config: TrainConfig, learner: Learner, data_fingerprint: str) -> int:
    """Loads the checkpoint that the run resumes from, if any. Returns the number of steps already done."""
    if config.resume is None:
        return 0
    folder = Path(config.resume)
    # A run that was restarted automatically may resume from its last step; no step is left then.
    check_compatible(folder, config, data_fingerprint=data_fingerprint, may_be_done=True)
    with learner.world.phase("loading of the checkpoint"):
        checkpoint.load(learner, folder)
    return read_step(folder)


def load_initial_weights(config: TrainConfig, learner: Learner, prepared: Prepared) -> str:
    """Loads the weights that `init_from` names, if any, and returns a line that describes them."""
    if config.initial_weights is None:
        return ""
    with learner.world.phase("loading of initial weights"):
        line = load_initial(config, learner, prepared.tokenizer)
    if learner.ema is not None:
        learner.ema.follow_weights()
    learner.comparison.follow(learner.replica)
    return line
