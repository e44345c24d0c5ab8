"""Faults that tests plant in rank processes, each by replacing one function, and how a verification names them."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from comm.dispatch import all_to_all
from comm.watchdog.collective_log import CollectiveLog
from model.block import RoutedExperts
from model.transformer import named_tensors
from train.checkpoint import locate
from train.checkpoint.save import CheckpointSaver
from train.config import TrainConfig
from train.core import learner, step, world
from train.core.replica import BatchReader, Replica
from train.optim import staged
from train.optim.adamw import EMBEDDING, ReplicatedAdamW
from train.post import comparison
from train.start import startup
from verify import places, rates, resuming, runs, steps

Plant = Callable[[int, ExitStack], None]
"""Plants a fault on a rank until the stack closes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """A fault and what must be named: the check, the ranks (None: all), the tensor or key, and the likely cause."""

    plant: Plant
    check: str
    ranks: tuple[int | None, ...]
    subject: str
    cause: str


def wrapped(owner: Any, name: str, wrap: Callable[..., Any], ranks: tuple[int, ...] = (0, 1, 2, 3)) -> Plant:
    """Calls `wrap(original, *arguments)` in place of a function, on some ranks."""

    def plant(rank: int, stack: ExitStack) -> None:
        original = getattr(owner, name)
        if rank in ranks:
            stack.enter_context(patch.object(owner, name, lambda *args, **kwargs: wrap(original, *args, **kwargs)))

    return plant


def after_passes(change: Callable[[Replica, Any], None], ranks: tuple[int, ...] = (0, 1, 2, 3)) -> Plant:
    """Changes the gradients of some ranks after the passes."""

    def train(original: Any, replica: Replica, batches: Any, objective: Any, sums: Any, store: Any, *rest: Any) -> Any:
        done = original(replica, batches, objective, sums, store, *rest)
        change(replica, store)
        return done

    return wrapped(Replica, "train", train, ranks)


def scale(name: str, factor: float) -> Callable[[Replica, Any], None]:
    def change(replica: Replica, store: Any) -> None:
        parameters = dict(replica.network.named_parameters())
        if name in parameters:
            store.gradient(parameters[name]).mul_(factor)

    return change


def scale_experts(replica: Replica, store: Any) -> None:
    for module in replica.network.modules():
        if isinstance(module, RoutedExperts):
            for parameter in module.parameters():
                store.gradient(parameter).mul_(replica.world.layout.parallelism.expert)


def round_overlapped(replica: Replica, store: Any) -> None:
    if replica.config.pairing == "overlapped":
        store.gradients()[0].mul_(1 + 2**-50)


def unsummed(*columns: int, num_losses: int = 2) -> Plant:
    """Leaves some denominators of steps with so many losses as those of the rank."""

    def reduce(original: Any, own: Any, values: Tensor, name: str, *rest: Any) -> Tensor:
        values, total = values.clone(), original(own, values, name, *rest)
        if name == "sum of targets" and len(values) == num_losses + 1:
            for column in columns:
                total[column] = values[column]
        return total

    return wrapped(world.World, "reduce", reduce)


def scaled_objective(original: Any, *args: Any) -> Any:
    task = original(*args)
    objective = task.objective

    def scaled(counts: Tensor, rates: Any) -> Any:
        built = objective(counts, rates)
        return replace(built, factors=tuple(4 * factor for factor in built.factors), balance=4 * built.balance)

    task.objective = scaled
    return task


def swapped(original: Any, reader: BatchReader, direction: int, micro_batch: int) -> Any:
    replica = reader._replica
    is_last = replica.network.output_head is not None and replica.network.model.embed_tokens is None
    return original(reader, direction, (1 - micro_batch) if is_last and micro_batch < 2 else micro_batch)


def with_replicas(**groups: str) -> Callable[..., Any]:
    def units_of(original: Any, model: Any, stages: Any, schedule: Any, all_groups: Any) -> Any:
        chosen = {name: getattr(all_groups, group) for name, group in groups.items()}
        units = original(model, stages, schedule, all_groups)
        return [replace(unit, replicas=replace(unit.replicas, **chosen)) for unit in units]

    return units_of


def stale_embedding(original: Any, optimizer: ReplicatedAdamW, *args: Any) -> None:
    before = {name: weight.detach().clone() for name, weight in optimizer._groups.all().items()}
    original(optimizer, *args)
    if EMBEDDING in before:
        with torch.no_grad():
            optimizer._groups.all()[EMBEDDING].copy_(before[EMBEDDING])


def other_version(original: Any, name: str) -> str:
    return "0.1" if name == "torch" else original(name)


def other_schedule(original: Any, config: TrainConfig, *rest: Any) -> Any:
    planned = original(config, *rest)
    ranks = planned.schedule.ranks
    return replace(planned, schedule=replace(planned.schedule, ranks=(ranks[0][::-1], *ranks[1:])))


def renamed(original: Any, log: CollectiveLog, group: str, ranks: Any, name: str, *rest: Any, **keys: Any) -> Any:
    return original(log, group, ranks, "sum of loads" if name == "sum of router loads" else name, *rest, **keys)


