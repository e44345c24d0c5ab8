"""Runs one step of a pipeline on this rank: with the project, torch's schedules, or only its blocks.

Shape legend: T rows of a micro-batch, D hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV

from bench.blocks import Block, DeferredGradients, SleepBlock, SleepLog, Workload, build_block
from comm.config import ParallelismConfig
from comm.layout import Layout
from comm.protocol import Work
from comm.transfers import PipelineTransport
from comm.watchdog.collective_log import CollectiveLog
from dualpipe.ir import Message, Schedule
from dualpipe.registry import SCHEDULES
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.execute import execute
from dualpipe.runtime.program import Lane
from train.core.world import message_key

Step = Callable[[], None]
OWN_KINDS = SCHEDULES.names()
TORCH_KINDS = ("torch:ScheduleDualPipeV", "torch:Schedule1F1B")
ALONE = "blocks alone"
_TIMEOUT_SECONDS = 60.0


class BlockRun:
    """Run of a block: F, I and W of one micro-batch."""

    def __init__(self, block: Block, like_TD: Tensor) -> None:
        """Stores the block; `like_TD` is the input of the first stage and the output gradient of the last."""
        self._block = block
        self._deferred = DeferredGradients()
        self._input_TD = like_TD.detach().requires_grad_()
        self._output_TD: Tensor | None = None
        self._gradient_TD = like_TD
        self._weight: Callable[[], None] | None = None

    def set_input(self, hidden_TD: Tensor, /) -> None:
        """Stores the activation of the previous stage."""
        self._input_TD = hidden_TD.requires_grad_()

    def output(self) -> Tensor:
        """Returns the activation for the next stage."""
        assert self._output_TD is not None
        return self._output_TD.detach()

    def set_output_gradient(self, gradient_TD: Tensor, /) -> None:
        """Stores the gradient of the next stage."""
        self._gradient_TD = gradient_TD

    def input_gradient(self) -> Tensor:
        assert self._input_TD.grad is not None
        return self._input_TD.grad

    def forward(self, phase: int) -> None:
        self._output_TD = self._block.forward(self._input_TD, self._deferred)

    def backward(self, phase: int) -> None:
        assert self._output_TD is not None
        torch.autograd.backward([self._output_TD], [self._gradient_TD])
        self._output_TD = None
        self._weight = self._deferred.take()

    def weight(self, phase: int) -> None:
        assert self._weight is not None
        self._weight()

    def wait(self) -> None:
        """Does nothing: no phase is ever pending."""


class PassingRun:
    """Run that passes its inputs on. Its F, I and W are calls of `perform` with their kind and phase."""

    def __init__(self, like_TD: Tensor, perform: Callable[[str, int], None]) -> None:
        self._hidden_TD = self._gradient_TD = like_TD
        self._perform = perform

    def set_input(self, hidden_TD: Tensor, /) -> None:
        self._hidden_TD = hidden_TD

    def output(self) -> Tensor:
        return self._hidden_TD

    def set_output_gradient(self, gradient_TD: Tensor, /) -> None:
        self._gradient_TD = gradient_TD

    def input_gradient(self) -> Tensor:
        return self._gradient_TD

    def forward(self, phase: int) -> None:
        self._perform("F", phase)

    def backward(self, phase: int) -> None:
        self._perform("I", phase)

    def weight(self, phase: int) -> None:
        self._perform("W", phase)

    def wait(self) -> None:
        """Does nothing: no phase is ever pending."""


class PassingStage:
    """Pipeline stage of one computation that passes its inputs on."""

    lanes: tuple[Lane, ...] = ("compute",)

    def __init__(self, like_TD: Tensor, perform: Callable[[str, int], None]) -> None:
        self._like_TD = like_TD
        self._perform = perform

    def start(self, direction: int, micro_batch: int) -> PassingRun:
        return PassingRun(self._like_TD, self._perform)


class BlockStage:
    """Pipeline stage of a block: one computation without exchange."""

    lanes: tuple[Lane, ...] = ("compute",)

    def __init__(self, block: Block, like_TD: Tensor) -> None:
        self._block = block
        self._like_TD = like_TD

    def start(self, direction: int, micro_batch: int) -> PassingRun | BlockRun:
        if isinstance(self._block, SleepBlock):
            block = self._block
            return PassingRun(self._like_TD, lambda kind, phase: block.sleep(kind))
        return BlockRun(self._block, self._like_TD)


class Links:
    """Adapter of the transport for the interpreter."""

    def __init__(self, transport: PipelineTransport, like_TD: Tensor) -> None:
        self._transport = transport
        self._like_TD = like_TD

    def post_receive(self, message: Message, /) -> Work[Tensor]:
        return self._transport.post_receive(message_key(message), self._like_TD.shape, self._like_TD.dtype)

    def send(self, message: Message, tensor: Tensor, /) -> None:
        self._transport.send(message_key(message), tensor)

    def flush(self) -> None:
        """Waits until all messages have been sent."""
        self._transport.flush()


def open_transport(num_ranks: int) -> PipelineTransport:
    """Opens the project's links between `num_ranks` gloo ranks. All ranks call it at the same point."""
    layout = Layout(ParallelismConfig(pipeline=num_ranks, data=1, expert=1), ranks_per_node=num_ranks)
    pairs = [(index, index + 1) for index in range(num_ranks - 1)]
    return PipelineTransport(layout, pairs, torch.device("cpu"), _TIMEOUT_SECONDS, CollectiveLog())


