"""Rejects a run that does not fit its devices, and suggests the nearest change that fits. No torch."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from base.refusal import ConfigError, broken
from model.config import LAYER, RECOMPUTED, all_recomputed
from train.config import Fp8PrecisionConfig, PrecisionConfig, TrainConfig
from train.optim.registry import AdamWConfig
from train.predict.fit import context_sizes, fitted_config, gigabytes, parts, shortage
from train.predict.memory import JobMemory, predict_memory

Rules = Callable[[TrainConfig], None]
Change = tuple[str, TrainConfig]  # overrides as a user writes them, and the resulting configuration

_GB = 1e9
_SMALLER_SHARE = 0.9  # of the predicted memory, which a change must not exceed if the prediction was too small


def check_memory(config: TrainConfig, rules: Rules) -> None:
    """Rejects a run with predicted peaks above what `cluster` says of devices and hosts.

    Nothing is checked without `cluster.memory_bytes`. Suggested changes must pass `rules`, which raises ValueError.
    `plan.check=false` skips the check.
    """
    room = config.cluster.memory_bytes
    if room is None or not config.plan.check:
        return
    if config.cluster.memory_reserve_bytes >= room:
        rule = f"must be below cluster.memory_bytes={room}"
        raise broken("cluster.memory_reserve_bytes", rule, config.cluster.memory_reserve_bytes, room // 20)
    job = predict_memory(fitted_config(config))
    worst = job.worst
    if worst.total > room:
        need, have = _rounded(worst.total, room)
        raise ConfigError(
            f"memory: rank {worst.pipeline_rank} needs {need} GB of {have}{_batch(config, job)} ({parts(worst)}); "
            f"nearest: {_nearest(config, rules, room)}"
        )
    if short := shortage(config, job):
        raise ConfigError(f"{short}; nearest: {_nearest(config, rules, room)}")


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether a device had too little memory, by the class's name: torch may not be loaded."""
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)


