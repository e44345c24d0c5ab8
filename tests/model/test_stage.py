"""Stages against the plain model, also with another form of attention, and no wait for the device."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from comm.dispatch.local import LocalDispatcher
from comm.protocol import ALONE, ContextGroup
from infer.decoder import Decoder
from kernels.attention.documents import Documents
from model.attention.cache import CacheView, PromptView
from model.attention.form import Attention
from model.attention.mla import LatentAttention
from model.config import ATTENTION_FORMS, AttentionForm, Computing, ModelConfig, Products, cut_layers
from model.linear import GradientStore, Projection, WeightSink
from model.norm import RmsNorm
from model.objective import CrossEntropy, LossSums, MicroBatch, Objective, loss_names
from model.precision.linears import Linears
from model.stage import Stage, StageRun
from model.transformer import Transformer, initialize_weights, routers, whole
from tests.host_reads import Reads
from tests.tiny import MODEL


def make_model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float64, whole(config))
    initialize_weights(model, seed)
    generator = torch.Generator().manual_seed(11)
    for router in routers(model).values():
        router.e_score_correction_bias.copy_(torch.randn(config.num_routed_experts, generator=generator) * 0.1)
    return model


def make_batch(config: ModelConfig, seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (2, 12 + config.mtp_depth + 1), generator=generator)
    targets = [tokens[:, depth + 1 : depth + 13].clone() for depth in range(config.mtp_depth + 1)]
    for target in targets:
        target[torch.rand(target.shape, generator=generator) < 0.2] = -100
    inputs = tuple(tokens[:, depth : depth + 12] for depth in range(config.mtp_depth + 1))
    return MicroBatch(inputs_BT=inputs, targets_BT=tuple(targets))


def make_objective(config: ModelConfig) -> CrossEntropy:
    return CrossEntropy(factors=tuple(0.1 / (depth + 1) for depth in range(config.mtp_depth + 1)), balance=0.05)


def run_phases(run: StageRun, stage: Stage, backward: bool) -> None:
    phases = list(enumerate(stage.lanes))
    for phase, lane in reversed(phases) if backward else phases:
        (run.backward if backward else run.forward)(phase)
        if lane == "comm":
            run.wait()


def run_weights(run: StageRun, stage: Stage) -> None:
    for phase, lane in enumerate(stage.lanes):
        if lane == "compute":
            run.weight(phase)


def phased(
    model: Transformer,
    num_stages: int,
    batch: MicroBatch,
    store: GradientStore | None,
    objective: Objective | None = None,
) -> LossSums:
    config, objective = model.config, objective or make_objective(model.config)
    sums = LossSums(loss_names(config.mtp_depth))
    cut = cut_layers(config.num_layers, num_stages, config.mtp_depth)
    last = num_stages - 1
    stages = [Stage(model, layers, first=index == 0, last=index == last) for index, layers in enumerate(cut)]
    # Those in the middle need the batch for its documents alone.
    given = [batch if index in (0, last) or batch.documents is not None else None for index in range(num_stages)]
    runs = [stage.start(each, objective, sums, store) for each, stage in zip(given, stages, strict=True)]
    for index, (run, stage) in enumerate(zip(runs, stages, strict=True)):
        if index:
            run.set_input(runs[index - 1].output())
        run_phases(run, stage, backward=False)
    if store is None:
        return sums
    for index in range(last, -1, -1):
        if index < last:
            runs[index].set_output_gradient(runs[index + 1].input_gradient())
        run_phases(runs[index], stages[index], backward=True)
    for run, stage in zip(runs, stages, strict=True):
        run_weights(run, stage)
    return sums


CONFIGS = [
    MODEL,
    replace(MODEL, mtp_depth=2, mtp_hidden="pre_norm", q_lora_rank=None),
    replace(MODEL, mtp_depth=0, num_shared_experts=0, num_dense_layers=0),
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS)
def test_phased_equals_plain(config: ModelConfig, num_stages: int, is_packed: bool) -> None:
    documents = Documents.from_positions(torch.arange(12).remainder(5).expand(2, 12)) if is_packed else None
    plain, cut = make_model(config), make_model(config)
    store = GradientStore(cut.parameters())
    plain_sums = LossSums(loss_names(config.mtp_depth))
    made = torch.zeros(config.mtp_depth + 2, dtype=torch.float64)
    for seed in range(2):
        batch = replace(make_batch(config, seed), documents=documents)
        plain.loss(batch, make_objective(config), plain_sums).backward()
        made = made + phased(cut, num_stages, batch, store).settle()
    expected = plain_sums.settle()
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=0)
    ours = dict(cut.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(store.gradient(ours[name]), parameter.grad, rtol=1e-10, atol=1e-14, msg=name)
    for layer, router in routers(plain).items():
        assert torch.equal(router.load, routers(cut)[layer].load)


def test_forward_only_gives_the_same_losses_and_keeps_no_gradient() -> None:
    model = make_model(MODEL)
    batch = make_batch(MODEL, 5)
    expected = LossSums(loss_names(1))
    with torch.no_grad():
        model.loss(batch, make_objective(MODEL), expected)
    made = phased(model, 2, batch, None)
    assert torch.equal(made.settle(), expected.settle())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    config = MODEL
    full = make_model(config, seed=5)
    part = whole(config)
    half = Transformer(
        config,
        LocalDispatcher(config.num_routed_experts),
        torch.float64,
        replace(part, layers=(2, 3), experts=range(4, 8), embedding=False, head=False),
    )
    initialize_weights(half, 5)
    ours, theirs = dict(half.named_parameters()), dict(full.named_parameters())
    for name, parameter in ours.items():
        expected = theirs[name]
        if ".mlp.experts." in name:
            expected = expected[4:8]  # type: ignore[assignment]
        assert torch.equal(parameter, expected), name
    other = make_model(config, seed=6)
    assert not torch.equal(other.head_weight, full.head_weight)


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
        out: Tensor = x_BTD + self.o_proj(self._mix(*projected.chunk(3, -1), seen), sink)  # type: ignore[call-arg]
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
        seen = None if view.future_BST is None else ~view.future_BST[:, None]  # type: ignore[assignment]
        key, value = view.read().chunk(2, -1)
        mixed_BSD = self._mix(query_ND.view(*view.positions_BS.shape, -1), key, value, seen)
        return hidden_ND + self.o_proj(mixed_BSD.flatten(0, 1), None)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
        heads = (each.unflatten(-1, (self._heads, -1)).transpose(1, 2) for each in (query, key, value))
        return ATTENDED(*heads, attn_mask=seen).transpose(1, 2).flatten(2)  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiHeadConfig(ModelConfig):
    head_size: int

    ROTATED: ClassVar[str] = "head_size"

    @property
    def cached_values(self) -> int:
        return 2 * self.hidden_size


MULTI_HEAD = MultiHeadConfig(
    **{field.name: getattr(MODEL, field.name) for field in fields(ModelConfig) if field.name != "attention"},
    attention="multi_head",
    head_size=MODEL.hidden_size // MODEL.num_heads,
)


@pytest.fixture(autouse=True)
def _form() -> Iterator[None]:
    form = AttentionForm(summary="", config=MultiHeadConfig, build=MultiHeadAttention, small=lambda config: {})
    ATTENTION_FORMS.register("multi_head", form)
    yield
    ATTENTION_FORMS.remove(["multi_head"])


def make_model_of_another_form(dtype: torch.dtype = torch.float64, products: Products = "own") -> Transformer:
    dispatcher, computing = LocalDispatcher(MODEL.num_routed_experts), Computing(products=products)
    model = Transformer(MULTI_HEAD, dispatcher, dtype, computing=computing)
    initialize_weights(model, 3)
    return model


def test_a_configuration_has_latent_attention() -> None:
    latent = Transformer(MODEL, LocalDispatcher(MODEL.num_routed_experts), torch.float64)
    assert isinstance(latent.block(0).self_attn, LatentAttention)
    assert isinstance(make_model_of_another_form().block(0).self_attn, MultiHeadAttention)


@pytest.mark.parametrize(("num_stages", "is_packed"), [(1, False), (4, True)])
def test_phased_equals_plain_of_another_form(num_stages: int, is_packed: bool) -> None:
    documents = Documents.from_positions(torch.arange(12).remainder(5).expand(2, 12)) if is_packed else None
    batch = replace(make_batch(MODEL, 1), documents=documents)
    plain, cut = make_model_of_another_form(), make_model_of_another_form()
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


@pytest.mark.slow
@pytest.mark.parametrize("products", ["own", "fp8"])
def test_it_trains_in_stages(products: Products) -> None:
    """Its input projections are the model's own linear layers, in both precisions."""
    model, batch, losses = make_model_of_another_form(torch.float32, products), make_batch(MODEL, 1), []
    store = GradientStore(model.parameters())
    for _ in range(8):
        store.clear()
        losses.append(float(phased(model, 2, batch, store).settle()[0]))
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * store.gradient(weight).clamp(-0.3, 0.3)  # type: ignore[misc]
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(store.gradient(weight).any() for name, weight in model.named_parameters() if "self_attn" in name)


@torch.no_grad()
def test_cached_decoding_equals_whole_passes() -> None:
    model = make_model_of_another_form()
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(MODEL.vocab_size, (size,), generator=generator).tolist() for size in (7, 9)]
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


def test_computations_of_a_step_read_nothing_from_the_device() -> None:
    model, reads = make_model(MODEL), Reads()
    stage, store = Stage(model, range(MODEL.num_layers), first=True, last=True), GradientStore(model.parameters())
    run = stage.start(make_batch(MODEL, 3), make_objective(MODEL), LossSums(loss_names(MODEL.mtp_depth)), store)

    def computed(phase: int, lane: str, way: str) -> None:
        if lane == "compute":
            with reads:
                getattr(run, way)(phase)
        else:
            getattr(run, way)(phase)
            run.wait()

    lanes = list(enumerate(stage.lanes))
    for phase, lane in lanes:
        computed(phase, lane, "forward")
    for phase, lane in reversed(lanes):
        computed(phase, lane, "backward")
    for phase, lane in lanes:
        if lane == "compute":
            computed(phase, lane, "weight")
    assert reads.num_seen > 1000
    assert reads.found == []
