"""A new feature of the model costs no line of accounting: a residual stream of twice the width."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from comm.protocol import MappedWork, Work
from model.block import Attended, Block
from model.phases import CombinePhase, DispatchPhase
from model.transformer import Transformer
from model.values import ExpertGradients, ExpertOutput, Hidden, HiddenGradients, ReceivedGradients, RoutedGradients
from tests.ranks import run_ranks
from tests.tiny import write_text
from tests.train.predict.live import Compared, compare_rank
from tests.train.predict.test_live import BASE, PRECISIONS, check_alone, make_config
from train.config import TrainConfig
from train.predict.memory import hidden_bytes, planning_sizes


def first(stream: Tensor) -> Tensor:
    """Returns the stream that layers read."""
    return stream.chunk(2, -1)[0].contiguous()


def second(stream: Tensor) -> Tensor:
    return stream.chunk(2, -1)[1]


def joined(read: Tensor, other: Tensor) -> Tensor:
    """Returns both streams side by side, with an exchange between them."""
    return torch.cat([read + 0.25 * other, other - 0.25 * read], -1)


@contextmanager
def widened() -> Iterator[None]:
    """Gives models two residual streams side by side, of which layers read the first."""
    embed, head_loss = Transformer.embed, Transformer.head_loss
    mix, route, add_mlp, add_shared = Block.mix, Block.route, Block.add_mlp, Block.add_shared

    def wide_embed(self: Transformer, tokens_BT: Tensor, sink: Any) -> Tensor:
        embedded = embed(self, tokens_BT, sink)
        return joined(embedded, embedded)

    def wide_mix(self: Block, hidden: Tensor, *others: Any) -> Tensor:
        return joined(mix(self, first(hidden), *others), second(hidden))

    def wide_route(self: Block, residual: Tensor, *others: Any) -> Attended:
        return replace(route(self, first(residual), *others), residual_BTD=residual)

    def wide_add(add: Any) -> Any:
        def added(self: Block, residual: Tensor, *others: Any, **options: Any) -> Tensor:
            return joined(add(self, first(residual), *others, **options), second(residual))

        return added

    def wide_head_loss(self: Transformer, depth: int, hidden: Tensor, *others: Any, **options: Any) -> Any:
        return head_loss(self, depth, first(hidden) + second(hidden), *others, **options)

    def combine(self: CombinePhase, output: ExpertOutput) -> Work[Hidden]:
        base = output.base_BTD
        work = self._exchange.dispatcher.combine(output.routed_AD, self._exchange.planned())
        return MappedWork(work, lambda summed: Hidden(joined(first(base) + summed.view_as(first(base)), second(base))))

    def combine_backward(self: CombinePhase, gradients: HiddenGradients) -> Work[ExpertGradients]:
        grad = gradients.hidden_BTD
        assert grad is not None
        read = first(grad) - 0.25 * second(grad)
        base = torch.cat([read, second(grad) + 0.25 * first(grad)], -1)
        rows, exchange = read.flatten(0, 1), self._exchange
        work = exchange.dispatcher.combine_backward(exchange.wire.pack_gradient(rows), exchange.planned())
        unpack = exchange.wire.unpack_gradient
        return MappedWork(work, lambda received: ExpertGradients(unpack(received, rows), base))

    def dispatch_backward(self: DispatchPhase, gradients: ReceivedGradients) -> Work[RoutedGradients]:
        own = gradients.local_BTD
        assert own is not None
        work = self._exchange.dispatcher.dispatch_backward(
            gradients.received_AD, gradients.weights_A, self._exchange.planned()
        )
        residual = gradients.residual_BTD
        return MappedWork(work, lambda back: RoutedGradients(residual, own + back[0].view_as(own), back[1]))

    changes: list[tuple[type, str, Any]] = [
        (Transformer, "embed", wide_embed),
        (Transformer, "head_loss", wide_head_loss),
        (Block, "mix", wide_mix),
        (Block, "route", wide_route),
        (Block, "add_mlp", wide_add(add_mlp)),
        (Block, "add_shared", wide_add(add_shared)),
        (CombinePhase, "forward", combine),
        (CombinePhase, "backward", combine_backward),
        (DispatchPhase, "backward", dispatch_backward),
    ]
    with ExitStack() as stack:
        for owner, name, function in changes:
            stack.enter_context(patch.object(owner, name, function))
        yield


def compare_wide(rank: int, world_size: int, jobs: list[TrainConfig]) -> list[tuple[Compared, int]]:
    """Returns the measured and predicted bytes of each job, and the predicted bytes of a hidden state."""
    with widened():
        compared = compare_rank(rank, world_size, [(job, None) for job in jobs], False)
        return [(each, hidden_bytes(planning_sizes(job))) for each, job in zip(compared, jobs, strict=True)]


@pytest.mark.slow
def test_residual_stream_of_twice_the_width_is_predicted_without_a_change(tmp_path: Path) -> None:
    write_text(tmp_path)
    model = replace(BASE, num_layers=3, mtp_depth=0)
    jobs = [
        make_config(tmp_path, model, (), PRECISIONS["float32"]),
        make_config(tmp_path, model, ("norm",), PRECISIONS["bf16"]),
    ]
    (results,) = run_ranks(1, compare_wide, jobs)
    for job, (compared, message_bytes) in zip(jobs, results, strict=True):
        check_alone(compared, job.precision.kind)
        sizes = planning_sizes(job)
        assert message_bytes == 2 * hidden_bytes(sizes)
        assert message_bytes == 2 * sizes.num_tokens * model.hidden_size * sizes.value_bytes
