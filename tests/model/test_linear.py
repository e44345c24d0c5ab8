"""The split backward: the same gradients as torch's, the weights' put off and given once."""

from weakref import ref

import torch
from torch import nn

from model.gradients import GradientStore, WeightQueue
from model.precision.linear import linear


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_split_linear_gives_input_gradient_now_and_weight_gradient_later() -> None:
    weight = nn.Parameter(randn(4, 3, seed=0))
    store, queue = GradientStore([weight]), WeightQueue()
    ours, theirs = randn(2, 5, 3, seed=1).requires_grad_(), randn(2, 5, 3, seed=1).requires_grad_()
    linear(ours, weight, queue).square().sum().backward()
    assert torch.equal(store.gradient(weight), torch.zeros(4, 3))
    queue.flush(store)
    queue.flush(store)
    reference = weight.detach().clone().requires_grad_()
    linear(theirs, reference, None).square().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(store.gradient(weight), reference.grad, rtol=1e-12, atol=1e-14)
    assert weight.grad is None


def test_queue_drops_what_a_gradient_held_before_it_computes_the_next() -> None:
    weight, queue = nn.Parameter(randn(1, seed=0)), WeightQueue()
    seen: list[bool] = []
    held = randn(1, seed=1)
    first = ref(held)

    def second() -> torch.Tensor:
        seen.append(first() is None)
        return randn(1, seed=2)

    queue.defer(weight, held.double)
    queue.defer(weight, second)
    del held
    queue.flush(GradientStore([weight]))
    assert seen == [True]


def test_store_keeps_float32_sums_of_bf16_gradients() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    store = GradientStore([weight])
    for _ in range(1000):
        (weight * 1.0).sum().backward()
    assert weight.grad is None
    assert store.gradient(weight).dtype == torch.float32
    assert float(store.gradient(weight)) == 1000.0  # bf16 alone would stop at 256
    store.clear()
    assert float(store.gradient(weight)) == 0.0
