"""Another form of attention is one class: a model of it trains in phases and decodes like any other."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from comm.context.protocol import ALONE, ContextGroup
from comm.dispatch.local import LocalDispatcher
from infer.decoder import Decoder
from kernels.attention.documents import Documents
from model.attention.form import Attention, AttentionForm
from model.attention.kv_cache import CacheView, PromptView
from model.attention.mla import LatentAttention
from model.config import Computing, ModelConfig, Products
from model.gradients import GradientStore
from model.norm import RmsNorm
from model.objective import LossSums, loss_names
from model.precision.linear import Projection, WeightSink
from model.precision.linears import Linears
from model.transformer import Transformer, initialize_weights
from tests.model.test_stage import make_batch, make_objective, phased
from tests.tiny import MODEL

ATTENDED = partial(functional.scaled_dot_product_attention, dropout_p=0.0)


class MultiHeadAttention(Attention):
    """Plain multi-head attention without positions: every head has its own queries, keys and values."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, kernel: str, linears: Linears) -> None:
        super().__init__()
        self._linears, self._heads = linears, config.num_heads
        hidden = config.hidden_size
        self.q_proj = Projection(hidden, hidden, dtype)
        self.k_proj = Projection(hidden, hidden, dtype)
        self.v_proj = Projection(hidden, hidden, dtype)
        self.o_proj = Projection(hidden, hidden, dtype)

    def forward(
        self,
        x_BTD: Tensor,
        norm: RmsNorm,
        sink: WeightSink | None,
        documents: Documents | None = None,
        context: ContextGroup = ALONE,
    ) -> Tensor:
        assert context.size == 1
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        projected = self._linears.normed_linear(x_BTD, norm, weights, sink)
        size = x_BTD.shape[1]
        seen = torch.ones(size, size, dtype=torch.bool).tril()
        if documents is not None:
            seen = seen & (documents.ids_BT[:, None, :, None] == documents.ids_BT[:, None, None, :])
        out: Tensor = x_BTD + self.o_proj(self._mix(*projected.chunk(3, -1), seen), sink)
        return out

    def decode(self, hidden_ND: Tensor, norm: RmsNorm, view: CacheView) -> Tensor:
        x_ND = norm(hidden_ND)
        query_ND, key_ND, value_ND = (layer(x_ND, None) for layer in (self.q_proj, self.k_proj, self.v_proj))
        view.write(torch.cat((key_ND, value_ND), -1))
        if isinstance(view, PromptView):
            parts = [each.split(list(view.counts)) for each in (query_ND, key_ND, value_ND)]
            mixed = []
            for query, key, value in zip(*parts, strict=True):
                seen = torch.ones(len(query), len(query), dtype=torch.bool).tril()
                mixed.append(self._mix(query[None], key[None], value[None], seen)[0])
            return hidden_ND + self.o_proj(torch.cat(mixed), None)
        seen = None if view.future_BST is None else ~view.future_BST[:, None]
        key, value = view.read().chunk(2, -1)
        mixed_BSD = self._mix(query_ND.view(*view.positions_BS.shape, -1), key, value, seen)
        return hidden_ND + self.o_proj(mixed_BSD.flatten(0, 1), None)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
        heads = (each.unflatten(-1, (self._heads, -1)).transpose(1, 2) for each in (query, key, value))
        return ATTENDED(*heads, attn_mask=seen).transpose(1, 2).flatten(2)


MULTI_HEAD = AttentionForm(
    name="multi_head", build=MultiHeadAttention, values_per_token=lambda config: 2 * config.hidden_size
)


def make_model(dtype: torch.dtype = torch.float64, products: Products = "own") -> Transformer:
    dispatcher, computing = LocalDispatcher(MODEL.num_routed_experts), Computing(products=products)
    model = Transformer(MODEL, dispatcher, dtype, computing=computing, attention=MULTI_HEAD)
    initialize_weights(model, 3)
    return model


def test_a_configuration_has_latent_attention() -> None:
    latent = Transformer(MODEL, LocalDispatcher(MODEL.num_routed_experts), torch.float64)
    assert latent.attention.name == "mla"
    assert isinstance(latent.block(0).self_attn, LatentAttention)
    assert isinstance(make_model().block(0).self_attn, MultiHeadAttention)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_phased_equals_plain(num_stages: int, is_packed: bool) -> None:
    documents = Documents.from_positions(torch.arange(12).remainder(5).expand(2, 12)) if is_packed else None
    batch = replace(make_batch(MODEL, 1), documents=documents)
    plain, cut = make_model(), make_model()
    sums = LossSums(loss_names(MODEL.mtp_depth))
    plain.loss(batch, make_objective(MODEL), sums).backward()
    store = GradientStore(cut.parameters())
    made = phased(cut, num_stages, batch, store)
    torch.testing.assert_close(made.settle(), sums.settle(), rtol=1e-12, atol=0)
    ours = dict(cut.named_parameters())
    assert sum("self_attn" in name for name in ours) == 4 * (MODEL.num_layers + MODEL.mtp_depth)
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(store.gradient(ours[name]), parameter.grad, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("products", ["own", "fp8"])
def test_it_trains_in_stages(products: Products) -> None:
    """Its input projections are the model's own linear layers, in both precisions."""
    model, batch, losses = make_model(torch.float32, products), make_batch(MODEL, 1), []
    store = GradientStore(model.parameters())
    for _ in range(12):
        store.clear()
        losses.append(float(phased(model, 2, batch, store).settle()[0]))
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * store.gradient(weight).clamp(-0.3, 0.3)
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(store.gradient(weight).any() for name, weight in model.named_parameters() if "self_attn" in name)


@torch.no_grad()
def test_cached_decoding_equals_whole_passes() -> None:
    model = make_model()
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(MODEL.vocab_size, (size,), generator=generator).tolist() for size in (7, 9)]
    expected = [model(torch.tensor([each]))[0] for each in tokens]
    decoder = Decoder(model, 2, 12, with_mtp=False)
    rows, lengths = [decoder.main.add() for _ in tokens], [3, 5]
    _, logits_BV = decoder.read_prompts(rows, [each[:size] for each, size in zip(tokens, lengths, strict=True)])
    for row, size in enumerate(lengths):
        torch.testing.assert_close(logits_BV[row], expected[row][size - 1], rtol=0, atol=1e-10)
    for width in (2, 1, 1):
        for row, size in enumerate(lengths):
            decoder.main.resize(row, size)
        new = torch.tensor([each[size : size + width] for each, size in zip(tokens, lengths, strict=True)])
        _, logits_BSV = decoder.step(new)
        for row, size in enumerate(lengths):
            torch.testing.assert_close(logits_BSV[row], expected[row][size : size + width], rtol=0, atol=1e-10)
        lengths = [size + width for size in lengths]
