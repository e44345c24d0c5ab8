"""A small model in FP8, and the ways to run it."""

from dataclasses import replace

import torch
from torch import Tensor

from comm.dispatch.local import LocalDispatcher
from comm.protocol import Arrived, Dispatcher, Handle, Label, Work
from kernels.attention.documents import Documents
from model.config import Computing, ModelConfig, Products
from model.linear import GradientStore
from model.objective import LossSums, MicroBatch, loss_names
from model.transformer import Transformer, initialize_weights, named_tensors
from tests.model.test_stage import make_objective, phased
from tests.tiny import MODEL

FP8: list[Products] = ["fp8", "fp8_power_of_two"]
# Maps that begin within a tile of 128 and such that do not; a dense layer, two MoE layers, an MTP module.
CONFIG = replace(
    MODEL,
    num_layers=3,
    hidden_size=160,
    dense_intermediate_size=192,
    q_lora_rank=128,
    kv_lora_rank=48,
    expert_intermediate_size=80,
)

# After `scale_like_trained`, it is as unsure of its tokens, and of their experts, as trained models are.
CONFIDENT = replace(CONFIG, vocab_size=64, initializer_range=0.03)


def scale_like_trained(model: Transformer) -> None:
    """Scales both ends of a new model or a part, so that layers change the embedding and do not replace it."""
    with torch.no_grad():
        for name, weight in named_tensors(model).items():
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                weight.mul_(3.0 if name.startswith("model") else 4.0)


class Away:
    """A dispatcher whose rows, for all that the model knows, leave the rank."""

    def __init__(self, inner: Dispatcher) -> None:
        self._inner = inner
        self.num_local_experts = inner.num_local_experts

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        return self._inner.plan(ids_TK, weights_TK, label)

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        return self._inner.dispatch(rows_TD, weights_TK, handle)

    def dispatch_again(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        return self._inner.dispatch_again(rows_TD, handle)

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        return self._inner.combine(rows_AD, handle)

    def dispatch_backward(self, rows_AD: Tensor, weights_A: Tensor, handle: Handle) -> Work[tuple[Tensor, Tensor]]:
        return self._inner.dispatch_backward(rows_AD, weights_A, handle)

    def combine_backward(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        return self._inner.combine_backward(rows_TD, handle)

    def close(self) -> None:
        self._inner.close()


def make_model(products: Products, config: ModelConfig = CONFIG, *, is_away: bool = False) -> Transformer:
    dispatcher: Dispatcher = LocalDispatcher(config.num_routed_experts)
    made = Transformer(
        config, Away(dispatcher) if is_away else dispatcher, torch.bfloat16, computing=Computing(products=products)
    )
    initialize_weights(made, 3)
    return made


def make_batch(config: ModelConfig, sequences: int = 2, size: int = 75, *, is_packed: bool = False) -> MicroBatch:
    """Sequences that are not whole tiles of 128."""
    depths = range(config.mtp_depth + 1)
    ids = torch.randint(config.vocab_size, (sequences, size + len(depths)), generator=torch.Generator().manual_seed(1))
    return MicroBatch(
        inputs_BT=tuple(ids[:, depth : depth + size] for depth in depths),
        targets_BT=tuple(ids[:, depth + 1 : depth + 1 + size] for depth in depths),
        documents=Documents.from_positions(torch.arange(size).remainder(13).expand(sequences, size))
        if is_packed
        else None,
    )


def compute_eagerly(made: Transformer, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss, and gradients by autograd."""
    loss = made.loss(batch, make_objective(made.config), LossSums(loss_names(made.config.mtp_depth)))
    loss.backward()
    grads = {name: weight.grad for name, weight in made.named_parameters() if weight.grad is not None}
    assert len(grads) == len(list(made.parameters()))
    return loss.detach(), grads


def by_phases(
    made: Transformer, batch: MicroBatch, num_stages: int = 1, store: GradientStore | None = None
) -> dict[str, Tensor]:
    """Gradients in float32 as phases sum them, and the losses. store: of the model, if it has one."""
    store = store or GradientStore(made.parameters())
    sums = phased(made, num_stages, batch, store)
    grads = {name: store.gradient(weight) for name, weight in made.named_parameters()}
    return {**grads, "losses": sums.settle()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, theirs[name]), name