def slow_pair(original: Any, rows: Tensor, partner: int, rank: int) -> None:
    time.sleep(0.05 * ({partner, rank} == {1, 2}))
    original(rows, partner, rank)


def slow_runs(original: Any, device: torch.device, run: Callable[[], object]) -> float:
    def slower() -> None:
        time.sleep(0.05)
        run()

    return original(device, slower)


def corrupted(original: Any, saver: CheckpointSaver) -> Path | None:
    folder: Path | None = original(saver)
    if folder is not None and saver._rank == 0:
        path = next(iter(sorted(folder.glob("*.safetensors"))))
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    return folder


def forget_moments(original: Any, optimizer: staged.StagedAdamW) -> None:
    original(optimizer)
    for name, moment in optimizer.state().items():
        if name.endswith("exp_avg_sq"):
            moment.local.mul_(2)  # type: ignore[union-attr]


def swap_layers(original: Any, learner: Any, folder: Path) -> None:
    original(learner, folder)
    weights = named_tensors(learner.replica.model)
    one, other = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (1, 2))
    if one in weights and other in weights:
        kept = weights[one].clone()
        weights[one].copy_(weights[other])
        weights[other].copy_(kept)


def own_cap(original: Any, num_over_R: Any, group: Any, *rest: Any) -> None:
    original([number * (index == group.index) for index, number in enumerate(num_over_R)], group, *rest)


def first_part(original: Any, replica: Replica, micro_batch: int) -> int:
    return 0 if replica.world.layout.parallelism.context > 1 else original(replica, micro_batch)


ONE = "model.layers.1.self_attn.o_proj.weight"

