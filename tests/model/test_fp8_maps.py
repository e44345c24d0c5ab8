"""Norms, maps and latent attention in FP8 against their formulas in float64 over the same codes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kernels.heads.reference import rotate
from kernels.operation import check_columns
from kernels.quantize import reference
from kernels.quantize.layout import Quantized, QuantizedColumns, unpack
from model.attention.form import rotation_table, softmax_scale
from model.attention.mla import LATENT_NORM_EPS, LatentAttention
from model.config import MlaConfig
from model.linear import GradientStore, WeightQueue, WeightSink
from model.norm import NormSource, RmsNorm
from model.precision.fp8_linears import Fp8Linears
from model.precision.fp8_rows import Fp8Maps, pack_gradient, pack_rows
from tests.kernels.plain import randn
from tests.model.against_plain import randomize
from tests.model.fp8_plain import Gate, InFp8, Normed, expect, in_12_bits
from tests.tiny import MODEL

EPS = 1e-6
SHAPE = (2, 70)  # of rows: not a whole tile of 128, and more than one
HIDDEN = 160  # a tile and a quarter
Maps = list[nn.Parameter]


def parameter(*shape: int, seed: int, size: float = 0.1) -> nn.Parameter:
    return nn.Parameter(randn(*shape, seed=seed, dtype=torch.float32) * size)


def make_norm() -> RmsNorm:
    norm = RmsNorm(HIDDEN, EPS, torch.float32)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * randn(HIDDEN, seed=5, dtype=torch.float32))
        norm.weight[7] = 0
    return norm


def weight_gradients(
    weights: Sequence[nn.Parameter], is_split: bool, run: Callable[[WeightSink | None], None]
) -> list[Tensor]:
    """Returns the gradients after a backward that `run` executes.

    They come from autograd or from a sink, and exist in only one of the two.
    """
    queue = WeightQueue()
    run(queue if is_split else None)
    if not is_split:
        return [weight.grad for weight in weights if weight.grad is not None]
    assert all(weight.grad is None for weight in weights)
    store = GradientStore(weights)
    queue.flush(store)
    return [store.gradient(weight) for weight in weights]


@pytest.mark.covering(2)
@pytest.mark.parametrize("outputs", [(128, 72), (72, 128), (40,)], ids=str)
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_maps_of_a_norm_equal_the_formula(power_of_two: bool, is_split: bool, outputs: tuple[int, ...]) -> None:
    """Outputs are cut into tiles map by map, or over all maps if each of them begins a tile."""
    codes, linears, norm = InFp8(power_of_two), Fp8Linears(power_of_two=power_of_two), make_norm()
    weights = [parameter(size, HIDDEN, seed=index) for index, size in enumerate(outputs)]
    # Small slopes, as gradients are: below the bound that is right for inputs.
    x, slope = randn(*SHAPE, HIDDEN, seed=8, dtype=torch.float32), 1e-6 * randn(*SHAPE, sum(outputs), seed=9)
    x.requires_grad_()
    outs: list[Tensor] = []

    def run(sink: WeightSink | None) -> None:
        outs.append(linears.normed_linear(x, norm, weights, sink))
        outs[0].backward(slope.float())

    gradients = weight_gradients(weights, is_split, run)
    normal = Normed.of(codes, x.detach().flatten(0, 1), norm.weight, EPS)
    expect(outs[0].flatten(0, 1), torch.cat([normal.kept_AD @ codes.weight(each).t() for each in weights], 1), "output")
    parts = slope.flatten(0, 1).split(outputs, 1)
    whole = sum(codes.gradient(part) @ codes.weight(weight) for part, weight in zip(parts, weights, strict=True))
    assert isinstance(whole, Tensor)
    grad_x, grad_norm = normal.backward(whole)
    assert x.grad is not None
    # 1e6 times, so that what is near is near for its own size.
    expect(1e6 * x.grad.flatten(0, 1), 1e6 * grad_x, "gradient of x")
    assert norm.weight.grad is not None
    expect(1e6 * norm.weight.grad, 1e6 * grad_norm, "gradient of the norm")
    for made, part in zip(gradients, parts, strict=True):
        expect(1e6 * made, 1e6 * codes.weight_gradient(part, normal.kept_AD), "gradient of a map")


@pytest.mark.parametrize(("is_split", "power_of_two"), [(False, True), (True, False)])
def test_second_half_of_a_network_equals_the_formula(power_of_two: bool, is_split: bool) -> None:
    """The gate's backward reads codes of its input, in tiles that hold the last gates and the first ups."""
    codes, linears, width = InFp8(power_of_two), Fp8Linears(power_of_two=power_of_two), 200
    down = parameter(HIDDEN, width, seed=0)
    base, slope = randn(*SHAPE, HIDDEN, seed=1, dtype=torch.float32), randn(*SHAPE, HIDDEN, seed=3)
    hidden = randn(*SHAPE, 2 * width, seed=2, dtype=torch.float32)
    base.requires_grad_()
    hidden.requires_grad_()
    outs: list[Tensor] = []

    def run(sink: WeightSink | None) -> None:
        outs.append(linears.gated_down(base, hidden, down, sink))
        outs[0].backward(slope.float())

    (made,) = weight_gradients([down], is_split, run)
    hidden_AH, slope_AD = hidden.detach().flatten(0, 1).double(), slope.flatten(0, 1)
    out = codes.rows(Gate(hidden_AH).out_AM) @ codes.weight(down).t()
    expect(outs[0].flatten(0, 1), base.detach().flatten(0, 1).double() + out, "output")
    kept = Gate(codes.rows(hidden_AH))
    assert base.grad is not None
    assert hidden.grad is not None
    assert torch.equal(base.grad, slope.float())
    expect(hidden.grad.flatten(0, 1), kept.backward(codes.gradient(slope_AD) @ codes.weight(down)), "gradient within")
    expect(made, codes.weight_gradient(slope_AD, kept.out_AM), "gradient of the map")


