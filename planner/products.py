"""What rates were measured on, and how products depend on their sizes. No torch here."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from base.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from model.size import mlp_maps


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A linear map, how often a token uses it, its rows in a micro-batch, and how many of it a rank holds."""

    outputs: int
    inputs: int
    rows: float
    uses: float
    copies: float
    is_grouped: bool


Products = tuple[Product, ...]
Phase = Literal["F", "I", "W"]


def products_of(
    maps: Iterable[tuple[int, int]], rows: float, *, uses: float = 1.0, copies: float = 1.0, is_grouped: bool = False
) -> Products:
    """Returns the products of linear maps, given as outputs and inputs, with equal rows."""
    return tuple(
        Product(outputs=outputs, inputs=inputs, rows=rows, uses=uses, copies=copies, is_grouped=is_grouped)
        for outputs, inputs in maps
    )


def held_weights(products: Products) -> float:
    """Returns the weights that a rank reads in each micro-batch, and for which it sums gradients."""
    return sum(product.copies * product.outputs * product.inputs for product in products)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductCurve:
    """How much longer products take than their FLOP at full rate; see `conf/rates/h800_trace.yaml`."""

    inner_size: NonNegativeFloat
    output_size: NonNegativeFloat
    padding_rows: NonNegativeFloat
    exposed_reads: NonNegativeFloat
    gradient_bytes: NonNegativeFloat

    def work(self, products: Products, phase: Phase) -> float:
        """Returns the multiplications for a token, each weighted by how slow its product is."""
        return sum(
            product.uses * product.outputs * product.inputs * self._slowdown(product, phase) for product in products
        )

    def _slowdown(self, product: Product, phase: Phase) -> float:
        rows = product.rows + self.padding_rows * product.is_grouped
        # Sizes over which a product sums, and along which its columns run: X W, dY W^T, and dY^T X.
        inner, columns = {
            "F": (product.inputs, product.outputs),
            "I": (product.outputs, product.inputs),
            "W": (rows, product.inputs),
        }[phase]
        return (1 + self.inner_size / inner) * (1 + self.output_size / columns) * rows / product.rows


FLAT = ProductCurve(inner_size=0.0, output_size=0.0, padding_rows=0.0, exposed_reads=0.0, gradient_bytes=0.0)
"""Curve with which products of all sizes take the time of their FLOP at the measured rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RateErrors:
    """Relative errors of a step: of the rates, of what their curve adds, and of twice the peak."""

    measured: NonNegativeFloat
    curve: NonNegativeFloat
    device: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class RateReference:
    """What the times of `KernelRates` were measured on."""

    tokens: PositiveInt
    sequence_length_tokens: PositiveInt
    hidden_size: PositiveInt
    attention_maps: tuple[tuple[PositiveInt, PositiveInt], ...]
    recomputed_parameters: NonNegativeInt
    expert_width: PositiveInt
    expert_rows: PositiveInt
    local_experts: PositiveInt
    head_rows: PositiveInt
    score_width: PositiveInt
    active_expert_width: PositiveInt
    rows_across_nodes: PositiveFloat
    parameters_per_rank: PositiveInt
    num_sms: PositiveInt
    communication_sms: PositiveInt
    peak_flops: PositiveFloat
    inter_node_bytes_per_second: PositiveFloat
    intra_node_bytes_per_second: PositiveFloat

    @property
    def attention(self) -> Products:
        """The products of a layer's attention."""
        return products_of(self.attention_maps, self.tokens)

    @property
    def experts(self) -> Products:
        """The products of a layer's experts, shared ones included."""
        uses = self.expert_rows * self.local_experts / self.tokens
        shared = self.active_expert_width - round(uses * self.expert_width)
        maps = mlp_maps(self.hidden_size, self.expert_width)
        routed = products_of(maps, self.expert_rows, uses=uses, copies=self.local_experts, is_grouped=True)
        return (*routed, *products_of(mlp_maps(self.hidden_size, shared), self.tokens))

    @property
    def dense(self) -> Products:
        """The products of a dense MLP with as much work as the experts."""
        return products_of(mlp_maps(self.hidden_size, self.active_expert_width), self.tokens)

    @property
    def head(self) -> Products:
        """The product of an output head."""
        return products_of([(self.head_rows, self.hidden_size)], self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTimes:
    """Seconds of one pass of one layer's attention or experts, by kind of kernel."""

    products: NonNegativeFloat
    scores: NonNegativeFloat
    casts: NonNegativeFloat
    other: NonNegativeFloat


_NOTHING = KernelTimes(products=0.0, scores=0.0, casts=0.0, other=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTimes:
    """Kernel times of F, I and W."""

    forward: KernelTimes
    backward_input: KernelTimes
    backward_weight: KernelTimes


@dataclass(frozen=True, kw_only=True, slots=True)
class FormatSpeeds:
    """Time of a layer's products in bf16 over that in a format of `plan.products`, conversions included."""

    mxfp8: PositiveFloat
    nvfp4: PositiveFloat

    def speed(self, name: Literal["mxfp8", "nvfp4"] | None) -> float:
        """Returns the speed of a format; None is bf16."""
        return 1.0 if name is None else {"mxfp8": self.mxfp8, "nvfp4": self.nvfp4}[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeTimes:
    """Seconds of one layer's exchanges."""

    dispatch: NonNegativeFloat
    combine: NonNegativeFloat
    dispatch_backward: NonNegativeFloat
    combine_backward: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputedTimes:
    """Seconds of one layer's I for each kind of output that the backward recomputes."""

    norm: NonNegativeFloat
    mla_up: NonNegativeFloat
    swiglu: NonNegativeFloat
