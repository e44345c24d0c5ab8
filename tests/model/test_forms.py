"""Laws of every form of attention in stages, decoding and counts; `--plugins` adds those of files."""

from dataclasses import replace

import pytest
import torch

from comm.dispatch.local import LocalDispatcher
from infer.decoder import Decoder
from kernels.attention.documents import Documents
from model.config import ATTENTION_FORMS, Computing, ModelConfig, Products
from model.linear import GradientStore
from model.objective import LossSums, loss_names
from model.size import attention_parameters, count_parameters
from model.transformer import Transformer, initialize_weights, named_tensors
from tests.model.test_stage import make_batch, make_objective, phased
from tests.tiny import GQA, small_model

FORMS = [pytest.param(small_model(name), id=name) for name in ATTENTION_FORMS.names()]
TRAINED = [
    (name, products)
    for name in ATTENTION_FORMS.names()
    for products in ("own", "fp8")
    if products == "own" or ATTENTION_FORMS.get(name).has_fp8
]
WIDE = pytest.param(replace(GQA, num_heads=4, num_kv_heads=2, qk_norm=False), id="groups")


def build_model(config: ModelConfig, dtype: torch.dtype = torch.float64, products: Products = "own") -> Transformer:
    dispatcher, computing = LocalDispatcher(config.num_routed_experts), Computing(products=products)
    model = Transformer(config, dispatcher, dtype, computing=computing)
    initialize_weights(model, 3)
    return model


@pytest.mark.parametrize(("num_stages", "is_packed"), [(1, False), (4, True)])
@pytest.mark.parametrize("config", FORMS)
def test_stages_equal_the_whole_model(config: ModelConfig, num_stages: int, is_packed: bool) -> None:
    documents = Documents.from_positions(torch.arange(12).remainder(5).expand(2, 12)) if is_packed else None
    batch = replace(make_batch(config, 1), documents=documents)
    plain, cut = build_model(config), build_model(config)
    sums = LossSums(loss_names(config.mtp_depth))
    plain.loss(batch, make_objective(config), sums).backward()
    store = GradientStore(cut.parameters())
    made = phased(cut, num_stages, batch, store)
    torch.testing.assert_close(made.settle(), sums.settle(), rtol=1e-12, atol=0)
    ours = dict(cut.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), f"{name} does not change the loss"
        torch.testing.assert_close(store.gradient(ours[name]), parameter.grad, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "products"), TRAINED)
def test_it_trains_in_stages(name: str, products: Products) -> None:
    config = small_model(name)
    model, batch, losses = build_model(config, torch.float32, products), make_batch(config, 1), []
    store = GradientStore(model.parameters())
    for _ in range(8):
        store.clear()
        losses.append(float(phased(model, 2, batch, store).settle()[0]))
        with torch.no_grad():
            for weight in model.parameters():
                weight.sub_(0.1 * store.gradient(weight).clamp(-0.3, 0.3))
    assert losses[-1] < 0.9 * losses[0], losses


@torch.no_grad()
@pytest.mark.parametrize("config", [*FORMS, WIDE])
def test_cached_decoding_equals_whole_passes(config: ModelConfig) -> None:
    model = build_model(config)
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(config.vocab_size, (size,), generator=generator).tolist() for size in (7, 9)]
    expected = [model(torch.tensor([each]))[0] for each in tokens]
    decoder = Decoder(model, 2, 12, with_mtp=False)
    rows, lengths = [decoder.main.add() for _ in tokens], [3, 5]
    read = decoder.read(rows, [each[:size] for each, size in zip(tokens, lengths, strict=True)])
    for row, size in enumerate(lengths):
        torch.testing.assert_close(decoder.logits(read[row][1]), expected[row][:size], rtol=0, atol=1e-10)
    for width in (2, 1, 1):
        for row, size in enumerate(lengths):
            decoder.main.resize(row, size)
        new = torch.tensor([each[size : size + width] for each, size in zip(tokens, lengths, strict=True)])
        _, logits_BSV = decoder.step(new)
        for row, size in enumerate(lengths):
            torch.testing.assert_close(logits_BSV[row], expected[row][size : size + width], rtol=0, atol=1e-10)
        lengths = [size + width for size in lengths]


@torch.no_grad()
@pytest.mark.parametrize("config", FORMS)
def test_documents_and_later_tokens_are_not_seen(config: ModelConfig) -> None:
    model = build_model(config)
    tokens = torch.arange(10)[None]
    documents = Documents.from_positions(torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]))
    packed = model(tokens, documents)
    torch.testing.assert_close(packed[:, :4], model(tokens[:, :4], None), rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[:, 4:], model(tokens[:, 4:], None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", FORMS)
def test_counts_are_those_of_the_weights(config: ModelConfig) -> None:
    model = build_model(replace(config, mtp_depth=0))
    account = count_parameters(model.config)
    assert sum(weight.numel() for weight in model.parameters()) == account.total
    prefix = "model.layers.0.self_attn."
    layer = {name: weight for name, weight in named_tensors(model).items() if name.startswith(prefix)}
    assert sum(weight.numel() for weight in layer.values()) == attention_parameters(config)
    shapes = {f"{prefix}{name}.weight": shape for name, shape in config.attention_weights}
    assert {name: tuple(weight.shape) for name, weight in layer.items()} == shapes