def out_of_memory_line(config: TrainConfig, rules: Rules, rank: int, error: str) -> str:
    """Returns one line about a rank with too little memory on its device, given torch's error."""
    request = re.search(r"Tried to allocate ([\d.]+ \w+)", error)
    begin = f"memory: rank {rank} requested {request[1] if request else 'memory'} that its device did not have"
    room = config.cluster.memory_bytes
    try:
        job = predict_memory(fitted_config(config))
        own = job.ranks[rank // config.parallelism.stage_ranks]
        nearest = _nearest(config, rules, int(_SMALLER_SHARE * job.worst.total))
    except ValueError as unpredicted:
        return f"{begin}; not predicted: {unpredicted}"
    of_room = "" if room is None else f" of {room / _GB:.1f}"
    return f"{begin}, predicted {gigabytes(own.total)}{of_room} ({parts(own)}); nearest: {nearest}"


def _nearest(config: TrainConfig, rules: Rules, room: int) -> str:
    """Returns the first change that fits, or the closest one if none fits the device."""
    closest: tuple[int, str] | None = None
    for text, changed in _changes(config):
        try:
            rules(changed)
            job = predict_memory(fitted_config(changed))
        except ValueError:
            continue
        if not shortage(replace(changed, cluster=replace(changed.cluster, memory_bytes=room)), job):
            return text
        total = job.worst.total
        if closest is None or total < closest[0]:
            closest = total, text
    if closest is None:
        return "a larger cluster.memory_bytes, or a smaller model"
    return f"none; closest {closest[1]}, which needs {closest[0] / _GB:.1f} GB"


def _changes(config: TrainConfig) -> Iterator[Change]:
    """Yields single changes, the cheapest first, then the cheap changes combined with other layouts."""
    yield from _micro_batches(config)
    yield from _recomputation(config)
    yield from _moments(config)
    yield from _host(config)
    yield from _ramp(config)
    yield from _layouts(config)
    yield from _precision(config)
    overrides = list[str]()
    cheap = config
    for changes in (_micro_batches, _recomputation):
        for text, changed in list(changes(cheap))[-1:]:
            overrides.append(text)
            cheap = changed
    if overrides:
        combined = (*_layouts(cheap), *_precision(cheap))
        yield from ((" ".join([*overrides, text]), changed) for text, changed in combined)


def _micro_batches(config: TrainConfig) -> Iterator[Change]:
    batch = config.batch
    for size in range(batch.micro_sequences - 1, 0, -1):
        if batch.micro_sequences % size == 0:
            changed = replace(config, batch=replace(batch, micro_sequences=size))
            yield f"batch.micro_sequences={size}", changed


def _recomputation(config: TrainConfig) -> Iterator[Change]:
    """Yields more recomputation: first what costs almost nothing, then all of a layer but attention."""
    recomputed = all_recomputed(config.recompute)
    for kinds in (RECOMPUTED, (LAYER,)):
        if not recomputed.issuperset(kinds):
            yield f"recompute=[{','.join(kinds)}]", replace(config, recompute=kinds)


def _moments(config: TrainConfig) -> Iterator[Change]:
    if config.optim.moments == "float32":
        yield "optim.moments=bf16", replace(config, optim=replace(config.optim, moments="bf16"))
    if config.optim.sharding == "replicated" and config.parallelism.world_size > 1:
        yield "optim.sharding=zero1", replace(config, optim=replace(config.optim, sharding="zero1"))


def _host(config: TrainConfig) -> Iterator[Change]:
    """Yields what moves between the device and the host, and a run without a moving average."""
    optim = config.optim
    if isinstance(optim, AdamWConfig) and (optim.offload or optim.sharding == "zero1"):
        offload = not optim.offload
        yield f"optim.offload={str(offload).lower()}", replace(config, optim=replace(optim, offload=offload))
    if config.ema.decay is not None:
        yield "ema.decay=null", replace(config, ema=replace(config.ema, decay=None))


def _ramp(config: TrainConfig) -> Iterator[Change]:
    """Yields a ramp with two micro-batches per rank in its first step; with fewer, W is deferred longer."""
    batch = config.batch
    ramp = config.batch.ramp
    parallelism = config.parallelism
    start = 2 * parallelism.pipeline * parallelism.data * batch.micro_sequences
    if ramp is not None and ramp.start_sequences < start < batch.global_sequences:
        changed = replace(config, batch=replace(batch, ramp=replace(ramp, start_sequences=start)))
        yield f"batch.ramp.start_sequences={start}", changed


def _layouts(config: TrainConfig) -> Iterator[Change]:
    """Yields layouts in which more ranks share each sequence, then those with more ranks."""
    mesh = config.parallelism
    meshes = [
        replace(mesh, data=mesh.stage_ranks // context, context=context)
        for context in context_sizes(config)
        if context > mesh.context and mesh.stage_ranks % context == 0
    ]
    meshes += [
        replace(mesh, expert=mesh.expert * times) for times in (2, 4) if mesh.stage_ranks % (mesh.expert * times) == 0
    ]
    meshes += [replace(mesh, pipeline=mesh.pipeline * times) for times in (2, 4)]
    meshes += [replace(mesh, data=mesh.data * times, expert=mesh.expert * times) for times in (2, 4)]
    for changed in meshes:
        sizes = {name: getattr(changed, name) for name in ("pipeline", "data", "expert", "context")}
        text = [f"parallelism.{name}={size}" for name, size in sizes.items() if size != getattr(mesh, name)]
        yield " ".join(text), replace(config, parallelism=changed)


def _precision(config: TrainConfig) -> Iterator[Change]:
    optim = replace(config.optim, sharding="zero1")
    if config.precision.kind in ("float64", "float32"):
        yield "precision=bf16", replace(config, precision=PrecisionConfig(kind="bf16"), optim=optim)
    if config.precision.kind != "fp8":
        fp8 = Fp8PrecisionConfig(kind="fp8", scales="float32")
        # FP8 recomputes all but `layer` in any case.
        recompute = config.recompute if LAYER in config.recompute else RECOMPUTED
        yield "precision=fp8", replace(config, precision=fp8, recompute=recompute, optim=optim)


def _batch(config: TrainConfig, job: JobMemory) -> str:
    """Returns the batch size of the ramp that the error is about, or nothing for the final size."""
    if job.num_micro_batches == config.num_micro_batches:
        return ""
    sequences = job.num_micro_batches * config.parallelism.data * config.batch.micro_sequences
    return f" in steps of {sequences:,} sequences"


def _rounded(need: int, room: int) -> tuple[str, str]:
    """Returns both sizes in GB, with enough digits to differ."""
    for digits in range(1, 9):
        sizes = f"{need / _GB:.{digits}f}", f"{room / _GB:.{digits}f}"
        if sizes[0] != sizes[1]:
            return sizes
    return str(need / _GB), str(room / _GB)
