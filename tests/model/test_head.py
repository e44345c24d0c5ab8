"""The model's ends against formulas under ordinary autograd, and how much memory the loss takes.

Shape legend: B sequences, T tokens, N tokens of all, D hidden size, V vocabulary.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.mla import LatentAttention
from model.config import Computing
from model.head import Embedding, MtpBlock, score_tokens
from model.precision.linear import Projection, WeightSink
from model.transformer import build_linears
from tests.kernels import plain
from tests.kernels.plain import randn, strided
from tests.model.against_plain import Weights, assert_equals_plain, randomize
from tests.model.live_memory import LiveMemory
from tests.tiny import MODEL

ROOT = Path(__file__).resolve().parents[2]
V3_VOCABULARY = 129_280
NUM_ROWS = 1024


class Head(nn.Module):
    """The output matrix."""

    def __init__(self, vocab: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.lm_head = Projection(6, vocab, dtype)
        randomize(self, 1)


def nats_of(rows_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, sink: WeightSink | None) -> Tensor:
    """Returns the summed cross-entropy."""
    nats, _ = score_tokens(rows_BTD, head_VD, targets_BT, sink, value=lambda log_probs_N: -log_probs_N.sum())
    return nats


def some_targets(shape: tuple[int, ...], vocab: int) -> Tensor:
    targets = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(5))
    targets.flatten()[::3] = -100
    return targets


@pytest.mark.parametrize("frozen", [(), ("lm_head.weight",)])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_summed_cross_entropy_equals_formula(dtype: torch.dtype, is_split: bool, frozen: tuple[str, ...]) -> None:
    for shape, vocab in (((2, 5), 11), ((1, 1), 2), ((0, 4), 7), ((2, 70), 20_011)):
        targets = some_targets(shape, vocab)

        def call(
            head: Head, inputs: Sequence[Tensor], sink: WeightSink | None, targets: Tensor = targets
        ) -> tuple[Tensor]:
            return (nats_of(inputs[0], head.lm_head.weight, targets, sink),)

        def plainly(weights: Weights, inputs: Sequence[Tensor], targets: Tensor = targets) -> tuple[Tensor]:
            logits_NV = inputs[0].flatten(0, 1) @ weights["lm_head.weight"].t()
            return (plain.cross_entropies(logits_NV, targets.flatten()).sum(),)

        x = randn(*shape, 6, seed=2, dtype=dtype)
        for given in (x, strided(x)):
            assert_equals_plain(Head(vocab, dtype), call, plainly, [given], is_split=is_split, frozen=frozen)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_embedding_equals_lookup_and_sums_slopes_of_each_token(dtype: torch.dtype, is_split: bool) -> None:
    embedding = Embedding(9, 6, dtype)
    randomize(embedding, 1)
    tokens = torch.tensor([[0, 8, 3, 3], [3, 0, 0, 7]])
    factor = randn(2, 4, 6, seed=3, dtype=dtype)
    assert_equals_plain(
        embedding,
        lambda module, inputs, sink: (module(tokens, sink) * inputs[0],),
        lambda weights, inputs: (functional.one_hot(tokens, 9).double() @ weights["weight"] * inputs[0],),
        [factor],
        is_split=is_split,
    )


@pytest.mark.parametrize("frozen", [(), ("eh_proj.weight",)])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mtp_merge_equals_formula(dtype: torch.dtype, is_split: bool, frozen: tuple[str, ...]) -> None:
    linears = build_linears(Computing())
    attention = LatentAttention(MODEL, dtype, "auto", linears)
    block = MtpBlock(MODEL, range(0), dtype, attention, linears)
    for name, _ in list(block.named_children()):
        if name not in ("enorm", "hnorm", "eh_proj"):
            delattr(block, name)
    randomize(block, 1)

    def plainly(weights: Weights, inputs: Sequence[Tensor]) -> tuple[Tensor]:
        left = plain.rms_norm(inputs[0], weights["enorm.weight"], MODEL.norm_eps)
        right = plain.rms_norm(inputs[1], weights["hnorm.weight"], MODEL.norm_eps)
        return (torch.cat((left, right), -1) @ weights["eh_proj.weight"].t(),)

    for shape in ((2, 5, 32), (1, 1, 32), (0, 3, 32)):
        given = [randn(*shape, seed=2, dtype=dtype), strided(randn(*shape, seed=3, dtype=dtype))]
        assert_equals_plain(
            block,
            lambda module, inputs, sink: (module.merge(*inputs, sink),),
            plainly,
            given,
            is_split=is_split,
            frozen=frozen,
        )


def test_cross_entropy_without_gradients_records_nothing() -> None:
    head = Head(11, torch.float32)
    with torch.no_grad():
        nats = nats_of(torch.ones(1, 2, 6), head.lm_head.weight, torch.tensor([[1, -100]]), None)
    assert not nats.requires_grad


def test_cross_entropy_rejects_a_second_backward() -> None:
    """Its gradients are scaled in place, so a second backward would silently be wrong."""
    head = Head(11, torch.float64)
    nats = nats_of(randn(1, 3, 6, seed=0).requires_grad_(), head.lm_head.weight, some_targets((1, 3), 11), None)
    (nats * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second|modified by an inplace"):
        (nats * 2).backward()


def whole_logits(rows_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Computes all logits, then the loss, as usual."""
    logits_NV = functional.linear(rows_BTD.flatten(0, 1), head_VD)
    return functional.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=-100, reduction="sum")


