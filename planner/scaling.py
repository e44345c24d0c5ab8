"""Rates of kernels, and how they scale to a run's model and devices. No torch here.

Matrix products scale with the weights of a token and, by a curve, with their sizes. Scores scale with the heads and the
length, casts and other kernels with the values that they read, and exchange with the rows that balanced experts
receive. All scale with tokens, except reads of weights and sums of gradients, once for each micro-batch.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import hypot, log2
from typing import Annotated, Literal

import numpy
from numpy.typing import NDArray

from base.ranges import AtLeast, NonNegativeFloat, PositiveFloat
from dualpipe.ir import Schedule
from model.config import LAYER
from model.size import attention_maps, dense_maps, expert_maps, shared_maps, stage_shapes
from planner.axes import context_seconds, tensor_seconds, with_gathers
from planner.products import (
    FLAT,
    ExchangeTimes,
    FormatSpeeds,
    KernelTimes,
    PassTimes,
    Phase,
    ProductCurve,
    Products,
    RateErrors,
    RateReference,
    RecomputedTimes,
    held_weights,
    products_of,
)
from train.config import TrainConfig
from train.predict.cut import run_cut
from train.predict.layer_times import LayerTimes, PartTimes
from train.predict.memory import rank_parameters
from train.predict.rank_bytes import count_replicas, host_update_seconds, matrix_flops
from train.predict.timing import MeasuredRates, RateSource, communication_share
from train.report.micro_batches import expert_bytes

_VALUE_BYTES = 2
_WIDE_BYTES = 4
_SCALE_BYTES = 4
_TILE = 128
REFERENCE_MEMORY_BYTES_PER_SECOND = 3.35e12
"""Memory of an H800, on which casts were measured."""
_PHASES: tuple[Phase, ...] = ("F", "I", "W")
_TOKENS = 8192
"""Number of tokens that are routed at random. The standard error of a row count is below 0.01."""
_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad:
    """The busiest ranks of a micro-batch, for which all others wait; means over micro-batches.

    `rank` and `node` are the rows of the fullest one over the mean. `copies` and `copies_across` are the copies of
    experts that the busiest rank sends or receives within its node and between nodes; `slots` are the most copies with
    which a rank computes.
    """

    rank: float = 1.0
    node: float = 1.0
    copies: float = 0.0
    copies_across: float = 0.0
    slots: float = 0.0


FORCED_BALANCE = ExpertLoad()


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelRates:
    """Times of kernels on a reference, which are scaled by work to other models and devices.

    `conf/rates/h800_trace.yaml` says what each value is.
    """

    kind: Literal["kernels"]
    reference: RateReference
    attention: PassTimes
    experts: PassTimes
    exchange: ExchangeTimes
    products: ProductCurve
    errors: RateErrors
    receive_imbalance: Annotated[float, AtLeast(1)]
    recomputed: RecomputedTimes
    dense_over_experts: PositiveFloat
    bf16_over_fp8: PositiveFloat
    formats: FormatSpeeds
    head_flops_per_second: PositiveFloat
    latency_seconds: NonNegativeFloat
    optimizer_seconds: NonNegativeFloat
    sources: tuple[RateSource, ...]

    def part_seconds(
        self,
        config: TrainConfig,
        attended_tokens: int | None = None,
        index: int | None = None,
        load: ExpertLoad = FORCED_BALANCE,
    ) -> LayerTimes:
        """Returns the seconds of the parts of a run's model for one micro-batch; see `LayerRates`."""
        scale = _Scale(self, config, attended_tokens or config.batch.sequence_length_tokens, index, load)
        again = LAYER in config.computing.recomputed
        exchange = scale.exchange
        weight_bytes, gradient_bytes = expert_bytes(config.model, is_fp8=config.precision.kind == "fp8")
        moe = scale.attention + scale.experts
        moe = replace(
            moe,
            # Gradients of copies travel while the next layers' W compute.
            backward_weight=max(moe.backward_weight, scale.over_links(0.0, gradient_bytes)),
            forward_exchange=scale.over_links(exchange.dispatch + exchange.combine, weight_bytes),
            # A recomputed layer sends its rows once more.
            backward_exchange=scale.over_links(
                exchange.dispatch_backward + exchange.combine_backward + again * exchange.dispatch, weight_bytes
            ),
        )
        moe = with_gathers(moe, config, self.reference, shared_maps(config.model), with_experts=True)
        return LayerTimes(
            dense=with_gathers(scale.attention + scale.dense, config, self.reference, dense_maps(config.model)),
            moe=moe,
            embedding=PartTimes(),
            head=scale.head,
            mtp=(moe + scale.projection + scale.head) * config.model.mtp_depth,
            latency_seconds=self.latency_seconds * scale.tokens * scale.width * (config.parallelism.pipeline > 1),
        )

    def alone_factor(self, config: TrainConfig) -> float:
        """Returns the factor on the computation of an operation that runs alone; see `CostModel`."""
        return DeviceScale.of_run(config, self.reference).alone

    def update_seconds(self, config: TrainConfig, schedule: Schedule) -> float:
        """Returns the time of the update of the rank with the most weights."""
        shapes = stage_shapes(run_cut(config, schedule.placement))
        most = 0.0
        for rank in range(schedule.num_ranks):
            held = rank_parameters(config, schedule, rank, shapes)
            replicas = count_replicas(config, schedule, rank)
            seconds = self.optimizer_seconds * held.total / self.reference.parameters_per_rank
            seconds += matrix_flops(config, held, replicas) / self.head_flops_per_second
            most = max(most, seconds + host_update_seconds(config, held, replicas))
        return most


