"""Updates a replica: gradients, optimizer and average, with one learner for each size of a ramp."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch import distributed as dist

from comm.dispatch.build import open_lane
from comm.protocol import CompletedWork
from data.config import BatchSizes
from dualpipe.ir import Message, Schedule
from dualpipe.runtime.execute import execute, open_clock
from model.config import ModelConfig
from model.linear import GradientStore
from model.objective import LossSums, MicroBatch, Objective
from model.objectives.pairs import SCORE, head_objective
from model.transformer import BIAS, Transformer, named_tensors, routers
from train.config import EmaConfig
from train.core.replica import BatchReader, Replica, TaskHook
from train.core.world import World, link_shapes, weight_dtype
from train.optim.adamw import units_of
from train.optim.learning_rate import OptimConfig
from train.optim.staged import Background, StagedAdamW, build_optimizer

if TYPE_CHECKING:
    from train.post.comparison import Reference


class ParameterEma:
    """The moving average of the weights that this rank holds (arXiv:2412.19437, section 3.2.3).

    It owns the averages, a copy of the weights on the host, and a thread. The copy follows an update on its lane, and
    the thread averages during the next step. The router bias is not a weight and is copied without averaging.
    """

    def __init__(self, model: Transformer, decay: float, wait_for_updates: Callable[[], None] = lambda: None) -> None:
        """Starts with the present weights; `decay`, from 0 to below 1, is the weight of the old average.

        `wait_for_updates` waits until no call of `update` is pending on the lane of the weights' updates.
        """
        self._model = model
        self._decay = decay
        self._wait_for_updates = wait_for_updates
        weights = named_tensors(model)
        self._copies = {
            name: torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda)
            for name, weight in weights.items()
        }
        self._averages = {name: torch.empty(weight.shape, dtype=torch.float32) for name, weight in weights.items()}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._under_way: Future[None] | None = None
        self.follow_weights()

    def update(self) -> None:
        """Waits for the average of the previous update, copies the weights, and starts to average them.

        Called on the lane of the weights' updates. On CUDA, the thread waits for the copy.
        """
        self._finish_average()
        weights = named_tensors(self._model)
        for name, weight in weights.items():
            self._copies[name].copy_(weight, non_blocking=True)
        is_on_gpu = any(weight.is_cuda for weight in weights.values())
        copied = torch.cuda.current_stream().record_event() if is_on_gpu else None
        self._under_way = self._worker.submit(self._average_copies, copied)

    def wait(self) -> None:
        """Waits until the averages include the last update, and raises the error of the thread."""
        self._wait_for_updates()
        self._finish_average()

    def _finish_average(self) -> None:
        if self._under_way is not None:
            under_way = self._under_way
            self._under_way = None
            under_way.result()

    def state(self) -> dict[str, Tensor]:
        """Returns the averages by released name, float32 on the host, unchanged until `update`."""
        self.wait()
        return self._averages

    def loaded(self) -> None:
        """Does nothing, because nothing else depends on the tensors of `state`."""

    def follow_weights(self) -> None:
        """Restarts the averages from the present weights."""
        self.wait()
        for name, weight in named_tensors(self._model).items():
            self._averages[name].copy_(weight)

    def close(self) -> None:
        """Ends the thread."""
        self.wait()
        self._worker.shutdown()

    def _average_copies(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        for name, average in self._averages.items():
            if name.endswith(BIAS):
                average.copy_(self._copies[name])
            else:
                average.mul_(self._decay).add_(self._copies[name].float(), alpha=1 - self._decay)


class NetworkComparison:
    """What a run compares its network with. This base class is for a run that compares with none."""

    @property
    def extras(self) -> "dict[str, Reference]":
        """Its part of a checkpoint, by the prefix of its names."""
        return {}

    @property
    def network(self) -> Replica | None:
        """The frozen network of the run's divergence, which may judge answers, too; None if there is none."""
        return None

    def add(self, batches: BatchReader, objective: Objective) -> Objective:
        """Adds what a frozen network finds to the micro-batches. All ranks call it."""
        return objective

    def follow(self, policy: Replica) -> None:
        """Copies the present weights of the policy, if the network is to have those at the start of a run."""

    def refresh(self, policy: Replica, num_done: int) -> None:
        """Copies the present weights of the policy, if that is due after this many steps. All ranks call it."""

    def with_schedule(self, schedule: Schedule) -> Self:
        """Returns the same weights under another schedule, which the policy's replica has validated."""
        return self

    def close(self) -> None:
        """Closes what was opened. All ranks call it at the same point."""


_NO_NETWORK = NetworkComparison()
_DATA_ALONE = TaskHook()


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """A replica that is trained, with its average and the frozen network that its task compares."""

    replica: Replica
    config: OptimConfig
    store: GradientStore
    optimizer: StagedAdamW
    ema: ParameterEma | None
    comparison: NetworkComparison
    hook: TaskHook
    ramp: Mapping[int, Schedule] = field(default_factory=dict)

    @property
    def world(self) -> World:
        """The process that holds the replica."""
        return self.replica.world

    @property
    def extras(self) -> "dict[str, ParameterEma | Reference]":
        """Further state of a checkpoint besides weights and optimizer state, by the prefix of its names."""
        average = {} if self.ema is None else {"ema": self.ema}
        return {**average, **self.comparison.extras}

    def update_average(self) -> None:
        """Starts to update the moving average, if the run keeps one, behind all updates of the weights."""
        if self.ema is not None:
            self.optimizer.after_updates(self.ema.update)

    def discard(self) -> None:
        """Discards what passes accumulated: gradients, router loads and traffic counts."""
        self.optimizer.discard()
        for gate in routers(self.replica.network).values():
            gate.load.zero_()
        self.replica.discard_counts()

    def close(self) -> None:
        """Closes optimizer, moving average and replica. All ranks call it at the same point."""
        self.optimizer.close()
        if self.ema is not None:
            self.ema.close()
        self.hook.close()  # it may use the frozen network
        self.comparison.close()
        self.replica.close()


