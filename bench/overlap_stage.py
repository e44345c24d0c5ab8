"""Provides a pipeline stage with the model's phases, real exchanges, and computations that sleep.

Shape legend: T tokens of a micro-batch, K experts per token, E experts, D hidden size, A arrived rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.blocks import SleepBlock, SleepLog
from comm.protocol import Dispatcher, Label
from kernels.router.reference import limit_groups
from model.linear import GradientStore, WeightSink
from model.phases import CombinePhase, Computed, ComputePhase, DispatchPhase, Exchange
from model.precision.plain import PlainRows, PlainWire
from model.stage import Lane, Phase, StageRun, block_lanes
from model.values import ExpertOutput, Hidden, Received, Routed


@dataclass(frozen=True, kw_only=True, slots=True)
class EmulatedModel:
    """Model of equal stages with `blocks_per_stage` MoE blocks, whose two computations sleep.

    Like most stages of a long pipeline, they have no embedding and no head. `seconds` is the sleep of each computation
    in each of F, I and W.
    """

    blocks_per_stage: int
    seconds: float
    tokens: int
    hidden: int
    num_experts: int
    num_choices: int

    def ids(self, seed: int, num_groups: int, max_groups: int) -> Tensor:
        """Returns a micro-batch's experts, TK, in at most `max_groups` groups: the V3 gate, random scores."""
        generator = torch.Generator().manual_seed(seed)
        scores_TE = torch.rand(self.tokens, self.num_experts, generator=generator)
        mask_TE = limit_groups(scores_TE, num_groups, max_groups, self.num_choices // max_groups)
        return scores_TE.masked_fill(~mask_TE, -torch.inf).topk(self.num_choices, -1).indices


class _Slept(torch.autograd.Function):
    """Function that sleeps and returns its rows, and so for the gradient. Other inputs get zero gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, others: Tensor, weight: Tensor, block: SleepBlock, sink: WeightSink) -> Tensor:
        ctx.save_for_backward(others, weight)
        ctx.block, ctx.sink = block, sink
        block.sleep("F")
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        others, weight = ctx.saved_tensors
        block = ctx.block

        def gradient() -> Tensor:
            block.sleep("W")
            return torch.ones_like(weight)

        block.sleep("I")
        ctx.sink.defer(weight, gradient)
        return grads[0], torch.zeros_like(others), None, None, None


def _sleep(rows: Tensor, others: Tensor, block: SleepBlock, sink: WeightSink | None) -> Tensor:
    assert sink is not None
    out: Tensor = _Slept.apply(rows, others, block.weights[0], block, sink)
    return out


class EmulatedStage:
    """Stage with a real dispatcher between computations that sleep."""

    def __init__(
        self, model: EmulatedModel, number: int, dispatcher: Dispatcher, ids_TK: Tensor, log: SleepLog
    ) -> None:
        """Builds the stage; `ids_TK` holds the experts of every micro-batch and block."""
        self.lanes: tuple[Lane, ...] = block_lanes(is_dense=False) * model.blocks_per_stage
        self._model = model
        self._first_layer = number * model.blocks_per_stage
        self._dispatcher = dispatcher
        self._ids_TK = ids_TK
        self._weights_TK = torch.full(ids_TK.shape, 1 / ids_TK.shape[1])
        self._sleepers = [SleepBlock(model.seconds, log) for _ in range(2 * model.blocks_per_stage)]
        self._store = GradientStore(weight for block in self._sleepers for weight in block.weights)

    def start(self, direction: int, micro_batch: int) -> StageRun:
        phases: list[Phase] = []
        for index in range(self._model.blocks_per_stage):
            phases += self._block(index, Label(self._first_layer + index, direction, micro_batch))
        run = StageRun(phases)
        # Input of the first stage and output gradient of the last; other stages receive theirs.
        run.set_input(torch.zeros(1, self._model.tokens, self._model.hidden, dtype=torch.bfloat16))
        run.set_output_gradient(torch.ones(1, self._model.tokens, self._model.hidden, dtype=torch.bfloat16))
        return run

    def _block(self, index: int, label: Label) -> list[Phase]:
        attention, ffn = self._sleepers[2 * index : 2 * index + 2]

        def attend(hidden: Hidden, sink: WeightSink | None) -> Computed[Routed]:
            hidden_1TD = _sleep(hidden.hidden_BTD, self._weights_TK, attention, sink)
            return Computed(Routed(hidden_1TD, PlainRows(hidden_1TD), self._weights_TK, self._ids_TK))

        def experts(received: Received, sink: WeightSink | None) -> Computed[ExpertOutput]:
            routed_AD = _sleep(received.received.values, received.weights_A, ffn, sink)
            return Computed(ExpertOutput(routed_AD, received.residual_BTD))

        exchange = Exchange(self._dispatcher, label, PlainWire(), lambda dispatcher, handle: None)
        return [
            ComputePhase(attend, self._store),
            DispatchPhase(exchange),
            ComputePhase(experts, self._store),
            CombinePhase(exchange),
        ]