@pytest.mark.parametrize(("is_split", "power_of_two"), [(False, True), (True, False)])
def test_maps_of_rows_that_experts_read_too_equal_the_formula(power_of_two: bool, is_split: bool) -> None:
    """Scales of these rows are powers of two under every rule.

    The rows are recomputed from x for the gradients of the maps.
    """
    codes, linears, norm = InFp8(power_of_two), Fp8Linears(power_of_two=power_of_two), make_norm()
    weights = [parameter(48, HIDDEN, seed=index) for index in range(2)]
    x, slope = randn(*SHAPE, HIDDEN, seed=8, dtype=torch.float32), randn(*SHAPE, 96, seed=9)
    normal = norm(x).detach().requires_grad_()
    outs: list[Tensor] = []

    def run(sink: WeightSink | None) -> None:
        rows = pack_rows(normal)
        assert rows.values.shape == normal.shape
        assert rows.values.untyped_storage().nbytes() == 4
        kept = unpack(rows.packed, HIDDEN)
        assert kept.scales.frexp().mantissa.unique().tolist() == [0.5]
        outs.append(linears.linear_of_rows(rows, NormSource.of(x, norm), weights, sink))
        outs[0].backward(slope.float())

    gradients = weight_gradients(weights, is_split, run)
    normal_AD = normal.detach().flatten(0, 1).double()
    rows_AD = codes.rows(normal_AD, rounds=True)
    expect(outs[0].flatten(0, 1), torch.cat([rows_AD @ codes.weight(each).t() for each in weights], 1), "output")
    parts = slope.flatten(0, 1).split(48, 1)
    whole = sum(codes.gradient(part) @ codes.weight(weight) for part, weight in zip(parts, weights, strict=True))
    assert isinstance(whole, Tensor)
    assert normal.grad is not None
    expect(normal.grad.flatten(0, 1), whole, "gradient of rows")
    for made, part in zip(gradients, parts, strict=True):
        expect(made, codes.weight_gradient(part, normal_AD, rounds=True), "gradient of a map")
    assert norm.weight.grad is None