def open_learner(
    replica: Replica,
    optim: OptimConfig,
    ema: EmaConfig,
    comparison: NetworkComparison = _NO_NETWORK,
    hook: TaskHook = _DATA_ALONE,
) -> Learner:
    """Builds the gradient store, the optimizer and, if configured, the moving average. All ranks call it."""
    model = replica.model
    world = replica.world
    store = GradientStore(replica.model.parameters())
    units = units_of(model, replica.stages, replica.schedule, world.groups)
    lane = open_lane(world.device, "reduction")
    background = Background(lane=lane, updates=replica.weight_updates, log=world.log)
    learner = Learner(
        replica=replica,
        config=optim,
        store=store,
        optimizer=build_optimizer(units, store, world.groups.world, optim, background),
        ema=None if ema.decay is None else ParameterEma(model, ema.decay, replica.weight_updates.wait_all),
        comparison=comparison,
        hook=hook,
    )
    if world.device.type == "cuda":
        warm_up(learner)
    return learner


def warm_up(learner: Learner) -> None:
    """Runs the first micro-batch of each direction without its transfers, and an update by zero gradients.

    All kernels are loaded by it. Otherwise CUDA loads a kernel at its first launch and may wait for the whole device,
    which receives occupy while they wait for other ranks. Weights, moments, averages, step counts and random state
    stay bitwise the same if no update has run before. All ranks call it.
    """
    replica = learner.replica
    network = replica.config.model
    device = replica.world.device
    shapes = link_shapes(replica.config, replica.parts, replica.schedule.slices)
    batches = [random_batch(network, (sequences, tokens), device) for sequences, tokens, _ in shapes]
    objective, names = head_objective(network, 1 / batches[0].targets_BT[0].numel())
    stages = replica.bind_stages(lambda _, number: batches[number], objective, LossSums(names), learner.store)
    steps = tuple(step for step in replica.train_program.steps if step.run.micro_batch < len(shapes))
    links = _NoLinks(shapes, weight_dtype(replica.config.precision), device)
    with replica.network.weights_unchanged():
        execute(replace(replica.train_program, steps=steps), stages, links, open_clock(device))
    learner.discard()

    learner.optimizer.norm()
    learner.optimizer.update(learning_rate=0.0)
    learner.update_average()
    num_steps = learner.optimizer.state()["step"]
    assert isinstance(num_steps, Tensor)
    num_steps.zero_()
    learner.optimizer.loaded()
    if learner.ema is not None:
        learner.ema.follow_weights()


@dataclass(frozen=True, slots=True)
class _NoLinks:
    """Links of a rank that communicates with no other and receives random values of a message's shape."""

    shapes: Sequence[tuple[int, int, int]]
    dtype: torch.dtype
    device: torch.device

    def post_receive(self, message: Message) -> CompletedWork[Tensor]:
        """Returns a random value."""
        shape = self.shapes[message.micro_batch]
        value_BTD = torch.randn(shape, generator=torch.Generator().manual_seed(dist.get_rank()))
        return CompletedWork(value_BTD.to(self.device, self.dtype))

    def send(self, message: Message, tensor: Tensor) -> None:
        """Drops a value."""

    def flush(self) -> None:
        """Returns at once."""


class LearnersByBatchSize:
    """One learner for each batch size; its programs run the number of micro-batches of that size.

    The learners share everything except schedules and programs. Programs are compiled once, at the start.
    """

    last: Learner

    def __init__(
        self, learner: Learner, sizes: BatchSizes, ramp: Mapping[int, Schedule], *, is_proven: bool = False
    ) -> None:
        """Compiles the programs of the ramp. Their schedules must place stages and messages as the learner's."""
        self.last = replace(learner, ramp=ramp)
        self._sizes = sizes
        self._sized = {
            sequences: _with_schedule(learner, schedule, is_proven=is_proven) for sequences, schedule in ramp.items()
        }
        assert set(sizes.sizes) <= {*self._sized, learner.replica.global_sequences}
        assert all(sized.replica.global_sequences == sequences for sequences, sized in self._sized.items())

    def for_step(self, step: int) -> Learner:
        """Returns the learner for a step, counted from 0."""
        return self._sized.get(self._sizes.sequences(step), self.last)


def _with_schedule(learner: Learner, schedule: Schedule, *, is_proven: bool) -> Learner:
    replica = learner.replica.with_schedule(schedule, is_proven=is_proven)
    return replace(learner, replica=replica, comparison=learner.comparison.with_schedule(schedule))


def random_batch(model: ModelConfig, shape: tuple[int, int], device: torch.device) -> MicroBatch:
    """Draws a random micro-batch of BT tokens, different on every rank, like real ones."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    drawn = [torch.randint(model.vocab_size, shape, generator=generator).to(device) for _ in range(model.mtp_depth + 2)]
    # One answer for each sequence, for the ranking of scores.
    score_BT = torch.zeros(shape, dtype=torch.int16, device=device)
    score_BT[:, -1] = 1
    return MicroBatch(inputs_BT=tuple(drawn[:-1]), targets_BT=tuple(drawn[1:]), extras={SCORE: score_BT})