PLANTED: dict[str, Planted] = {
    "wrong reduction group": Planted(
        plant=wrapped(learner, "units_of", with_replicas(dense="expert")),
        check="equality",
        ranks=(0, 1, 2, 3),
        subject="reduced gradient of ",
        cause="the (data|expert) axis",
    ),
    "experts summed over the stage": Planted(
        plant=wrapped(learner, "units_of", with_replicas(experts="stage")),
        check="equality",
        ranks=(0, 1, 2, 3),
        subject="reduced gradient of .*experts",
        cause="the expert axis",
    ),
    "gradient doubled": Planted(
        plant=after_passes(scale(ONE, 2), (1,)),
        check="equality",
        ranks=(1,),
        subject=f"gradient of {ONE}",
        cause="it is 2 times .*the data axis",
    ),
    "gradient missed": Planted(
        plant=after_passes(scale(ONE, 0), (2,)),
        check="equality",
        ranks=(2,),
        subject=f"gradient of {ONE}",
        cause="it is 0 times .*the data axis",
    ),
    "local token count": Planted(
        plant=unsummed(0),
        check="equality",
        ranks=(0, 1, 2, 3),
        subject="loss of main",
        cause="it is [1-9.]+ times .*the data axis",
    ),
    "local token count of MTP": Planted(
        plant=unsummed(1, num_losses=3),
        check="equality",
        ranks=(0, 1, 2, 3),
        subject="loss of mtp_1",
        cause="it is [1-9.]+ times .*the MTP axis",
    ),
    "local count of sequences in the balance loss": Planted(
        plant=unsummed(1),
        check="equality",
        ranks=(0, 1, 2, 3),
        subject="loss of balance",
        cause="it is 4 times .*the data axis",
    ),
    "loss scaled by an axis": Planted(
        plant=wrapped(step, "open_task", scaled_objective),
        check="equality",
        ranks=(0, 1, 2, 3),
        subject="gradient of ",
        cause="it is 4 times .*the data axis",
    ),
    "two messages swapped": Planted(
        plant=wrapped(BatchReader, "__call__", swapped),
        check="equality",
        ranks=(0, 1, 2, 3),
        subject="gradient of ",
        cause="the pipeline axis",
    ),
    "tied weights out of step": Planted(
        plant=wrapped(ReplicatedAdamW, "update", stale_embedding, (3,)),
        check="copies",
        ranks=(3,),
        subject=f"weight of {EMBEDDING}",
        cause="tied",
    ),
    "routed gradient scaled by the expert axis": Planted(
        plant=after_passes(scale_experts),
        check="equality",
        ranks=(0, 1, 2, 3),
        subject="gradient of .*experts",
        cause="it is 4 times .*the expert axis",
    ),
    "bias updated twice": Planted(
        plant=wrapped(steps, "update_router_bias", lambda original, replica, rate: original(replica, 2 * rate)),
        check="equality",
        ranks=(0, 1, 2, 3),
        subject="weight of .*bias",
        cause="its update is 2 times .*the data axis",
    ),
    "another seed": Planted(
        plant=wrapped(world, "initialize_weights", lambda original, model, seed: original(model, seed + 1), (1,)),
        check="equality",
        ranks=(1,),
        subject="initial weight of ",
        cause="before the first step .*the data axis",
    ),
    "another version": Planted(
        plant=wrapped(startup, "version", other_version, (2,)),
        check="versions",
        ranks=(None,),
        subject="versions",
        cause="rank 2 .*version of torch is 0.1 instead of",
    ),
    "another configuration": Planted(
        plant=wrapped(startup, "encode", lambda original, config: original(replace(config, seed=9)), (3,)),
        check="versions",
        ranks=(None,),
        subject="versions",
        cause="rank 3 .*seed is 9 instead of",
    ),
    "wrong device": Planted(
        plant=wrapped(places, "place_of", lambda original, device: replace(original(device), device_type="cuda"), (1,)),
        check="peers",
        ranks=(1,),
        subject="device",
        cause="cluster.device",
    ),
    "another schedule": Planted(
        plant=wrapped(runs, "plan", other_schedule, (2,)),
        check="equality",
        ranks=(2,),
        subject="schedule",
        cause="version of the generators",
    ),
    "another order of collectives": Planted(
        plant=wrapped(CollectiveLog, "start", renamed, (1,)),
        check="order",
        ranks=(1,),
        subject="group world",
        cause="branch on this rank",
    ),
    "overlap changes a value": Planted(
        plant=after_passes(round_overlapped, (0,)),
        check="overlap",
        ranks=(0, 1, 2, 3),
        subject="gradient of ",
        cause="a lane reads",
    ),
    "norm counts copies": Planted(
        plant=wrapped(ReplicatedAdamW, "reduce", lambda original, own: 4 * original(own)),
        check="equality",
        ranks=(0, 1, 2, 3),
        subject="gradient norm",
        cause="it is 2 times .*the data axis",
    ),
    "slow link": Planted(
        plant=wrapped(rates, "_ping_pong", slow_pair),
        check="rates",
        ranks=(1,),
        subject="link between ranks 1 and 2",
        cause="slower cable",
    ),
    "slow rank": Planted(
        plant=wrapped(rates, "_best", slow_runs, (2,)),
        check="rates",
        ranks=(2,),
        subject="product rate",
        cause="throttled",
    ),
    "node cap raises on one rank alone": Planted(
        plant=wrapped(all_to_all, "verify_cap", own_cap),
        check="node cap",
        ranks=(0, 1, 2),
        subject="node cap",
        cause="raises no error",
    ),
    "node cap raises nowhere": Planted(
        plant=wrapped(all_to_all, "verify_cap", lambda original, *rest: None),
        check="node cap",
        ranks=(0, 1, 2, 3),
        subject="node cap",
        cause="raises no error",
    ),
    "corrupted checkpoint": Planted(
        plant=wrapped(CheckpointSaver, "close", corrupted),
        check="checkpoint",
        ranks=(0,),
        subject="checkpoint file .*safetensors",
        cause="changed a file",
    ),
    "damaged checkpoint accepted": Planted(
        plant=wrapped(locate, "_check_file", lambda original, *args, **keys: None),
        check="checkpoint",
        ranks=(0,),
        subject="safetensors",
        cause="not compared with the hashes",
    ),
    "moments of a checkpoint are not loaded": Planted(
        plant=wrapped(staged.StagedAdamW, "loaded", forget_moments),
        check="checkpoint",
        ranks=(0, 1, 2, 3),
        subject="weight of ",
        cause="not saved",
    ),
    "layers swapped by a resume": Planted(
        plant=wrapped(resuming, "load", swap_layers),
        check="checkpoint",
        ranks=(0, 1, 2, 3),
        subject="weight of model.layers.[12].self_attn.o_proj",
        cause="not saved, or is given to another",
    ),
    "average not updated": Planted(
        plant=wrapped(learner.ParameterEma, "_average", lambda original, own: None, (1,)),
        check="equality",
        ranks=(1,),
        subject="average of ",
        cause="the configured optimizer",
    ),
    "part of a sequence of another context rank": Planted(
        plant=wrapped(Replica, "part_of", first_part, (1,)),
        check="equality",
        ranks=(None,),
        subject="gradient of ",
        cause="the context axis",
    ),
    "sequences of another rank": Planted(
        plant=wrapped(
            Replica,
            "first_sequence",
            lambda original, own, *args: (
                original(own, *args) % 4 if own.schedule.num_micro_batches == 1 else original(own, *args)
            ),
            (1,),
        ),
        check="equality",
        ranks=(1,),
        subject="gradient of ",
        cause="in step 1 .*the data axis",
    ),
}


def next_reference(original: Any, reader: BatchReader, name: str, found: Any) -> None:
    keys = list(found)
    original(reader, name, dict(zip(keys, [found[key] for key in (*keys[1:], keys[0])], strict=True)))


TASK_FAULTS: dict[str, Plant] = {
    "reference has other weights": wrapped(comparison.Reference, "follow", lambda original, own, policy: None, (1,)),
    "reference of another micro-batch": wrapped(BatchReader, "add_extras", next_reference, (1,)),
    "local number of pairs or answers": unsummed(0, num_losses=8),
}
"""Faults of runs with a frozen network or another loss, each of which the task axis names."""