@pytest.fixture
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces kernels by ones that reject what Triton's kernels reject."""
    quantize_1x128, quantize_columns = reference.quantize_1x128, reference.quantize_columns

    def rows(rows_ND: Tensor, *, power_of_two: bool, min_amax: float = 1e-4) -> Quantized:
        check_columns("rows", rows_ND=rows_ND)
        return quantize_1x128(rows_ND, power_of_two=power_of_two, min_amax=min_amax)

    def columns(
        rows_ND: Tensor, counts: Sequence[int], *, power_of_two: bool, min_amax: float = 1e-4
    ) -> QuantizedColumns:
        check_columns("columns", rows_ND=rows_ND)
        return quantize_columns(rows_ND, counts, power_of_two=power_of_two, min_amax=min_amax)

    monkeypatch.setattr(reference, "quantize_1x128", rows)
    monkeypatch.setattr(reference, "quantize_columns", columns)


@pytest.mark.usefixtures("_strict")
@pytest.mark.parametrize("outputs", [(128, 40), (40, 128)], ids=str)
def test_gradients_may_have_no_rows_of_their_own_in_memory(outputs: tuple[int, ...]) -> None:
    """The gradient of a sum is one number, expanded."""
    norm, weights = make_norm(), [parameter(size, HIDDEN, seed=index) for index, size in enumerate(outputs)]
    down = parameter(HIDDEN, sum(outputs) // 2, seed=2)
    found: list[list[Tensor]] = []
    for slope in (torch.ones(()).expand(*SHAPE, HIDDEN), torch.ones(*SHAPE, HIDDEN)):
        linears, x = Fp8Linears(power_of_two=False), randn(*SHAPE, HIDDEN, seed=8, dtype=torch.float32).requires_grad_()
        linears.gated_down(x, linears.normed_linear(x, norm, weights, None), down, None).backward(slope)
        linears.normed_linear(x, norm, weights, None).backward(slope[..., :1].expand(*SHAPE, sum(outputs)))
        each = (x, norm.weight, *weights, down)
        found.append([tensor.grad for tensor in each if tensor.grad is not None])
        for tensor in each:
            tensor.grad = None
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_weight_is_quantized_once_inside_the_context_and_again_afterwards() -> None:
    maps, weight = Fp8Maps(power_of_two=False), parameter(40, 200, seed=0)
    with maps.weights_unchanged():
        first = maps.codes(weight)
        assert maps.codes(weight) is first
    with torch.no_grad():
        weight.mul_(3)
    found = [maps.codes(weight)]
    with maps.weights_unchanged():
        found.append(maps.codes(weight))
    for changed in found:
        assert torch.equal(changed.forward.codes.view(torch.uint8), first.forward.codes.view(torch.uint8))
        torch.testing.assert_close(changed.forward.scales, 3 * first.forward.scales)
        torch.testing.assert_close(changed.backward.scales, changed.forward.scales.t())
    with pytest.raises(ZeroDivisionError), maps.weights_unchanged():
        raise ZeroDivisionError
    assert maps.codes(weight) is not maps.codes(weight)


@pytest.mark.parametrize("outputs", [(40,), (72, 128)], ids=str)
def test_gradient_blocks_share_a_scale_among_128_rows_in_the_product_for_the_input(outputs: tuple[int, ...]) -> None:
    weights = [parameter(size, 200, seed=index) for index, size in enumerate(outputs)]
    # The rows differ in size by a factor of a million, so that a block's scale loses the small ones.
    grad = randn(140, sum(outputs), seed=3, dtype=torch.float32) * torch.logspace(0, -6, 140)[:, None]
    tiles = Fp8Maps(power_of_two=False).gradient(grad, weights)
    blocks = Fp8Maps(power_of_two=False, gradient_blocks=True).gradient(grad, weights)
    assert all(torch.equal(*pair) for pair in zip(tiles.columns, blocks.columns, strict=True))
    for by_row, by_block in zip(tiles.pieces, blocks.pieces, strict=True):
        largest = torch.stack([rows.amax(0) for rows in by_row.scales.split(128)])
        assert torch.equal(by_block.scales, largest.repeat_interleave(128, 0)[:140])
        assert int((by_block.codes[:128].float() == 0).sum()) > int((by_row.codes[:128].float() == 0).sum())
    sent = [unpack(pack_gradient(grad, blocks=blocks), sum(outputs)).scales[:128] for blocks in (False, True)]
    assert torch.equal(sent[1], sent[0].amax(0).expand_as(sent[1]))
    assert not torch.equal(*sent)


def test_a_cached_weight_is_not_confused_with_a_freed_one() -> None:
    maps = Fp8Maps(power_of_two=False)
    with maps.weights_unchanged():
        for size in range(1, 20):
            # Nothing else keeps it, so that the next may be given its place in memory.
            assert maps.codes(torch.full((1, 4), float(size))).forward.scales.item() == pytest.approx(size / 448)


CONFIG = replace(
    MODEL,
    hidden_size=160,
    num_heads=3,
    q_lora_rank=136,
    kv_lora_rank=48,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    v_head_dim=20,
)

BATCH, TOKENS = 2, 70


class Core:
    """Queries, keys and values to what the heads mix, NV, whose backward reads that in 12 bits."""

    def __init__(self, config: MlaConfig, queries: Tensor, expanded: Tensor, shared: Tensor) -> None:
        """Stores queries, [N, H Q], keys without position and values, NE, and the shared key of all heads, NR."""
        self.leaves = [each.detach().requires_grad_() for each in (queries, expanded, shared)]
        heads, nope = config.num_heads, config.qk_nope_head_dim
        query, both, key = (
            each.view(BATCH, TOKENS, -1, size) for each, size in zip(self.leaves, _sizes(config), strict=True)
        )
        turns = torch.complex(*rotation_table(config, TOKENS, torch.float64))
        query = torch.cat([query[..., :nope], rotate(query[..., nope:], turns)], -1)
        shared_key = rotate(key, turns).expand(-1, -1, heads, -1)
        parts = query, torch.cat([both[..., :nope], shared_key], -1), both[..., nope:]
        self._parts = [part.transpose(1, 2) for part in parts]
        query, key, value = (part.detach() for part in self._parts)
        self._scale = softmax_scale(config)
        future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        self._shares = (query @ key.mT * self._scale).masked_fill(future, -torch.inf).softmax(-1)
        self.mixed_NV = (self._shares @ value).transpose(1, 2).flatten(2).flatten(0, 1)

    def backward(self, grad_NV: Tensor) -> tuple[Tensor, ...]:
        """Gradients of what it was made of."""
        query, key, value = (part.detach() for part in self._parts)
        grad, kept = (
            each.view(BATCH, TOKENS, -1, value.shape[-1]).transpose(1, 2)
            for each in (grad_NV, in_12_bits(self.mixed_NV))
        )
        slope = self._shares * (grad @ value.mT - (grad * kept).sum(-1, keepdim=True)) * self._scale
        torch.autograd.backward(self._parts, [slope @ key, slope.mT @ query, self._shares.mT @ grad])
        return tuple(leaf.grad for leaf in self.leaves if leaf.grad is not None)


def _sizes(config: MlaConfig) -> tuple[int, int, int]:
    return config.qk_head_dim, config.qk_nope_head_dim + config.v_head_dim, config.qk_rope_head_dim


def expected(
    codes: InFp8, config: MlaConfig, weights: dict[str, Tensor], norm: RmsNorm, x_ND: Tensor, slope_ND: Tensor
) -> dict[str, Tensor]:
    """Returns the output, and the gradient of x, of the norm and of every weight by name."""
    query_name = "q_proj.weight" if config.q_lora_rank is None else "q_a_proj.weight"
    down = [weights[query_name], weights["kv_a_proj_with_mqa.weight"]]
    normal = Normed.of(codes, x_ND, norm.weight, norm.eps)
    sizes = (len(down[0]), config.kv_lora_rank, config.qk_rope_head_dim)
    query, latent, shared = torch.cat([normal.kept_AD @ codes.weight(each).t() for each in down], 1).split(sizes, 1)
    latent_norm = Normed.of(codes, latent, weights["kv_a_layernorm.weight"], LATENT_NORM_EPS)
    expanded = latent_norm.kept_AD @ codes.weight(weights["kv_b_proj.weight"]).t()
    queries, query_norm = query, None
    if config.q_lora_rank is not None:
        query_norm = Normed.of(codes, query, weights["q_a_layernorm.weight"], LATENT_NORM_EPS)
        queries = query_norm.kept_AD @ codes.weight(weights["q_b_proj.weight"]).t()
    core = Core(config, queries, expanded, shared)
    out = weights["o_proj.weight"]
    found = {"output": x_ND.double() + codes.rows(core.mixed_NV, rounds=True) @ codes.weight(out).t()}
    found["o_proj.weight"] = codes.weight_gradient(slope_ND, in_12_bits(core.mixed_NV), rounds=True)
    grad_query, grad_expanded, grad_shared = core.backward(codes.gradient(slope_ND) @ codes.weight(out))

    def through(norm: Normed, name: str, up: str, grad: Tensor) -> Tensor:
        found[up] = codes.weight_gradient(grad, norm.kept_AD)
        grad_x, found[name] = norm.backward(codes.gradient(grad) @ codes.weight(weights[up]))
        return grad_x

    grad_latent = through(latent_norm, "kv_a_layernorm.weight", "kv_b_proj.weight", grad_expanded)
    if query_norm is not None:
        grad_query = through(query_norm, "q_a_layernorm.weight", "q_b_proj.weight", grad_query)
    grads = (grad_query, torch.cat([grad_latent, grad_shared], 1))
    found[query_name], found["kv_a_proj_with_mqa.weight"] = (
        codes.weight_gradient(each, normal.kept_AD) for each in grads
    )
    whole = sum(codes.gradient(grad) @ codes.weight(weight) for grad, weight in zip(grads, down, strict=True))
    assert isinstance(whole, Tensor)
    grad_x, found["norm"] = normal.backward(whole)
    found["x"] = slope_ND + grad_x
    return found


@pytest.mark.covering(2)
@pytest.mark.parametrize("query_rank", [None, 136, 128])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_attention_equals_the_formula(power_of_two: bool, is_split: bool, query_rank: int | None) -> None:
    config = replace(CONFIG, q_lora_rank=query_rank)
    attention = LatentAttention(config, torch.float32, "auto", Fp8Linears(power_of_two=power_of_two))
    norm = RmsNorm(config.hidden_size, config.norm_eps, torch.float32)
    randomize(attention, 1, 0.1)
    randomize(norm, 2, 0.3)
    x = randn(BATCH, TOKENS, config.hidden_size, seed=3, dtype=torch.float32).requires_grad_()
    slope = randn(*x.shape, seed=4)
    queue, weights = WeightQueue(), dict(attention.named_parameters())
    out = attention(x, norm, queue if is_split else None)
    out.backward(slope.float())
    maps = {name: weight for name, weight in weights.items() if "norm" not in name}
    store = GradientStore(maps.values())
    if is_split:
        assert all(weight.grad is None for weight in maps.values())
        queue.flush(store)
    plain = {name: weight.detach() for name, weight in weights.items()}
    exact = expected(InFp8(power_of_two), config, plain, norm, x.detach().flatten(0, 1), slope.flatten(0, 1))
    expect(out.flatten(0, 1), exact.pop("output"), "output")
    assert x.grad is not None
    expect(x.grad.flatten(0, 1), exact.pop("x"), "gradient of x")
    expect(norm.weight.grad, exact.pop("norm"), "gradient of the norm before")
    assert exact.keys() == weights.keys()
    for name, weight in weights.items():
        made = store.gradient(weight) if is_split and name in maps else weight.grad
        expect(made, exact[name], f"gradient of {name}")