def in_chunks(rows_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Computes the loss by this project's function."""
    return nats_of(rows_BTD, head_VD, targets_BT, None)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {"whole logits": whole_logits, "in chunks": in_chunks}


def loss_inputs(hidden: int, num_rows: int = NUM_ROWS) -> tuple[Tensor, Tensor, Tensor]:
    rows = randn(1, num_rows, hidden, seed=0, dtype=torch.float32).requires_grad_()
    head = torch.full((V3_VOCABULARY, hidden), 0.01).requires_grad_()
    return rows, head, some_targets((1, num_rows), V3_VOCABULARY)


def peak_bytes(loss: Loss, hidden: int) -> int:
    """Returns the peak bytes that operators allocate in forward and backward, with gradients and without inputs."""
    inputs = loss_inputs(hidden)
    with LiveMemory() as memory:
        loss(*inputs).backward()
    return memory.peak_bytes


@pytest.mark.parametrize(("hidden", "share"), [(64, 0.07), pytest.param(256, 0.13, marks=pytest.mark.long)])
def test_cross_entropy_of_v3s_vocabulary_takes_a_small_share_of_whole_logits_memory(hidden: int, share: float) -> None:
    chunked, whole = (peak_bytes(LOSSES[name], hidden) for name in ("in chunks", "whole logits"))
    print(f"hidden {hidden}: {chunked / 2**20:.0f} MiB of {whole / 2**20:.0f}: {chunked / whole:.4f}")
    assert whole > 3 * 4 * NUM_ROWS * V3_VOCABULARY / 2
    assert chunked <= share * whole


MEASURE = """
import sys
from pathlib import Path
from tests.model.test_head import LOSSES, loss_inputs

def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


loss, hidden = LOSSES[sys.argv[1]], int(sys.argv[2])
loss(*loss_inputs(hidden, 1)).backward()
inputs = loss_inputs(hidden)
Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is resident now
before = most()
loss(*inputs).backward()
print(most() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the largest resident set is read from Linux's /proc"
)
def test_cross_entropy_of_v3s_vocabulary_is_as_small_to_the_operating_system() -> None:
    """Growth of a process' resident set, gradients included and inputs not."""
    grown = {}
    for name in LOSSES:
        command = [sys.executable, "-c", MEASURE, name, "256"]
        grown[name] = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    chunked, whole = grown["in chunks"] / 1024, grown["whole logits"] / 1024
    print(f"hidden 256: {chunked:.0f} MiB of {whole:.0f}: {chunked / whole:.4f}")
    assert whole > 1000
    assert chunked <= 0.15 * whole