Rates = KernelRates | MeasuredRates


def expert_rows(config: TrainConfig) -> float:
    """Returns the mean rows of an expert in a micro-batch; 1 in a model without experts."""
    tokens = config.batch.micro_sequences * config.mean_part_tokens * config.parallelism.expert
    return max(1.0, tokens * config.model.num_experts_per_token / max(1, config.model.num_routed_experts))


def shape_distance(config: TrainConfig, rates: Rates) -> dict[str, float] | None:
    """Returns how far a run is from what its rates were measured on, or None with rates of a run.

    `slowdown` is the computation of a layer over that at the measured rate, `error` the relative error of a step.
    """
    if not isinstance(rates, KernelRates):
        return None
    reference = rates.reference
    model = config.model
    part = "dense" if model.num_dense_layers == model.num_layers else "moe"
    computed, level = (
        getattr(each.part_seconds(config), part).work.compute for each in (rates, replace(rates, products=FLAT))
    )
    device = rates.errors.device * log2((config.cluster.peak_flops or reference.peak_flops) / reference.peak_flops)
    return {
        "expert_rows": expert_rows(config),
        "measured_rows": reference.expert_rows,
        "slowdown": computed / level,
        "error": hypot(rates.errors.measured, rates.errors.curve * (1 - level / computed), device),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceScale:
    """A run's device relative to that of the rates: factors on times.

    `intra_node` is the time of a byte within a node over that of a byte between nodes of the reference; `alone` is
    computation without exchange over computation next to exchange.
    """

    products: float
    memory: float
    inter_node: float
    intra_node: float
    alone: float

    @classmethod
    def of_run(cls, config: TrainConfig, reference: RateReference) -> "DeviceScale":
        """Returns the scale of a run's device. What its cluster does not say is as on the reference."""
        cluster = config.cluster
        used = communication_share("rates.reference", reference.communication_sms, reference.num_sms)
        taken = used
        if cluster.communication_sms is not None:
            taken = communication_share("cluster", cluster.communication_sms, cluster.num_sms or reference.num_sms)
        if config.parallelism.expert == 1:
            taken = 0.0
        busy = (1 - used) / (1 - taken)
        link = reference.inter_node_bytes_per_second
        memory = REFERENCE_MEMORY_BYTES_PER_SECOND
        return cls(
            products=busy * reference.peak_flops / (cluster.peak_flops or reference.peak_flops),
            memory=busy * memory / (cluster.memory_bytes_per_second or memory),
            inter_node=link / (cluster.inter_node_bytes_per_second or link),
            intra_node=link / (cluster.intra_node_bytes_per_second or reference.intra_node_bytes_per_second),
            alone=1 - taken,
        )


@dataclass(frozen=True)
class _Scale:
    """The work of a run's micro-batch relative to that of the reference."""

    rates: KernelRates
    config: TrainConfig
    sequence_tokens: int
    index: int | None
    load: ExpertLoad

    @cached_property
    def part(self) -> float:
        """The tokens of each sequence that a micro-batch has on a rank."""
        return self.config.mean_part_tokens if self.index is None else self.config.part_lengths[self.index]

    @cached_property
    def before(self) -> float:
        """The tokens of each sequence that a rank holds of earlier slices; without an index, their mean."""
        if self.index is None:
            return self.config.mean_part_tokens * (self.config.schedule.slices - 1) / 2
        return sum(self.config.part_lengths[: self.index])

    @cached_property
    def rows(self) -> float:
        return self.config.batch.micro_sequences * self.part

    @cached_property
    def tokens(self) -> float:
        return self.rows / self.rates.reference.tokens

    @property
    def width(self) -> float:
        return self.config.model.hidden_size / self.rates.reference.hidden_size

    @cached_property
    def device(self) -> DeviceScale:
        return DeviceScale.of_run(self.config, self.rates.reference)

    @property
    def attention(self) -> PartTimes:
        """One layer's attention, and the exchange of latents if ranks share sequences.

        Nothing hides the exchange, which overestimates it: latents travel during the attention of a rank's own tokens.
        """
        model = self.config.model
        reference = self.rates.reference
        score_width = model.num_heads * (model.qk_head_dim + model.value_head_dim)
        # Ranks that share a sequence expand the latents of all its tokens before their slice's end to keys and values.
        ranks = self.config.parallelism.context * self.sequence_tokens / self.config.batch.sequence_length_tokens
        shared = ranks * (self.before + self.part) / self.part
        # Without slices, tokens attend to half of their sequence in the mean.
        attended = ranks * self.tensor * (2 * self.before + self.part)
        expanded = [] if model.expanded_map is None else [model.expanded_map]
        again = products_of(expanded, self.rows * shared, uses=shared - 1, copies=0)
        latents = set(model.latents.values())
        maps = attention_maps(model)
        # Each tensor rank projects its rows to latents, and all rows for its heads.
        down = products_of([each for each in maps if each[0] in latents], self.rows)
        part = self._part(
            self.rates.attention,
            (*down, *self._split([each for each in maps if each[0] not in latents]), *again),
            reference.attention,
            scores=score_width * attended / reference.score_width / reference.sequence_length_tokens,
            others=self.width,
        )
        part = self._with_layer(self._without_recomputation(part, ("norm", "mla_up")), self._residual_again)
        gathered = sum(model.latents.values()) if "q_a_proj" in model.latents else model.hidden_size
        return part + context_seconds(self.config, reference) + self._tensor_seconds(gathered)

    @property
    def tensor(self) -> int:
        return self.config.parallelism.tensor

    def _split(self, maps: list[tuple[int, int]]) -> Products:
        """Returns the products of all rows of a tensor group with a rank's share of the weights."""
        outputs = [(rows // self.tensor, columns) for rows, columns in maps]
        return products_of(outputs, self.rows * self.tensor, uses=self.tensor)

    def _tensor_seconds(self, gathered_width: int) -> PartTimes:
        return tensor_seconds(self.config, self.rates.reference, self.rows, gathered_width)

    @property
    def experts(self) -> PartTimes:
        """One layer's experts, shared ones included."""
        model = self.config.model
        local = model.num_routed_experts // self.config.parallelism.expert
        uses = float(model.num_experts_per_token)
        rows = max(1.0, expert_rows(self.config) * self.part / self.config.mean_part_tokens)
        # The fullest rank computes more rows, with the weights of its copies in addition to its own.
        uses *= self.load.rank
        copies = local + self.load.slots
        rows *= self.load.rank * local / copies
        routed = products_of(expert_maps(model), rows, uses=uses, copies=copies, is_grouped=True)
        active = (uses + model.num_shared_experts) * model.expert_intermediate_size
        part = self._mlp((*routed, *self._split(shared_maps(model))), self.rates.reference.experts, active, 1.0)
        return part + self._tensor_seconds(model.hidden_size) * bool(shared_maps(model))

    @property
    def dense(self) -> PartTimes:
        width = self.config.model.dense_intermediate_size
        dense = self._split(dense_maps(self.config.model))
        part = self._mlp(dense, self.rates.reference.dense, width, self.rates.dense_over_experts)
        return part + self._tensor_seconds(self.config.model.hidden_size)

    @property
    def head(self) -> PartTimes:
        """An output head, in bf16."""
        model = self.config.model
        reference = self.rates.reference
        products = self._split([(model.num_head_rows, model.hidden_size)])
        measured = 2 * reference.tokens * held_weights(reference.head) / self.rates.head_flops_per_second
        sizes = (_VALUE_BYTES, _VALUE_BYTES)
        forward, backward, weight = (
            self._multiply(measured, products, reference.head, phase, sizes) for phase in _PHASES
        )
        return PartTimes(forward=forward, backward_input=backward, backward_weight=weight)

    @property
    def projection(self) -> PartTimes:
        """The projection of an MTP module, two hidden states to one."""
        hidden = self.config.model.hidden_size
        products = products_of([(hidden, 2 * hidden)], self.rows)
        return self._part(self.rates.attention, products, self.rates.reference.attention, scores=0.0, others=0.0)

    @cached_property
    def exchange(self) -> ExchangeTimes:
        """Seconds of an exchange with as many rows between nodes as the reference's, and its links."""
        rates = self.rates.exchange
        both = self.tokens * self.width * self.rates.receive_imbalance
        is_fp8 = self.config.precision.kind == "fp8" or self.config.dispatch.payload == "fp8"
        payload = 1.0 if is_fp8 else 2 / (1 + _SCALE_BYTES / _TILE)
        return ExchangeTimes(
            dispatch=rates.dispatch * both * payload,
            combine=rates.combine * both,
            dispatch_backward=rates.dispatch_backward * both,
            combine_backward=rates.combine_backward * both * payload,
        )

    def over_links(self, seconds: float, copy_bytes: float) -> float:
        """Returns the time of an exchange, given that of the reference's rows and the bytes of a copy."""
        load = self.load
        reference = self.rates.reference
        rows = rows_per_token(self.config)
        # Rows of two_hop reach a node over all its links, those of all_to_all over the link of their rank.
        fullest = load.node if self.config.dispatch.kind in ("two_hop", "deepep") else load.rank
        across = rows.across_nodes / reference.rows_across_nodes * fullest * seconds
        within = rows.within_node / reference.rows_across_nodes * load.rank * seconds
        per_byte = copy_bytes / reference.inter_node_bytes_per_second
        # Both links work at the same time, one part of a micro-batch after the other.
        return max(
            (across + load.copies_across * per_byte) * self.device.inter_node,
            (within + load.copies * per_byte) * self.device.intra_node,
        )

    def _mlp(self, products: Products, reference: Products, active_width: float, kind: float) -> PartTimes:
        share = active_width / self.rates.reference.active_expert_width
        part = self._part(self.rates.experts, products, reference, scores=0.0, others=share * self.width)
        part *= kind
        # The backward of a recomputed layer needs gate and up again, but not the last of the three products.
        down = kind * self._forward_products(self.rates.experts, products, reference) / 3
        return self._with_layer(self._without_recomputation(part, ("swiglu",)), part.forward - down)

    def _part(
        self, passes: PassTimes, products: Products, reference: Products, *, scores: float, others: float
    ) -> PartTimes:
        """Returns the times of a part by its work relative to the reference's."""
        is_fp8 = self.config.precision.kind == "fp8"

        def seconds(kernels: KernelTimes, phase: Phase) -> float:
            matrix = self._multiply(kernels.products, products, reference, phase, self._weight_bytes)
            computing = kernels.scores * scores * self.device.products
            waiting = (kernels.casts * is_fp8 + kernels.other) * others * self.device.memory
            return matrix + (computing + waiting) * self.tokens

        return PartTimes(
            forward=seconds(passes.forward, "F"),
            backward_input=seconds(passes.backward_input, "I"),
            backward_weight=seconds(passes.backward_weight, "W"),
        )

    @property
    def _weight_bytes(self) -> tuple[int, int]:
        """Bytes of a weight where products were measured, in FP8, and in the run."""
        return 1, 1 if self.config.precision.kind == "fp8" else _VALUE_BYTES

    def _multiply(
        self, measured: float, products: Products, reference: Products, phase: Phase, weight_bytes: tuple[int, int]
    ) -> float:
        """Returns the time of products, given the `measured` seconds of their reference.

        Reads of weights that nothing hides, or sums of gradients, take the same time for any number of rows.
        """
        curve = self.rates.products
        weight = (1.0 if phase == "W" else curve.exposed_reads) / REFERENCE_MEMORY_BYTES_PER_SECOND
        sizes = (curve.gradient_bytes,) * 2 if phase == "W" else weight_bytes
        multiplied = max(0.0, measured - weight * sizes[0] * held_weights(reference))
        slower = 1.0
        if weight_bytes[1] > weight_bytes[0]:
            slower = self.rates.bf16_over_fp8 / self.rates.formats.speed(self.config.plan.products)
        work = curve.work(products, phase) / curve.work(reference, phase)
        moved = weight * sizes[1] * held_weights(products) * self.device.memory
        return multiplied * work * slower * self.tokens * self.device.products + moved

    @property
    def _residual_again(self) -> float:
        """Seconds in which a recomputed layer computes the residual after attention; in FP8 it is kept."""
        if self.config.precision.kind == "fp8":
            return 0.0
        model = self.config.model
        projection = products_of([(model.hidden_size, model.num_heads * model.value_head_dim)], self.rows)
        return self._forward_products(self.rates.attention, projection, self.rates.reference.attention)

    def _forward_products(self, passes: PassTimes, products: Products, reference: Products) -> float:
        """Returns the seconds of matrix products in a forward."""
        return self._multiply(passes.forward.products, products, reference, "F", self._weight_bytes)

    def _with_layer(self, part: PartTimes, again: float) -> PartTimes:
        """Returns the times with `again` seconds of recomputation if the backward recomputes layers."""
        if LAYER not in self.config.computing.recomputed:
            return part
        return replace(part, backward_input=part.backward_input + again)

    def _without_recomputation(self, part: PartTimes, names: tuple[str, ...]) -> PartTimes:
        """Returns the times without outputs that the run keeps. A run in FP8 recomputes all of them."""
        if self.config.precision.kind == "fp8":
            return part
        recomputed = self.config.computing.recomputed
        unneeded = sum(getattr(self.rates.recomputed, name) for name in names if name not in recomputed)
        saved = unneeded * self.tokens * self.width * self.device.memory
        return replace(part, backward_input=max(0.0, part.backward_input - saved))


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsPerToken:
    """Mean number of rows that one dispatch sends for a token; forwarded rows count within the node."""

    across_nodes: float
    within_node: float


def rows_per_token(config: TrainConfig) -> RowsPerToken:
    """Returns the rows of a run's dispatcher for random scores."""
    model = config.model
    expert = config.parallelism.expert
    if expert == 1 or model.num_dense_layers == model.num_layers:
        return RowsPerToken(across_nodes=0.0, within_node=0.0)
    choices = (
        *(model.num_routed_experts, model.num_experts_per_token),
        *(model.num_expert_groups, model.num_limited_groups, model.num_group_scores),
    )
    sends_once = config.dispatch.kind in ("two_hop", "deepep")
    return _count_rows(choices, expert, config.cluster.ranks_per_node, sends_once=sends_once)


@lru_cache(maxsize=1024)
def _count_rows(choices: tuple[int, ...], num_ranks: int, ranks_per_node: int, *, sends_once: bool) -> RowsPerToken:
    """Routes random tokens and counts their rows."""
    tokens = numpy.arange(_TOKENS)
    rank_TK = _route(*choices) // (choices[0] // num_ranks)
    home_T = tokens % num_ranks
    node_R = numpy.arange(num_ranks) // ranks_per_node
    if not sends_once:
        away = node_R[rank_TK] != node_R[home_T][:, None]
        near = ~away & (rank_TK != home_T[:, None])
    else:
        # `near` [T, R] is True if a token has experts on a rank, `away` [T, N] if it has some on another node.
        near = numpy.zeros((_TOKENS, num_ranks), dtype=bool)
        numpy.put_along_axis(near, rank_TK, values=True, axis=1)
        num_nodes = node_R[-1] + 1
        away = numpy.stack([near[:, node_R == node].any(1) for node in range(num_nodes)], axis=1)
        away[tokens, node_R[home_T]] = False
        # A token reaches each node at the rank with the index of its home rank, and is forwarded to the others.
        entries_TN = numpy.arange(num_nodes) * ranks_per_node + (home_T % ranks_per_node)[:, None]
        near[tokens[:, None], numpy.minimum(entries_TN, num_ranks - 1)] = False
    return RowsPerToken(across_nodes=float(away.sum(1).mean()), within_node=float(near.sum(1).mean()))


def _route(num_experts: int, num_chosen: int, num_groups: int, num_kept: int, num_scores: int) -> NDArray[numpy.int64]:
    """Returns the experts of random tokens under the router's limit of groups."""
    scores_TE = 1 / (1 + numpy.exp(-numpy.random.default_rng(_SEED).standard_normal((_TOKENS, num_experts))))
    if num_kept < num_groups:
        # A group's score is the sum of its best experts (arXiv:2412.19437, section 2.1.2).
        by_group = scores_TE.reshape(_TOKENS, num_groups, -1)
        sums = numpy.sort(by_group, axis=2)[:, :, -num_scores:].sum(2)
        dropped = numpy.argsort(sums, axis=1)[:, : num_groups - num_kept]
        numpy.put_along_axis(by_group, dropped[:, :, None], values=-1.0, axis=1)
    chosen = numpy.argpartition(scores_TE, num_experts - num_chosen, axis=1)[:, num_experts - num_chosen :]
    return chosen.astype(numpy.int64)
