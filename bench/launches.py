"""Counts the kernels that one expert layer of DeepSeek-V3 launches on CUDA, without a GPU.

The layer runs on tensors without memory as on CUDA. A launch is an operation of torch that is neither a view nor an
allocation, or a launch of a Triton kernel. Attention counts as one operation each way. Reading a number on the host
fails on such tensors, so the reads of the dispatch plan's counts are all that there are.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from comm.dispatch.local import LocalDispatcher, LocalHandle, SortedChoices, count_choices
from comm.protocol import Handle, Label
from kernels.attention import SIZED_CUDA
from kernels.launch import without_launches
from launch.config.run import compose_run
from model.config import Computing
from model.linear import GradientStore
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.stage import Stage
from model.transformer import Part, Transformer

Products = Literal["own", "fp8"]
TARGET = 150
TOKENS = 4096
_NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "lift_fresh", "promote_types")
_PHASES = ("attend", "dispatch", "experts", "combine")
_PASSES = ("F", "B", "W")

LaunchCounts = dict[tuple[str, str], int]
"""Launches by phase and pass; `reads` by the host are a phase of their own."""


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.place = ("", "")
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self) -> None:
        self.counts[self.place] += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in _NO_LAUNCH:
            self.add()
        return result


class _EvenDispatcher(LocalDispatcher):
    """Delivers equally many rows to every expert, since tensors without memory have no counts."""

    def __init__(self, num_experts: int, counter: _Counter) -> None:
        super().__init__(num_experts)
        self._counter = counter

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        count_choices(ids_TK, self.num_local_experts)

        def read() -> list[int]:
            self._counter.counts["reads", self._counter.place[1]] += 1
            return [0, *[ids_TK.numel() // self.num_local_experts] * self.num_local_experts]

        return LocalHandle(SortedChoices.sort(ids_TK), read)


@contextmanager
def _counted_kernels(counter: _Counter) -> Iterator[None]:
    launcher_of = KernelInterface.__getitem__

    def launcher(kernel: Any, grid: Any) -> Any:
        counter.add()
        return launcher_of(kernel, grid)

    KernelInterface.__getitem__ = launcher
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launcher_of


def count_launches(products: Products) -> LaunchCounts:
    """Counts the launches of one micro-batch in one expert layer in bf16, with products in that type or in FP8."""
    config = replace(compose_run(["experiment=quickstart", "model=v3_671b_4k"]).model, mtp_depth=0)
    layer = config.num_dense_layers
    counter = _Counter()
    with torch.device("meta"), _counted_kernels(counter), without_launches():
        model = Transformer(
            config,
            _EvenDispatcher(config.num_routed_experts, counter),
            torch.bfloat16,
            Part(layers=(layer,), experts=range(config.num_routed_experts), embedding=False, head=False),
            Computing(products=products, attention=SIZED_CUDA),
        )
        stage = Stage(model, range(layer, layer + 1), first=False, last=False)
        store = GradientStore(model.parameters())
        tokens_BT = torch.empty(1, TOKENS, dtype=torch.int64)
        batch = MicroBatch(inputs_BT=(tokens_BT,), targets_BT=(tokens_BT,))
        hidden_BTD = torch.empty(1, TOKENS, config.hidden_size, dtype=torch.bfloat16)
        with model.weights_unchanged(), counter:
            # The first micro-batch makes tables and FP8 weights, which stay.
            for _ in range(2):
                counter.counts.clear()
                objective = CrossEntropy(factors=(1.0,), balance=1e-4)
                run = stage.start(batch, objective, LossSums(loss_names(0)), store)
                run.set_input(hidden_BTD)
                for number, phase in enumerate(_PHASES):
                    counter.place = (phase, "F")
                    run.forward(number)
                    if stage.lanes[number] == "comm":
                        run.wait()
                run.set_output_gradient(torch.empty_like(run.output()))
                for number, phase in reversed(list(enumerate(_PHASES))):
                    counter.place = (phase, "B")
                    run.backward(number)
                    if stage.lanes[number] == "comm":
                        run.wait()
                for number, phase in enumerate(_PHASES):
                    counter.place = (phase, "W")
                    if stage.lanes[number] == "compute":
                        run.weight(number)
    return dict(counter.counts)


def num_launches(counts: LaunchCounts) -> int:
    """Returns all launches of a layer."""
    return sum(count for (phase, _), count in counts.items() if phase in _PHASES)


def launches_text(counts: dict[Products, LaunchCounts]) -> str:
    """Formats a table of phases and passes."""
    lines = [
        f"Launches of an expert layer of DeepSeek-V3 and one micro-batch, one rank, target {TARGET}",
        f"{'':20}" + "".join(f"{products:>16}" for products in counts),
        f"{'':20}" + f"{'F':>6}{'B':>5}{'W':>5}" * len(counts),
    ]
    for name in (*_PHASES, "reads"):
        cells = (f"{of.get((name, place), 0):>{5 + (place == 'F')}}" for of in counts.values() for place in _PASSES)
        lines.append(f"{'reads by the host' if name == 'reads' else name:20}" + "".join(cells))
    lines.append(f"{'launches':20}" + "".join(f"{num_launches(of):>16}" for of in counts.values()))
    return "\n".join(lines)


def measure_launches() -> dict[Products, LaunchCounts]:
    """Counts the launches in each precision."""
    return {products: count_launches(products) for products in get_args(Products)}
