"""Runs the golden training step on one rank of any layout, and records every result by released name.

`launch.golden` merges what the ranks recorded. What a rank does not hold of a token is NaN, or -1 for experts.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist

from comm.config import AllToAllDispatchConfig, ClusterConfig
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.registry import TokenSizes
from comm.groups import start, stop
from comm.layout import Layout
from comm.protocol import Label
from comm.watchdog.membership import STORE_FILE_VARIABLE
from data.config import BatchSizes
from data.loader import Batch
from data.pack import WEIGHTS
from dualpipe.builder import build_schedule
from model.config import Computing, cut_layers
from model.hf.names import HEAD, layer_of, stored_tensors
from model.hf.writer import write_hf
from model.linear import WeightSink
from model.objective import BALANCE, MicroBatch, Objective, OutputHead, TaskLoss, depth_name
from model.router import Router, Routing
from model.transformer import BIAS, Transformer, initialize_weights, named_tensors, routers
from train.checkpoint.sources import open_source
from train.config import PrecisionConfig
from train.core.learner import NetworkComparison, open_learner
from train.core.replica import BatchReader, StepBatch, open_replica
from train.core.step import accumulate, rates_of, update_router_bias
from train.core.world import ReplicaConfig, open_world
from train.optim.adamw import MOMENTS, Slice
from train.tasks.registry import open_task
from verify.golden.config import GoldenConfig, GoldenRun
from verify.steps import by_released_name

Arrays = dict[str, NDArray[Any]]
MODEL_FOLDER = "model"
_PLACE = "place"  # number of each token in the global batch


def make_batch(golden: GoldenConfig, step: int) -> Batch:
    """Draws the global batch of a step, counted from 0. Later sequences train more of their tokens."""
    generator = torch.Generator().manual_seed(golden.seed + step)
    shape = golden.batch.global_sequences, golden.batch.sequence_length_tokens
    tokens_BT = torch.randint(golden.model.vocab_size, shape, generator=generator)
    is_trained_BT = torch.rand(shape, generator=generator) < torch.linspace(0.3, 1.0, shape[0])[:, None]
    return Batch(
        tokens_BT=tokens_BT,
        positions_BT=torch.arange(shape[1]).expand(shape),
        pad_id=0,
        extras={WEIGHTS: is_trained_BT.float(), _PLACE: torch.arange(tokens_BT.numel()).view(shape)},
    )


def write_inputs(golden: GoldenConfig, folder: Path) -> None:
    """Writes initial weights in released names, random norms and biases too, and all batches."""
    model = Transformer(golden.model, LocalDispatcher(golden.model.num_routed_experts), torch.float32)
    initialize_weights(model, golden.seed)
    named = named_tensors(model)
    generator = torch.Generator().manual_seed(golden.seed)
    for name, tensor in named.items():
        if name.endswith("norm.weight"):
            tensor.normal_(1.0, 0.1, generator=generator)
        elif name.endswith(BIAS):
            tensor.normal_(0.0, 0.05, generator=generator)
    plan = stored_tensors(golden.model, dtype="F32", fp8=False)
    write_hf(folder / MODEL_FOLDER, golden.model, plan, named.__getitem__)
    task = open_task(golden.task, golden.model, golden.batch)
    arrays: Arrays = {}
    for step in range(golden.task.steps):
        read = task.read(make_batch(golden, step), torch.device("cpu"))
        for kind, tensors in (("inputs", read.inputs_BT), ("targets", read.targets_BT)):
            for depth, tensor_BT in enumerate(tensors):
                arrays[f"step_{step + 1}/{kind}/{depth_name(depth)}"] = tensor_BT.numpy()
    np.savez(folder / "batch.npz", **arrays)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _RecordedObjective:
    """An objective that also records the loss of each token."""

    inner: Objective
    record: Callable[[int, Tensor, Tensor], None]

    @property
    def balance(self) -> float:
        return self.inner.balance

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        result = self.inner.loss(hidden_BTD, head, batch, sink)
        assert result.log_probs_BT is not None
        self.record(head.depth, batch.extras[_PLACE], -result.log_probs_BT)
        return result


class _GoldenRank(NetworkComparison):
    """One rank of a run, which records what the passes of a step compute."""

    def __init__(self, golden: GoldenConfig, run: GoldenRun, cluster: ClusterConfig, folder: Path) -> None:
        """Opens the run with the weights in `folder`. All ranks call it."""
        self._golden = golden
        self._is_plain = run == golden.plain_run(run.precision)
        self._arrays: Arrays = {}
        self._balances: dict[int, Tensor] = {}
        self._world, self._replica = _open(golden, run, cluster)
        open_source(str(folder / MODEL_FOLDER), "out").fill(named_tensors(self._replica.model))
        # Weights in bf16 have float32 master copies, which only sharded state keeps.
        optim = replace(golden.optim, sharding="zero1") if run.precision == "bf16" else golden.optim
        self._learner = open_learner(self._replica, optim, golden.ema, comparison=self)
        for layer, block in self._replica.network.model.layers.items() if self._is_plain else ():
            block.self_attn.register_forward_hook(partial(self._record_attention, layer))

    def add(self, batches: BatchReader, objective: Objective) -> Objective:
        """Wraps the objective of a step."""
        return _RecordedObjective(objective, self._record_losses)

    def route(self, label: Label, router: Router, logits_BTE: Tensor) -> Routing:
        """Implements `Routes`: the router chooses."""
        routing = router.route(logits_BTE)
        size = logits_BTE.shape[:2]
        ids_TK, order_TK = routing.ids_TK.sort(-1)
        weights_TK = routing.weights_TK.detach().gather(1, order_TK)
        self._put(label, "router_scores", routing.scores_BTE.detach())
        self._put(label, "router_experts", ids_TK.unflatten(0, size))
        self._put(label, "router_weights", weights_TK.unflatten(0, size))
        if self._is_plain:
            self._balances[label.layer] = routing.balance().detach() / self._golden.batch.global_sequences
        return routing

    def run(self, step: int) -> Arrays:
        """Runs a step as `train.core.step.train_step` does, and returns its results in the order of execution."""
        golden, learner, replica = self._golden, self._learner, self._replica
        sizes = BatchSizes(golden.batch.global_sequences, golden.batch.sequence_length_tokens)
        rates = rates_of(golden.task, golden.optim, sizes, step)
        self._arrays = {}
        batch = StepBatch((make_batch(golden, step).sequences,), routes=(self,))
        losses = accumulate(learner, golden.task, batch, rates, reduce=learner.optimizer.reduce).losses
        norm = learner.optimizer.norm()
        results = self._arrays
        for layer, balance in self._balances.items():
            results[f"loss/balance/layers.{layer}"] = balance.double().numpy()
        means = dict(losses.by_name)
        means |= {BALANCE: means.pop(BALANCE), "total": losses.total}
        results |= {f"loss/{name}": np.asarray(mean) for name, mean in means.items()}
        gradients = by_released_name(replica.model, learner.store.gradient)
        results |= {f"gradient/{name}": gradients[name].numpy() for name in self._backward_order(gradients)}
        results["gradient_norm"] = np.asarray(norm)
        if not self._is_plain:
            results |= self._rank_results()
        learner.optimizer.update(rates.learning_rate)
        update_router_bias(replica, rates.bias_update)
        learner.update_average()
        # numpy has no bf16.
        updated = (
            (name, tensor if tensor.dtype.itemsize > 2 else tensor.float()) for name, tensor in self._updated().items()
        )
        return results | {name: tensor.numpy().copy() for name, tensor in updated}

    def leave(self) -> None:
        """Closes what was opened, after all ranks have arrived here."""
        dist.barrier(group=self._world.groups.world)
        self._learner.close()
        self._world.close()

    def _whole(self, name: str, like: Tensor) -> Tensor:
        """Returns the array of a result for all tokens of the global batch, [B, T, ...]."""
        if name not in self._arrays:
            batch = self._golden.batch
            shape = (batch.global_sequences, batch.sequence_length_tokens, *like.shape[2:])
            dtype = np.float64 if like.is_floating_point() else np.int64
            self._arrays[name] = np.full(shape, np.nan if like.is_floating_point() else -1, dtype)
        return torch.from_numpy(self._arrays[name])

    def _put(self, label: Label, kind: str, part: Tensor) -> None:
        replica = self._replica
        whole = self._whole(f"{kind}/layers.{label.layer}", part)
        first = replica.first_sequence(label.direction, label.micro_batch)
        replica.parts.put(part, replica.part_of(label.micro_batch), whole[first : first + part.shape[0]])

    def _record_attention(self, layer: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._put(Label(int(layer), 0, 0), "attention", output.detach())

    def _record_losses(self, depth: int, place_BT: Tensor, nats_BT: Tensor) -> None:
        whole = self._whole(f"token_loss/{depth_name(depth)}", nats_BT)
        whole.view(-1)[place_BT.flatten()] = nats_BT.flatten().double()

    def _backward_order(self, names: Iterable[str]) -> list[str]:
        """Returns names as a backward reaches the weights: head, MTP modules, final norm, layers, embedding."""

        def order(name: str) -> int:
            layer = layer_of(name)
            if layer is None or layer < self._golden.model.num_layers:
                return 0 if name == HEAD else 3
            return 2 if name.split(".")[3] in ("enorm", "hnorm", "eh_proj") else 1

        backward = list(names)[::-1]
        return sorted(backward, key=order)

    def _rank_results(self) -> Arrays:
        """Returns what each rank has by itself: sums of its tokens' losses, and its tokens by expert."""
        rank = f"rank_{self._world.rank}"
        losses = {name: nats_BT for name, nats_BT in self._arrays.items() if name.startswith("token_loss/")}
        sums = {name.replace("token_loss", f"{rank}/loss_sum"): np.asarray(np.nansum(losses[name])) for name in losses}
        gates = routers(self._replica.network)
        return sums | {f"{rank}/load/layers.{layer}": gate.load.numpy().copy() for layer, gate in gates.items()}

    def _updated(self) -> dict[str, Tensor]:
        """Returns moments, weights with router biases, and averages after the update."""
        model = self._replica.model
        names = {parameter: name for name, parameter in model.named_parameters()}
        state = self._learner.optimizer.state()

        def moment(kind: str, parameter: nn.Parameter) -> Tensor:
            part = state[f"{names[parameter]}.{kind}"]
            assert isinstance(part, Slice)
            return part.local.view_as(parameter)

        moments = {kind: by_released_name(model, partial(moment, kind)) for kind in MOMENTS}
        weights = named_tensors(model)
        biases = {name: weights.pop(name) for name in list(weights) if name.endswith(BIAS)}
        assert self._learner.ema is not None
        averages = {name: tensor for name, tensor in self._learner.ema.state().items() if name not in biases}
        kinds = {**moments, "weight": weights | biases, "average": averages}
        return {f"{kind}/{name}": tensor for kind, named in kinds.items() for name, tensor in named.items()}