def own_step(schedule: Schedule, rank: int, workload: Workload, transport: PipelineTransport, log: SleepLog) -> Step:
    """Builds a step of the project: schedule, compiler, interpreter and transport as in training."""
    like_TD = torch.zeros(workload.num_rows, workload.hidden)
    stages = {
        stage: BlockStage(build_block(workload, schedule.num_ranks, schedule.num_stages, log), like_TD)
        for _, stage in schedule.stages_of(rank)
    }
    lanes = {number: stage.lanes for number, stage in stages.items()}
    program = compile_rank(schedule, rank, lanes, pairing.overlapped)
    links = Links(transport, like_TD)

    def run() -> None:
        execute(program, stages, links)  # type: ignore[arg-type]

    return run


def alone_step(num_micro_batches: int, workload: Workload, log: SleepLog) -> Step:
    """Builds a step of a rank's blocks without schedule and transfers: F, I and W in sequence."""
    like_TD = torch.zeros(workload.num_rows, workload.hidden)
    stage = BlockStage(build_block(workload, 1, 1, log), like_TD)

    def run() -> None:
        for micro_batch in range(num_micro_batches):
            block_run = stage.start(0, micro_batch)
            block_run.forward(0)
            block_run.backward(0)
            block_run.weight(0)

    return run


class _BlockModule(nn.Module):
    """Module of a block for torch's pipelines.

    The function of `build_weights` runs W of the last backward.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self._block = block
        self._deferred = DeferredGradients()
        self._weights = nn.ParameterList([nn.Parameter(weight) for weight in block.weights])
        block.weights[:] = list(self._weights)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Returns the block's output.

        The first stage's input also requires a gradient, so that all I are equal.
        """
        x_TD = x_TD if x_TD.requires_grad else x_TD.detach().requires_grad_()
        return self._block.forward(x_TD, self._deferred)

    def build_weights(self) -> Callable[[], None]:
        """Returns a function that runs W, as torch's `dw_builder`."""
        return self._deferred.take()


def torch_step(kind: str, rank: int, num_ranks: int, num_micro_batches: int, workload: Workload, log: SleepLog) -> Step:
    """Builds a step of one of torch's schedules, `TORCH_KINDS`, over the world's group."""
    like_TD = torch.zeros(workload.num_rows, workload.hidden)
    num_stages = num_ranks if kind == "torch:Schedule1F1B" else 2 * num_ranks
    like_TD.requires_grad_()  # else torch expects no gradient of it
    held = [rank] if num_stages == num_ranks else [rank, num_stages - 1 - rank]
    stages = []
    for stage in held:
        module = _BlockModule(build_block(workload, num_ranks, num_stages, log))
        stages.append(
            PipelineStage(
                module,
                stage,
                num_stages,
                torch.device("cpu"),
                input_args=like_TD,
                output_args=like_TD,
                dw_builder=module.build_weights,
            )
        )
    schedule: Schedule1F1B | ScheduleDualPipeV
    if kind == "torch:Schedule1F1B":
        schedule = Schedule1F1B(stages[0], num_micro_batches, loss_fn=_loss, scale_grads=False)
    else:
        schedule = ScheduleDualPipeV(stages, num_micro_batches, loss_fn=_loss, scale_grads=False)  # type: ignore[arg-type]
    batch_TD = torch.zeros(workload.num_rows * num_micro_batches, workload.hidden)
    arguments = (batch_TD,) if 0 in held else ()
    target = batch_TD if num_stages - 1 in held else None

    def run() -> None:
        schedule.step(*arguments, target=target, return_outputs=False)

    return run


def _loss(output_TD: Tensor, target_TD: Tensor) -> Tensor:
    return output_TD.sum()
