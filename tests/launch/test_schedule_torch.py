"""Orders that `launch.schedule` writes for torch run in torch's own pipelines, with the gradients of ours."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from bench.blocks import ProductBlock
from bench.contenders import BlockRun, BlockStage, Links
from comm.config import ParallelismConfig
from comm.layout import Layout
from comm.transfers import PipelineTransport
from comm.watchdog.collective_log import CollectiveLog
from dualpipe.ir import Schedule, from_json, linked_pairs
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.execute import execute
from launch.schedule import main
from tests.ranks import run_ranks

P, M, ROWS, HIDDEN = 4, 8, 3, 8
CHOICES = (
    *("schedule=1f1b", "schedule=interleaved_1f1b schedule.chunks=2", "schedule=interleaved_1f1b schedule.chunks=3"),
    *("schedule=dualpipe_v groups=all", "schedule=dualpipe_v groups=pairs", "schedule=zb_v groups=all"),
    *("schedule=interleaved_1f1b schedule.chunks=2 groups=all", "schedule=v_half", "schedule=v_min"),
)
CPU = torch.device("cpu")


def weights(stage: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(stage)
    return [torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64) / HIDDEN**0.5 for _ in range(2)]


def inputs(micro_batch: int) -> Tensor:
    return torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(micro_batch), dtype=torch.float64)


class SeededStage(BlockStage):
    """Stage whose micro-batches differ: each is the input of the first stage and the output gradient of the last."""

    def __init__(self, stage: int) -> None:
        self.block = ProductBlock(0, HIDDEN)
        self.block.weights = [weight.requires_grad_() for weight in weights(stage)]

    def start(self, direction: int, micro_batch: int) -> BlockRun:
        return BlockRun(self.block, inputs(micro_batch))


class Layer(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        return nn.functional.linear(x_TD, self.weight).tanh()


def gradients(parameters: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight.grad for weight in parameters if weight.grad is not None])


def our_gradients(schedule: Schedule, rank: int) -> dict[int, Tensor]:
    layout = Layout(ParallelismConfig(pipeline=P, data=1, expert=1), ranks_per_node=P)
    transport = PipelineTransport(layout, linked_pairs(schedule), CPU, 60.0, CollectiveLog())
    stages = {stage: SeededStage(stage) for _, stage in schedule.stages_of(rank)}
    lanes = {number: stage.lanes for number, stage in stages.items()}
    program = compile_rank(schedule, rank, lanes, pairing.overlapped)
    execute(program, stages, Links(transport, inputs(0)))  # type: ignore[arg-type]
    return {number: gradients(stage.block.weights) for number, stage in stages.items()}


def torch_gradients(path: str, schedule: Schedule, rank: int) -> dict[int, Tensor]:
    held = [stage for _, stage in schedule.stages_of(rank)]
    modules = {stage: nn.Sequential(*map(Layer, weights(stage))) for stage in held}
    stages = [PipelineStage(modules[stage], stage, schedule.num_stages, CPU) for stage in held]
    runtime = _PipelineScheduleRuntime(
        stages, M, loss_fn=lambda output_TD, target_TD: (output_TD * target_TD).sum(), scale_grads=False
    )
    runtime._load_csv(path)
    batch_TD = torch.cat([inputs(micro_batch) for micro_batch in range(M)])
    is_last = schedule.num_stages - 1 in held
    runtime.step(*((batch_TD,) if 0 in held else ()), target=batch_TD if is_last else None)
    return {stage: gradients([*module.parameters()]) for stage, module in modules.items()}


def run_both(rank: int, world_size: int, paths: list[str], orders: list[str]) -> list[float]:
    """Returns the largest difference of a gradient, relative to the largest gradient, for each order."""
    differences = []
    for path, order in zip(paths, orders, strict=True):
        schedule = from_json(order)
        theirs = torch_gradients(path, schedule, rank)
        ours = our_gradients(schedule, rank)
        assert theirs.keys() == ours.keys()
        differences.append(max(float((theirs[at] - ours[at]).abs().max() / ours[at].abs().max()) for at in ours))
    return differences


@pytest.mark.long
@pytest.mark.slow
def test_torch_runs_the_orders_with_our_gradients(tmp_path: Path) -> None:
    paths, orders = [], []
    for index, choice in enumerate(CHOICES):
        order, _, groups = choice.partition(" groups=")
        size = [*order.split(), f"num_ranks={P}", f"num_micro_batches={M}", "costs.exchange=0.5"]
        for form in (["format=torch", f"groups={groups or 'none'}"], ["format=json"]):
            assert main([*size, *form, f"out={tmp_path}/{index}.{form[0].removeprefix('format=')}"]) == 0
        paths.append(f"{tmp_path}/{index}.torch")
        orders.append((tmp_path / f"{index}.json").read_text())
    for rank, differences in enumerate(run_ranks(P, run_both, paths, orders)):
        assert max(differences) < 1e-12, f"rank {rank}: {dict(zip(CHOICES, differences, strict=True))}"