def _open(golden: GoldenConfig, run: GoldenRun, cluster: ClusterConfig) -> Any:
    mesh = run.parallelism
    batch = replace(golden.batch, micro_sequences=run.micro_sequences)
    num_micro_batches = batch.global_sequences // (mesh.data * run.micro_sequences)
    schedule = build_schedule("1f1b" if mesh.pipeline == 1 else "dualpipe", mesh.pipeline, num_micro_batches)
    layout = Layout(mesh, cluster.ranks_per_node)
    world = open_world(layout, schedule, golden.model.mtp_depth, cluster, torch.device("cpu"))
    config = ReplicaConfig(
        model=golden.model,
        computing=Computing(products="fp8" if run.precision == "fp8" else "own"),
        precision=PrecisionConfig(kind="float32" if run.precision == "fp8" else run.precision),
        dispatch=AllToAllDispatchConfig(kind="all_to_all", payload="full", max_nodes=1, node_cap="verify"),
        tokens=TokenSizes(
            max_tokens=run.micro_sequences * batch.sequence_length_tokens // mesh.context,
            hidden_size=golden.model.hidden_size,
            num_choices=golden.model.num_experts_per_token,
        ),
        batch=batch,
        pairing="overlapped",
        seed=None,
    )
    cut = cut_layers(golden.model.num_layers, mesh.pipeline, golden.model.mtp_depth)
    return world, open_replica(world, config, schedule, cut)


def record_runs(
    golden: GoldenConfig,
    runs: Mapping[str, GoldenRun],
    folder: Path,
    cluster: ClusterConfig,
    send: Callable[..., None],
) -> None:
    """Joins the job, and writes this rank's results of each run into `folder`. All ranks call it.

    One rank alone writes the inputs first, if they are not there.
    """
    world_size = next(iter(runs.values())).parallelism.world_size
    start(cluster, dist.FileStore(os.environ[STORE_FILE_VARIABLE], world_size))  # type: ignore[attr-defined]
    if world_size == 1 and not (folder / MODEL_FOLDER).exists():
        write_inputs(golden, folder)
    for name, run in runs.items():
        rank = _GoldenRank(golden, run, cluster, folder)
        steps = [rank.run(step) for step in range(golden.task.steps)]
        rank.leave()
        for step, results in enumerate(steps, start=1):
            np.savez(folder / f"{name}-{step}-{dist.get_rank()}.npz", **results)  # type: ignore[arg-type]
        send(name, [float(results["loss/total"]) for results in steps], float(steps[0]["gradient_norm"]))
    stop()
